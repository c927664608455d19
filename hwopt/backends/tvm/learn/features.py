"""What a predictor sees of a kernel: a prior from counted work, and what makes kernels slower or faster than that.

The prior is analytical: the cycles of the tiles that the templates would choose, elements and bytes. The predictor learns
log(measured / prior), so that far from anything measured it says what the counted work says.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hwopt.backends.tvm.learn.tiles import tile_of
from hwopt.target import MicroKernel, Workload

if TYPE_CHECKING:  # the templates import TVM; listing targets must not
    from hwopt.backends.tvm.kernels.spec import ConvSpec, MatmulSpec

HERTZ = 4e9  # of nothing in particular: a factor that the predictor learns away
BYTES_PER_SECOND = 3e10
CALL_SECONDS = 5e-8
SERIAL_MACS = 200_000  # below it kernels run on one thread (kernels/schedule.py)
KINDS = ("conv", "depthwise", "matmul", "pool", "elementwise", "reduce", "move")
STEPS = ("Add", "Mul", "Relu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Gelu", "Softmax", "LayerNormalization",
         "GlobalAveragePool", "MaxPool", "AveragePool", "Transpose", "QuantizeLinear", "DequantizeLinear", "Cast", "Div",
         "Resize", "Concat", "Slice", "Gather", "Erf", "Sub", "Pow", "Sqrt", "ReduceMean")  # fmt: skip
TRANSCENDENTAL = ("Sigmoid", "Gelu", "Erf", "Tanh", "Exp", "Softmax")
NAMES = (
    "kind", "dtype", "threads", "log_prior", "log_macs", "log_bytes", "log_weights", "log_read", "log_write", "log_elements",
    "m", "n", "k", "groups", "taps", "stride", "dilation", "padded", "height", "width", "out_width", "tile_rows", "tile_columns",
    "vectors", "word_steps", "lanes", "cycles_per_word", "lanes_used", "columns_left", "vectors_left", "k_left", "share_compute",
    "share_bytes", "steps", "transcendental", "out_bytes_each", "elements_per_byte", "anchor", "rank", "last", "rows",
    "moves_last", "computed", "channels", "channels_aligned", "last_aligned", "n_aligned", "k_aligned", "groups_aligned",
    "pixels", "read_per_write", "read_per_element", "bytes_per_row", *(f"step_{one}" for one in STEPS),
)  # fmt: skip
Micros = Mapping[str, MicroKernel]


@functools.lru_cache(maxsize=8192)
def _described(work: Workload, micros: tuple[tuple[str, MicroKernel], ...], threads: int) -> tuple[float, tuple[float, ...]]:
    micro = dict(micros).get("float32" if work.kind == "depthwise" and work.dtype == "bfloat16" else work.dtype)
    cycles: float = 0.0
    tile: tuple[float, ...] = (0.0,) * 10
    if micro is not None and work.kind in ("conv", "depthwise", "matmul"):
        cycles, tile = _blocking(work, micro, threads)
    parallel = threads if work.macs >= SERIAL_MACS else 1
    compute = cycles / HERTZ / parallel
    lanes = micro.lanes if micro else 4
    steps = work.elements / (lanes * HERTZ / 4) / threads
    moved = work.bytes / BYTES_PER_SECOND
    prior = compute + steps + moved + CALL_SECONDS
    window = work.window or (1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0)
    outputs = max(1, work.m * work.n * work.groups or work.elements)
    names = [step.partition(" ")[0] for step in work.steps]
    values = (
        float(KINDS.index(work.kind)) if work.kind in KINDS else -1.0,
        {"float32": 0.0, "int8": 1.0, "bfloat16": 2.0}.get(work.dtype, 3.0), float(threads), math.log(prior),
        *(math.log1p(one) for one in (
            work.macs, work.bytes, work.weight_bytes, work.read_bytes, work.write_bytes, work.elements, work.m, work.n, work.k,
            work.groups,
        )),
        float(work.taps), float(window[5] * window[6]), float(window[7] * window[8]), float(any(window[9:])),
        float(window[1]), float(window[2]), float(_out_width(window)), *tile,
        compute / prior, moved / prior, float(len(work.steps)), float(sum(one in TRANSCENDENTAL for one in names)),
        work.write_bytes / outputs, work.elements / max(1, work.bytes),
        float(STEPS.index(names[0])) if names and names[0] in STEPS else -1.0,
        float(len(work.dims)), math.log1p(work.dims[-1] if work.dims else 0), math.log1p(math.prod(work.dims[:-1])),
        _moves_last(work), float(work.kind == "matmul" and work.weight_bytes == 0),
        *_alignment(work),
        *(float(names.count(one)) for one in STEPS),
    )  # fmt: skip
    return prior, values


def described(work: Workload, micros: Micros, threads: int) -> tuple[float, tuple[float, ...]]:
    """The prior in seconds, and the features in the order of NAMES."""
    return _described(_nameless(work), tuple(sorted(micros.items())), threads)


def _nameless(work: Workload) -> Workload:
    return dataclasses.replace(work, name="", coded=None)


def _alignment(work: Workload) -> tuple[float, ...]:
    """Powers of two in what vectors run along: code for the remainders is slow."""
    channels = work.dims[1] if len(work.dims) >= 3 else work.dims[-1] if work.dims else 1
    last = work.dims[-1] if work.dims else 1
    powers = (float(math.gcd(size, 64)) if size else 0.0 for size in (channels, last, work.n, work.k, work.groups))
    pixels = math.prod(work.dims[2:]) if len(work.dims) > 2 else 1
    each = max(1, math.prod(work.dims))
    return (
        math.log1p(channels), *powers, math.log1p(pixels), math.log((work.read_bytes + 1) / (work.write_bytes + 1)),
        work.read_bytes / each, math.log1p(work.write_bytes / each * last),
    )  # fmt: skip


def _moves_last(work: Workload) -> float:
    """1 for a permutation that does not leave the last axis where it is: it moves single elements."""
    order = work.steps[0].partition(" ")[2] if work.steps and work.steps[0].startswith("Transpose ") else ""
    return float(bool(order) and order.split(",")[-1] != str(len(order.split(",")) - 1))


def _out_width(window: tuple[int, ...]) -> int:
    return (window[2] + window[10] + window[12] - (window[4] - 1) * window[8] - 1) // max(1, window[6]) + 1


def _blocking(work: Workload, micro: MicroKernel, threads: int) -> tuple[float, tuple[float, ...]]:
    """Cycles of the default schedule's tiles, and its shape: rows, columns, vectors, unroll, tasks and what does not divide."""
    from hwopt.backends.tvm.kernels import suited
    from hwopt.backends.tvm.kernels.geometry import geometry
    from hwopt.backends.tvm.kernels.spec import ConvSpec

    spec = spec_of(work, micro)
    micro = suited(spec, micro)
    if work.kind == "depthwise" and isinstance(spec, ConvSpec):
        return _depthwise(spec, micro, threads)
    shape = geometry(spec)
    steps, vectors = shape.taps[0] * shape.taps[1] * shape.words(micro.depth), shape.vectors(micro.lanes)
    each, tile = tile_of(shape.rows, shape.columns, shape.n, steps, micro)
    total = shape.images * shape.groups * each
    return total, _shape(tile, (shape.rows, shape.columns, vectors), steps, total, work.n, work.k, micro)


def _depthwise(spec: ConvSpec, micro: MicroKernel, threads: int) -> tuple[float, tuple[float, ...]]:
    from hwopt.backends.tvm.kernels.depthwise import _row_cost, default_schedule

    plan, vectors = default_schedule(spec, micro, threads), -(-spec.in_channels // micro.lanes)
    total = spec.batch * spec.out_height * _row_cost(spec, plan.tile_columns) * vectors / micro.depth
    steps = -(-spec.kernel[0] // micro.depth) * spec.kernel[1]
    sizes = (spec.out_height, spec.out_width, vectors)
    return total, _shape((1, plan.tile_columns, 1), sizes, steps, total, spec.in_channels, spec.kernel[0], micro)


def _shape(
    tile: tuple[int, int, int], sizes: tuple[int, int, int], steps: int, total: float, channels: int, depth: int,
    micro: MicroKernel,
) -> tuple[float, ...]:  # fmt: skip
    rows, columns, vectors = sizes
    products = max(1.0, float(rows * columns * vectors * steps))
    found = (
        *tile, steps, micro.lanes, total / products, channels / max(1, vectors * micro.lanes),
        (columns % tile[1]) / tile[1], (vectors % tile[2]) / tile[2], depth % micro.depth,
    )  # fmt: skip
    return tuple(float(one) for one in found)


def spec_of(work: Workload, micro: MicroKernel) -> ConvSpec | MatmulSpec:
    """The template's request behind the work, without its epilogue; a matmul where there is no window."""
    from hwopt.backends.tvm.kernels.spec import ConvSpec, MatmulSpec

    wide = work.kind == "depthwise" and micro.dtype == "float32"
    data, weights, out = ("float32",) * 3 if wide else (micro.activation or "float32", micro.dtype, micro.accumulator)
    if not work.window:
        batch = work.groups if work.kind == "matmul" else 1
        m, n, k = (max(1, one) for one in (work.m, work.n, work.k))
        return MatmulSpec(batch, m, n, k, constant=batch == 1, data_dtype=data, weight_dtype=weights, out_dtype=out)
    batch, height, width, down, across, *rest = work.window
    return ConvSpec(
        batch, height, width, work.k // work.taps * work.groups, work.n * work.groups, (down, across), (rest[0], rest[1]),
        (rest[2], rest[3]), (rest[4], rest[5], rest[6], rest[7]), work.groups, data, weights, out,
    )  # fmt: skip
