"""Matrices turned: squares of elements in registers, exchanged by shuffles; memory sees whole vectors only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from hwopt.backends.tvm.kernels.code import Code, Value, function, load

SERIAL_ELEMENTS = 65536  # below this a parallel launch costs more than it gains
SIDE = 16  # of a square at most: as many registers as the smallest vector units have
LEAST = 8  # elements of a row or a column, for squares to pay


@dataclass(frozen=True)
class TransposeSpec:
    """[count, rows, columns] -> [count, columns, rows]."""

    count: int
    rows: int
    columns: int
    dtype: str


def spec_of(prim: Any) -> TransposeSpec | None:
    """What a PrimFunc does that only permutes axes, if that turns matrices; None for all others."""
    from tvm.ir.expr import TensorLoad
    from tvm.s_tir import SBlock, SBlockRealize

    body = prim.body
    while not isinstance(body, SBlock):
        body = body.block if isinstance(body, SBlockRealize) else getattr(body, "body", None)
        if body is None:
            return None
        if isinstance(body, SBlock) and body.name_hint == "root":
            body = body.body
    store = body.body
    if not isinstance(store, tirx.BufferStore) or not isinstance(store.value, TensorLoad) or len(prim.params) != 2:
        return None
    written, read = (list(one.indices) for one in (store, store.value))
    if len(written) != len(read) or any(sum(one.same_as(other) for other in written) != 1 for one in read):
        return None
    shape = [int(dim) for dim in prim.params[0].shape]
    order = [next(at for at, one in enumerate(read) if one.same_as(index)) for index in written]
    return turned(shape, order, str(prim.params[0].dtype))


def turned(shape: Sequence[int], order: Sequence[int], dtype: str) -> TransposeSpec | None:
    """A permutation as matrices that are turned; None where it is not two runs of axes that change places."""
    axes = [axis for axis in order if shape[axis] != 1]
    kept = sorted(axes)
    head = next((at for at, (one, other) in enumerate(zip(axes, kept, strict=True)) if one != other), len(axes))
    tail, rest = axes[head:], kept[head:]
    cut = tail.index(rest[0]) if tail else 0
    if not tail or tail != rest[len(rest) - cut :] + rest[: len(rest) - cut]:
        return None
    count, rows, columns = (math.prod(shape[axis] for axis in part) for part in (kept[:head], tail[cut:], tail[:cut]))
    return TransposeSpec(count, rows, columns, dtype) if min(rows, columns) >= LEAST and dtype != "bool" else None


def build(spec: TransposeSpec, threads: int, lanes: int) -> tirx.PrimFunc:
    """PrimFunc(data, out), both [count * rows * columns]; `lanes` are those of a vector of float32."""
    size = spec.count * spec.rows * spec.columns
    data, out = (tirx.decl_buffer((size,), spec.dtype, name) for name in ("data", "out"))
    side = min(SIDE, lanes)
    down, across = -(-spec.rows // side), -(-spec.columns // side)
    code = Code()

    def band(outer: Code, number: Value) -> None:
        """The squares of one row of squares of the result; the last ones overlap those before them."""
        matrix = outer.bind("matrix", tirx.floordiv(number, across) * (spec.rows * spec.columns))
        column = outer.bind("column", _start(tirx.floormod(number, across), spec.columns, side))

        def square(inner: Code, index: Value) -> None:
            row = inner.bind("row", _start(index, spec.rows, side))
            width, height = min(side, spec.columns), min(side, spec.rows)
            rows = [inner.bind("line", load(data, matrix + (row + at) * spec.columns + column, width)) for at in range(height)]
            for at, line in enumerate(_exchanged(inner, rows, width)):
                inner.store(out, matrix + (column + at) * spec.rows + row, line, height)

        outer.loop("square", down, square)

    parallel = threads > 1 and size >= SERIAL_ELEMENTS
    code.loop("band", spec.count * across, band, parallel=parallel)
    return function("transpose", [data, out], code)


def _start(index: Value, size: int, side: int) -> Value:
    """Where a square begins: the last one ends with the matrix."""
    return tirx.Min(index * side, size - side) if size > side and size % side else index * side


def _exchanged(code: Code, rows: list[Value], width: int) -> list[Value]:
    """`width` vectors of as many elements as there are rows: pairs of rows interleaved, then pairs of pairs."""
    lines, height, run = rows, len(rows), 1
    if height & (height - 1) or width & (width - 1) or height != width:
        return [tirx.Shuffle(rows, [at * width + column for at in range(height)]) for column in range(width)]
    while run < height:
        made: list[Value] = [None] * height
        for first in range(height):
            if first & run:
                continue
            pair = [lines[first], lines[first | run]]
            low = [lane & ~run if not lane & run else width + (lane & ~run) for lane in range(width)]
            high = [lane | run if not lane & run else width + lane for lane in range(width)]
            made[first], made[first | run] = (code.bind("half", tirx.Shuffle(pair, order)) for order in (low, high))
        lines, run = made, 2 * run
    return lines
