"""The implicit GEMM kernel: tiles of output positions x vectors of output channels, accumulated in registers.

A task (one iteration of the parallel loop) takes a block of rows or columns of one image and a block of channel tiles:

    copy its input rows, padding included, into workspace           (only where the convolution pads)
    for each channel tile: for each position tile:
        accumulators = bias
        for tap, for word of the run: accumulators += weights[vectors] * data[positions]
        epilogue, store

Edges are variants of the same code with fewer positions, fewer vectors or a partial last vector, chosen outside of the loops.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx

from hwopt.backends.tvm.kernels import bfloat16, pooled
from hwopt.backends.tvm.kernels.beside import begin, stride
from hwopt.backends.tvm.kernels.code import Code, Value, function, load, pieces, splat, stored
from hwopt.backends.tvm.kernels.epilogue import Epilogue, Place
from hwopt.backends.tvm.kernels.geometry import Geometry
from hwopt.backends.tvm.kernels.micro import accumulate_block, arranged, data_block, fused_multiply_add, weight_operand
from hwopt.backends.tvm.kernels.repack import Repack
from hwopt.backends.tvm.kernels.schedule import Schedule, split
from hwopt.backends.tvm.kernels.spec import MatmulSpec, Mean, Quantize
from hwopt.target import MicroKernel


def pack(shape: Geometry, weights: np.ndarray, micro: MicroKernel) -> np.ndarray:
    """[groups, n, taps..., run] -> [groups, vectors, taps, words, lanes, depth], channels and runs filled up with zeros."""
    taps = shape.taps[0] * shape.taps[1]
    vectors, words = shape.vectors(micro.lanes), shape.words(micro.depth)
    full = np.zeros((shape.groups, vectors * micro.lanes, taps, words * micro.depth), weights.dtype)
    full[:, : shape.n, :, : shape.run] = weights.reshape(shape.groups, shape.n, taps, shape.run)
    split = full.reshape(shape.groups, vectors, micro.lanes, taps, words, micro.depth)
    return np.ascontiguousarray(split.transpose(0, 1, 3, 4, 2, 5)).reshape(-1)


def packed_size(shape: Geometry, micro: MicroKernel) -> int:
    panel = shape.taps[0] * shape.taps[1] * shape.words(micro.depth) * micro.lanes * micro.depth
    return shape.groups * shape.vectors(micro.lanes) * panel


@dataclass(frozen=True)
class Source:
    """Data as a tile reads it: `at` is the element under tap 0 of output position (row, column)."""

    buffer: Value
    row_stride: int  # elements between input rows
    at: Callable[[Value, Value], Value]


class Gemm:
    """One kernel under construction."""

    def __init__(self, shape: Geometry, schedule: Schedule, micro: MicroKernel) -> None:
        self.shape, self.schedule, self.micro = shape, schedule, micro
        self.words, self.step = shape.words(micro.depth), micro.lanes * micro.depth
        self.vectors = shape.vectors(micro.lanes)
        self.panel = shape.taps[0] * shape.taps[1] * self.words * self.step  # weights of one vector of channels
        size = shape.images * shape.rows * shape.columns * shape.out_channels
        written = shape.images * shape.out_channels if shape.pooled else size
        self.data = tirx.decl_buffer((shape.images * shape.height * shape.width * shape.channels,), shape.data_dtype, "data")
        self.out = tirx.decl_buffer((written,), shape.out_dtype, "out")
        steps, self.mean, behind = pooled.divided(shape.epilogue)
        dtype = "float32" if self.mean else shape.out_dtype
        fused = fused_multiply_add(micro)
        self.epilogue = Epilogue(steps, shape.accumulator, dtype, shape.out_channels, shape.images, size, fused, micro)
        self.behind = Epilogue(behind, "float32", shape.out_dtype, shape.out_channels, shape.images, written, fused, micro)

    def build(self, symbol: str) -> tirx.PrimFunc:
        """PrimFunc(data, packed weights, *epilogue tensors, out)."""
        weights = tirx.decl_buffer((packed_size(self.shape, self.micro),), self.shape.weight_dtype, "weights")
        code = Code()

        def task(inner: Code, number: Value) -> None:
            image, row, column, tile = self.schedule.place(number, self.shape, self.vectors)
            self.task(inner, image, row, column, tile, lambda group: (weights, group * self.vectors * self.panel))

        code.loop("task", self.schedule.tasks(self.shape, self.vectors), task, parallel=self.schedule.parallel)
        return function(symbol, [self.data, weights, *self.epilogue.parameters, self.out], code, bfloat16.library(self.micro))

    def build_computed(self, spec: MatmulSpec, symbol: str) -> tirx.PrimFunc:
        """PrimFunc(left, right, *epilogue tensors, out): every task packs the part of the right side that it multiplies."""
        right = tirx.decl_buffer(((1 if spec.shared else spec.batch) * spec.k * spec.n,), spec.weight_dtype, "right")
        count = min(self.schedule.block_tiles * self.schedule.vectors, self.vectors)
        code = Code()

        def task(inner: Code, number: Value) -> None:
            image, row, column, tile = self.schedule.place(number, self.shape, self.vectors)
            space = inner.alloc("packed", count * self.panel, spec.weight_dtype)
            first = tile * self.schedule.vectors
            base = 0 if spec.shared else Repack.begin(spec, image)
            Repack(spec, self.micro, right, base, space).emit(inner, first, count)
            self.task(inner, image, row, column, tile, lambda _: (space, first * -self.panel))

        code.loop("task", self.schedule.tasks(self.shape, self.vectors), task, parallel=self.schedule.parallel)
        return function(symbol, [self.data, right, *self.epilogue.parameters, self.out], code, bfloat16.library(self.micro))

    def task(self, code: Code, image: Value, row: Value, column: Value, tile: Value, weights: Callable) -> None:
        """All groups of the block that starts at output (row, column) and channel tile `tile`."""
        source = self.padded(code, image, row) if self.shape.padded else self.direct(image)

        def of_group(inner: Code, group: Value) -> None:
            buffer, offset = weights(group)
            self.channel_tiles(inner, Work(self, image, group, row, column, source, buffer, offset), tile)

        code.loop("group", self.shape.groups, of_group)

    def position(self, image: Value, row: Value, column: Value) -> Value:
        """Where an output position lies, counted in positions."""
        shape = self.shape
        return begin(shape, "out", image, shape.rows * shape.columns, 1) + (row * shape.columns + column) * stride(
            shape, "out", 1
        )

    def direct(self, image: Value) -> Source:
        shape = self.shape
        pixel = stride(shape, "data", shape.channels)
        row_stride = shape.width * pixel

        def at(row: Value, column: Value) -> Value:
            first = begin(shape, "data", image, shape.height * shape.width, shape.channels)
            return first + row * (shape.strides[0] * row_stride) + column * (shape.strides[1] * pixel)

        return Source(self.data, row_stride, at)

    def padded(self, code: Code, image: Value, first: Value) -> Source:
        """Copies the input rows of the block that starts at output row `first`, with their borders, into workspace."""
        shape = self.shape
        height = min(self.schedule.block_rows, shape.rows)
        rows = (height - 1) * shape.strides[0] + (shape.taps[0] - 1) * shape.dilations[0] + 1
        stride = -(-(shape.padded_width * shape.channels) // 16) * 16
        space = code.alloc("padded", rows * stride + 64, shape.data_dtype)  # 64: the last word may read beyond the run

        def copy(inner: Code, index: Value) -> None:
            y = first * shape.strides[0] + index - shape.pads[0]
            inside = tirx.And(tirx.GE(y, 0), tirx.LT(y, shape.height))
            base = (image * shape.height + y) * (shape.width * shape.channels)
            inner.when(
                inside,
                lambda some: self._copy_row(some, space, index * stride, base),
                lambda some: self._fill(some, space, index * stride, shape.padded_width * shape.channels),
            )

        code.loop("row", rows, copy)
        return Source(
            space,
            stride,
            lambda row, column: (row - first) * (shape.strides[0] * stride) + column * (shape.strides[1] * shape.channels),
        )

    def _copy_row(self, code: Code, space: Value, target: Value, base: Value) -> None:
        shape = self.shape
        left, middle, right = (size * shape.channels for size in (shape.pads[1], shape.width, shape.pads[3]))
        self._fill(code, space, target, left)

        def move(some: Code, at: Value, lanes: int) -> None:
            some.store(space, target + left + at, load(self.data, base + at, lanes), lanes)

        self._sweep(code, middle, move)
        self._fill(code, space, target + left + middle, right)

    def _fill(self, code: Code, space: Value, target: Value, size: int) -> None:
        dtype = stored(self.shape.data_dtype)
        value = float(self.shape.pad_value) if dtype == "float32" else int(self.shape.pad_value)
        self._sweep(code, size, lambda some, at, lanes: some.store(space, target + at, splat(value, lanes, dtype), lanes))

    def _sweep(self, code: Code, size: int, body: Callable[[Code, Value, int], None]) -> None:
        """body(code, offset, lanes) over `size` elements, in whole vectors as far as they reach."""
        lanes = self.micro.lanes * (4 if self.shape.data_dtype != "float32" else 1)
        whole = size // lanes
        code.loop("part", whole, lambda inner, part: body(inner, part * lanes, lanes))
        for offset, count in pieces(size - whole * lanes, lanes):
            body(code, whole * lanes + offset, count)

    def channel_tiles(self, code: Code, work: Work, first: Value) -> None:
        """Whole channel tiles in a loop, then the last one where it has fewer vectors or channels."""
        width, lanes = self.schedule.vectors, self.micro.lanes
        whole = self.shape.n // (width * lanes)
        total = -(-self.vectors // width)
        block = self.schedule.block_tiles
        many = block if whole % block == 0 and whole == total else tirx.Max(0, tirx.Min(block, whole - first))
        many = whole if block >= total else many
        code.loop("tile", many, lambda inner, tile: work.positions(inner, tile * width, width, lanes), start=first)
        if whole == total:
            return
        vectors = self.vectors - whole * width
        last_lanes = self.shape.n - (self.vectors - 1) * lanes
        here = True if block >= total else tirx.And(tirx.LE(first, whole), tirx.GT(first + block, whole))
        code.when(here, lambda inner: work.positions(inner, whole * width, vectors, last_lanes))


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
        self._products(code, totals, origin, weights)
        self._finish(code, totals, row, column)

    @property
    def positions(self) -> list[tuple[int, int]]:
        return [(row, column) for row in range(self.height) for column in range(self.width)]

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

    def _products(self, code: Code, totals: list[list[Value]], origin: Value, weights: Value) -> None:
        """The loops over taps and along the run."""
        gemm, shape = self.work.gemm, self.work.gemm.shape
        # padded integers may be read beyond the run, where weights are zero; zero times what is no number would be none
        beyond = shape.padded and shape.accumulator == "int32"
        exact = gemm.words if beyond else shape.run // gemm.micro.depth

        def down(outer: Code, y: Value) -> None:
            def across(inner: Code, x: Value) -> None:
                data = origin + y * (shape.dilations[0] * self.work.source.row_stride) + x * (shape.dilations[1] * shape.channels)
                base = weights + (y * shape.taps[1] + x) * (gemm.words * gemm.step)
                self._run(inner, totals, data, base, exact)

            outer.loop("across", shape.taps[1], across)

        code.loop("down", shape.taps[0], down)

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
            value = data_block(code, micro, source.buffer, indices, shape.data_dtype, count)
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
