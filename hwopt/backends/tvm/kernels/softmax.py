"""Softmax of scaled values over the last axis.

One pass finds the largest value, one makes the exponentials and their sum, one divides.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx

from hwopt.backends.tvm.kernels.code import Code, Value, function, load, pieces, splat
from hwopt.backends.tvm.kernels.functions import Maths
from hwopt.backends.tvm.kernels.micro import fused_multiply_add
from hwopt.target import MicroKernel

SERIAL_ELEMENTS = 16384  # below this a parallel launch costs more than it gains


def build(rows: int, size: int, micro: MicroKernel, threads: int, symbol: str) -> tirx.PrimFunc:
    """PrimFunc(data, scale [1], out) on float32 [rows, size]: softmax(data * scale).

    A row of nothing but -inf, or with a NaN, becomes NaN.
    """
    data, out = (tirx.decl_buffer((rows * size,), "float32", name) for name in ("data", "out"))
    scales = tirx.decl_buffer((1,), "float32", "scale")
    lanes, code = micro.lanes, Code()
    fused = fused_multiply_add(micro)
    scale = code.bind("scale", load(scales, 0))

    def row(inner: Code, number: Value) -> None:
        base = number * size

        def scaled(_: Code, at: Value, width: int) -> Value:
            return load(data, base + at, width) * splat(scale, width)

        largest = _reduced(inner, size, lanes, tirx.Max, -float("inf"), scaled)

        def exponential(some: Code, at: Value, width: int) -> Value:
            found = Maths(some, width, fused).exp(scaled(some, at, width) - splat(largest, width))
            some.store(out, base + at, found, width)
            return found

        total = _reduced(inner, size, lanes, tirx.Add, 0.0, exponential)
        factor = inner.bind("factor", tirx.Div(tirx.const(1.0, "float32"), total))

        def divide(some: Code, at: Value, width: int) -> None:
            some.store(out, base + at, load(out, base + at, width) * splat(factor, width), width)

        inner.loop("part", size // lanes, lambda some, part: divide(some, part * lanes, lanes))
        for offset, width in pieces(size % lanes, lanes):
            divide(inner, size - size % lanes + offset, width)

    code.loop("row", rows, row, parallel=threads > 1 and rows * size >= SERIAL_ELEMENTS)
    return function(symbol, [data, scales, out], code)


def _reduced(
    code: Code, size: int, lanes: int, combine: Callable, start: float, value: Callable[[Code, Value, int], Value]
) -> Value:
    """All of value(code, offset, lanes) combined into one scalar: vectors first, then halves of the last vector."""
    partial = code.alloc("partial", lanes, "float32")
    code.store(partial, 0, splat(start, lanes), lanes)

    def part(inner: Code, index: Value) -> None:
        inner.store(partial, 0, combine(load(partial, 0, lanes), value(inner, index * lanes, lanes)), lanes)

    code.loop("part", size // lanes, part)
    result = _across(code, load(partial, 0, lanes), lanes, combine)
    for offset, width in pieces(size % lanes, lanes):
        rest = value(code, size - size % lanes + offset, width)
        result = code.bind("result", combine(result, _across(code, rest, width, combine)))
    return result


def _across(code: Code, value: Value, lanes: int, combine: Callable) -> Value:
    """The lanes of a vector combined, by halves."""
    value = code.bind("whole", value)
    while lanes > 1:
        lanes //= 2
        halves = [tirx.Shuffle([value], list(range(first, first + lanes))) for first in (0, lanes)]
        value = code.bind("half", combine(*halves))
    return value
