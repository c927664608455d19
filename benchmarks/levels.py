"""Suite `levels`: every instruction set that this processor has, on ResNet-18's layers: the share of that instruction's own peak.

The other runtimes take the best instructions there are, so that nobody compares at the lower levels. Peak (a loop on registers)
and kernel take turns in one process; the best turn of each counts. Operands are in the cache, the epilogue is none.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.layout import Row, result
from benchmarks.models import geometric_mean
from benchmarks.peak import loop, operations
from hwopt.backends.tvm import kernels
from hwopt.backends.tvm.build import object_code
from hwopt.backends.tvm.kernels.spec import ConvSpec
from hwopt.backends.tvm.run import load_objects
from hwopt.emit.cpu import host_features, host_machine
from hwopt.plugins import find_target
from hwopt.target import MicroKernel, Target
from targets import _isa_arm, _isa_x86

V3 = frozenset({"avx2", "fma"})
V4 = V3 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
X86 = {
    "sse": frozenset({"sse4_2", "ssse3", "popcnt"}), "avx2": V3, "avx-vnni": V3 | {"avx_vnni"}, "avx512": V4,
    "avx512-vnni": V4 | {"avx512_vnni"},
}  # fmt: skip
ARM = {"neon": frozenset(), "dotprod": frozenset({"asimddp"}), "i8mm": frozenset({"asimddp", "i8mm"})}
LAYERS = {
    "3x3 64 56x56": ConvSpec(1, 56, 56, 64, 64, (3, 3), pads=(1, 1, 1, 1)),
    "3x3 128 28x28": ConvSpec(1, 28, 28, 128, 128, (3, 3), pads=(1, 1, 1, 1)),
    "3x3/2 128>256 28x28": ConvSpec(1, 28, 28, 128, 256, (3, 3), strides=(2, 2), pads=(1, 1, 1, 1)),
    "3x3 256 14x14": ConvSpec(1, 14, 14, 256, 256, (3, 3), pads=(1, 1, 1, 1)),
    "1x1/2 256>512 14x14": ConvSpec(1, 14, 14, 256, 512, (1, 1), strides=(2, 2)),
}
TURNS = 30


def run(quick: bool = False) -> dict[str, Any]:
    """Shares of the peak by level and dtype, one thread."""
    rows: list[Row] = []
    shares: dict[str, list[float]] = {}
    for level, target in levels().items():
        for dtype in ("float32", "int8"):
            for name, spec in list(LAYERS.items())[: 2 if quick else None]:
                share = share_of_peak(spec, target.microkernels[dtype], target, TURNS // 5 if quick else TURNS)
                rows.append(Row(f"{level} {dtype} {name}", "share of the peak", "", share, {}, None))
                shares.setdefault(f"{level.replace('-', '_')}_{dtype}_peak_share", []).append(share)
    return result("levels", rows, {name: geometric_mean(values) for name, values in shares.items()})


def levels() -> dict[str, Target]:
    """The instruction sets that this processor can execute."""
    known: Mapping[str, frozenset[str]] = {"x86_64": X86, "aarch64": ARM}.get(host_machine(), {})
    isa: Any = _isa_x86 if host_machine() == "x86_64" else _isa_arm
    host = find_target("host")
    return {
        name: dataclasses.replace(host, name=name, microkernels=isa.microkernels(flags), tvm=isa.llvm(flags))
        for name, flags in known.items()
        if flags <= host_features()
    }


def share_of_peak(spec: ConvSpec, micro: MicroKernel, target: Target, turns: int) -> float:
    """Operations a second of the kernel's best turn over those of the peak's."""
    kinds = {"data_dtype": micro.activation, "weight_dtype": micro.dtype, "out_dtype": micro.accumulator}
    spec = dataclasses.replace(spec, **kinds)
    kernel, peak = timer(spec, micro, target), loop(micro, target)
    pairs = [(kernel(), peak()) for _ in range(turns)]
    best, least = (min(times) for times in zip(*pairs, strict=True))
    return (2 * spec.macs / best) / (operations(micro) / least)


def timer(spec: ConvSpec, micro: MicroKernel, target: Target) -> Callable[[], float]:
    """The kernel, compiled: a call runs it once and returns its seconds."""
    import tvm

    function = kernels.build(spec, kernels.default_schedule(spec, micro), micro, "kernel")
    library: Any = load_objects((object_code({"kernel": function}, target.tvm, target.name),))
    weights = np.ones((spec.out_channels, spec.in_channels // spec.groups, *spec.kernel), spec.weight_dtype)
    arrays = (
        np.ones(spec.batch * spec.height * spec.width * spec.in_channels, spec.data_dtype),
        kernels.pack(spec, weights, micro),
        np.zeros(spec.batch * spec.out_height * spec.out_width * spec.out_channels, spec.out_dtype),
    )
    arguments = [tvm.runtime.tensor(array) for array in arrays]

    def once() -> float:
        started = time.perf_counter()
        library["kernel"](*arguments)
        return time.perf_counter() - started

    return once
