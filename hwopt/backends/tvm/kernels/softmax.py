"""Softmax over the last axis, of data + mask, stored in float32 or 8 bits.

One pass finds the largest value, one makes the exponentials and their sum, one divides.
"""

from __future__ import annotations

from tvm import tirx

from hwopt.backends.tvm.kernels.code import Code, Value, function, load, splat
from hwopt.backends.tvm.kernels.functions import Maths
from hwopt.backends.tvm.kernels.rows import Rows, RowsSpec
from hwopt.target import MicroKernel


def build(spec: RowsSpec, micro: MicroKernel, threads: int, symbol: str) -> tirx.PrimFunc:
    """PrimFunc(data [, mask], scale [1], *epilogue tensors, out): softmax(data * scale + mask).

    A row of nothing but -inf, or with a NaN, becomes NaN, or 0 with `spec.guard`. (TVM takes a function of one tensor for a
    reshape.)
    """
    rows, code = Rows(spec, micro, threads), Code()
    rows.scale = tirx.decl_buffer((1,), "float32", "scale")

    def row(inner: Code, number: Value, space: Value) -> None:
        read = rows.read(inner, number)
        largest = rows.reduced(inner, tirx.Max, -float("inf"), lambda _, at, lanes: read(at, lanes))

        def exponential(some: Code, at: Value, lanes: int) -> Value:
            found = Maths(some, lanes, rows.fused).decay(read(at, lanes) - splat(largest, lanes))
            some.store(space, at, found, lanes)
            return found

        total = rows.reduced(inner, tirx.Add, 0.0, exponential)
        factor = inner.bind("factor", tirx.Div(tirx.const(1.0, "float32"), total))

        def share(some: Code, at: Value, lanes: int) -> None:
            rows.store(some, number, at, load(space, at, lanes) * splat(factor, lanes), lanes)

        def nothing(some: Code, at: Value, lanes: int) -> None:
            rows.store(some, number, at, splat(0.0, lanes), lanes)

        guarded = tirx.isnan(total) if spec.guard else False
        inner.when(guarded, lambda some: rows.sweep(some, nothing), lambda some: rows.sweep(some, share))

    rows.each(code, row)
    masks = [rows.addend] if spec.addend else []
    return function(symbol, [rows.data, *masks, rows.scale, *rows.epilogue.parameters, rows.out], code, rows.library)
