"""What row kernels (softmax, layer norm) share: blocks of rows, an addend in front, reductions in vectors, an epilogue behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx

from hwopt.backends.tvm.kernels import bfloat16
from hwopt.backends.tvm.kernels.code import Code, Value, cast, load, pieces, splat
from hwopt.backends.tvm.kernels.epilogue import Epilogue, Place
from hwopt.backends.tvm.kernels.micro import fused_multiply_add
from hwopt.backends.tvm.kernels.schedule import split
from hwopt.backends.tvm.kernels.spec import Add, Step
from hwopt.target import MicroKernel

SERIAL_ELEMENTS = 16384  # below this a parallel launch costs more than it gains
Body = Callable[[Code, Value, int], None]  # code, offset in the row, lanes


@dataclass(frozen=True)
class RowsSpec:
    """`function` (softmax or layer_norm) over the last of `dims`; everything else counts as rows.

    With an `addend`, a tensor of `addend_dims` (each 1 or that of `dims`, the last one whole) is added first. With `guard`,
    a row of the softmax that would be NaN is 0.
    """

    function: str
    dims: tuple[int, ...]
    addend: Add | None = None
    addend_dims: tuple[int, ...] = ()
    epsilon: float = 0.0
    out_dtype: str = "float32"
    epilogue: tuple[Step, ...] = ()
    guard: bool = False

    @property
    def size(self) -> int:
        return self.dims[-1]

    @property
    def rows(self) -> int:
        count = 1
        for dim in self.dims[:-1]:
            count *= dim
        return count


class Rows:
    """The buffers and loops of one kernel."""

    def __init__(self, spec: RowsSpec, micro: MicroKernel, threads: int) -> None:
        self.spec, self.lanes, self.fused = spec, micro.lanes, fused_multiply_add(micro)
        count = spec.rows * spec.size
        self.parallel = threads > 1 and count >= SERIAL_ELEMENTS
        self.block = -(-spec.rows // threads) if self.parallel else spec.rows
        self.data = tirx.decl_buffer((count,), "float32", "data")
        self.out = tirx.decl_buffer((count,), spec.out_dtype, "out")
        self.scale: Value = None  # a buffer of one number that data are multiplied by
        added = 1
        for dim in spec.addend_dims:
            added *= dim
        self.addend = tirx.decl_buffer((added,), spec.addend.dtype, "addend") if spec.addend else None
        self.epilogue = Epilogue(spec.epilogue, "float32", spec.out_dtype, spec.size, 1, count, self.fused, micro)
        self.library = bfloat16.library(micro)

    def each(self, code: Code, row: Callable[[Code, Value, Value], None]) -> None:
        """row(code, number, workspace of one row) for all rows, in blocks that are one task each."""
        spec = self.spec

        def task(inner: Code, number: Value) -> None:
            space = inner.alloc("row", spec.size, "float32")
            first = number * self.block
            whole = spec.rows % self.block == 0
            many = self.block if whole else tirx.Min(self.block, spec.rows - first)
            inner.loop("row", many, lambda some, index: row(some, first + index, space))

        code.loop("task", -(-spec.rows // self.block), task, parallel=self.parallel)

    def read(self, code: Code, row: Value) -> Callable[[Value, int], Value]:
        """data [* scale] + addend at (offset in the row, lanes)."""
        base, add = code.bind("base", row * self.spec.size), self.spec.addend
        scale = None if self.scale is None else code.bind("scale", load(self.scale, 0))

        def given(at: Value, lanes: int) -> Value:
            found = load(self.data, base + at, lanes)
            return found if scale is None else found * splat(scale, lanes)

        if add is None or self.addend is None:
            return given
        other = code.bind("other", self._addend_row(row))

        def value(at: Value, lanes: int) -> Value:
            found = load(self.addend, other + at, lanes)
            if add.dtype == "bfloat16":
                found = bfloat16.widen(found, lanes)
            elif add.dtype != "float32":
                floats = cast(cast(found, "int32", lanes), "float32", lanes)
                found = (floats - splat(float(add.zero_point), lanes)) * splat(add.scale, lanes)
            return given(at, lanes) + found

        return value

    def _addend_row(self, row: Value) -> Value:
        """The element at which the addend of a row begins."""
        stride, found = self.spec.size, 0
        for dim, own in zip(reversed(self.spec.dims[:-1]), reversed(self.spec.addend_dims[:-1]), strict=True):
            index, row = split(row, dim)
            if own > 1:
                found = found + index * stride
                stride *= own
        return found

    def store(self, code: Code, row: Value, at: Value, value: Value, lanes: int) -> None:
        """The value through the epilogue into the output."""
        flat = row * self.spec.size + at
        shared = self.epilogue.per_channel(code, at, lanes)
        result = self.epilogue.apply(code, code.bind("value", value), Place(flat, at), shared, lanes, False)
        code.store(self.out, flat, result, lanes)

    def sweep(self, code: Code, body: Body) -> None:
        """body over a row in vectors, then in smaller ones."""
        size, lanes = self.spec.size, self.lanes
        code.loop("part", size // lanes, lambda inner, part: body(inner, part * lanes, lanes))
        for offset, width in pieces(size % lanes, lanes):
            body(code, size - size % lanes + offset, width)

    def reduced(self, code: Code, combine: Callable, start: float, value: Callable[[Code, Value, int], Value]) -> Value:
        """All of value(code, offset, lanes) combined into one scalar: vectors first, then halves of the last vector."""
        size, lanes = self.spec.size, self.lanes
        partial = code.alloc("partial", lanes, "float32")
        code.store(partial, 0, splat(start, lanes), lanes)

        def part(inner: Code, index: Value) -> None:
            inner.store(partial, 0, combine(load(partial, 0, lanes), value(inner, index * lanes, lanes)), lanes)

        code.loop("part", size // lanes, part)
        result = across(code, load(partial, 0, lanes), lanes, combine)
        for offset, width in pieces(size % lanes, lanes):
            rest = value(code, size - size % lanes + offset, width)
            result = code.bind("result", combine(result, across(code, rest, width, combine)))
        return result


def across(code: Code, value: Value, lanes: int, combine: Callable) -> Value:
    """The lanes of a vector combined, by halves."""
    value = code.bind("whole", value)
    while lanes > 1:
        lanes //= 2
        halves = [tirx.Shuffle([value], list(range(first, first + lanes))) for first in (0, lanes)]
        value = code.bind("half", combine(*halves))
    return value
