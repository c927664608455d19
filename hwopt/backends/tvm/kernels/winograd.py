"""3 x 3 convolutions by Winograd's algorithm: fewer products, for additions before and behind them (see winograd_forms).

A task takes blocks of rows of tiles and of channel tiles of one image, or whole images, which then share the weights:

    copy its input rows, padding included, into workspace           (only where something lies beyond the image)
    transform the data of all tiles                                 [tiles, points, channels]
    for each tile of channels:
        for each part of the words: transform the weights           [points, vectors, words]
            for each point: a matmul of data and weights            [tiles, points, channels of the tile]
        transform the sums back; epilogue, store

Weights are transformed when they are used: as the products take them, they would be four or eight times as large in memory.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from tvm import tirx

from hwopt.backends.tvm.kernels import bfloat16, gemm, modular
from hwopt.backends.tvm.kernels.code import Code, Value, cast, function, load, pieces
from hwopt.backends.tvm.kernels.epilogue import Epilogue, Place
from hwopt.backends.tvm.kernels.geometry import geometry
from hwopt.backends.tvm.kernels.micro import fused_multiply_add
from hwopt.backends.tvm.kernels.onto import Onto
from hwopt.backends.tvm.kernels.schedule import Schedule, split
from hwopt.backends.tvm.kernels.spec import ConvSpec
from hwopt.backends.tvm.kernels.tile import Source, Work
from hwopt.backends.tvm.kernels.winograd_forms import form_of
from hwopt.backends.tvm.kernels.winograd_schedule import images_and_rows, multiplier, products, tiles, words_at_once
from hwopt.target import MicroKernel

Place4 = tuple[Value, Value, Value, Value]  # image, row, column, channel


def pack(spec: ConvSpec, weights: np.ndarray, given: MicroKernel) -> np.ndarray:
    """[out, in, 3, 3] -> [vectors, words, 9, lanes x depth], filled up with zeros."""
    micro = multiplier(spec, given)
    vectors, words = -(-spec.out_channels // micro.lanes), -(-spec.in_channels // micro.depth)
    full = np.zeros((vectors * micro.lanes, words * micro.depth, 9), weights.dtype)
    full[: spec.out_channels, : spec.in_channels] = weights.reshape(*weights.shape[:2], 9)
    split = full.reshape(vectors, micro.lanes, words, micro.depth, 9)
    return np.ascontiguousarray(split.transpose(0, 2, 4, 1, 3)).reshape(-1)


class Winograd:
    """One kernel under construction.

    A task takes `block_rows` rows of tiles, more than an image has for several images, and `block_tiles` tiles of channels. Of
    the schedule's tiles, `tile_columns` are tiles of results: what its accumulators hold.
    """

    def __init__(self, spec: ConvSpec, schedule: Schedule, micro: MicroKernel) -> None:
        micro = multiplier(spec, micro)
        self.spec, self.schedule, self.micro = spec, schedule, micro
        self.form = form_of(spec)
        self.tile, self.patch = self.form.shape.tile, self.form.shape.patch
        self.points = self.patch * self.patch
        self.down, self.across = tiles(spec)
        self.images, self.rows = images_and_rows(spec, schedule)
        self.count = self.images * self.rows * self.across  # tiles of a task
        self.vectors = -(-spec.out_channels // micro.lanes)
        self.words, self.step = -(-spec.in_channels // micro.depth), micro.lanes * micro.depth
        self.part = words_at_once(spec, schedule, micro)
        # one step more, so that the points do not lie in one set of the cache
        self.point = (schedule.vectors * self.part + 1) * self.step
        size = spec.batch * spec.out_height * spec.out_width * spec.out_channels
        self.data = tirx.decl_buffer((spec.batch * spec.height * spec.width * spec.in_channels,), spec.data_dtype, "data")
        self.out = tirx.decl_buffer((size,), spec.out_dtype, "out")
        fused = fused_multiply_add(micro)
        self.epilogue = Epilogue(
            spec.epilogue, spec.accumulator, spec.out_dtype, spec.out_channels, spec.batch, size, fused, micro
        )  # fmt: skip

    def build(self, symbol: str) -> tirx.PrimFunc:
        """PrimFunc(data, packed weights, *epilogue tensors, out)."""
        weights = tirx.decl_buffer((self.vectors * self.words * 9 * self.step,), self.spec.weight_dtype, "weights")
        code = Code()
        channel_blocks = -(-self.vectors // (self.schedule.vectors * self.schedule.block_tiles))
        row_blocks = -(-self.down // self.rows)

        def task(inner: Code, number: Value) -> None:
            block, number = split(number, channel_blocks)
            row, image = split(number, row_blocks)
            self._task(inner, image * self.images, row * self.rows, block * self.schedule.block_tiles, weights)

        tasks = self.spec.batch // self.images * row_blocks * channel_blocks
        code.loop("task", tasks, task, parallel=self.schedule.parallel)
        parameters = [self.data, weights, *self.epilogue.parameters, self.out]
        return function(symbol, parameters, code, self._library(), self.epilogue.overwritten(self.spec.out_dtype))

    def _library(self) -> str:
        return modular.library(self.micro.lanes) if self.spec.accumulator == "int32" else bfloat16.library(self.micro)

    def _task(self, code: Code, image: Value, row: Value, tile: Value, weights: Value) -> None:
        width, channels = self.schedule.vectors, self.spec.in_channels
        patches = code.alloc("patches", self.count * self.points * channels, self.form.shape.dtype)

        def of_image(inner: Code, index: Value) -> None:
            source = self._source(inner, image + index, row * self.tile)
            self._patches(inner, source, patches, row, index * (self.rows * self.across))

        code.loop("image", self.images, of_image)
        turned = code.alloc("turned", self.points * self.point, self.form.shape.dtype)
        sums = code.alloc("sums", self.count * self.points * width * self.micro.lanes, self.spec.accumulator)

        def of_tile(inner: Code, first: Value, vectors: int, last_lanes: int) -> None:
            def part(some: Code, number: Value, onto: bool) -> None:
                self._turned(some, weights, turned, first, number, vectors)
                self._multiply(some, (patches, turned, sums), number, vectors, onto)

            part(inner, 0, False)
            inner.loop("part", self.words // self.part - 1, lambda some, number: part(some, number + 1, True))
            self._results(inner, sums, (image, row, first), vectors, last_lanes)

        self._channel_tiles(code, tile, of_tile)

    def _channel_tiles(self, code: Code, first: Value, body: Callable[[Code, Value, int, int], None]) -> None:
        """body(code, vector, vectors, lanes of the last one) for whole tiles in a loop, then for one with less, of a task."""
        width, block, lanes = self.schedule.vectors, self.schedule.block_tiles, self.micro.lanes
        whole = self.spec.out_channels // (width * lanes)
        rest = self.vectors - whole * width
        if block >= -(-self.vectors // width):
            many, here, first = whole, True, 0
        else:
            many = tirx.Max(0, tirx.Min(block, whole - first))
            here = tirx.And(tirx.LE(first, whole), tirx.GT(first + block, whole))
        code.loop("tile", many, lambda inner, number: body(inner, number * width, width, lanes), start=first)
        if rest:
            last = self.spec.out_channels - (self.vectors - 1) * lanes
            code.when(here, lambda inner: body(inner, whole * width, rest, last))

    def _source(self, code: Code, image: Value, row: Value) -> Source:
        """The data under the tiles, with whatever lies beyond the image filled up."""
        spec, shape = self.spec, geometry(self.spec)
        top, left, bottom, right = spec.pads
        more = (self.down * self.tile - spec.out_height, self.across * self.tile - spec.out_width)
        frame = dataclasses.replace(shape, rows=self.down * self.tile, pads=(top, left, bottom + more[0], right + more[1]))
        block = dataclasses.replace(self.schedule, block_rows=self.rows * self.tile)
        whole = gemm.Gemm(frame, block, self.micro)
        whole.data = self.data
        return whole.padded(code, image, row) if frame.padded or self.down % self.rows else whole.direct(image)

    def _patches(self, code: Code, source: Source, patches: Value, row: Value, first: Value) -> None:
        """B^T d B of every tile of an image, from tile `first` on: [tile, points, channels]."""
        channels, lanes = self.spec.in_channels, self.form.shape.lanes(self.micro)

        def tile(inner: Code, number: Value) -> None:
            x, y = split(number, self.across)
            origin = inner.bind("origin", source.at((row + y) * self.tile, x * self.tile))
            target = inner.bind("target", (first + number) * (self.points * channels))

            def part(some: Code, index: Value, count: int = lanes) -> None:
                self._patch(some, source, origin + index, patches, target + index, count)

            whole = channels // lanes
            inner.loop("part", whole, lambda some, number: part(some, number * lanes))
            for offset, count in pieces(channels % lanes, lanes):
                part(inner, whole * lanes + offset, count)

        code.loop("patch", self.rows * self.across, tile)

    def _patch(self, code: Code, source: Source, origin: Value, patches: Value, target: Value, lanes: int) -> None:
        channels = self.spec.in_channels

        def at(y: int, x: int) -> Value:
            value = load(source.buffer, origin + y * source.row_stride + x * channels, lanes)
            return code.bind("d", self._wide(value, lanes))

        columns = [self.form.data(code, [at(y, x) for y in range(self.patch)], lanes) for x in range(self.patch)]
        for y in range(self.patch):
            for x, value in enumerate(self.form.data(code, [column[y] for column in columns], lanes)):
                code.store(patches, target + (y * self.patch + x) * channels, value, lanes)

    def _wide(self, value: Value, lanes: int) -> Value:
        """Bytes as 16-bit numbers."""
        return cast(value, "int16", lanes) if self.spec.accumulator == "int32" else value

    def _turned(self, code: Code, weights: Value, turned: Value, first: Value, part: Value, vectors: int) -> None:
        """G w G^T of a part of the words of one tile of channels: [points, vectors, words, lanes x depth]."""
        step = self.step

        def word(inner: Code, vector: Value, number: Value) -> None:
            base = ((first + vector) * self.words + part * self.part + number) * (9 * step)
            taps = [inner.bind("w", self._wide(load(weights, base + tap * step, step), step)) for tap in range(9)]
            columns = [self.form.weights(inner, taps[x::3], step) for x in range(3)]
            target = (vector * self.part + number) * step
            for y in range(self.patch):
                for x, value in enumerate(self.form.weights(inner, [column[y] for column in columns], step)):
                    inner.store(turned, (y * self.patch + x) * self.point + target, value, step)

        def of_vector(inner: Code, vector: Value) -> None:
            inner.loop("word", self.part, lambda some, number: word(some, vector, number))

        code.loop("vector", vectors, of_vector)

    def _multiply(self, code: Code, buffers: tuple[Value, Value, Value], part: Value, vectors: int, onto: bool) -> None:
        """Products of a part of the words, or these added to those before: [tile, points, channels of this tile]."""
        patches, turned, sums = buffers
        deep = self.part * self.micro.depth
        shape = products(self.spec, self.count, self.schedule.vectors * self.micro.lanes, deep)
        block = dataclasses.replace(self.schedule, tile_rows=1, block_rows=1, block_columns=self.count)
        kernel = gemm.Gemm(shape, block, self.micro)
        kernel.data, kernel.out = patches, sums
        if onto:
            kernel.epilogue = Onto(sums, shape.out_channels, self.count * shape.out_channels, self.micro)
        direct = kernel.direct(0)

        def point(inner: Code, group: Value) -> None:
            # of a point's channels the matmul knows those of the part only
            start = part * deep + group * (self.spec.in_channels - deep)
            source = dataclasses.replace(direct, at=lambda row, column: direct.at(row, column) + start)
            work = Work(kernel, 0, group, 0, 0, source, turned, group * self.point)
            work.positions(inner, 0, vectors, self.micro.lanes)

        code.loop("point", self.points, point)

    def _results(self, code: Code, sums: Value, at: tuple[Value, Value, Value], vectors: int, last_lanes: int) -> None:
        """A^T m A of every tile, and the epilogue."""
        image, row, first = at
        lanes = self.micro.lanes
        for vector in range(vectors):
            for offset, count in pieces(last_lanes if vector == vectors - 1 else lanes, lanes):
                channel = (first + vector) * lanes + offset
                self._channels(code, sums, (image, row, channel), vector * lanes + offset, count)

    def _channels(self, code: Code, sums: Value, at: tuple[Value, Value, Value], element: int, lanes: int) -> None:
        """`lanes` channels of all tiles, which begin at `element` of each point's sums."""
        image, row, first = at
        channel = code.bind("channel", first)
        shared = self.epilogue.per_channel(code, channel, lanes)
        width = self.schedule.vectors * self.micro.lanes

        def tile(inner: Code, number: Value) -> None:
            x, line = split(number, self.across)
            y, index = split(line, self.rows) if self.images > 1 else (line, 0)
            found = self._square(inner, sums, number * (self.points * width) + element, lanes)
            top, left = inner.bind("top", (row + y) * self.tile), inner.bind("left", x * self.tile)
            place = (image + index, top, left, channel)
            if self.epilogue.heavy:
                self._looped(inner, found, place, shared, lanes)
                return
            for index, value in enumerate(found):
                self._store(inner, value, self._at(place, index), shared, lanes)

        code.loop("square", self.count, tile)

    def _looped(self, code: Code, found: Sequence[Value], place: Place4, shared: Sequence[Value], lanes: int) -> None:
        """A long epilogue is written twice, in loops over half of the results: unrolled, it would take long to compile."""
        half = self.tile * self.tile // 2  # as much as TVM puts on the stack
        for first in (0, half):
            space = code.alloc("half", half * lanes, self.spec.accumulator)
            for index in range(half):
                code.store(space, index * lanes, found[first + index], lanes)

            def store(inner: Code, index: Value, first: int = first, space: Value = space) -> None:
                value = load(space, index * lanes, lanes)
                self._store(inner, value, self._at(place, index + first), shared, lanes)

            code.loop("result", half, store)

    def _store(self, code: Code, value: Value, at: Place4, shared: Sequence[Value], lanes: int) -> None:
        spec = self.spec
        image, row, column, channel = at
        ends = [(row, spec.out_height)] if spec.out_height % self.tile or self.down % self.rows else []
        ends += [(column, spec.out_width)] if spec.out_width % self.tile else []
        inside = [tirx.LT(place, end) for place, end in ends]

        def store(inner: Code) -> None:
            flat = ((image * spec.out_height + row) * spec.out_width + column) * spec.out_channels + channel
            result = self.epilogue.apply(inner, value, Place(flat, channel, image), shared, lanes, False)
            inner.store(self.out, flat, result, lanes)

        code.when(functools.reduce(tirx.And, inside) if inside else True, store)

    def _at(self, first: Place4, index: Value) -> Place4:
        """Where a result of the tile lies that begins at `first`."""
        image, top, left, channel = first
        across, down = split(index, self.tile)
        return image, top + down, left + across, channel

    def _square(self, code: Code, sums: Value, base: Value, lanes: int) -> list[Value]:
        """The results of one tile, A^T m A."""
        width = self.schedule.vectors * self.micro.lanes

        def column(x: int) -> list[Value]:
            return [code.bind("m", load(sums, base + (y * self.patch + x) * width, lanes)) for y in range(self.patch)]

        columns = [self.form.results(code, column(x), lanes) for x in range(self.patch)]
        rows = [self.form.results(code, [one[y] for one in columns], lanes) for y in range(self.tile)]
        return [code.bind("y", self.form.last(value, lanes)) for line in rows for value in line]
