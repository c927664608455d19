"""What a processor can do and what of it this machine shows: instruction sets, clock and caches from the system."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import psutil

from hwopt.emit.cpu import request_tiles
from hwopt.target import Memory, MicroKernel, Target
from targets._roofline import Roofline

DRAM_BYTES_PER_SECOND = 12e9  # one core of a current server or desktop reading main memory; measured tables replace it
CACHE_BYTES_PER_CYCLE = (64, 32, 12)  # first, second, third level, of one core; from the vendors' optimization guides
FALLBACK_HERTZ = 2.5e9

CPUINFO_NAMES = {
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
    "avxvnni": "avx_vnni",
    "amx-tile": "amx_tile",
    "amx-int8": "amx_int8",
    "amx-bf16": "amx_bf16",
    "neon": "asimd",
    "dotprod": "asimddp",
}
CPUINFO_NAMES_ARM32 = {"vfp4": "vfpv4"}
_V2 = ("sse4_1", "sse4_2", "ssse3", "popcnt")
_V3 = (*_V2, "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe")
LEVELS = {  # System V psABI, x86-64 microarchitecture levels
    "x86-64-v2": _V2,
    "x86-64-v3": _V3,
    "x86-64-v4": (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
}


def operations_per_cycle(kernel: MicroKernel) -> float:
    """Of one core: two vector instructions a cycle, half of that where a product needs a second instruction to be added.

    A product of tiles takes 16 cycles (Intel, "Optimization reference manual", chapter "Intel AMX").
    """
    if kernel.narrow:  # what other weights get
        return operations_per_cycle(kernel.others[0])
    products = kernel.lanes * kernel.depth * 2
    if ".tdp" in kernel.intrinsic:
        return products * kernel.rows / 16
    return float(products if "pmadd" in kernel.intrinsic or "smull" in kernel.intrinsic else 2 * products)


def needed_features(llvm: Mapping[str, object]) -> tuple[str, ...]:
    """What /proc/cpuinfo must show for code that LLVM compiled for this target."""
    attributes = (str(name).removeprefix("+") for name in cast(list, llvm.get("mattr", [])))
    known = CPUINFO_NAMES_ARM32 if str(llvm["mtriple"]).startswith("arm") else CPUINFO_NAMES
    names = {known.get(name, name) for name in attributes} | set(LEVELS.get(str(llvm["mcpu"]), ()))
    return tuple(sorted(names))


def roofline_cpu(
    name: str, summary: str, cores: int, peak: Mapping[str, float], memories: tuple[Memory, ...],
    isa: tuple[Mapping[str, Any], Mapping[str, MicroKernel]], **cost: Any,
) -> Target:  # fmt: skip
    """A CPU that is priced from data sheets; `isa` is TVM's target and the micro-kernels, `cost` the other fields of Roofline."""
    tvm, kernels = isa
    granule = {dtype: kernel.lanes for dtype, kernel in kernels.items()}
    return Target(
        name=name, summary=summary, kind="cpu", cores=cores, peak=peak, memories=memories, granule=granule,
        cost=Roofline(peak=peak, memories=memories, granule=granule, micros=kernels, **cost), tvm=tvm, microkernels=kernels,
        features=needed_features(tvm),
    )  # fmt: skip


def cpu_features() -> frozenset[str]:
    """Flags of the first processor in /proc/cpuinfo; none where the system has no such file.

    Those of AMX only if Linux lets this process use tiles.
    """
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    found = frozenset(flags.partition(":")[2].split())
    tiles = {name for name in found if name.startswith("amx")}
    return found if not tiles or request_tiles() else found - tiles


def cpu_hertz() -> float:
    """The highest clock the system states."""
    found = psutil.cpu_freq()
    stated = (found.max or found.current) if found else 0.0
    return stated * 1e6 or FALLBACK_HERTZ


def cpu_memories(hertz: float) -> tuple[Memory, ...]:
    """Data caches of the first core as sysfs states them, and main memory."""
    sizes: dict[int, int] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (index / "type").read_text().strip() != "Instruction":
            sizes[int((index / "level").read_text())] = _size((index / "size").read_text().strip())
    sizes = sizes or {1: 32 << 10, 2: 1 << 20}
    caches = [
        Memory(f"l{level}", sizes[level], per_cycle * hertz, joules)
        for level, per_cycle, joules in zip(sorted(sizes), CACHE_BYTES_PER_CYCLE, (1e-12, 5e-12, 15e-12), strict=False)
    ]
    return (*caches, Memory("dram", psutil.virtual_memory().total, DRAM_BYTES_PER_SECOND, 100e-12))


def _size(text: str) -> int:
    """Sysfs writes 48K and 2M."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)
