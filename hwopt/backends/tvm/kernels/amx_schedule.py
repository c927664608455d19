"""Blocking of kernels on a matrix unit, and when it is better than vectors: a small analytical model in cycles.

A product of two tiles occupies the matrix unit for 16 cycles, a tile load the first cache for 8 (for 16 where the rows of the
tile cross cache lines). With 2 x 2 accumulators that is 64 cycles of products for 32 of loads; 1 x 1 would be 16 for 16. Each
accumulator waits 52 cycles for its last product, so fewer than four of them leave the unit idle. The
epilogue runs on the vector units at the same time. Source: Intel, "Optimization reference manual", chapter "Intel AMX".
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

from hwopt.backends.tvm.kernels import schedule
from hwopt.backends.tvm.kernels.amx_layout import SIZES, Layout, layout_of
from hwopt.backends.tvm.kernels.geometry import Geometry
from hwopt.backends.tvm.kernels.schedule import Schedule, cuts_of, round_up
from hwopt.target import MicroKernel

PRODUCT, LATENCY, LOAD, LINE = 16, 52, 8, 64
RESULTS = 3.0  # cycles of the epilogue for a vector of results
TURN = 40  # cycles between the last product of a step and the first of the next
SETUP = 150  # of a task: configuration and release of the tiles
NEAR, FAR = 40 << 10, 48  # bytes of the first cache that operands can fill; bytes a cycle from the second
WORKSPACE = 512 << 10  # bytes of staged data of a task: a share of the second cache, 2 MiB on every processor with AMX
SERIAL_MACS = 4_000_000  # below this a parallel launch costs more than it gains
TILES = 8
TALLEST = 16  # rows of taps that the template writes one by one


def tiles_of(shape: Geometry, micro: MicroKernel) -> Iterator[tuple[int, int, int]]:
    """(1, positions, vectors) of the blocks whose accumulators and operands are eight tiles at most; 2 x 2 first."""
    layout = layout_of(shape, micro)
    most = -(-layout.positions(shape, shape.rows) // micro.rows)
    counts = sorted(itertools.product(range(1, 5), range(1, 5)), key=lambda count: abs(count[0] - 2) + abs(count[1] - 2))
    for across, vectors in counts:
        if across * vectors + across + vectors <= TILES and across <= most and vectors <= shape.vectors(micro.lanes):
            yield 1, across * micro.rows, vectors


def cycles(shape: Geometry, micro: MicroKernel, rows: int, columns: int, vectors: int) -> float:
    """Cycles of an image and group, `rows` being 1."""
    layout = layout_of(shape, micro)
    tiles = -(-layout.positions(shape, shape.rows) // micro.rows)
    total = staging(shape, layout, micro) / shape.groups + SETUP
    for (across, xs), (deep, vs) in itertools.product(
        cuts_of(tiles, columns // micro.rows), cuts_of(shape.vectors(micro.lanes), vectors)
    ):
        total += xs * vs * step_cycles(shape, layout, micro, across, deep)
    return total * rows


def step_cycles(shape: Geometry, layout: Layout, micro: MicroKernel, across: int, deep: int) -> float:
    """One step: products, loads, epilogue and the second cache work at the same time; the slowest counts."""
    size, iterations = SIZES[micro.dtype], shape.taps[0] * shape.taps[1] * layout.run.count
    crossing = 2 if layout.step * size % LINE or layout.run.last * size % LINE else 1
    products = max(PRODUCT * across * deep, LATENCY) * iterations
    loads = LOAD * (across * crossing + deep) * iterations
    data = across * micro.rows * layout.step * size
    weights = deep * iterations * layout.run.width * size * micro.lanes
    far = data + (weights if weights + data * shape.taps[0] > NEAR else 0)
    return max(products, loads, RESULTS * across * micro.rows * deep, far / FAR) + TURN


def staging(shape: Geometry, layout: Layout, micro: MicroKernel) -> float:
    """Cycles of the copy of an image."""
    if not layout.staged:
        return 0.0
    return layout.space(shape, shape.rows, 0) * SIZES[micro.dtype] / FAR


def default_schedule(shape: Geometry, micro: MicroKernel, cores: int = 1) -> Schedule:
    """The block of tiles with the fewest estimated cycles, blocks that fit the cache, and a share for every core."""
    _, columns, vectors = min(tiles_of(shape, micro), key=lambda tile: cycles(shape, micro, *tile))
    layout = layout_of(shape, micro)
    tiles = -(-shape.vectors(micro.lanes) // vectors)
    parallel = cores > 1 and shape.macs * shape.images >= SERIAL_MACS
    rows, wide, block_tiles = rows_in_workspace(shape, layout, micro), round_up(shape.columns, columns), tiles
    shares = cores if parallel else 1
    if shape.images < shares:
        if shape.groups == 1 and tiles >= 2 * shares and _weights(shape) > _data(shape):
            block_tiles = -(-tiles // shares)  # each core reads its weights only
        elif shape.rows > 1:
            rows = min(rows, -(-shape.rows // (2 * shares)) if shape.rows >= 16 * shares else -(-shape.rows // shares))
        elif not layout.staged and not shape.computed:
            wide = round_up(-(-shape.columns // shares), columns)
        elif shape.groups == 1:
            block_tiles = -(-tiles // shares)
    found = Schedule(1, columns, vectors, 1, rows, wide, block_tiles, parallel)
    return with_prefetch(found, shape, micro)


def with_prefetch(found: Schedule, shape: Geometry, micro: MicroKernel) -> Schedule:
    """Every step asks for an equal share of the next channel tile's weights; computed ones have just been packed."""
    if shape.computed:
        return found
    layout = layout_of(shape, micro)
    block = layout.positions(shape, found.block_rows) if shape.rows > 1 else min(found.block_columns, shape.columns)
    steps = -(-block // found.tile_columns)
    lines = found.vectors * layout.run.width * SIZES[micro.dtype] * micro.lanes // LINE
    return dataclasses.replace(found, prefetch=-(-lines // steps))


def rows_in_workspace(shape: Geometry, layout: Layout, micro: MicroKernel) -> int:
    """Output rows of a task: all, or as many as fit where they are staged."""
    if not layout.staged or shape.rows == 1:
        return shape.rows
    size = SIZES[micro.dtype]
    count = -(-layout.space(shape, shape.rows, 0) * size // WORKSPACE)
    return max(1, -(-shape.rows // count))


def reason_for_vectors(shape: Geometry, micro: MicroKernel) -> str:
    """Why vector instructions, the first of `micro.others`, should compute this kernel; "" if tiles should."""
    layout = layout_of(shape, micro)
    if shape.taps[0] > TALLEST:
        return f"it has {shape.taps[0]} rows of taps"
    if layout.staged and layout.space(shape, 1, 0) * SIZES[micro.dtype] > WORKSPACE:
        return "one row of its data does not fit into the workspace"
    if shape.computed and shape.run > micro.depth and shape.run % micro.depth:
        return f"products of {shape.run} do not fill whole tiles of a computed right side"
    if not micro.others:
        return ""
    tiles, vectors = _fewest(shape, micro), _fewest(shape, micro.others[0])
    vectors += staging(shape, layout, micro) / shape.groups if shape.padded else 0.0
    return "" if tiles < vectors else f"vectors take {vectors:.0f} cycles, tiles {tiles:.0f}"


@functools.lru_cache(maxsize=4096)
def _fewest(shape: Geometry, micro: MicroKernel) -> float:
    if is_tile(micro):
        return min(cycles(shape, micro, *tile) for tile in tiles_of(shape, micro))
    return min(schedule.cycles(shape, micro, *tile) for tile in schedule.tiles_of(shape, micro))


def is_tile(micro: MicroKernel) -> bool:
    """Whether the micro-kernel is a matrix unit's product of tiles."""
    return ".tdp" in micro.intrinsic


def _weights(shape: Geometry) -> int:
    return shape.n * shape.groups * shape.taps[0] * shape.taps[1] * shape.run


def _data(shape: Geometry) -> int:
    return shape.height * shape.width * shape.channels
