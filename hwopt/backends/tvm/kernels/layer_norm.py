"""Layer normalization of data + residual over the last axis, stored in float32 or 8 bits: mean, variance, result."""

from __future__ import annotations

from tvm import tirx

from hwopt.backends.tvm.kernels.code import Code, Value, function, load, splat
from hwopt.backends.tvm.kernels.rows import Rows, RowsSpec
from hwopt.target import MicroKernel


def build(spec: RowsSpec, micro: MicroKernel, threads: int, symbol: str) -> tirx.PrimFunc:
    """PrimFunc(data [, addend], gamma, beta, *epilogue tensors, out): (x - mean) / sqrt(variance + epsilon) * gamma + beta."""
    rows, code = Rows(spec, micro, threads), Code()
    gamma, beta = (tirx.decl_buffer((spec.size,), "float32", name) for name in ("gamma", "beta"))
    share = tirx.const(1.0 / spec.size, "float32")

    def row(inner: Code, number: Value, space: Value) -> None:
        read = rows.read(inner, number)

        def kept(some: Code, at: Value, lanes: int) -> Value:
            value = some.bind("value", read(at, lanes))
            some.store(space, at, value, lanes)
            return value

        mean = inner.bind("mean", rows.reduced(inner, tirx.Add, 0.0, kept) * share)

        def square(some: Code, at: Value, lanes: int) -> Value:
            centered = some.bind("centered", load(space, at, lanes) - splat(mean, lanes))
            return centered * centered

        variance = rows.reduced(inner, tirx.Add, 0.0, square) * share
        root = tirx.sqrt(variance + tirx.const(spec.epsilon, "float32"))
        scale = inner.bind("scale", tirx.Div(tirx.const(1.0, "float32"), root))

        def result(some: Code, at: Value, lanes: int) -> None:
            centered = (load(space, at, lanes) - splat(mean, lanes)) * splat(scale, lanes)
            rows.store(some, number, at, centered * load(gamma, at, lanes) + load(beta, at, lanes), lanes)

        rows.sweep(inner, result)

    rows.each(code, row)
    added = [rows.addend] if spec.addend else []
    return function(symbol, [rows.data, *added, gamma, beta, *rows.epilogue.parameters, rows.out], code, rows.library)
