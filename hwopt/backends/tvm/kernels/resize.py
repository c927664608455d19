"""Resizing images: every output row is a sum of a few input rows, every output pixel of a few pixels of that row.

Which ones, and with which weights, is known at compile time (`resize_tables`): nearest, linear and cubic are one kernel with 1, 2
or 4 taps, in all coordinate modes. Vectors run along the channels; 8-bit data are read as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from hwopt.backends.tvm.kernels.code import Code, Value, cast, function, load, pieces, splat
from hwopt.backends.tvm.kernels.epilogue import Epilogue, Place
from hwopt.backends.tvm.kernels.micro import fused_multiply_add
from hwopt.backends.tvm.kernels.schedule import SERIAL_MACS, split
from hwopt.backends.tvm.kernels.spec import Step
from hwopt.target import MicroKernel


@dataclass(frozen=True)
class ResizeSpec:
    """[batch, height, width, channels] -> [batch, out_height, out_width, channels]; `taps` down and across.

    Quantized data stand for (value - zero_point) x scale. With one tap, the same dtype and no epilogue, values are copied.
    """

    batch: int
    height: int
    width: int
    channels: int
    out_height: int
    out_width: int
    taps: tuple[int, int]
    data_dtype: str = "float32"
    out_dtype: str = "float32"
    scale: float = 1.0
    zero_point: int = 0
    epilogue: tuple[Step, ...] = ()

    @property
    def copies(self) -> bool:
        return self.taps == (1, 1) and self.data_dtype == self.out_dtype and not self.epilogue


class Resize:
    """One kernel under construction."""

    def __init__(self, spec: ResizeSpec, micro: MicroKernel, threads: int) -> None:
        self.spec, self.micro = spec, micro
        size = spec.batch * spec.out_height * spec.out_width * spec.channels
        self.parallel = threads > 1 and size * spec.taps[0] * spec.taps[1] >= SERIAL_MACS
        self.data = tirx.decl_buffer((spec.batch * spec.height * spec.width * spec.channels,), spec.data_dtype, "data")
        self.out = tirx.decl_buffer((size,), spec.out_dtype, "out")
        counts = (spec.out_height * spec.taps[0], spec.out_width * spec.taps[1])
        self.places = [tirx.decl_buffer((count,), "int32", "place") for count in counts]
        self.shares = [tirx.decl_buffer((count,), "float32", "share") for count in counts]
        self.fused = fused_multiply_add(micro)
        self.epilogue = Epilogue(spec.epilogue, "float32", spec.out_dtype, spec.channels, spec.batch, size, self.fused)

    def build(self, symbol: str) -> tirx.PrimFunc:
        """PrimFunc(data, rows, row weights, columns, column weights, *epilogue tensors, out)."""
        code, spec = Code(), self.spec

        def task(inner: Code, number: Value) -> None:
            y, image = split(number, spec.out_height)
            line, base = self._line(inner, image, y)
            inner.loop("column", spec.out_width, lambda some, x: self._pixel(some, line, base, (image, number, x)))

        code.loop("row", spec.batch * spec.out_height, task, parallel=self.parallel)
        tables = [self.places[0], self.shares[0], self.places[1], self.shares[1]]
        return function(symbol, [self.data, *tables, *self.epilogue.parameters, self.out], code)

    def _line(self, code: Code, image: Value, y: Value) -> tuple[Value, Value]:
        """The input row of an output row: where it lies in the data, or the weighted sum of several in workspace."""
        spec, count = self.spec, self.spec.taps[0]
        size = spec.width * spec.channels
        rows = [code.bind("row", (image * spec.height + load(self.places[0], y * count + tap)) * size) for tap in range(count)]
        if count == 1:
            return self.data, rows[0]
        line = code.alloc("line", size + 64, "float32")
        shares = [code.bind("share", load(self.shares[0], y * count + tap)) for tap in range(count)]

        def part(inner: Code, at: Value, lanes: int) -> None:
            values = [self._floats(load(self.data, row + at, lanes), lanes) for row in rows]
            inner.store(line, at, self._sum(inner, values, shares, lanes), lanes)

        lanes = self.micro.lanes
        code.loop("part", size // lanes, lambda inner, index: part(inner, index * lanes, lanes))
        for offset, width in pieces(size % lanes, lanes):
            part(code, size - size % lanes + offset, width)
        return line, 0

    def _pixel(self, code: Code, line: Value, base: Value, at: tuple[Value, Value, Value]) -> None:
        spec, count = self.spec, self.spec.taps[1]
        image, row, x = at
        places = [code.bind("place", base + load(self.places[1], x * count + tap) * spec.channels) for tap in range(count)]
        shares = [code.bind("share", load(self.shares[1], x * count + tap)) for tap in range(count)] if count > 1 else []
        flat = code.bind("flat", (row * spec.out_width + x) * spec.channels)

        def part(inner: Code, channel: Value, lanes: int) -> None:
            values = [load(line, place + channel, lanes) for place in places]
            if not spec.copies:
                values = [self._floats(value, lanes) for value in values]
            value = self._sum(inner, values, shares, lanes) if count > 1 else values[0]
            value = value if spec.copies else self._result(inner, value, Place(flat + channel, channel, image), lanes)
            inner.store(self.out, flat + channel, value, lanes)

        lanes = self.micro.lanes * (4 if spec.copies and spec.data_dtype != "float32" else 1)
        code.loop("part", spec.channels // lanes, lambda inner, index: part(inner, index * lanes, lanes))
        for offset, width in pieces(spec.channels % lanes, lanes):
            part(code, spec.channels - spec.channels % lanes + offset, width)

    def _floats(self, value: Value, lanes: int) -> Value:
        return cast(cast(value, "int32", lanes), "float32", lanes) if "int" in str(value.ty.dtype) else value

    def _sum(self, code: Code, values: list[Value], shares: list[Value], lanes: int) -> Value:
        """values . shares"""
        total = code.bind("total", values[0] * splat(shares[0], lanes))
        for value, share in zip(values[1:], shares[1:], strict=True):
            total = code.bind("total", total + value * splat(share, lanes))
        return total

    def _result(self, code: Code, value: Value, place: Place, lanes: int) -> Value:
        """The dequantized value (weights add up to one) and the epilogue."""
        spec = self.spec
        if spec.data_dtype != "float32" and (spec.scale, spec.zero_point) != (1.0, 0):
            value = (value - splat(float(spec.zero_point), lanes)) * splat(spec.scale, lanes)
        shared = self.epilogue.per_channel(code, place.channel, lanes)
        return self.epilogue.apply(code, code.bind("value", value), place, shared, lanes, False)
