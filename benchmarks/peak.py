"""What this machine can do at most, measured: operations per second of one core, by dtype, and memory bandwidth.

The micro-kernel of the target runs on registers only: independent accumulators hide its latency.
"""

from __future__ import annotations

import time
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
    import tvm

    if is_tile(micro):
        return amx.operations_per_second(micro, target)
    library: Any = load_objects((object_code({"peak": peak_kernel(micro)}, target.tvm, target.name),))
    count, size = accumulators(micro), micro.lanes * micro.depth
    arrays = (
        np.ones(PERIOD * micro.depth, micro.activation or micro.dtype),
        np.ones(count * size, micro.dtype),
        np.zeros(count * micro.lanes, micro.accumulator),
    )
    arguments = [tvm.runtime.tensor(array) for array in arrays]
    best = float("inf")
    for _ in range(TURNS):
        started = time.perf_counter()
        library["peak"](*arguments)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size * count * STEPS / best


def accumulators(micro: MicroKernel) -> int:
    """Enough to hide the latency of two instructions a cycle; with few registers the weights are read from the first cache."""
    return 12 if micro.registers >= 32 else 8


def peak_kernel(micro: MicroKernel) -> object:
    """out[a] += weights[a] * data[step], for all accumulators a and many steps."""
    from tvm import tirx

    from hwopt.backends.tvm.kernels.bfloat16 import library
    from hwopt.backends.tvm.kernels.bfloat16 import library
    from hwopt.backends.tvm.kernels.code import Code, Value, function, load
    from hwopt.backends.tvm.kernels.micro import accumulate, data_operand, weight_operand

    count, lanes, size = accumulators(micro), micro.lanes, micro.lanes * micro.depth
    kind = micro.activation or micro.dtype
    data = tirx.decl_buffer((PERIOD * micro.depth,), kind, "data")
    weights = tirx.decl_buffer((count * size,), micro.dtype, "weights")
    out = tirx.decl_buffer((count * lanes,), micro.accumulator, "out")
    code = Code()
    totals = code.alloc("totals", count * lanes, micro.accumulator)
    operands = [weight_operand(code, micro, weights, which * size) for which in range(count)]
    for which in range(count):
        code.store(totals, which * lanes, load(out, which * lanes, lanes), lanes)

    def step(inner: Code, number: Value) -> None:
        value = data_operand(inner, micro, data, tirx.Mod(number, PERIOD) * micro.depth, kind, micro.depth)
        for which, weight in enumerate(operands):
            added = accumulate(micro, load(totals, which * lanes, lanes), value, weight)
            inner.store(totals, which * lanes, added, lanes)

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
