"""Depthwise convolution: vectors run along the channels, a tile is `tile_columns` output positions of one row.

The taps of a kernel column go `depth` at a time into one instruction: the input rows under them are interleaved once per
input column and used by every output position above it. Nothing is copied: columns outside of the image are known when the
code is written (tiles at the border are variants of their own), rows outside are replaced by the padding value in the few
output rows that touch them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from tvm import tirx

from hwopt.backends.tvm.kernels import bfloat16
from hwopt.backends.tvm.kernels.code import Code, Value, function, interleaved, load, load_part, pieces, splat
from hwopt.backends.tvm.kernels.epilogue import Epilogue, Place
from hwopt.backends.tvm.kernels.micro import accumulate, fused_multiply_add, widened
from hwopt.backends.tvm.kernels.schedule import Schedule, parallel_pays
from hwopt.backends.tvm.kernels.spec import ConvSpec
from hwopt.target import MicroKernel

CODE = 128  # products in one tile, unrolled: more compile slowly and overflow the decoded-instruction cache


def is_depthwise(spec: object) -> TypeGuard[ConvSpec]:
    """One input and one output channel per group."""
    return isinstance(spec, ConvSpec) and spec.groups > 1 and spec.groups == spec.in_channels == spec.out_channels


def pack(spec: ConvSpec, weights: np.ndarray, micro: MicroKernel) -> np.ndarray:
    """[channels, 1, height, width] -> [vectors, width, words, lanes, depth], filled up with zeros."""
    lanes, depth = micro.lanes, micro.depth
    vectors, words = -(-spec.in_channels // lanes), -(-spec.kernel[0] // depth)
    full = np.zeros((vectors * lanes, words * depth, spec.kernel[1]), weights.dtype)
    full[: spec.in_channels, : spec.kernel[0]] = weights[:, 0]
    split = full.reshape(vectors, lanes, words, depth, spec.kernel[1])
    return np.ascontiguousarray(split.transpose(0, 4, 2, 1, 3)).reshape(-1)


def default_schedule(spec: ConvSpec, micro: MicroKernel, cores: int = 1) -> Schedule:
    """The tile whose loads, products and waste are least per row, and rows enough for every core."""
    most = max(2, min(8 if micro.registers > 16 else 4, CODE // (spec.kernel[0] * spec.kernel[1])))
    columns = min(range(1, min(most, spec.out_width) + 1), key=lambda width: _row_cost(spec, width))
    parallel = parallel_pays(spec.macs / micro.lanes, cores)  # a cycle each, loads included
    rows = _share(spec, cores) if parallel else spec.out_height
    return Schedule(1, columns, 1, 1, rows, spec.out_width, -(-spec.in_channels // micro.lanes), parallel)


def _share(spec: ConvSpec, cores: int) -> int:
    """Rows of a task, about four tasks for each core, with which the busiest core has fewest."""
    wanted = -(-spec.batch * spec.out_height // (4 * cores))

    def busiest(rows: int) -> int:
        tasks = spec.batch * -(-spec.out_height // rows)
        return -(-tasks // cores) * rows

    return min(range(1, spec.out_height + 1), key=lambda rows: (busiest(rows), abs(rows - wanted)))


def _row_cost(spec: ConvSpec, width: int) -> float:
    loaded = (width - 1) * spec.strides[1] + (spec.kernel[1] - 1) * spec.dilations[1] + 1
    tiles = -(-spec.out_width // width)
    return tiles * (loaded * spec.kernel[0] * 1.5 + width * spec.kernel[0] * spec.kernel[1] + 6)


@dataclass(frozen=True)
class Line:
    """The input row under one tap: where it starts in the data, and whether it is one (None: it always is)."""

    start: Value
    inside: Value


@dataclass(frozen=True)
class Row:
    """One output row of one image for `lanes` channels from `channel` on."""

    image: Value
    y: Value
    lines: list[Line]
    channel: Value
    vector: Value
    lanes: int


class Depthwise:
    """One kernel under construction."""

    def __init__(self, spec: ConvSpec, schedule: Schedule, micro: MicroKernel) -> None:
        self.spec, self.schedule, self.micro = spec, schedule, micro
        self.channels, self.words = spec.in_channels, -(-spec.kernel[0] // micro.depth)
        self.panel = spec.kernel[1] * self.words * micro.lanes * micro.depth
        size = spec.batch * spec.out_height * spec.out_width * self.channels
        self.data = tirx.decl_buffer((spec.batch * spec.height * spec.width * self.channels,), spec.data_dtype, "data")
        vectors = -(-self.channels // micro.lanes)
        self.weights = tirx.decl_buffer((vectors * self.panel,), spec.weight_dtype, "weights")
        self.out = tirx.decl_buffer((size,), spec.out_dtype, "out")
        fused = fused_multiply_add(micro)
        self.epilogue = Epilogue(spec.epilogue, spec.accumulator, spec.out_dtype, self.channels, spec.batch, size, fused, micro)

    def build(self, symbol: str) -> tirx.PrimFunc:
        """PrimFunc(data, packed weights, *epilogue tensors, out)."""
        code, height = Code(), self.spec.out_height
        block = self.schedule.block_rows
        blocks = -(-height // block)

        def task(inner: Code, number: Value) -> None:
            image, first = (number, 0) if blocks == 1 else (tirx.floordiv(number, blocks), tirx.floormod(number, blocks) * block)
            rows = block if height % block == 0 else tirx.Min(block, height - first)
            inner.loop("row", rows, lambda some, y: self._row(some, image, y), start=first)

        code.loop("task", self.spec.batch * blocks, task, parallel=self.schedule.parallel)
        parameters = [self.data, self.weights, *self.epilogue.parameters, self.out]
        return function(symbol, parameters, code, bfloat16.library(self.micro))

    def _row(self, code: Code, image: Value, y: Value) -> None:
        """Rows that touch the vertical padding check it, the others do not."""
        spec = self.spec
        top = code.bind("top", y * spec.strides[0] - spec.pads[0])
        reach = (spec.kernel[0] - 1) * spec.dilations[0]
        if not spec.pads[0] and not spec.pads[2]:
            self._vectors(code, image, y, top, False)
            return
        inside = tirx.And(tirx.GE(top, 0), tirx.LT(top + reach, spec.height))
        code.when(
            inside,
            lambda inner: self._vectors(inner, image, y, top, False),
            lambda inner: self._vectors(inner, image, y, top, True),
        )

    def _vectors(self, code: Code, image: Value, y: Value, top: Value, checked: bool) -> None:
        lanes = self.micro.lanes
        whole, rest = divmod(self.channels, lanes)
        lines = [self._line(code, image, top + tap * self.spec.dilations[0], checked) for tap in range(self.spec.kernel[0])]

        def vector(inner: Code, index: Value, valid: int = lanes) -> None:
            self._columns(inner, Row(image, y, lines, index * lanes, index, valid))

        code.loop("vector", whole, vector)
        if rest:
            vector(code, whole, rest)

    def _line(self, code: Code, image: Value, y: Value, checked: bool) -> Line:
        height = self.spec.height
        inside = code.bind("inside", tirx.And(tirx.GE(y, 0), tirx.LT(y, height))) if checked else None
        row = tirx.Max(0, tirx.Min(y, height - 1)) if checked else y
        return Line(code.bind("line", (image * height + row) * (self.spec.width * self.channels)), inside)

    def _columns(self, code: Code, row: Row) -> None:
        """Tiles along a row: those at the border each by themselves, those between them in a loop."""
        width = self.schedule.tile_columns
        starts = range(0, self.spec.out_width, width)
        inner = [start // width for start in starts if start + width <= self.spec.out_width and self._inside(start, width)]
        for index, start in enumerate(starts):
            if inner and index == inner[0]:
                code.loop("strip", len(inner), lambda some, strip: self._tile(some, row, strip * width, width, None), start=index)
            elif index not in inner:
                self._tile(code, row, start, min(width, self.spec.out_width - start), start)

    def _inside(self, start: int, width: int) -> bool:
        """Whether a tile reads nothing left or right of the image."""
        return all(0 <= self._column(start, column) < self.spec.width for column in (0, self._span(width) - 1))

    def _column(self, start: Any, column: int) -> Any:
        return start * self.spec.strides[1] - self.spec.pads[1] + column

    def _span(self, width: int) -> int:
        """Input columns under a tile."""
        return (width - 1) * self.spec.strides[1] + (self.spec.kernel[1] - 1) * self.spec.dilations[1] + 1

    def _tile(self, code: Code, row: Row, start: Value, width: int, known: int | None) -> None:
        """`width` output positions from column `start` on, which is `known` at a border."""
        micro, spec = self.micro, self.spec
        weights = self._weights(code, row)
        partial = row.lanes < micro.lanes
        shared = [] if partial else self.epilogue.per_channel(code, row.channel, micro.lanes)
        zero = splat(0 if spec.accumulator == "int32" else 0.0, micro.lanes, spec.accumulator)
        first = zero if partial else self.epilogue.initial(code, row.channel, micro.lanes)
        totals: list[Value] = [first] * width
        for column in range(self._span(width)):
            uses = [
                (position, tap)
                for position in range(width)
                for tap in range(spec.kernel[1])
                if position * spec.strides[1] + tap * spec.dilations[1] == column
            ]
            if not uses:
                continue
            outside = known is not None and not 0 <= self._column(known, column) < spec.width
            words = [self._word(code, row, self._column(start, column), word, outside) for word in range(self.words)]
            for position, tap in uses:
                for word, value in enumerate(words):
                    product = accumulate(micro, totals[position], value, weights[tap][word])
                    totals[position] = code.bind("total", product)
        if not self.epilogue.heavy:
            for position, total in enumerate(totals):
                self._finish(code, row, start + position, total, shared)
            return
        space = code.alloc("totals", width * micro.lanes, spec.accumulator)
        for position, total in enumerate(totals):
            code.store(space, position * micro.lanes, total, micro.lanes)

        def finish(inner: Code, index: Value) -> None:
            self._finish(inner, row, start + index, load(space, index * micro.lanes, micro.lanes), shared)

        code.loop("position", width, finish)

    def _weights(self, code: Code, row: Row) -> list[list[Value]]:
        """[tap across][word] vectors of weights."""
        size = self.micro.lanes * self.micro.depth
        base = row.vector * self.panel
        return [
            [
                code.bind("weight", widened(self.micro, load(self.weights, base + (tap * self.words + word) * size, size)))
                for word in range(self.words)
            ]
            for tap in range(self.spec.kernel[1])
        ]

    def _word(self, code: Code, row: Row, column: Value, word: int, outside: bool) -> Value:
        """`depth` input rows of one input column, interleaved channel by channel."""
        micro, spec = self.micro, self.spec
        taps = range(word * micro.depth, (word + 1) * micro.depth)
        rows = [self._element(row, column, tap) if tap < spec.kernel[0] and not outside else self._padding() for tap in taps]
        return code.bind("word", widened(micro, interleaved(rows, micro.lanes)))

    def _element(self, row: Row, column: Value, tap: int) -> Value:
        """The channels of one input position, or the padding value where its row is outside."""
        line = row.lines[tap]
        value = load_part(self.data, line.start + column * self.channels + row.channel, self.micro.lanes, row.lanes)
        if self.spec.data_dtype == "bfloat16":  # computed in float32: with one channel a group there are no dot products
            value = bfloat16.widen(value, self.micro.lanes)
        return value if line.inside is None else tirx.Select(splat(line.inside, self.micro.lanes), value, self._padding())

    def _padding(self) -> Value:
        floating = self.spec.accumulator == "float32"
        value = float(self.spec.pad_value) if floating else self.spec.pad_value
        return splat(value, self.micro.lanes, "float32" if floating else self.spec.data_dtype)

    def _finish(self, code: Code, row: Row, x: Value, total: Value, shared: list[Value]) -> None:
        """The epilogue on a whole vector, or on the pieces of a partial one, and the stores."""
        spec, lanes = self.spec, self.micro.lanes
        flat = ((row.image * spec.out_height + row.y) * spec.out_width + x) * self.channels + row.channel
        if row.lanes == lanes:
            value = self.epilogue.apply(code, total, Place(flat, row.channel, row.image), shared, lanes, True)
            code.store(self.out, flat, value, lanes)
            return
        space = code.alloc("totals", lanes, spec.accumulator)
        code.store(space, 0, total, lanes)
        for offset, count in pieces(row.lanes, lanes):
            part = self.epilogue.per_channel(code, row.channel + offset, count)
            place = Place(flat + offset, row.channel + offset, row.image)
            value = self.epilogue.apply(code, load(space, offset, count), place, part, count, False)
            code.store(self.out, flat + offset, value, count)
