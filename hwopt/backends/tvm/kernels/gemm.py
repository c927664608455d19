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

import numpy as np
from tvm import tirx

from hwopt.backends.tvm.kernels import bfloat16, pooled
from hwopt.backends.tvm.kernels.beside import begin, stride
from hwopt.backends.tvm.kernels.code import Code, Value, cast, function, load, pieces, splat, stored
from hwopt.backends.tvm.kernels.epilogue import Epilogue
from hwopt.backends.tvm.kernels.geometry import Geometry
from hwopt.backends.tvm.kernels.micro import fused_multiply_add, word_of
from hwopt.backends.tvm.kernels.repack import Repack
from hwopt.backends.tvm.kernels.schedule import Schedule, copies_rows, widens
from hwopt.backends.tvm.kernels.spec import MatmulSpec
from hwopt.backends.tvm.kernels.tile import Source, Work
from hwopt.target import MicroKernel


def pack(shape: Geometry, weights: np.ndarray, micro: MicroKernel) -> np.ndarray:
    """[groups, n, taps..., run] -> [groups, vectors, taps, words, lanes, depth], channels and runs filled up with zeros.

    A step of several words (micro.word_of) has them one behind the other: [words, lanes, depth].
    """
    taps = shape.taps[0] * shape.taps[1]
    vectors, words = shape.vectors(micro.lanes), shape.words(micro.depth)
    full = np.zeros((shape.groups, vectors * micro.lanes, taps, words * micro.depth), weights.dtype)
    full[:, : shape.n, :, : shape.run] = weights.reshape(shape.groups, shape.n, taps, shape.run)
    one = word_of(micro)
    split = full.reshape(shape.groups, vectors, micro.lanes, taps, words * micro.depth // one.depth, one.depth)
    return np.ascontiguousarray(split.transpose(0, 1, 3, 4, 2, 5)).reshape(-1)


def packed_size(shape: Geometry, micro: MicroKernel) -> int:
    panel = shape.taps[0] * shape.taps[1] * shape.words(micro.depth) * micro.lanes * micro.depth
    return shape.groups * shape.vectors(micro.lanes) * panel


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
        return self._function(symbol, weights, code)

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
        return self._function(symbol, right, code)

    def _function(self, symbol: str, weights: Value, code: Code) -> tirx.PrimFunc:
        over = None if self.mean else self.epilogue.overwritten(self.shape.out_dtype)
        parameters = [self.data, weights, *self.epilogue.parameters, self.out]
        return function(symbol, parameters, code, bfloat16.library(self.micro), over)

    def task(self, code: Code, image: Value, row: Value, column: Value, tile: Value, weights: Callable) -> None:
        """All groups of the block that starts at output (row, column) and channel tile `tile`."""
        source = self.source(code, image, row, column)

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

    def source(self, code: Code, image: Value, row: Value, column: Value) -> Source:
        """The data of the block that starts at (row, column): where they are, or copied with what surrounds them, or widened."""
        if copies_rows(self.shape, self.micro):
            zeros = self.shape.pad_value == 0 and max(self.shape.dilations) > 1
            return dataclasses.replace(self.padded(code, image, row), skips=zeros)
        return self.widened(code, image, column) if widens(self.shape, self.micro) else self.direct(image)

    def widened(self, code: Code, image: Value, first: Value) -> Source:
        """Copies what the block of a single row that starts at column `first` reads into workspace, as 16-bit numbers."""
        shape, step = self.shape, self.shape.strides[1]
        reach = shape.width - (shape.columns - 1) * step  # the positions that one result reads, or some more
        block = min(self.schedule.block_columns, shape.columns)
        count = (block - 1) * step + reach
        space = code.alloc("widened", count * shape.channels + 64, "int16")
        base = begin(shape, "data", image, shape.width, shape.channels) + first * (step * shape.channels)
        many = count if shape.columns % block == 0 else tirx.Min(count, shape.width - first * step)

        def copy(inner: Code, index: Value) -> None:
            self._copy(inner, space, index * shape.channels, base + index * shape.channels, shape.channels)

        code.loop("position", many, copy)
        return Source(space, 0, lambda _, column: (column - first) * (step * shape.channels))

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
        space = code.alloc("padded", rows * stride + 64, self.kept)  # 64: the last word may read beyond the run

        def copy(inner: Code, index: Value) -> None:
            y = first * shape.strides[0] + index - shape.pads[0]
            inside = tirx.And(tirx.GE(y, 0), tirx.LT(y, shape.height))
            base = (image * shape.height + y) * (shape.width * shape.channels)
            inner.when(
                inside,
                lambda some: self._copy_row(some, space, index * stride, base),
                lambda some: self._fill(some, space, index * stride, shape.padded_width * shape.channels),
            )

        reach = (height - 1) * shape.strides[0] + 1  # rows that one tap reads; between those of two taps others may lie
        taps, many = (shape.taps[0], reach) if reach < shape.dilations[0] else (1, rows)
        code.loop(
            "tap", taps, lambda some, tap: some.loop("row", many, lambda each, row: copy(each, tap * shape.dilations[0] + row))
        )
        return Source(
            space,
            stride,
            lambda row, column: (row - first) * (shape.strides[0] * stride) + column * (shape.strides[1] * shape.channels),
        )

    def _copy_row(self, code: Code, space: Value, target: Value, base: Value) -> None:
        shape = self.shape
        left, middle, right = (size * shape.channels for size in (shape.pads[1], shape.width, shape.pads[3]))
        self._fill(code, space, target, left)
        self._copy(code, space, target + left, base, middle)
        self._fill(code, space, target + left + middle, right)

    @property
    def kept(self) -> str:
        """How copied data lie in workspace."""
        return "int16" if widens(self.shape, self.micro) else self.shape.data_dtype

    def _copy(self, code: Code, space: Value, target: Value, base: Value, size: int) -> None:
        def move(some: Code, at: Value, lanes: int) -> None:
            value = load(self.data, base + at, lanes)
            some.store(space, target + at, cast(value, "int16", lanes) if space.dtype == "int16" else value, lanes)

        self._sweep(code, size, move)

    def _fill(self, code: Code, space: Value, target: Value, size: int) -> None:
        dtype = stored(self.kept)
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
