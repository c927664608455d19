"""What this machine can do at most, measured: operations per second of one core, by dtype, and memory bandwidth.

The micro-kernel of the target runs on registers only: independent accumulators hide its latency.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import amx
from hwopt.backends.tvm.build import object_code
from hwopt.backends.tvm.kernels.amx_schedule import is_tile
from hwopt.backends.tvm.run import load_objects
from hwopt.target import MicroKernel, Target

PERIOD, STEPS, TURNS = 8, 100_000, 30
COPIED = 1 << 28  # bytes: more than any last-level cache that is shared by few cores


def peaks(target: Target) -> dict[str, float]:
    """Operations (2 per multiply-add) per second of one core by dtype, and `bytes_per_second` of a large copy."""
    found = {dtype: operations_per_second(micro, target) for dtype, micro in target.microkernels.items()}
    return found | {"bytes_per_second": bytes_per_second()}


def operations_per_second(micro: MicroKernel, target: Target) -> float:
    """The best of several turns."""
    run = loop(micro, target)
    best = min(run() for _ in range(TURNS))
    return operations(micro) / best


def operations(micro: MicroKernel) -> float:
    """Of one run of the loop."""
    if is_tile(micro):
        return amx.operations(micro)
    return 2.0 * micro.lanes * micro.depth * accumulators(micro) * STEPS


def loop(micro: MicroKernel, target: Target) -> Callable[[], float]:
    """The loop, compiled: a call runs it once and returns its seconds."""
    import tvm

    if is_tile(micro):
        return amx.loop(micro, target)
    library: Any = load_objects((object_code({"peak": peak_kernel(micro)}, target.tvm, target.name),))
    count, size = accumulators(micro), micro.lanes * micro.depth
    arrays = (
        np.ones(words(micro) * micro.depth, micro.activation or micro.dtype),
        np.ones(count * size, micro.dtype),
        np.zeros(count * micro.lanes, micro.accumulator),
    )
    arguments = [tvm.runtime.tensor(array) for array in arrays]

    def run() -> float:
        started = time.perf_counter()
        library["peak"](*arguments)
        return time.perf_counter() - started

    return run


def accumulators(micro: MicroKernel) -> int:
    """Enough to hide the latency of two instructions a cycle."""
    weights, words = tile(micro)
    return weights * words * micro.rows


def tile(micro: MicroKernel) -> tuple[int, int]:
    """(vectors of weights, words of data) whose products one step adds.

    Few registers hold 3 x 4 accumulators, 3 weights and a word. Where a product is added by an instruction of its own, words must
    also be widened: more weights for each, though then they are read from the first cache.
    """
    if not micro.intrinsic or "madd" in micro.intrinsic or "mull" in micro.intrinsic:
        return 10, 1
    return (12 // micro.rows, 1) if micro.registers >= 32 else (3, 4)


def words(micro: MicroKernel) -> int:
    """Words of data that the loop reads, over and over."""
    return PERIOD + tile(micro)[1]


def peak_kernel(micro: MicroKernel) -> object:
    """out[d, w] += weights[w] * data[step + d], for many steps; `rows` accumulators share a vector of weights."""
    from tvm import tirx

    from hwopt.backends.tvm.kernels.bfloat16 import library
    from hwopt.backends.tvm.kernels.code import Code, Value, function, load
    from hwopt.backends.tvm.kernels.micro import accumulate_block, data_block, weight_operand

    count, lanes, size = accumulators(micro), micro.lanes, micro.lanes * micro.depth
    kind = micro.activation or micro.dtype
    data = tirx.decl_buffer((words(micro) * micro.depth,), kind, "data")
    weights = tirx.decl_buffer((count * size,), micro.dtype, "weights")
    out = tirx.decl_buffer((count * lanes,), micro.accumulator, "out")
    code = Code()
    totals = code.alloc("totals", count * lanes, micro.accumulator)
    operands = [weight_operand(code, micro, weights, which * size) for which in range(tile(micro)[0])]
    for which in range(count):
        code.store(totals, which * lanes, load(out, which * lanes, lanes), lanes)

    def step(inner: Code, number: Value) -> None:
        for word in range(tile(micro)[1]):
            index = (tirx.Mod(number, PERIOD) + word) * micro.depth
            value = data_block(inner, micro, data, [index] * micro.rows, kind, micro.depth)
            for group, weight in enumerate(operands, word * len(operands)):
                places = [(group * micro.rows + row) * lanes for row in range(micro.rows)]
                added = accumulate_block(micro, [load(totals, place, lanes) for place in places], value, weight)
                for place, total in zip(places, added, strict=True):
                    inner.store(totals, place, total, lanes)

    code.loop("step", STEPS, step)
    for which in range(count):
        code.store(out, which * lanes, load(totals, which * lanes, lanes), lanes)
    return function("peak", [data, weights, out], code, library(micro))


def bytes_per_second() -> float:
    """Read and written bytes of copying a large array with one core, the best of five."""
    source, target = np.ones(COPIED, np.uint8), np.ones(COPIED, np.uint8)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - started)
    return 2 * COPIED / best
