"""Copying the input rows of a block, padding included, into the planes that amx_layout describes."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx

from hwopt.backends.tvm.kernels.amx_layout import SIZES, Layout
from hwopt.backends.tvm.kernels.code import Code, Value, load, pieces, splat, stored
from hwopt.backends.tvm.kernels.geometry import Geometry
from hwopt.backends.tvm.kernels.schedule import split


def stage(code: Code, shape: Geometry, layout: Layout, data: Value, space: Value, image: Value, first: Value, rows: int) -> None:
    """The input rows of `rows` output rows from `first` on."""
    fill = _Filler(shape, space)
    plane, line = layout.plane(shape, rows), layout.pitch * layout.step
    left, used = layout.left * shape.channels, layout.used * shape.channels

    def row(inner: Code, index: Value) -> None:
        y = inner.bind("y", first * shape.strides[0] + index - shape.pads[0])
        which, place = split(index, shape.strides[0])
        target = inner.bind("target", which * plane + place * line)
        base = inner.bind("base", (image * shape.height + y) * (shape.width * shape.channels))

        def copy(some: Code) -> None:
            fill.emit(some, target, left)
            fill.sweep(some, used, lambda last, at, n: last.store(space, target + left + at, load(data, base + at, n), n))
            fill.emit(some, target + left + used, line - left - used)

        inside = tirx.And(tirx.GE(y, 0), tirx.LT(y, shape.height)) if shape.padded else True
        inner.when(inside, copy, lambda some: fill.emit(some, target, line))

    count = layout.input_rows(shape, rows)
    code.loop("row", count, row)
    tail = layout.shared * shape.channels + layout.run.over
    for which in range(shape.strides[0] if tail else 0):
        lines = -(-(count - which) // shape.strides[0])
        fill.emit(code, which * plane + lines * line, tail)


class _Filler:
    """Writes the padding value."""

    def __init__(self, shape: Geometry, space: Value) -> None:
        self.space, self.dtype = space, stored(shape.data_dtype)
        self.value = int(shape.pad_value)  # zero for bfloat16, of which the bits are moved
        self.widest = 64 // SIZES[shape.data_dtype]

    def emit(self, code: Code, target: Value, size: int) -> None:
        def store(inner: Code, at: Value, lanes: int) -> None:
            inner.store(self.space, target + at, splat(self.value, lanes, self.dtype), lanes)

        self.sweep(code, size, store)

    def sweep(self, code: Code, size: int, body: Callable[[Code, Value, int], None]) -> None:
        """body(code, offset, lanes) over `size` elements, in whole vectors as far as they reach."""
        whole = size // self.widest
        code.loop("part", whole, lambda inner, part: body(inner, part * self.widest, self.widest))
        for offset, lanes in pieces(size - whole * self.widest, self.widest):
            body(code, whole * self.widest + offset, lanes)
