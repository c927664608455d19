"""The machine this runs on: instruction set, cores and caches read from the system."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping

import psutil

from hwopt.emit.cpu import host_machine
from hwopt.target import CostModel, Memory, MicroKernel, Target
from targets import _isa_arm, _isa_arm32, _isa_riscv, _isa_x86
from targets._cpu import cpu_features, cpu_hertz, cpu_memories, needed_features, operations_per_cycle
from targets._roofline import Roofline
from targets._tiles import TilesOrVectors, is_tile

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
        cost=_cost(kernels, memories, hertz),
        tvm=llvm,
        microkernels=kernels,
        features=needed_features(llvm),
        runs_here=True,
    )


def _kind(kernel: MicroKernel) -> str:
    parts = kernel.intrinsic.split(".")
    return f"{kernel.dtype} x {kernel.lanes}" + (f" ({parts[-1 if is_tile(kernel) else -2]})" if len(parts) > 1 else "")


def _cost(kernels: Mapping[str, MicroKernel], memories: tuple[Memory, ...], hertz: float) -> CostModel:
    """Of the vector instructions, or, where there are tiles, of what is faster."""
    vectors = {dtype: kernel.others[-1] if is_tile(kernel) else kernel for dtype, kernel in kernels.items()}
    model = _roofline(vectors, memories, hertz)
    return model if vectors == kernels else TilesOrVectors(_roofline(kernels, memories, hertz), model)


def _roofline(kernels: Mapping[str, MicroKernel], memories: tuple[Memory, ...], hertz: float) -> Roofline:
    tiles = any(is_tile(kernel) for kernel in kernels.values())
    share = 0.55 if tiles else 0.7
    return Roofline(
        peak={dtype: operations_per_cycle(kernel) * hertz for dtype, kernel in kernels.items()},
        elements_per_second=kernels["float32"].lanes * hertz / 4,  # an epilogue step: about four vector instructions
        memories=memories,
        granule={dtype: kernel.lanes for dtype, kernel in kernels.items()},
        depth={dtype: kernel.depth for dtype, kernel in kernels.items()},
        rows=16 if tiles else 1,
        efficiency={"conv": share, "matmul": share, "depthwise": 0.3},
        launch_seconds=0.5e-6,
        joules_per_op=JOULES_PER_OP,
    )
