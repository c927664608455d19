"""When Winograd's algorithm pays, and how its work is divided: a model of its cycles, beside that of the implicit GEMM."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

from hwopt.backends.tvm.kernels import schedule
from hwopt.backends.tvm.kernels.amx_schedule import is_tile
from hwopt.backends.tvm.kernels.geometry import Geometry, geometry
from hwopt.backends.tvm.kernels.schedule import Schedule
from hwopt.backends.tvm.kernels.spec import ConvSpec, Mean
from hwopt.target import MicroKernel

TILE, PATCH = 4, 6  # results and data of one tile, in both directions
POINTS = PATCH * PATCH
WORTH = 0.93  # of the implicit GEMM's cycles: below, it pays
# cycles of one vector, measured on AVX-512 with 32 registers: data of a tile, weights of a word, results of a tile
PATCH_CYCLES, WEIGHT_CYCLES, RESULT_CYCLES = 100.0, 80.0, 110.0
LEAST_CHANNELS = 16  # in and out
MOST_VECTORS = 2  # of channels in a tile: the transformed weights of more fill the second cache


@dataclasses.dataclass(frozen=True)
class WinogradSpec(ConvSpec):
    """A convolution that is computed this way."""


def winograd_spec(spec: ConvSpec) -> WinogradSpec:
    return WinogradSpec(**{one.name: getattr(spec, one.name) for one in dataclasses.fields(spec)})


def widened(micro: MicroKernel) -> MicroKernel:
    """The micro-kernel for 16-bit numbers beside one for bytes."""
    depth = 1 if "mull" in micro.wide else 2  # of Arm, of x86
    return dataclasses.replace(micro, dtype="int16", activation="int16", depth=depth, intrinsic=micro.wide, others=())


def tiles(spec: ConvSpec) -> tuple[int, int]:
    """Tiles down and across an image."""
    return -(-spec.out_height // TILE), -(-spec.out_width // TILE)


def products(spec: ConvSpec, count: int, channels: int) -> Geometry:
    """The 36 products of `count` tiles, as groups of one matmul: [count, 36 x k] -> [count, 36 x channels]."""
    return Geometry(
        images=1, height=1, width=count, channels=POINTS * spec.in_channels, rows=1, columns=count, n=channels, groups=POINTS,
        run=spec.in_channels, data_dtype="int16", weight_dtype="int16", out_dtype="int32", accumulator="int32",
    )  # fmt: skip


def able(spec: ConvSpec, micro: MicroKernel) -> bool:
    """Whether the kernel can compute it, apart from what its weights are (winograd.exact)."""
    plain = spec.kernel == (3, 3) and spec.strides == (1, 1) == spec.dilations and spec.groups == 1
    whole = spec.in_channels % 2 == 0 and min(spec.in_channels, spec.out_channels) >= LEAST_CHANNELS
    steps = not any(isinstance(step, Mean) for step in spec.epilogue)
    return bool(micro.wide) and not is_tile(micro) and plain and whole and steps


@functools.lru_cache(maxsize=4096)
def pays(spec: ConvSpec, micro: MicroKernel) -> bool:
    """Whether it takes clearly fewer cycles of one core than the implicit GEMM."""
    return able(spec, micro) and cycles(spec, default_schedule(spec, micro), micro) < WORTH * direct_cycles(spec, micro)


def direct_cycles(spec: ConvSpec, micro: MicroKernel) -> float:
    """Estimated cycles of the implicit GEMM on one core."""
    shape = geometry(spec)
    tile = schedule.default_schedule(shape, micro)
    return schedule.cycles(shape, micro, tile.tile_rows, tile.tile_columns, tile.vectors) * shape.images


@functools.lru_cache(maxsize=4096)
def default_schedule(spec: ConvSpec, micro: MicroKernel, cores: int = 1) -> Schedule:
    """The blocks and tiles with the fewest estimated cycles of the busiest core."""
    one = min(schedules(spec, micro, 1), key=lambda found: cycles(spec, found, micro))
    if not schedule.parallel_pays(cycles(spec, one, micro), cores):
        return one
    several = (dataclasses.replace(found, parallel=True) for found in schedules(spec, micro, cores))
    return min(several, key=lambda found: cycles(spec, found, micro, cores))


def schedules(spec: ConvSpec, micro: MicroKernel, cores: int) -> Iterator[Schedule]:
    """Blocks of rows of tiles and of channels, each with its best tile of products."""
    down, across = tiles(spec)
    wide = widened(micro)
    vectors = -(-spec.out_channels // micro.lanes)
    for rows in sorted({-(-down // count) for count in range(1, down + 1)}):
        for deep, columns in _best_tiles(spec, rows * across, wide):
            channel_tiles = -(-vectors // deep)
            for count in range(1, min(cores, channel_tiles) + 1):
                yield Schedule(1, columns, deep, 1, rows, across, -(-channel_tiles // count))


def _best_tiles(spec: ConvSpec, count: int, wide: MicroKernel) -> Iterator[tuple[int, int]]:
    """(vectors, columns) for each number of vectors."""
    shape = products(spec, count, spec.out_channels)
    best: dict[int, tuple[float, int]] = {}
    for rows, columns, deep in schedule.tiles_of(shape, wide):
        if rows == 1 and deep <= MOST_VECTORS:
            found = (schedule.cycles(shape, wide, 1, columns, deep), columns)
            best[deep] = min(best.get(deep, found), found)
    return ((deep, columns) for deep, (_, columns) in best.items())


def cycles(spec: ConvSpec, found: Schedule, micro: MicroKernel, cores: int = 1) -> float:
    """Estimated cycles of the busiest core."""
    parts = Parts.of(spec, found, micro)
    return -(-parts.tasks // cores) * parts.cycles


@dataclasses.dataclass(frozen=True)
class Parts:
    """What one task does, in vectors that are transformed and cycles of products, and how many tasks there are."""

    tasks: int
    tiles: int
    vectors: int  # of channels
    words: int
    patches: int
    multiplied: float

    @staticmethod
    def of(spec: ConvSpec, found: Schedule, micro: MicroKernel) -> Parts:
        down, across = tiles(spec)
        wide = widened(micro)
        block = found.vectors * found.block_tiles
        every = -(-spec.out_channels // micro.lanes)
        count, vectors = found.block_rows * across, min(every, block)
        shape = products(spec, count, vectors * micro.lanes)
        multiplied = POINTS * schedule.cycles(shape, wide, 1, found.tile_columns, found.vectors)
        tasks = spec.batch * -(-down // found.block_rows) * -(-every // block)
        patches = count * -(-spec.in_channels // (2 * micro.lanes))
        return Parts(tasks, count, vectors, -(-spec.in_channels // wide.depth), patches, multiplied)

    @property
    def weights(self) -> int:
        return self.vectors * self.words

    @property
    def results(self) -> int:
        return self.tiles * self.vectors

    @property
    def cycles(self) -> float:
        moved = self.patches * PATCH_CYCLES + self.weights * WEIGHT_CYCLES + self.results * RESULT_CYCLES
        return moved + self.multiplied
