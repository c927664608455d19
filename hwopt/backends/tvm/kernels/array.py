"""The implicit GEMM on a weight-stationary array: blocks of weights are loaded, positions stream, sums come back.

    begin(shape)
    for each column of channels: for each block of positions whose sums fit the accumulators:
        sums = bias
        for tap, for word of the run: load(weights[lanes, depth]); compute(sums, data[positions]); store()
        epilogue on the controller, store
    end()

load, compute and store are C functions that stand in for the array's instructions (emit/hwopt_array.c).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tvm import tirx

from hwopt.backends.tvm.kernels.code import Code, Value, function, load, splat
from hwopt.backends.tvm.kernels.gemm import Gemm, packed_size
from hwopt.backends.tvm.kernels.geometry import Geometry
from hwopt.backends.tvm.kernels.schedule import Schedule
from hwopt.backends.tvm.kernels.spec import Bias, Scale
from hwopt.backends.tvm.kernels.tile import Source, Tile, Work
from hwopt.target import MicroKernel

INTRINSIC = "hwopt.array"
ITEM = {"float32": 4, "int32": 4, "uint8": 1, "int8": 1}


def is_array(micro: MicroKernel) -> bool:
    return micro.intrinsic == INTRINSIC


def default_schedule(shape: Geometry, micro: MicroKernel) -> Schedule:
    """One block of positions at a time, as many as the accumulators (`registers`) hold; all of them where no sums wait."""
    folds = shape.taps[0] * shape.taps[1] * shape.words(micro.depth)
    room = micro.registers if folds > 1 else shape.rows * shape.columns
    columns = min(shape.columns, room)
    rows = min(shape.rows, max(1, room // columns))
    return Schedule(1, 1, 1, 1, rows, columns, 1)


class ArrayGemm(Gemm):
    """One kernel under construction. Weights are packed as for every GEMM: [groups, vectors, taps, words, lanes, depth]."""

    def build(self, symbol: str) -> tirx.PrimFunc:
        shape = self.shape
        weights = tirx.decl_buffer((packed_size(shape, self.micro),), shape.weight_dtype, "weights")
        code = Code()
        self.call(code, "begin", *(tirx.const(value, "int64") for value in self._facts()))

        def of_image(inner: Code, image: Value) -> None:
            source = self._whole(inner, image) if shape.padded else self.direct(image)

            def of_group(deep: Code, group: Value) -> None:
                work = Work(self, image, group, 0, 0, source, weights, group * self.vectors * self.panel)
                whole, rest = shape.n // self.micro.lanes, shape.n % self.micro.lanes
                deep.loop("vector", whole, lambda some, vector: self._column(some, work, vector, self.micro.lanes))
                if rest:
                    self._column(deep, work, whole, rest)

            inner.loop("group", shape.groups, of_group)

        code.loop("image", shape.images, of_image)
        self.call(code, "end")
        return function(symbol, [self.data, weights, *self.epilogue.parameters, self.out], code)

    def _whole(self, code: Code, image: Value) -> Source:
        """The image with its borders: all rows at once."""
        schedule, self.schedule = self.schedule, dataclasses.replace(self.schedule, block_rows=self.shape.rows)
        source = self.padded(code, image, 0)
        self.schedule = schedule
        return source

    def _facts(self) -> tuple[int, ...]:
        """m, n, k, groups, parts, bytes of inputs and outputs, epilogue results: what the cost model's Workload says."""
        shape, schedule = self.shape, self.schedule
        m = shape.images * shape.rows * shape.columns
        parts = -(-shape.rows // schedule.block_rows) * -(-shape.columns // schedule.block_columns)
        inputs = shape.images * shape.height * shape.width * shape.channels
        steps = m * shape.out_channels * sum(not isinstance(step, Bias | Scale) for step in shape.epilogue)
        return m, shape.n, shape.taps[0] * shape.taps[1] * shape.run, shape.groups, parts, inputs, self._written(m), steps

    def _written(self, m: int) -> int:
        return m * self.shape.out_channels * ITEM.get(self.shape.out_dtype, 4)

    def call(self, code: Code, name: str, *arguments: Value) -> None:
        code.statements.append(tirx.Evaluate(tirx.call_extern("int32", f"hwopt_array_{name}", *arguments)))

    def _column(self, code: Code, work: Work, vector: Value, lanes: int) -> None:
        """All positions for one column of channels, `lanes` of which there are."""
        shape, schedule = self.shape, self.schedule
        down, across = -(-shape.rows // schedule.block_rows), -(-shape.columns // schedule.block_columns)

        def block(inner: Code, number: Value) -> None:
            y, x = divided(number, across)
            row, column = y * schedule.block_rows, x * schedule.block_columns
            height = _rest(shape.rows, schedule.block_rows, row)
            width = _rest(shape.columns, schedule.block_columns, column)
            Block(self, work, vector, lanes, row, column, height, width).emit(inner)

        code.loop("block", down * across, block)


def divided(number: Value, by: int) -> tuple[Value, Value]:
    """(number div by, number mod by)."""
    return divmod(number, by) if isinstance(number, int) else (tirx.floordiv(number, by), tirx.floormod(number, by))


def _rest(total: int, block: int, first: Value) -> Value:
    """How much of a block there is from `first` on."""
    return block if total % block == 0 else tirx.Min(block, total - first)


@dataclasses.dataclass(frozen=True)
class Block:
    """height x width positions from (row, column) on, for one column of channels."""

    gemm: ArrayGemm
    work: Work
    vector: Value
    lanes: int
    row: Value
    column: Value
    height: Value
    width: Value

    def emit(self, code: Code) -> None:
        gemm, lanes = self.gemm, self.gemm.micro.lanes
        width = gemm.schedule.block_columns
        sums = code.alloc("sums", gemm.schedule.block_rows * width * lanes, "int32")
        tile = Tile(self.work, self.vector, 1, self.lanes, 1, 1)
        channel = self.work.group * gemm.shape.n + self.vector * lanes
        full = self.lanes == lanes
        start = gemm.epilogue.initial(code, channel, lanes) if full else splat(0, lanes, "int32")
        self._positions(code, lambda some, y, x: some.store(sums, (y * width + x) * lanes, start, lanes))
        self._products(code, sums)

        def result(inner: Code, y: Value, x: Value) -> None:
            tile.result(inner, 0, sums, (y * width + x) * lanes, self.row + y, self.column + x)

        self._positions(code, result)

    def _positions(self, code: Code, body: Callable[[Code, Value, Value], None]) -> None:
        code.loop("y", self.height, lambda outer, y: outer.loop("x", self.width, lambda inner, x: body(inner, y, x)))

    def _products(self, code: Code, sums: Value) -> None:
        gemm, shape = self.gemm, self.gemm.shape
        taps, words, depth = shape.taps[1], gemm.words, gemm.micro.depth
        base = self.work.offset + self.vector * gemm.panel
        source, of_group = self.work.source, self.work.group * shape.run if shape.groups > 1 else 0

        def fold(inner: Code, number: Value) -> None:
            tap, word = divided(number, words)
            down, across = divided(tap, taps)
            used = depth if shape.run % depth == 0 else tirx.Min(depth, shape.run - word * depth)
            at = tirx.address_of(load(self.work.weights, base + number * gemm.step))
            gemm.call(inner, "load", at, used)
            shift = down * (shape.dilations[0] * source.row_stride) + across * (shape.dilations[1] * shape.channels)

            def line(deep: Code, y: Value) -> None:
                first = source.at(self.row + y, self.column) + of_group + shift + word * depth
                to = tirx.address_of(load(sums, y * gemm.schedule.block_columns * gemm.micro.lanes))
                stride = tirx.const(shape.strides[1] * shape.channels, "int64")
                many = tirx.const(self.width, "int64") if isinstance(self.width, int) else tirx.Cast("int64", self.width)
                gemm.call(deep, "compute", to, tirx.address_of(load(source.buffer, first)), stride, many)

            inner.loop("line", self.height, line)
            gemm.call(inner, "store")

        code.loop("fold", shape.taps[0] * taps * words, fold)
