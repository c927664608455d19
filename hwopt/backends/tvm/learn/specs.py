"""A workload as the request that the templates get, without its epilogue: what schedules are chosen by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hwopt.target import MicroKernel, Workload

if TYPE_CHECKING:  # the templates import TVM; listing targets must not
    from hwopt.backends.tvm.kernels.spec import ConvSpec, MatmulSpec


def spec_of(work: Workload, micro: MicroKernel) -> ConvSpec | MatmulSpec:
    """The template's request behind the work, without its epilogue; a matmul where there is no window."""
    from hwopt.backends.tvm.kernels.spec import ConvSpec, MatmulSpec

    wide = work.kind == "depthwise" and micro.dtype == "float32"
    data, weights, out = ("float32",) * 3 if wide else (micro.activation or "float32", micro.dtype, micro.accumulator)
    narrow = min(work.narrow, micro.narrow)
    if not work.window:
        batch = work.groups if work.kind == "matmul" else 1
        m, n, k = (max(1, one) for one in (work.m, work.n, work.k))
        return MatmulSpec(
            batch, m, n, k, constant=batch == 1, data_dtype=data, weight_dtype=weights, out_dtype=out, narrow=narrow
        )
    batch, height, width, down, across, *rest = work.window
    return ConvSpec(
        batch, height, width, work.k // work.taps * work.groups, work.n * work.groups, (down, across), (rest[0], rest[1]),
        (rest[2], rest[3]), (rest[4], rest[5], rest[6], rest[7]), work.groups, data, weights, out, narrow=narrow,
    )  # fmt: skip
