"""Refuses what cannot become a C library: broken programs, and kernels that need more than libc, libm and our runtime."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from hwopt.emit.elf import Object, read_object
from hwopt.emit.memory import bytes_of, root_of
from hwopt.emit.program import Call, Program
from hwopt.errors import HwoptError, UnsupportedError, VerifyError
from hwopt.ir import numpy_dtype

PREFIX = "__tvm_ffi_"  # of a kernel's symbol in the packed calling convention

# DLPack type codes (dlpack.h): what a generated driver can describe to a kernel, with the C type of its data.
C_TYPES: Mapping[str, tuple[str, int, int]] = {
    "bool": ("uint8_t", 6, 8),
    "int8": ("int8_t", 0, 8),
    "int16": ("int16_t", 0, 16),
    "int32": ("int32_t", 0, 32),
    "int64": ("int64_t", 0, 64),
    "uint8": ("uint8_t", 1, 8),
    "uint16": ("uint16_t", 1, 16),
    "uint32": ("uint32_t", 1, 32),
    "uint64": ("uint64_t", 1, 64),
    "float16": ("uint16_t", 2, 16),
    "bfloat16": ("uint16_t", 4, 16),
    "float32": ("float", 2, 32),
    "float64": ("double", 2, 64),
}

_LIBC = "abort memcmp memcpy memmove memset"
_LIBM = (
    "acos acosh asin asinh atan atan2 atanh cbrt ceil copysign cos cosh erf erfc exp exp10 exp2 expm1 fabs floor fma fmax fmin "
    "fmod hypot ldexp lgamma log log10 log1p log2 nearbyint nextafter pow remainder rint round roundeven sin sincos sinh sqrt "
    "tan tanh tgamma trunc"
)
# libgcc / compiler-rt helpers that a C compiler links by itself: half floats, wide integers, 32-bit ARM.
_BUILTINS = (
    "__truncsfhf2 __truncdfhf2 __extendhfsf2 __truncsfbf2 __truncdfbf2 __gnu_h2f_ieee __gnu_f2h_ieee "
    "__divdi3 __udivdi3 __moddi3 __umoddi3 __divti3 __udivti3 __modti3 __umodti3 __multi3 __muldi3 __stack_chk_fail"
)
_RUNTIME = (
    "__TVMBackendAllocWorkspace __TVMBackendFreeWorkspace __TVMBackendParallelLaunch __TVMBackendParallelBarrier "
    "TVMFFIErrorSetRaisedFromCStrParts"
)
ALLOWED = frozenset(
    [*_LIBC.split(), *_BUILTINS.split(), *_RUNTIME.split(), "_GLOBAL_OFFSET_TABLE_"]
    + [name + suffix for name in _LIBM.split() for suffix in ("", "f")]
)


def check_program(program: Program) -> None:
    """Raise VerifyError for a program that means nothing, UnsupportedError for a dtype that C does not have."""
    problems = list(_problems(program))
    if problems:
        raise VerifyError("; ".join(problems), place=program.name)
    wrong = sorted({f"{name} is {b.dtype}" for name, b in program.buffers.items() if b.dtype not in C_TYPES})
    if wrong:
        raise UnsupportedError(f"no C type for {', '.join(wrong)}", place=program.name)


def _problems(program: Program) -> Iterator[str]:
    named = [name for call in program.calls for name in call.args] + [name for _, name in (*program.inputs, *program.outputs)]
    unknown = sorted({name for name in named if name not in program.buffers})
    unknown += sorted({b.alias for b in program.buffers.values() if b.alias and b.alias not in program.buffers})
    if unknown:
        yield f"no buffer {', '.join(unknown)}"
        return
    loops = [name for name in program.buffers if _circular(program, name)]
    if loops:
        yield f"alias of itself: {', '.join(loops)}"
        return
    for name, buffer in program.buffers.items():
        if buffer.alias and buffer.dtype in C_TYPES and bytes_of(buffer) != bytes_of(program.buffers[root_of(program, name)]):
            yield f"{name} is not as large as {buffer.alias}, of which it is a view"
        if buffer.kind == "constant" and not buffer.alias:
            yield from _constant(name, program)
    yield from _order(program)


def _circular(program: Program, name: str) -> bool:
    seen = set()
    while program.buffers[name].alias:
        if name in seen:
            return True
        seen.add(name)
        name = program.buffers[name].alias
    return False


def _constant(name: str, program: Program) -> Iterator[str]:
    buffer = program.buffers[name]
    if buffer.data is None:
        yield f"constant {name} has no data"
    elif buffer.data.shape != buffer.shape or buffer.data.dtype != numpy_dtype(buffer.dtype):
        yield f"constant {name} is {buffer.dtype}{list(buffer.shape)}, its data {buffer.data.dtype}{list(buffer.data.shape)}"


def _order(program: Program) -> Iterator[str]:
    """Every value is written before it is read, and neither inputs nor constants are written."""
    fixed = {root_of(program, name) for _, name in program.inputs}
    fixed |= {name for name, buffer in program.buffers.items() if buffer.kind in ("constant", "input")}
    written = set(fixed)
    for call in program.calls:
        roots = [root_of(program, name) for name in call.args]
        read, made = roots[: len(roots) - call.results], roots[len(roots) - call.results :]
        yield from (f"{call.symbol} reads {name} before it is written" for name in read if name not in written)
        yield from (f"{call.symbol} writes {name}, which is not its to write" for name in made if name in fixed)
        written.update(made)
    yield from (f"output {name} is never written" for name, b in program.outputs if root_of(program, b) not in written)


def check_objects(program: Program) -> str:
    """The machine that the kernels are for; raises UnsupportedError that names the operators whose kernels need more than C."""
    objects = [_read(program, data) for data in program.objects]
    defined = {name for found in objects for name in found.functions}
    missing = sorted({call.symbol for call in program.calls if kernel_symbol(call, defined) not in defined})
    if missing:
        raise VerifyError(f"no object defines {', '.join(missing)}", place=program.name)
    machines = sorted({found.machine for found in objects})
    if len(machines) > 1:
        raise VerifyError(f"kernels for different machines: {', '.join(machines)}", place=program.name)
    foreign = sorted({line for found in objects for line in _foreign(program, found, defined)})
    if foreign:
        raise UnsupportedError(
            "; ".join(foreign), place=program.name, hint="a library in plain C has none of this; the Relax VM does"
        )
    return machines[0] if machines else ""


def kernel_symbol(call: Call, defined: Iterable[str]) -> str:
    """The linker's name of a call's kernel."""
    return call.symbol if call.symbol in defined and call.symbol.startswith(PREFIX) else PREFIX + call.symbol


def _read(program: Program, data: bytes) -> Object:
    try:
        return read_object(data)
    except ValueError as error:
        raise HwoptError(f"a kernel object is {error}", place=program.name) from error


def _foreign(program: Program, found: Object, defined: set[str]) -> Iterator[str]:
    for symbol, users in sorted({**found.needs, **found.slots}.items()):
        known = symbol in ALLOWED or symbol in defined or symbol in program.provides
        if not known and not symbol.startswith("__aeabi_"):
            yield f"{_operators(program, users)} needs {symbol}"


def _operators(program: Program, functions: Iterable[str]) -> str:
    """The calls behind some functions of an object: a kernel's body is called like the kernel, with a suffix."""
    functions = tuple(functions)
    found: dict[str, None] = {}
    for call in program.calls:
        bare = call.symbol.removeprefix(PREFIX)
        if any(name.removeprefix(PREFIX) in (bare, bare + "_compute_") for name in functions):
            found[call.label or bare] = None
    return ", ".join(found) or ", ".join(functions) or "a kernel"
