"""Which processor features a library needs, and the C code that asks for them before any kernel runs.

Names are those of /proc/cpuinfo. Bits: Intel SDM volume 2 (CPUID) and AMD APM volume 3; Linux uapi asm/hwcap.h for ARM.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterable
from pathlib import Path

from hwopt.errors import UnsupportedError, did_you_mean

# name -> (leaf, subleaf, register, bit)
X86 = {
    "pni": (1, 0, "c", 0), "ssse3": (1, 0, "c", 9), "fma": (1, 0, "c", 12), "sse4_1": (1, 0, "c", 19), "sse4_2": (1, 0, "c", 20),
    "movbe": (1, 0, "c", 22), "popcnt": (1, 0, "c", 23), "aes": (1, 0, "c", 25), "avx": (1, 0, "c", 28), "f16c": (1, 0, "c", 29),
    "sse": (1, 0, "d", 25), "sse2": (1, 0, "d", 26), "bmi1": (7, 0, "b", 3), "avx2": (7, 0, "b", 5), "bmi2": (7, 0, "b", 8),
    "avx512f": (7, 0, "b", 16), "avx512dq": (7, 0, "b", 17), "avx512ifma": (7, 0, "b", 21), "avx512cd": (7, 0, "b", 28),
    "avx512bw": (7, 0, "b", 30), "avx512vl": (7, 0, "b", 31), "avx512vbmi": (7, 0, "c", 1), "avx512_vbmi2": (7, 0, "c", 6),
    "gfni": (7, 0, "c", 8), "vaes": (7, 0, "c", 9), "avx512_vnni": (7, 0, "c", 11), "avx512_bitalg": (7, 0, "c", 12),
    "avx512_vpopcntdq": (7, 0, "c", 14), "amx_bf16": (7, 0, "d", 22), "avx512_fp16": (7, 0, "d", 23), "amx_tile": (7, 0, "d", 24),
    "amx_int8": (7, 0, "d", 25), "avx_vnni": (7, 1, "a", 4), "avx512_bf16": (7, 1, "a", 5), "amx_fp16": (7, 1, "a", 21),
    "avx_ifma": (7, 1, "a", 23), "avx_vnni_int8": (7, 1, "d", 4), "abm": (0x80000001, 0, "c", 5),
}  # fmt: skip
# name -> (hwcap word, bit)
AARCH64 = {
    "fp": (1, 0), "asimd": (1, 1), "aes": (1, 3), "crc32": (1, 7), "atomics": (1, 8), "fphp": (1, 9), "asimdhp": (1, 10),
    "asimdrdm": (1, 12), "asimddp": (1, 20), "sve": (1, 22), "asimdfhm": (1, 23), "sve2": (2, 1), "svei8mm": (2, 9),
    "i8mm": (2, 13), "bf16": (2, 14), "sme": (2, 23),
}  # fmt: skip
ARM = {
    "vfp": (1, 6),
    "neon": (1, 12),
    "vfpv3": (1, 13),
    "vfpv4": (1, 16),
    "asimdhp": (1, 23),
    "asimddp": (1, 24),
    "i8mm": (1, 27),
}
RISCV = {letter: (1, ord(letter) - ord("a")) for letter in "acdfimv"}

_HWCAP = {"aarch64": ("__aarch64__", AARCH64), "arm": ("__arm__", ARM), "riscv": ("__riscv", RISCV)}


def check_code(features: Iterable[str], machine: str, function: str = "supported") -> str:
    """C source of `static int <function>(void)`: 1 if the running processor has all of them, 0 if not.

    Raises UnsupportedError for a feature that nobody knows how to ask for: it must not be taken for granted.
    """
    wanted = sorted(set(features))
    known = X86 if machine in ("x86_64", "i386") else _HWCAP.get(machine, ("", {}))[1]
    for name in wanted:
        if name not in known:
            raise UnsupportedError(f"cannot ask a {machine or 'processor'} for {name!r}", hint=did_you_mean(name, known))
    if not wanted:
        return f"static int {function}(void) {{ return 1; }}\n"
    return _x86(wanted, function) if machine in ("x86_64", "i386") else _auxiliary(wanted, machine, function)


def _auxiliary(wanted: list[str], machine: str, function: str) -> str:
    macro, table = _HWCAP[machine]
    masks = {word: sum(1 << bit for name in wanted for at, bit in [table[name]] if at == word) for word in (1, 2)}
    tests = [
        f"(getauxval(AT_HWCAP{'' if word == 1 else '2'}) & {mask:#x}ul) == {mask:#x}ul" for word, mask in masks.items() if mask
    ]
    return f"""#if !defined({macro})
#error "the kernels are for {machine}"
#endif
#include <sys/auxv.h>
/* {" ".join(wanted)} */
static int {function}(void) {{ return {" && ".join(tests)}; }}
"""


def _x86(wanted: list[str], function: str) -> str:
    groups: dict[tuple[int, int], dict[str, int]] = {}
    for name in wanted:
        leaf, subleaf, register, bit = X86[name]
        masks = groups.setdefault((leaf, subleaf), {})
        masks[register] = masks.get(register, 0) | 1 << bit
    lines = []
    for (leaf, subleaf), masks in sorted(groups.items()):
        lines.append(f"  if (!__get_cpuid_count({leaf:#x}u, {subleaf}u, &a, &b, &c, &d)) return 0;\n")
        lines += [f"  if (({register} & {mask:#x}u) != {mask:#x}u) return 0;\n" for register, mask in sorted(masks.items())]
    state = _state(wanted)
    if state:
        lines.append("  if (!__get_cpuid_count(1u, 0u, &a, &b, &c, &d) || !(c & 0x8000000u)) return 0; /* xgetbv */\n")
        lines.append('  __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));\n')
        lines.append(f"  if ((a & {state:#x}u) != {state:#x}u) return 0; /* the system saves the wide registers */\n")
    tiles = any(name.startswith("amx") for name in wanted)
    head = "#include <cpuid.h>\n" + ("#include <sys/syscall.h>\n#include <unistd.h>\n" if tiles else "")
    if tiles:  # Linux hands out tile registers on request only: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)
        lines.append("  if (syscall(SYS_arch_prctl, 0x1023, 18)) return 0;\n")
    return f"""#if !defined(__x86_64__) && !defined(__i386__)
#error "the kernels are for x86"
#endif
{head}/* {" ".join(wanted)} */
static int {function}(void) {{
  unsigned a, b, c, d;
{"".join(lines)}  return 1;
}}
"""


def _state(wanted: list[str]) -> int:
    """The bits of XCR0 that must be set: registers that the operating system keeps across task switches."""
    bits = 0
    if any(name.startswith(("avx", "fma", "f16c", "vaes")) for name in wanted):
        bits |= 0x6
    if any(name.startswith("avx512") for name in wanted):
        bits |= 0xE6
    if any(name.startswith("amx") for name in wanted):
        bits |= 0x60000
    return bits


def request_tiles() -> bool:
    """Ask Linux for AMX's tile registers, for this process; False where there are none. What `supported` does in the library.

    arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA); Linux, Documentation/arch/x86/xstate.rst.
    """
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        return False
    return bool(ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0)


def host_machine() -> str:
    """This machine's processor family, in the words of elf.MACHINES."""
    name = platform.machine().lower()
    if name.startswith("armv"):
        return "aarch64" if name.startswith("armv8") else "arm"
    return {"amd64": "x86_64", "arm64": "aarch64", "riscv64": "riscv", "i686": "i386"}.get(name, name)


def host_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What this machine's processor can do, in the words of /proc/cpuinfo; empty where there is no such file."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    stated = {key.strip().lower(): value.split() for key, _, value in (line.partition(":") for line in reversed(lines))}
    if stated.get("isa"):  # RISC-V: rv64imafdc_zicsr, one letter for each of the first extensions
        return frozenset(stated["isa"][0].partition("_")[0][4:])
    return frozenset(stated.get("flags", stated.get("features", [])))
