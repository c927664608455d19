"""Portable x86-64 targets: a microarchitecture level of the System V psABI, priced as a core of the time when it was usual.

Where a table of kernels measured with exactly these instructions ships, it gives the prices. Neither depends on the machine that
builds, so that the same inputs give the same decisions everywhere.
"""

from __future__ import annotations

import platform

from hwopt.target import Memory, Target
from targets import _isa_x86
from targets._cpu import cpu_features, needed_features, operations_per_cycle
from targets._learned import shipped
from targets._roofline import Roofline

FLAGS = {  # what /proc/cpuinfo shows of it, as far as the micro-kernels ask
    "x86-64-v2": ("sse4_2", "ssse3", "popcnt"),
    "x86-64-v3": ("sse4_2", "ssse3", "popcnt", "avx2", "fma"),
    "x86-64-v4": ("sse4_2", "ssse3", "popcnt", "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq"),
}


def level(name: str, processor: str, hertz: float, memories: tuple[Memory, ...]) -> Target:
    """The target called after a level; `processor` says whose clock and caches its analytical prices are for."""
    features = frozenset(FLAGS[name])
    kernels, llvm = _isa_x86.microkernels(features), _isa_x86.llvm(features)
    needed = needed_features(llvm)
    peak = {dtype: operations_per_cycle(kernel) * hertz for dtype, kernel in kernels.items()}
    granule = {dtype: kernel.lanes for dtype, kernel in kernels.items()}
    here = platform.machine() in ("x86_64", "AMD64") and set(needed) <= cpu_features()
    model = Roofline(
        peak=peak,
        elements_per_second=granule["float32"] * hertz / 4,
        memories=memories,
        granule=granule,
        depth={dtype: kernel.depth for dtype, kernel in kernels.items()},
        efficiency={"conv": 0.7, "matmul": 0.7, "depthwise": 0.3},
        launch_seconds=0.5e-6,
        joules_per_op={"float32": 30e-12, "int8": 15e-12},  # about 5 W a core over the peaks
        micros=kernels,
    )
    return Target(
        name=name,
        summary=f"any {name} processor, priced as {processor}",
        kind="cpu",
        cores=1,  # nobody knows how many it will be: a program may ask for more threads when it runs
        peak=peak,
        memories=memories,
        granule=granule,
        cost=shipped(model, kernels, llvm, hertz),
        tvm=llvm,
        microkernels=kernels,
        features=needed,
        runs_here=here,
    )
