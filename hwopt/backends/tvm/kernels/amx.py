"""The implicit GEMM on a matrix unit (Intel AMX): products of whole tiles, [16 positions, k] x [k, 16 channels].

A task (one iteration of the parallel loop) takes a block of output rows, or of positions, and a block of channel tiles:

    configure the tiles; copy its input rows, padding included, into workspace      (where amx_layout says so)
    for each channel tile: for each step of `tile_columns` positions:
        accumulator tiles = 0
        for tap, for chunk of the run: accumulators += data tiles x weight tiles    (2 x 2 by default: 4 loads, 4 products)
        store the accumulators to scratch memory, whence the epilogue takes them

The epilogue of a step is spread over the products of the next one: the vector units work while the matrix unit does. So do
the prefetches that bring the next channel tile's weights near. Eight tiles are all there is; the accumulators are the first.

Sources: Intel SDM volume 2 (TILELOADD, TDPBUSD); Intel, "Optimization reference manual", chapter "Intel AMX": a product takes
16 cycles, a tile load from the first cache 8; Georganas et al., "Tensor processing primitives", SC 2021.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from hwopt.backends.tvm.kernels import bfloat16
from hwopt.backends.tvm.kernels.amx_instructions import address, number_of, prefetch, room, stride, tile_instruction
from hwopt.backends.tvm.kernels.amx_layout import SIZES, WORD, layout_of, packed_size
from hwopt.backends.tvm.kernels.amx_spread import Background, Spread
from hwopt.backends.tvm.kernels.amx_stage import stage
from hwopt.backends.tvm.kernels.code import Code, Value, function, load, pieces, stored
from hwopt.backends.tvm.kernels.epilogue import Epilogue, Place
from hwopt.backends.tvm.kernels.geometry import Geometry
from hwopt.backends.tvm.kernels.micro import fused_multiply_add
from hwopt.backends.tvm.kernels.repack import Repack
from hwopt.backends.tvm.kernels.schedule import Schedule, split
from hwopt.backends.tvm.kernels.spec import MatmulSpec
from hwopt.target import MicroKernel

ROW_BYTES = 64
LINE = 64  # bytes of a cache line
UNROLLED = 9  # taps that are written one by one

# Of a task's image and first channel tile: the packed weights, and where those of vector 0 are, or would be
Weights = Callable[[Code, Value, Value], tuple[Value, Value]]


class TileGemm:
    """One kernel under construction."""

    def __init__(self, shape: Geometry, schedule: Schedule, micro: MicroKernel) -> None:
        self.shape, self.schedule, self.micro = shape, schedule, micro
        self.layout = layout_of(shape, micro)
        self.run, self.size = self.layout.run, SIZES[micro.dtype]
        self.lanes, self.vectors = micro.lanes, shape.vectors(micro.lanes)
        self.taps = shape.taps[0] * shape.taps[1]
        self.chunk = self.run.width * self.lanes  # weights of one tile
        self.panel = self.taps * self.run.count * self.chunk  # of one vector of channels
        self.block = min(schedule.block_rows, shape.rows) if shape.rows > 1 else min(schedule.block_columns, shape.columns)
        self.height = 1 if shape.rows == 1 else self.block
        positions = self.block if shape.rows == 1 else self.layout.positions(shape, self.block)
        self.tile_rows = -(-positions // -(-positions // micro.rows))  # tiles of equal height, as few as can be
        self.across = min(schedule.tile_columns // micro.rows, -(-positions // self.tile_rows))
        count = shape.images * shape.rows * shape.columns * shape.out_channels
        self.data = tirx.decl_buffer((shape.images * shape.height * shape.width * shape.channels,), shape.data_dtype, "data")
        self.weights = tirx.decl_buffer((packed_size(shape, micro),), shape.weight_dtype, "weights")
        self.out = tirx.decl_buffer((count,), shape.out_dtype, "out")
        self.epilogue = Epilogue(
            shape.epilogue, shape.accumulator, shape.out_dtype, shape.out_channels, shape.images, count,
            fused_multiply_add(micro), micro,
        )  # fmt: skip

    def build(self, symbol: str) -> tirx.PrimFunc:
        """PrimFunc(data, packed weights, *epilogue tensors, out)."""
        return self._function(symbol, self.weights, lambda *_: (self.weights, 0))

    def build_computed(self, spec: MatmulSpec, symbol: str) -> tirx.PrimFunc:
        """PrimFunc(left, right, *epilogue tensors, out): every task packs the part of the right side that it multiplies.

        The words of 4 bytes lie as vector instructions want them; 16 words of 16 channels are a tile.
        """
        right = tirx.decl_buffer(((1 if spec.shared else spec.batch) * spec.k * spec.n,), spec.weight_dtype, "right")
        count = min(self.schedule.block_tiles * self.schedule.vectors, self.vectors)

        def packed(code: Code, image: Value, tile: Value) -> tuple[Value, Value]:
            space = room(code, "packed", count * self.panel, stored(spec.weight_dtype))
            first = tile * self.schedule.vectors
            base = 0 if spec.shared else image * (spec.k * spec.n)
            Repack(spec, self.micro.others[0], right, base, space).emit(code, first, count)
            return space, first * -self.panel

        return self._function(symbol, right, packed)

    def _function(self, symbol: str, right: Value, weights: Weights) -> tirx.PrimFunc:
        code, tasks = Code(), self.schedule.tasks(self.shape, self.vectors)
        code.loop("task", tasks, lambda inner, number: self._task(inner, number, weights), parallel=self.schedule.parallel)
        parameters = [self.data, right, *self.epilogue.parameters, self.out]
        over = self.epilogue.overwritten(self.shape.out_dtype)
        return function(symbol, parameters, code, bfloat16.library(self.micro), over)

    def _task(self, code: Code, number: Value, weights: Weights) -> None:
        image, row, column, tile = self.schedule.place(number, self.shape, self.vectors)
        vectors = min(self.schedule.vectors, self.vectors)
        scratch = room(code, "scratch", self.across * self.tile_rows * vectors * self.lanes, self.shape.accumulator)
        source = self.data
        if self.layout.staged:
            size = self.layout.space(self.shape, self.height, self.across * self.micro.rows)
            source = room(code, "staged", size, stored(self.shape.data_dtype))
        packed = weights(code, image, tile)
        self._configure(code)
        total, first = (self.shape.rows, row) if self.shape.rows > 1 else (self.shape.columns, column)
        rest = total % self.block

        def of_size(size: int) -> Callable[[Code], None]:
            return lambda inner: Block(self, image, first, size, source, scratch, *packed).emit(inner, tile)

        code.when(rest == 0 or tirx.LE(first + self.block, total), of_size(self.block), of_size(rest))
        tile_instruction(code, "tilerelease")

    def _configure(self, code: Code) -> None:
        """Palette 1; then for every tile the bytes of a row, and the rows."""
        vectors = min(self.schedule.vectors, self.vectors)
        accumulators = self.across * vectors
        word_rows = self.run.width * self.size // WORD
        data, weights = (self.tile_rows, self.run.width * self.size), (word_rows, ROW_BYTES)
        tiles = [(self.tile_rows, ROW_BYTES)] * accumulators + [data] * self.across + [weights] * vectors
        content = [1] + [0] * (ROW_BYTES - 1)
        for index, (rows, size) in enumerate(tiles):
            content[16 + 2 * index], content[48 + index] = size, rows
        config = code.alloc("config", ROW_BYTES, "uint8")
        for at, value in enumerate(content):
            code.store(config, at, tirx.const(value, "uint8"))
        tile_instruction(code, "ldtilecfg", address(config, 0))


@dataclass(frozen=True)
class Block:
    """The positions of one task: `size` output rows from row `first` on, or positions where there is one row only."""

    gemm: TileGemm
    image: Value
    first: Value
    size: int
    source: Value
    scratch: Value
    weights: Value
    offset: Value  # of vector 0 in the weights

    @property
    def height(self) -> int:
        return self.size if self.gemm.shape.rows > 1 else 1

    @property
    def positions(self) -> int:
        shape = self.gemm.shape
        return self.gemm.layout.positions(shape, self.size) if shape.rows > 1 else self.size

    def emit(self, code: Code, tile: Value) -> None:
        """Every group's and channel tile's results."""
        gemm, shape = self.gemm, self.gemm.shape
        if gemm.layout.staged:
            stage(code, shape, gemm.layout, gemm.data, self.source, self.image, self.first, self.height)
        code.loop("group", shape.groups, lambda inner, group: self._channel_tiles(inner, group, tile))

    def origin(self, group: Value) -> Value:
        """The first element of position 0."""
        gemm, shape = self.gemm, self.gemm.shape
        in_group = group * shape.run if shape.groups > 1 else 0
        if gemm.layout.staged:
            return in_group
        whole = gemm.layout.pitch * gemm.layout.step if shape.rows > 1 else gemm.layout.step
        return self.image * (shape.height * shape.width * shape.channels) + self.first * whole + in_group

    def _channel_tiles(self, code: Code, group: Value, first: Value) -> None:
        """Whole channel tiles in a loop, then the last one where it has fewer vectors or channels."""
        gemm = self.gemm
        width, lanes, block = gemm.schedule.vectors, gemm.lanes, gemm.schedule.block_tiles
        whole = gemm.shape.n // (width * lanes)
        total = -(-gemm.vectors // width)
        many = block if whole % block == 0 and whole == total else tirx.Max(0, tirx.Min(block, whole - first))
        many = whole if block >= total else many
        code.loop("tile", many, lambda inner, tile: Sweep(self, group, tile * width, width, lanes).emit(inner), start=first)
        if whole == total:
            return
        rest = Sweep(self, group, whole * width, gemm.vectors - whole * width, gemm.shape.n - (gemm.vectors - 1) * lanes)
        here = True if block >= total else tirx.And(tirx.LE(first, whole), tirx.GT(first + block, whole))
        code.when(here, rest.emit)


@dataclass(frozen=True)
class Step:
    """Tiles of positions that are multiplied together: tile i begins at position starts[i] and is new from row skip[i] on."""

    starts: tuple[Value, ...]
    skip: tuple[int, ...]
    valid: tuple[int, ...]  # rows up to the block's last position


@dataclass(frozen=True)
class Sweep:
    """One channel tile, `vectors` vectors from `vector` on, over all positions of a block."""

    block: Block
    group: Value
    vector: Value
    vectors: int
    last_lanes: int

    def emit(self, code: Code) -> None:
        """The steps in order, the epilogue of each beside the products of the next."""
        gemm, height = self.block.gemm, self.block.gemm.tile_rows
        shared = self._shared(code)
        origin = code.bind("origin", self.block.origin(self.group))
        panel = self.block.offset + self.group * (gemm.vectors * gemm.panel) + self.vector * gemm.panel
        panel = code.bind("panel", panel)
        size = gemm.across * height
        whole, rest = divmod(self.block.positions, size)
        products = Products(self, origin, panel)
        final = self._rest(whole * size, rest)
        if whole:
            products.emit(code, 0, self._whole(0))
            count = whole - 1

            def step(inner: Code, index: Value) -> None:
                products.emit(inner, index, self._whole(index * size), self._background(shared, (index - 1) * size))

            code.loop("step", count, step, start=1)
            waiting = self._background(shared, (whole - 1) * size)
            if not rest:
                code.loop("row", waiting.count, waiting.row)
                return
            products.emit(code, whole, final, waiting)
        else:
            products.emit(code, 0, final)
        self._finish(code, shared, final)

    def _whole(self, start: Value) -> Step:
        gemm = self.block.gemm
        starts = tuple(start + index * gemm.tile_rows for index in range(gemm.across))
        return Step(starts, (0,) * gemm.across, (gemm.tile_rows,) * gemm.across)

    def _rest(self, start: int, positions: int) -> Step:
        """The last tiles. Staged data may be read beyond the last position; elsewhere the last tile begins earlier instead."""
        gemm, height = self.block.gemm, self.block.gemm.tile_rows
        starts = range(start, start + positions, height)
        last = self.block.positions
        if gemm.layout.staged:
            return Step(tuple(starts), (0,) * len(starts), tuple(min(height, last - at) for at in starts))
        moved = tuple(min(at, last - height) for at in starts)
        return Step(moved, tuple(at - to for at, to in zip(starts, moved, strict=True)), (height,) * len(starts))

    def _shared(self, code: Code) -> list[list[tuple[int, int, list[Value]]]]:
        """Per vector its pieces: offset, lanes, and what the epilogue loads once for all positions."""
        epilogue, found = self.block.gemm.epilogue, []
        for vector in range(self.vectors):
            lanes = self.last_lanes if vector == self.vectors - 1 else self.block.gemm.lanes
            parts = [
                (offset, count, epilogue.per_channel(code, self._channel(vector) + offset, count))
                for offset, count in pieces(lanes, self.block.gemm.lanes)
            ]
            found.append(parts)
        return found

    def _channel(self, vector: int) -> Value:
        gemm = self.block.gemm
        return self.group * gemm.shape.n + (self.vector + vector) * gemm.lanes

    def _background(self, shared: Any, start: Value) -> Background:
        gemm = self.block.gemm
        return Background(lambda code, row: self._row(code, shared, row, start + row), gemm.across * gemm.tile_rows)

    def _finish(self, code: Code, shared: Any, step: Step) -> None:
        """The epilogue of a step whose tiles overlap or end early."""
        height = self.block.gemm.tile_rows
        for tile, (start, skip, valid) in enumerate(zip(step.starts, step.skip, step.valid, strict=True)):

            def row(inner: Code, index: Value, tile: int = tile, start: Value = start) -> None:
                self._row(inner, shared, tile * height + index, start + index)

            code.loop("row", valid - skip, row, start=skip)

    def _row(self, code: Code, shared: Any, index: Value, position: Value) -> None:
        """Results of one position, row `index` of the scratch memory; nothing for positions between the rows of the output."""
        shape, pitch = self.block.gemm.shape, self.block.gemm.layout.pitch
        if shape.rows == 1:
            self._results(code, shared, index, self.block.image * shape.columns + self.block.first + position)
            return
        first = (self.block.image * shape.rows + self.block.first) * shape.columns
        if pitch == shape.columns:
            self._results(code, shared, index, first + position)
            return
        column, row = (code.bind("place", part) for part in split(position, pitch))
        code.when(
            column < shape.columns if isinstance(column, int) else tirx.LT(column, shape.columns),
            lambda inner: self._results(inner, shared, index, first + row * shape.columns + column),
        )

    def _results(self, code: Code, shared: Any, index: Value, position: Value) -> None:
        gemm = self.block.gemm
        base = code.bind("base", position * gemm.shape.out_channels)
        for vector, parts in enumerate(shared):
            for offset, lanes, values in parts:
                channel = self._channel(vector) + offset
                total = load(self.block.scratch, (index * self.vectors + vector) * gemm.lanes + offset, lanes)
                place = Place(base + channel, channel, self.block.image)
                result = gemm.epilogue.apply(code, total, place, values, lanes, False)
                code.store(gemm.out, place.flat, result, lanes)


@dataclass(frozen=True)
class Products:
    """The products of a step: `origin` is position 0's first element, `panel` the channel tile's first weight."""

    sweep: Sweep
    origin: Value
    panel: Value

    def emit(self, code: Code, number: Value, step: Step, background: Background | None = None) -> None:
        """Accumulators of step `number` to scratch memory, once the background has read what lies there."""
        gemm, vectors = self.sweep.block.gemm, self.sweep.vectors
        for which in range(len(step.starts) * vectors):
            tile_instruction(code, "tilezero", number_of(which))
        bases = [code.bind("tile", self.origin + start * gemm.layout.step) for start in step.starts]
        ahead = self._ahead(code, number)
        unrolled = gemm.taps <= UNROLLED
        if background and not unrolled:
            code.loop("row", background.count, background.row)
        spread = Spread(background, gemm.taps * gemm.run.count) if unrolled else Spread(None, 1)
        for down in range(gemm.shape.taps[0]):
            if unrolled:
                for across in range(gemm.shape.taps[1]):
                    self._tap(code, bases, down, across, spread, ahead)
                continue

            def across_loop(inner: Code, across: Value, down: int = down) -> None:
                self._tap(inner, bases, down, across, spread, ahead)

            code.loop("across", gemm.shape.taps[1], across_loop)
        pitch = vectors * gemm.lanes
        for row, column in itertools.product(range(len(step.starts)), range(vectors)):
            place = address(self.sweep.block.scratch, row * gemm.tile_rows * pitch + column * gemm.lanes)
            tile_instruction(code, "tilestored64", number_of(row * vectors + column), place, stride(4 * pitch))

    def _ahead(self, code: Code, number: Value) -> Value:
        """Where this step prefetches weights: its share of the next channel tile's."""
        gemm = self.sweep.block.gemm
        per_step = gemm.taps * gemm.run.count * gemm.schedule.prefetch * (LINE // gemm.size)
        return code.bind("ahead", self.panel + self.sweep.vectors * gemm.panel + number * per_step)

    def _tap(self, code: Code, bases: Sequence[Value], down: int, across: Value, spread: Spread, ahead: Value) -> None:
        """The chunks of one tap's run: in loops where neighbours have equal work."""
        gemm = self.sweep.block.gemm
        run, tap = gemm.run, down * gemm.shape.taps[1] + across
        offset = gemm.layout.tap(gemm.shape, self.sweep.block.height, down, across)

        def work(chunk: int) -> tuple[int, bool]:
            return spread.rows(tap * run.count + chunk), run.start(chunk) != chunk * run.width

        for (rows, moved), group in itertools.groupby(range(run.count), work):
            chunks = list(group)

            def body(inner: Code, chunk: Value, rows: int = rows, moved: bool = moved) -> None:
                data = offset + (run.last if moved else chunk * run.width)
                number = tap * run.count + chunk
                self._chunk(inner, [base + data for base in bases], self.panel + number * gemm.chunk)
                for line in range(gemm.schedule.prefetch):
                    at = ahead + (number * gemm.schedule.prefetch + line) * (LINE // gemm.size)
                    prefetch(inner, address(self.sweep.block.weights, at))
                spread.emit(inner, number, rows)

            code.loop("chunk", len(chunks), body, start=chunks[0])

    @property
    def _weight_load(self) -> str:
        """Weights that one step alone multiplies pass the first cache by, where the data stay for the next channel tile."""
        block = self.sweep.block
        return "tileloaddt164" if block.positions <= block.gemm.across * block.gemm.tile_rows else "tileloadd64"

    def _chunk(self, code: Code, data: Sequence[Value], weights: Value) -> None:
        """Every data tile times every weight tile; each is loaded once, right before its first product."""
        gemm, vectors = self.sweep.block.gemm, self.sweep.vectors
        most = min(gemm.schedule.vectors, gemm.vectors)
        first_data = gemm.across * most
        first_weights = first_data + gemm.across
        for row, at in enumerate(data):
            for column in range(vectors):
                if row == 0:
                    panel = address(self.sweep.block.weights, weights + column * gemm.panel)
                    tile_instruction(code, self._weight_load, number_of(first_weights + column), panel, stride(ROW_BYTES))
                if column == 0:
                    tile = address(self.sweep.block.source, at)
                    step = stride(gemm.layout.step * gemm.size)
                    tile_instruction(code, "tileloadd64", number_of(first_data + row), tile, step)
                operands = (row * vectors + column, first_data + row, first_weights + column)
                tile_instruction(code, gemm.micro.intrinsic.removeprefix("llvm.x86."), *map(number_of, operands))
