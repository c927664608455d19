"""The tiles of the implicit GEMM: what a block of output positions does for one tile of channels, from products to stores."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm import tirx

from hwopt.backends.tvm.kernels import pooled
from hwopt.backends.tvm.kernels.beside import stride
from hwopt.backends.tvm.kernels.code import Code, Value, load, pieces, splat
from hwopt.backends.tvm.kernels.epilogue import Place
from hwopt.backends.tvm.kernels.micro import accumulate_block, arranged, data_block, weight_operand
from hwopt.backends.tvm.kernels.schedule import split
from hwopt.backends.tvm.kernels.spec import Mean, Quantize

if TYPE_CHECKING:
    from hwopt.backends.tvm.kernels.gemm import Gemm


@dataclass(frozen=True)
class Source:
    """Data as a tile reads it: `at` is the element under tap 0 of output position (row, column)."""

    buffer: Value
    row_stride: int  # elements between input rows
    at: Callable[[Value, Value], Value]
    skips: bool = False  # padding is zeros: a tile leaves out the taps at which it would read nothing else


@dataclass(frozen=True)
class Work:
    """One block of positions of one image and group, with its data and weights."""

    gemm: Gemm
    image: Value
    group: Value
    row: Value
    column: Value
    source: Source
    weights: Value
    offset: Value
    sums: pooled.Sums | None = None

    def positions(self, code: Code, vector: Value, vectors: int, last_lanes: int) -> None:
        """All positions of the block for the channel tile that starts at `vector`, and their mean where that is asked for."""
        if self.gemm.mean is None:
            self._positions(code, vector, vectors, last_lanes)
            return
        integers = any(isinstance(step, Quantize) for step in self.gemm.epilogue.steps)
        sums = pooled.Sums.start(code, vectors, self.gemm.micro.lanes, "int32" if integers else "float32")
        dataclasses.replace(self, sums=sums)._positions(code, vector, vectors, last_lanes)
        self._means(code, sums, self.gemm.mean, vector, vectors, last_lanes)

    def _means(self, code: Code, sums: pooled.Sums, mean: Mean, first: Value, vectors: int, last_lanes: int) -> None:
        gemm, lanes = self.gemm, self.gemm.micro.lanes
        shape = gemm.shape
        for vector in range(vectors):
            for offset, count in pieces(last_lanes if vector == vectors - 1 else lanes, lanes):
                channel = self.group * shape.n + (first + vector) * lanes + offset
                place = Place(self.image * shape.out_channels + channel, channel, self.image)
                at, positions = vector * lanes + offset, shape.rows * shape.columns
                value = pooled.finish(code, sums, at, positions, mean, gemm.behind, place, count)
                code.store(gemm.out, place.flat, value, count)

    def _positions(self, code: Code, vector: Value, vectors: int, last_lanes: int) -> None:
        shape, schedule = self.gemm.shape, self.gemm.schedule

        def rows(inner: Code, height: int, row: Value) -> None:
            _strips(
                inner, self.column, schedule.block_columns, shape.columns, schedule.tile_columns,
                lambda some, width, column: Tile(self, vector, vectors, last_lanes, height, width).emit(some, row, column),
            )  # fmt: skip

        _strips(code, self.row, schedule.block_rows, shape.rows, schedule.tile_rows, rows)


def _strips(code: Code, first: Value, block: int, total: int, tile: int, body: Callable[[Code, int, Value], None]) -> None:
    """body(code, size, start) over [first, first + block) cut off at `total`, in steps of `tile` and one shorter rest."""
    whole, rest = total // tile, total % tile
    start = first if isinstance(first, int) else tirx.floordiv(first, tile)
    if block >= total:
        many: Any = whole
        start = 0
    elif total % block == 0:
        many = block // tile
    else:
        many = tirx.Min(block // tile, whole - start)
    code.loop("strip", many, lambda inner, index: body(inner, tile, index * tile), start=start)
    if rest:
        here = True if block >= total else tirx.GT(first + block, whole * tile)
        code.when(here, lambda inner: body(inner, rest, whole * tile))


@dataclass(frozen=True)
class Tile:
    """height x width output positions x `vectors` vectors of channels, the last of which has `last_lanes` valid ones."""

    work: Work
    vector: Value
    vectors: int
    last_lanes: int
    height: int
    width: int

    def emit(self, code: Code, row: Value, column: Value) -> None:
        gemm, work = self.work.gemm, self.work
        of_group = work.group * gemm.shape.run if gemm.shape.groups > 1 else 0
        origin = code.bind("origin", work.source.at(row, column) + of_group)
        weights = code.bind("panel", work.offset + self.vector * gemm.panel)
        totals = self._start(code)
        self._products(code, totals, origin, weights, (row, column))
        self._finish(code, totals, row, column)

    @property
    def positions(self) -> list[tuple[int, int]]:
        return [(row, column) for row in range(self.height) for column in range(self.width)]

    @property
    def _kept(self) -> str:
        """The dtype of the data where they are read."""
        return "int16" if self.work.source.buffer.dtype == "int16" else self.work.gemm.shape.data_dtype

    def _channel(self, vector: int) -> Value:
        gemm = self.work.gemm
        return self.work.group * gemm.shape.n + (self.vector + vector) * gemm.micro.lanes

    def _lanes(self, vector: int) -> int:
        return self.last_lanes if vector == self.vectors - 1 else self.work.gemm.micro.lanes

    def _start(self, code: Code) -> list[list[Value]]:
        """Accumulators [position][vector], set to the bias, or to zero where a vector is partial."""
        gemm, lanes = self.work.gemm, self.work.gemm.micro.lanes
        kind = gemm.shape.accumulator
        zero = splat(0 if kind == "int32" else 0.0, lanes, kind)
        initial = [
            gemm.epilogue.initial(code, self._channel(v), lanes) if self._lanes(v) == lanes else zero for v in range(self.vectors)
        ]
        rows = gemm.micro.rows
        count = -(-len(self.positions) // rows) * rows  # the last block may have positions that are not stored
        totals = [[code.alloc("total", lanes, kind) for _ in range(self.vectors)] for _ in range(count)]
        starts = [arranged(gemm.micro, [value] * rows) for value in initial]
        for index, per_position in enumerate(totals):
            for total, start in zip(per_position, starts, strict=True):
                code.store(total, 0, start[index % rows], lanes)
        return totals

    def _products(self, code: Code, totals: list[list[Value]], origin: Value, weights: Value, place: tuple[Value, Value]) -> None:
        """The loops over taps and along the run, for the tile that starts at (row, column)."""
        gemm, shape = self.work.gemm, self.work.gemm.shape
        # padded integers may be read beyond the run, where weights are zero; zero times what is no number would be none
        beyond = (shape.padded or self._kept == "int16") and shape.accumulator == "int32"
        exact = gemm.words if beyond else shape.run // gemm.micro.depth

        def down(outer: Code, y: Value) -> None:
            def across(inner: Code, x: Value) -> None:
                data = origin + y * (shape.dilations[0] * self.work.source.row_stride) + x * (shape.dilations[1] * shape.channels)
                base = weights + (y * shape.taps[1] + x) * (gemm.words * gemm.step)
                inner.when(self._sees(place, (y, x)), lambda some: self._run(some, totals, data, base, exact))

            outer.loop("across", shape.taps[1], across)

        code.loop("down", shape.taps[0], down)

    def _sees(self, place: tuple[Value, Value], tap: tuple[Value, Value]) -> Value:
        """Whether any position of the tile reads data, not only padding, at a tap."""
        shape, found = self.work.gemm.shape, []
        for axis, (size, count) in enumerate(((shape.height, self.height), (shape.width, self.width))):
            if self.work.source.skips and shape.dilations[axis] > 1 and shape.taps[axis] > 1:
                first = place[axis] * shape.strides[axis] + tap[axis] * shape.dilations[axis] - shape.pads[axis]
                found += [first + (count - 1) * shape.strides[axis] >= 0, first < size]
        open_ones = [one for one in found if not isinstance(one, bool)]
        if not all(one for one in found if isinstance(one, bool)):
            return False
        return functools.reduce(tirx.And, open_ones) if open_ones else True

    def _run(self, code: Code, totals: list[list[Value]], data: Value, weights: Value, exact: int) -> None:
        """One tap: `exact` whole words, then the rest of the run as a word with fewer elements."""
        gemm = self.work.gemm
        unroll, depth = gemm.schedule.unroll, gemm.micro.depth

        def some(inner: Code, index: Value) -> None:
            for word in range(unroll):
                self._word(inner, totals, data, weights, index * unroll + word, depth)

        code.loop("word", exact // unroll, some)
        for word in range(exact - exact % unroll, exact):
            self._word(code, totals, data, weights, word, depth)
        if exact < gemm.words:
            self._word(code, totals, data, weights, exact, gemm.shape.run % depth)

    def _word(self, code: Code, totals: list[list[Value]], data: Value, weights: Value, word: Value, count: int) -> None:
        gemm, micro, source = self.work.gemm, self.work.gemm.micro, self.work.source
        shape = gemm.shape
        operands = [
            weight_operand(code, micro, self.work.weights, weights + v * gemm.panel + word * gemm.step)
            for v in range(self.vectors)
        ]
        pixel = stride(shape, "data", shape.channels)
        offsets = [
            row * shape.strides[0] * source.row_stride + column * shape.strides[1] * pixel for row, column in self.positions
        ]
        for first in range(0, len(offsets), micro.rows):
            indices = [data + (word * micro.depth + offset) for offset in offsets[first : first + micro.rows]]
            value = data_block(code, micro, source.buffer, indices, self._kept, count)
            for block, weight in zip(zip(*totals[first : first + micro.rows], strict=True), operands, strict=True):
                sums = accumulate_block(micro, [load(total, 0, micro.lanes) for total in block], value, weight)
                for total, result in zip(block, sums, strict=True):
                    code.store(total, 0, result, micro.lanes)

    def _arrange(self, code: Code, totals: list[list[Value]]) -> None:
        """Accumulators of several positions become vectors of one position each."""
        micro = self.work.gemm.micro
        for first in range(0, len(totals) if micro.rows > 1 else 0, micro.rows):
            for block in zip(*totals[first : first + micro.rows], strict=True):
                moved = arranged(micro, [load(total, 0, micro.lanes) for total in block])
                for total, value in zip(block, [code.bind("row", value) for value in moved], strict=True):
                    code.store(total, 0, value, micro.lanes)

    def _finish(self, code: Code, totals: list[list[Value]], row: Value, column: Value) -> None:
        """The epilogue on whole vectors, or on pieces of a partial one, and the stores."""
        gemm, lanes = self.work.gemm, self.work.gemm.micro.lanes
        self._arrange(code, totals)
        for vector in range(self.vectors):
            column_of = [accumulators[vector] for accumulators in totals[: len(self.positions)]]
            if not gemm.epilogue.heavy:
                for (y, x), total in zip(self.positions, column_of, strict=True):
                    self.result(code, vector, total, 0, row + y, column + x)
                continue
            some = 1000 // (4 * lanes)  # as many vectors as TVM puts on the stack
            for first in range(0, len(column_of), some):
                self._looped(code, vector, column_of[first : first + some], first, row, column)

    def _looped(self, code: Code, vector: int, totals: list[Value], first: int, row: Value, column: Value) -> None:
        """A long epilogue is written once, in a loop over the accumulators: unrolled, it would take seconds to compile."""
        lanes = self.work.gemm.micro.lanes
        space = code.alloc("totals", len(totals) * lanes, self.work.gemm.shape.accumulator)
        for index, total in enumerate(totals):
            code.store(space, index * lanes, load(total, 0, lanes), lanes)

        def position(inner: Code, index: Value) -> None:
            x, y = split(index + first, self.width) if self.height > 1 else (index + first, 0)
            self.result(inner, vector, space, index * lanes, row + y, column + x)

        code.loop("position", len(totals), position)

    def result(self, code: Code, vector: int, total: Value, at: Value, row: Value, column: Value) -> None:
        """One vector of results, from element `at` of `total`."""
        gemm, lanes = self.work.gemm, self.work.gemm.micro.lanes
        shape = gemm.shape
        position = gemm.position(self.work.image, row, column)
        for offset, count in pieces(self._lanes(vector), lanes):
            channel = self._channel(vector) + offset
            shared = gemm.epilogue.per_channel(code, channel, count)
            place = Place(position * shape.out_channels + channel, channel, self.work.image)
            value = load(total, at + offset, count)
            value = gemm.epilogue.apply(code, value, place, shared, count, self._lanes(vector) == lanes)
            if self.work.sums is None:
                code.store(gemm.out, place.flat, value, count)
            else:
                self.work.sums.add(code, vector * lanes + offset, value, count)
