"""3 x 3 convolutions of bytes by Winograd's algorithm F(4 x 4, 3 x 3), in integers and exact.

A tile of 4 x 4 results takes 36 products for each pair of channels instead of 144, of 16-bit numbers:

    results = A^T [(G w G^T) . (B^T d B)] A        d: 6 x 6 data, w: 3 x 3 weights (Lavin and Gray 2016, arXiv:1509.09308)

The fractions of G are multiplied out, by 24 a dimension, so all sums are whole: G w G^T and B^T d B have 16 bits, the rest is
computed modulo 2^32. The last step divides by 576 = 64 x 9: a product with the inverse of 9 modulo 2^32 and a shift, exact where
a result has at most 26 bits, which the weights tell (`exact`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from tvm import tirx

from hwopt.backends.tvm.kernels import gemm, modular
from hwopt.backends.tvm.kernels.code import Code, Value, cast, function, load, pieces, splat
from hwopt.backends.tvm.kernels.epilogue import Epilogue, Place
from hwopt.backends.tvm.kernels.geometry import geometry
from hwopt.backends.tvm.kernels.micro import fused_multiply_add
from hwopt.backends.tvm.kernels.schedule import Schedule, split
from hwopt.backends.tvm.kernels.spec import ConvSpec
from hwopt.backends.tvm.kernels.tile import Source, Work
from hwopt.backends.tvm.kernels.winograd_schedule import PATCH, POINTS, TILE, products, tiles, widened
from hwopt.target import MicroKernel

INVERSE_OF_9 = 954437177  # modulo 2^32
MOST = 2**25  # magnitude of results that are divided exactly
LARGEST = 255  # of data
Place4 = tuple[Value, Value, Value, Value]  # image, row, column, channel


def exact(weights: np.ndarray) -> bool:
    """Whether no data can make a sum of [out, in, 3, 3] weights that is too large."""
    wide = weights.astype(np.int64).reshape(len(weights), -1)
    return LARGEST * max(np.maximum(wide, 0).sum(1).max(), np.maximum(-wide, 0).sum(1).max()) < MOST


def pack(spec: ConvSpec, weights: np.ndarray, bytewise: MicroKernel) -> np.ndarray:
    """[out, in, 3, 3] -> [vectors, words, 9, lanes x depth] bytes, filled up with zeros; the kernel transforms them.

    Transformed, they would be eight times as large: more to read than the products take.
    """
    micro = widened(bytewise)
    vectors, words = -(-spec.out_channels // micro.lanes), -(-spec.in_channels // micro.depth)
    full = np.zeros((vectors * micro.lanes, words * micro.depth, 9), weights.dtype)
    full[: spec.out_channels, : spec.in_channels] = weights.reshape(*weights.shape[:2], 9)
    split = full.reshape(vectors, micro.lanes, words, micro.depth, 9)
    return np.ascontiguousarray(split.transpose(0, 2, 4, 1, 3)).reshape(-1)


class Winograd:
    """One kernel under construction.

    A task takes `block_rows` rows of tiles and `block_tiles` tiles of channels. Of the schedule's tiles, `tile_columns` are
    tiles of results: what its accumulators hold.
    """

    def __init__(self, spec: ConvSpec, schedule: Schedule, micro: MicroKernel) -> None:
        micro = widened(micro)
        self.spec, self.schedule, self.micro = spec, schedule, micro
        self.down, self.across = tiles(spec)
        self.count = schedule.block_rows * self.across  # tiles of a task
        self.vectors = -(-spec.out_channels // micro.lanes)
        self.words, self.step = -(-spec.in_channels // micro.depth), micro.lanes * micro.depth
        # one step more, so that the 36 points do not lie in one set of the cache
        self.point = (schedule.vectors * self.words + 1) * self.step
        size = spec.batch * spec.out_height * spec.out_width * spec.out_channels
        self.data = tirx.decl_buffer((spec.batch * spec.height * spec.width * spec.in_channels,), spec.data_dtype, "data")
        self.out = tirx.decl_buffer((size,), spec.out_dtype, "out")
        fused = fused_multiply_add(micro)
        self.epilogue = Epilogue(
            spec.epilogue, "int32", spec.out_dtype, spec.out_channels, spec.batch, size, fused, micro
        )  # fmt: skip

    def build(self, symbol: str) -> tirx.PrimFunc:
        """PrimFunc(data, packed weights, *epilogue tensors, out)."""
        weights = tirx.decl_buffer((self.vectors * self.words * 9 * self.step,), "int8", "weights")
        code = Code()
        channel_blocks = -(-self.vectors // (self.schedule.vectors * self.schedule.block_tiles))
        row_blocks = -(-self.down // self.schedule.block_rows)

        def task(inner: Code, number: Value) -> None:
            block, number = split(number, channel_blocks)
            row, image = split(number, row_blocks)
            self._task(inner, image, row * self.schedule.block_rows, block * self.schedule.block_tiles, weights)

        code.loop("task", self.spec.batch * row_blocks * channel_blocks, task, parallel=self.schedule.parallel)
        parameters = [self.data, weights, *self.epilogue.parameters, self.out]
        return function(
            symbol, parameters, code, modular.library(self.micro.lanes), self.epilogue.overwritten(self.spec.out_dtype)
        )

    def _task(self, code: Code, image: Value, row: Value, tile: Value, weights: Value) -> None:
        width, channels = self.schedule.vectors, self.spec.in_channels
        patches = code.alloc("patches", self.count * POINTS * channels, "int16")
        self._patches(code, self._source(code, image, row * TILE), patches, row)
        turned = code.alloc("turned", POINTS * self.point, "int16")
        sums = code.alloc("sums", self.count * POINTS * width * self.micro.lanes, "int32")

        def of_tile(inner: Code, first: Value, vectors: int, last_lanes: int) -> None:
            self._weights(inner, weights, turned, first, vectors)
            self._multiply(inner, patches, turned, sums, vectors)
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
        more = (self.down * TILE - spec.out_height, self.across * TILE - spec.out_width)
        frame = dataclasses.replace(shape, rows=self.down * TILE, pads=(top, left, bottom + more[0], right + more[1]))
        block = dataclasses.replace(self.schedule, block_rows=self.schedule.block_rows * TILE)
        whole = gemm.Gemm(frame, block, self.micro)
        whole.data = self.data
        return whole.padded(code, image, row) if frame.padded else whole.direct(image)

    def _patches(self, code: Code, source: Source, patches: Value, row: Value) -> None:
        """B^T d B of every tile, 16-bit numbers: [tile, 36, channels]."""
        channels, lanes = self.spec.in_channels, 2 * self.micro.lanes

        def tile(inner: Code, number: Value) -> None:
            x, y = split(number, self.across)
            origin = inner.bind("origin", source.at((row + y) * TILE, x * TILE))
            target = inner.bind("target", number * (POINTS * channels))

            def part(some: Code, index: Value, count: int = lanes) -> None:
                self._patch(some, source, origin + index, patches, target + index, count)

            whole = channels // lanes
            inner.loop("part", whole, lambda some, number: part(some, number * lanes))
            for offset, count in pieces(channels % lanes, lanes):
                part(inner, whole * lanes + offset, count)

        code.loop("patch", self.count, tile)

    def _patch(self, code: Code, source: Source, origin: Value, patches: Value, target: Value, lanes: int) -> None:
        channels = self.spec.in_channels

        def at(y: int, x: int) -> Value:
            value = load(source.buffer, origin + y * source.row_stride + x * channels, lanes)
            return code.bind("d", cast(value, "int16", lanes))

        columns = [_turned(code, [at(y, x) for y in range(PATCH)], lanes) for x in range(PATCH)]
        for y in range(PATCH):
            for x, value in enumerate(_turned(code, [column[y] for column in columns], lanes)):
                code.store(patches, target + (y * PATCH + x) * channels, value, lanes)

    def _weights(self, code: Code, weights: Value, turned: Value, first: Value, vectors: int) -> None:
        """24 G w (24 G)^T of one tile of channels: [36, vectors, words, lanes x depth]."""
        step = self.step

        def word(inner: Code, number: Value) -> None:
            base = (first * self.words + number) * (9 * step)
            taps = [inner.bind("w", cast(load(weights, base + tap * step, step), "int16", step)) for tap in range(9)]
            columns = [_scattered(inner, taps[x::3], step) for x in range(3)]
            for y in range(PATCH):
                for x, value in enumerate(_scattered(inner, [column[y] for column in columns], step)):
                    inner.store(turned, (y * PATCH + x) * self.point + number * step, value, step)

        code.loop("word", vectors * self.words, word)

    def _multiply(self, code: Code, patches: Value, weights: Value, sums: Value, vectors: int) -> None:
        """[tile, 36, channels of this tile]"""
        shape = products(self.spec, self.count, self.schedule.vectors * self.micro.lanes)
        block = dataclasses.replace(self.schedule, tile_rows=1, block_rows=1, block_columns=self.count)
        kernel = gemm.Gemm(shape, block, self.micro)
        kernel.data, kernel.out = patches, sums

        def point(inner: Code, group: Value) -> None:
            work = Work(kernel, 0, group, 0, 0, kernel.direct(0), weights, group * self.point)
            work.positions(inner, 0, vectors, self.micro.lanes)

        code.loop("point", POINTS, point)

    def _results(self, code: Code, sums: Value, at: tuple[Value, Value, Value], vectors: int, last_lanes: int) -> None:
        """A^T m A of every tile, divided, and the epilogue."""
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
            x, y = split(number, self.across)
            found = _divided(inner, sums, number * (POINTS * width) + element, width, lanes)
            top, left = inner.bind("top", (row + y) * TILE), inner.bind("left", x * TILE)
            place = (image, top, left, channel)
            if self.epilogue.heavy:
                self._looped(inner, found, place, shared, lanes)
                return
            for index, value in enumerate(found):
                self._store(inner, value, _at(place, index), shared, lanes)

        code.loop("square", self.count, tile)

    def _looped(self, code: Code, found: Sequence[Value], place: Place4, shared: Sequence[Value], lanes: int) -> None:
        """A long epilogue is written twice, in loops over half of the results: unrolled, it would take long to compile."""
        half = TILE * TILE // 2  # as much as TVM puts on the stack
        for first in (0, half):
            space = code.alloc("half", half * lanes, "int32")
            for index in range(half):
                code.store(space, index * lanes, found[first + index], lanes)

            def store(inner: Code, index: Value, first: int = first, space: Value = space) -> None:
                value = load(space, index * lanes, lanes)
                self._store(inner, value, _at(place, index + first), shared, lanes)

            code.loop("result", half, store)

    def _store(self, code: Code, value: Value, at: Place4, shared: Sequence[Value], lanes: int) -> None:
        spec = self.spec
        image, row, column, channel = at
        ends = [(row, spec.out_height)] if spec.out_height % TILE or self.down % self.schedule.block_rows else []
        ends += [(column, spec.out_width)] if spec.out_width % TILE else []
        inside = [tirx.LT(place, end) for place, end in ends]

        def store(inner: Code) -> None:
            flat = ((image * spec.out_height + row) * spec.out_width + column) * spec.out_channels + channel
            result = self.epilogue.apply(inner, value, Place(flat, channel, image), shared, lanes, False)
            inner.store(self.out, flat, result, lanes)

        code.when(functools.reduce(tirx.And, inside) if inside else True, store)


def _at(first: Place4, index: Value) -> Place4:
    """Where a result of the tile lies that begins at `first`."""
    image, top, left, channel = first
    across, down = split(index, TILE)
    return image, top + down, left + across, channel


def _divided(code: Code, sums: Value, base: Value, width: int, lanes: int) -> list[Value]:
    """The 16 results of one tile, A^T m A / 576."""
    columns = [
        _summed(code, [code.bind("m", load(sums, base + (y * PATCH + x) * width, lanes)) for y in range(PATCH)], lanes)
        for x in range(PATCH)
    ]
    rows = [_summed(code, [column[y] for column in columns], lanes) for y in range(TILE)]
    inverse, bits = splat(INVERSE_OF_9, lanes, "int32"), splat(6, lanes, "int32")
    whole = [modular.multiply(value, inverse, lanes) for line in rows for value in line]
    return [code.bind("y", tirx.shift_right(value, bits)) for value in whole]


def _turned(code: Code, d: Sequence[Value], lanes: int) -> list[Value]:
    """B^T d"""
    name, times = _naming(code, "t"), _times(lanes)
    a, b = name(d[4] - times(4, d[2])), name(d[3] - times(4, d[1]))
    c, e = name(d[4] - d[2]), name(times(2, d[3] - d[1]))
    first, last = times(4, d[0]) - times(5, d[2]) + d[4], times(4, d[1]) - times(5, d[3]) + d[5]
    return [name(one) for one in (first, a + b, a - b, c + e, c - e, last)]


def _scattered(code: Code, w: Sequence[Value], lanes: int) -> list[Value]:
    """24 G w, the last one halved: two of these factors times a byte stay within 16 bits.

    24 G = (6, 0, 0), (-4, -4, -4), (-4, 4, -4), (1, 2, 4), (1, -2, 4), (0, 0, 24)
    """
    name, times = _naming(code, "u"), _times(lanes)
    ends, middle = name(times(-4, w[0] + w[2])), name(times(4, w[1]))
    far, twice = name(w[0] + times(4, w[2])), name(times(2, w[1]))
    return [name(one) for one in (times(6, w[0]), ends - middle, ends + middle, far + twice, far - twice, times(12, w[2]))]


def _naming(code: Code, name: str) -> Callable[[Value], Value]:
    return lambda value: code.bind(name, value)


def _times(lanes: int) -> Callable[[int, Value], Value]:
    return lambda factor, value: value * splat(factor, lanes, "int16")


def _summed(code: Code, m: Sequence[Value], lanes: int) -> list[Value]:
    """A^T m, the last of m twice."""

    def add(a: Value, b: Value, bits: int = 0) -> Value:
        """a + b x 2^bits"""
        return code.bind("s", modular.add(a, tirx.shift_left(b, splat(bits, lanes, "int32")) if bits else b, lanes))

    p, r = add(m[1], m[2]), add(m[3], m[4])
    q, s = (code.bind("s", modular.subtract(a, b, lanes)) for a, b in ((m[1], m[2]), (m[3], m[4])))
    return [add(add(m[0], p), r), add(q, s, 1), add(p, r, 2), add(add(q, s, 3), m[5], 1)]
