"""Blocking of the implicit GEMM, and the small analytical model that chooses it: no search."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from tvm import tirx

from hwopt.backends.tvm.kernels.balance import Work, divided
from hwopt.backends.tvm.kernels.code import Value
from hwopt.backends.tvm.kernels.geometry import Geometry
from hwopt.target import MicroKernel

LATENCY = 8  # independent accumulators that hide a multiply-add's latency: 4 cycles x 2 a cycle
SERIAL_MACS = 200_000  # below this a parallel launch costs more than it gains
SERIAL_CYCLES = 4_000  # of one core: spinning workers take a loop over in less (measured on int8 networks)
WORKSPACE = 256 << 10  # bytes of padded rows per task: a share of the second level cache


@dataclass(frozen=True)
class Schedule:
    """Tiles in output positions and vectors of channels; blocks (what one task computes) in positions and channel tiles."""

    tile_rows: int
    tile_columns: int
    vectors: int
    unroll: int
    block_rows: int
    block_columns: int
    block_tiles: int
    parallel: bool = False
    prefetch: int = 0  # on a matrix unit: cache lines of the next channel tile's weights asked for beside each chunk of products

    def counts(self, shape: Geometry, vectors: int) -> tuple[int, int, int, int]:
        """Images, row blocks, column blocks, channel blocks."""
        tiles = -(-vectors // self.vectors)
        return (
            shape.images,
            -(-shape.rows // self.block_rows),
            -(-shape.columns // self.block_columns),
            -(-tiles // self.block_tiles),
        )

    def tasks(self, shape: Geometry, vectors: int) -> int:
        images, rows, columns, tiles = self.counts(shape, vectors)
        return images * rows * columns * tiles

    def place(self, task: Value, shape: Geometry, vectors: int) -> tuple[Value, Value, Value, Value]:
        """The image, first row, first column and first channel tile of a task."""
        _, rows, columns, tiles = self.counts(shape, vectors)
        tile, task = split(task, tiles)
        column, task = split(task, columns)
        row, image = split(task, rows)
        return image, row * self.block_rows, column * self.block_columns, tile * self.block_tiles


def split(number: Value, count: int) -> tuple[Value, Value]:
    """(number mod count, number div count)."""
    if count == 1:
        return 0, number
    if isinstance(number, int):
        return number % count, number // count
    return tirx.floormod(number, count), tirx.floordiv(number, count)


def default_schedule(shape: Geometry, micro: MicroKernel, cores: int = 1) -> Schedule:
    """The tile with the fewest estimated cycles, then blocks that fit the cache and keep the cores busy."""
    rows, columns, vectors = min(tiles_of(shape, micro), key=lambda tile: cycles(shape, micro, *tile))
    words = shape.words(micro.depth)
    # more than about 16 multiply-adds hide the loop; unrolling large tiles further makes LLVM spill (measured: 15 % slower)
    most = 32 // words_at_once(micro)
    unroll = next(count for count in (4, 2, 1) if rows * columns * vectors * count <= most or count == 1)
    return _blocked(shape, micro, cores, Schedule(rows, columns, vectors, min(unroll, words), 1, 1, 1))


def parallel_pays(cycles: float, cores: int) -> bool:
    """Whether work of so many cycles of one core is worth a parallel launch."""
    return cores > 1 and cycles >= SERIAL_CYCLES


def tiles_of(shape: Geometry, micro: MicroKernel) -> Iterator[tuple[int, int, int]]:
    """(rows, columns, vectors) whose accumulators and operands fit the registers."""
    most = shape.vectors(micro.lanes)
    for vectors, columns in itertools.product(range(1, min(most, 12) + 1), range(1, min(shape.columns, 30) + 1)):
        for rows in range(1, min(shape.rows, 8) + 1):
            accumulators = _blocks(rows * columns, micro) * vectors
            if accumulators + words_at_once(micro) * (micro.rows * vectors + 1) > micro.registers:
                break
            yield rows, columns, vectors


def cycles(shape: Geometry, micro: MicroKernel, rows: int, columns: int, vectors: int) -> float:
    """Cycles of all tiles of an image and group: two multiply-adds and two loads a cycle, and the epilogues."""
    steps = shape.taps[0] * shape.taps[1] * shape.words(micro.depth)
    total = 0.0
    for (height, ys), (width, xs), (deep, vs) in itertools.product(
        cuts_of(shape.rows, rows), cuts_of(shape.columns, columns), cuts_of(shape.vectors(micro.lanes), vectors)
    ):
        positions = _blocks(height * width, micro)
        issue = issued(positions, deep, micro)
        total += ys * xs * vs * (steps * (issue + 0.5) + 2.0 * positions * deep + 12)
    return total


def issued(positions: int, vectors: int, micro: MicroKernel) -> float:
    """Cycles of a tile's step: two multiply-adds and two loads a cycle; of several words at once, four instructions a cycle."""
    loads = positions + micro.rows * vectors
    if (words := words_at_once(micro)) > 1:
        return max((2 * words + 1) * positions * vectors + words * loads, 4 * LATENCY) / 4
    return max(positions * vectors, loads, LATENCY) / 2


def words_at_once(micro: MicroKernel) -> int:
    """Words of weights, and of data, that a step holds in registers."""
    return max(1, micro.narrow)


def _blocks(positions: int, micro: MicroKernel) -> int:
    """Positions that are computed: a micro-kernel takes `rows` at once."""
    return round_up(positions, micro.rows)


def cuts_of(size: int, tile: int) -> list[tuple[int, int]]:
    """(tile size, how many) of whole tiles and the rest."""
    cuts = [(tile, size // tile), (size % tile, 1)]
    return [(width, count) for width, count in cuts if width and count]


def _blocked(shape: Geometry, micro: MicroKernel, cores: int, tile: Schedule) -> Schedule:
    """Blocks for a tile: padded rows must fit the workspace, and there should be some tasks for every core."""
    tiles = -(-shape.vectors(micro.lanes) // tile.vectors)
    work = cycles(shape, micro, tile.tile_rows, tile.tile_columns, tile.vectors) * shape.images * shape.groups
    parallel = parallel_pays(work, cores)
    block_rows, block_columns = round_up(shape.rows, tile.tile_rows), round_up(shape.columns, tile.tile_columns)
    if copies_rows(shape, micro) and not shape.pooled:
        block_rows = rows_in_workspace(shape, tile.tile_rows, 2 if widens(shape, micro) else 0)
    elif widens(shape, micro) and not shape.pooled:
        most = WORKSPACE // (2 * shape.channels * shape.strides[1])
        block_columns = min(block_columns, max(1, most // tile.tile_columns) * tile.tile_columns)
    if parallel and shape.pooled:
        block_rows, tiles = divided(Work(shape, work, "", tile.tile_rows, block_rows, tiles), cores)
    elif parallel and shape.rows > 1:
        block_rows, tiles = divided(Work(shape, work, "rows", tile.tile_rows, block_rows, tiles), cores)
    elif parallel:
        along = "" if copies_rows(shape, micro) or shape.computed else "columns"
        size, most = (tile.tile_columns, block_columns) if along else (tile.tile_rows, block_rows)
        found, tiles = divided(Work(shape, work, along, size, most, tiles), cores)
        block_columns = found if along else block_columns
    return Schedule(tile.tile_rows, tile.tile_columns, tile.vectors, tile.unroll, block_rows, block_columns, tiles, parallel)


def round_up(size: int, tile: int) -> int:
    """The next multiple of `tile`."""
    return -(-size // tile) * tile


def widens(shape: Geometry, micro: MicroKernel) -> bool:
    """Whether bytes are widened in workspace, once, for an instruction that takes 16-bit numbers."""
    return "pmadd" in micro.intrinsic and not micro.narrow and micro.dtype == "int8" and not shape.computed and not shape.beside


def copies_rows(shape: Geometry, micro: MicroKernel) -> bool:
    """Whether a task copies whole rows of an image into workspace, for what surrounds them or to widen them."""
    return shape.padded or (widens(shape, micro) and shape.height > 1)


def rows_in_workspace(shape: Geometry, tile_rows: int, size: int = 0) -> int:
    """Output rows whose padded input, elements of `size` bytes, fits the workspace, a multiple of the tile's."""
    size = size or {"float32": 4, "bfloat16": 2}.get(shape.data_dtype, 1)
    row = shape.padded_width * shape.channels * size * shape.strides[0]
    whole = round_up(shape.rows, tile_rows)
    return min(whole, max(tile_rows, WORKSPACE // row // tile_rows * tile_rows))
