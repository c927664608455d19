"""The machine this runs on: instruction set, cores and caches read from the system."""

from __future__ import annotations

import functools
import platform

import psutil

from hwopt.emit.cpu import host_machine
from hwopt.target import MicroKernel, Target
from targets import _isa_arm, _isa_arm32, _isa_riscv, _isa_x86
from targets._cpu import cpu_features, cpu_hertz, cpu_memories, needed_features, operations_per_cycle
from targets._learned import learned
from targets._tiles import is_tile, priced

JOULES_PER_OP = {"float32": 12e-12, "bfloat16": 6e-12, "int8": 3e-12}  # about 5 W a core over AVX-512 peaks


@functools.cache
def TARGET() -> Target:
    """Detects this machine; works on any processor, with plain vector code where nothing better is known."""
    features = cpu_features()
    isa = {"aarch64": _isa_arm, "arm": _isa_arm32, "riscv": _isa_riscv}.get(host_machine(), _isa_x86)
    kernels: dict[str, MicroKernel] = isa.microkernels(features)
    llvm: dict[str, object] = isa.llvm(features)
    hertz, memories = cpu_hertz(), cpu_memories(cpu_hertz())
    peak = {dtype: operations_per_cycle(kernel) * hertz for dtype, kernel in kernels.items()}
    granule = {dtype: kernel.lanes for dtype, kernel in kernels.items()}
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return Target(
        name="host",
        summary=f"this machine: {platform.machine()}, {cores} cores, {', '.join(_kind(k) for k in kernels.values())}",
        kind="cpu",
        cores=cores,
        peak=peak,
        memories=memories,
        granule=granule,
        cost=learned(priced(kernels, memories, hertz, JOULES_PER_OP), kernels, llvm, hertz),
        tvm=llvm,
        microkernels=kernels,
        features=needed_features(llvm),
        runs_here=True,
    )


def _kind(kernel: MicroKernel) -> str:
    parts = kernel.intrinsic.split(".")
    return f"{kernel.dtype} x {kernel.lanes}" + (f" ({parts[-1 if is_tile(kernel) else -2]})" if len(parts) > 1 else "")
