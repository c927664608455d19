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

WORTH = 0.92  # of the implicit GEMM's cycles: below, it pays
SMALL_CACHE, LARGE_CACHE = 512 << 10, 2 << 20  # second ones, of processors with short and with long vectors
FEW = 8  # accumulators of a tile of products: a second step in a loop's turn hides its end
FAR = 6.0  # cycles of a cache line from beyond the second cache (measured on AVX2)
# Cycles of a step of the implicit GEMM, over those of its schedule's model, whose unit for several words is another one: by the
# micro-kernel's `narrow` (instructions; the last one measured beside this algorithm on AVX2)
INSTRUCTIONS = (1.0, 1.5, 1.05)
LEAST_CHANNELS = 16  # in and out
MOST_COLUMNS, MOST_VECTORS = 16, 2  # of a tile of products: the transformed weights of more vectors fill the second cache
# Bytes of transformed weights of a tile of channels, by lane (second caches grow with vectors): as many stay there until they
# are used; of more, so many are made at a time.
KEPT, PART = 16 << 10, 9 << 10
SPACE = 128 << 10  # bytes of workspace of a task by lane, of 8 and more, unless one row of tiles takes more


@dataclasses.dataclass(frozen=True)
class Shape:
    """Results and data of a tile in one direction, and cycles of one vector (measured on AVX-512, 32 registers)."""

    tile: int
    patch: int
    dtype: str  # of what is multiplied
    data_cycles: float  # of a tile
    weight_cycles: float  # of a word
    result_cycles: float  # of a tile

    @property
    def points(self) -> int:
        return self.patch * self.patch

    @property
    def size(self) -> int:
        """Bytes of what is multiplied."""
        return 2 if self.dtype == "int16" else 4

    def lanes(self, micro: MicroKernel) -> int:
        """Channels of data in a vector."""
        return micro.lanes * (2 if self.dtype == "int16" else 1)


INTEGERS = Shape(4, 6, "int16", 100.0, 80.0, 110.0)
FLOATS = Shape(2, 4, "float32", 40.0, 90.0, 45.0)


def shape_of(spec: ConvSpec) -> Shape:
    return INTEGERS if spec.accumulator == "int32" else FLOATS


@dataclasses.dataclass(frozen=True)
class WinogradSpec(ConvSpec):
    """A convolution that is computed this way."""


def winograd_spec(spec: ConvSpec) -> WinogradSpec:
    return WinogradSpec(**{one.name: getattr(spec, one.name) for one in dataclasses.fields(spec)})


def multiplier(spec: ConvSpec, micro: MicroKernel) -> MicroKernel:
    """The micro-kernel of the products: for bytes, the one for 16-bit numbers beside theirs."""
    if spec.accumulator == "float32":
        return micro
    depth = 1 if "mull" in micro.wide else 2  # of Arm, of x86
    plain = dataclasses.replace(micro, others=(), narrow=0)
    return dataclasses.replace(plain, dtype="int16", activation="int16", depth=depth, intrinsic=micro.wide)


def tiles(spec: ConvSpec) -> tuple[int, int]:
    """Tiles down and across an image."""
    tile = shape_of(spec).tile
    return -(-spec.out_height // tile), -(-spec.out_width // tile)


def products(spec: ConvSpec, count: int, channels: int, run: int) -> Geometry:
    """`run` products of each of `count` tiles, as groups of one matmul: [count, points x k] -> [count, points x channels]."""
    form = shape_of(spec)
    return Geometry(
        images=1, height=1, width=count, channels=form.points * spec.in_channels, rows=1, columns=count, n=channels,
        groups=form.points, run=run, data_dtype=form.dtype, weight_dtype=form.dtype, out_dtype=spec.accumulator,
        accumulator=spec.accumulator,
    )  # fmt: skip


def able(spec: ConvSpec, micro: MicroKernel) -> bool:
    """Whether the kernel can compute it, apart from what its weights are (winograd_forms.exact)."""
    plain = spec.kernel == (3, 3) and spec.strides == (1, 1) == spec.dilations and spec.groups == 1
    multiplies = bool(micro.wide) if spec.accumulator == "int32" else (spec.data_dtype, micro.dtype) == ("float32", "float32")
    whole = spec.in_channels % 2 == 0 and min(spec.in_channels, spec.out_channels) >= LEAST_CHANNELS
    steps = not any(isinstance(step, Mean) for step in spec.epilogue)
    return multiplies and not is_tile(micro) and plain and whole and steps


@functools.lru_cache(maxsize=4096)
def pays(spec: ConvSpec, micro: MicroKernel) -> bool:
    """Whether it takes clearly fewer cycles of one core than the implicit GEMM."""
    return able(spec, micro) and cycles(spec, default_schedule(spec, micro), micro) < WORTH * direct_cycles(spec, micro)


def direct_cycles(spec: ConvSpec, micro: MicroKernel) -> float:
    """Estimated cycles of the implicit GEMM on one core."""
    shape = geometry(spec)
    tile = schedule.default_schedule(shape, micro)
    instructions = INSTRUCTIONS[micro.narrow]
    return schedule.cycles(shape, micro, tile.tile_rows, tile.tile_columns, tile.vectors) * shape.images * instructions


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
    vectors = -(-spec.out_channels // micro.lanes)
    some = sorted({-(-down // count) for count in range(1, down + 1)})
    several = [down * images for images in range(2, spec.batch + 1) if spec.batch % images == 0]
    for rows in (*some, *several):
        deep, columns = _best_tile(spec, rows * across, multiplier(spec, micro))
        if rows > 1 and _workspace(spec, rows * across, deep * micro.lanes) > SPACE * max(8, micro.lanes):
            break
        channel_tiles = -(-vectors // deep)
        for count in range(1, min(cores, channel_tiles) + 1):
            unroll = 2 if columns * deep <= FEW and spec.in_channels % (2 * multiplier(spec, micro).depth) == 0 else 1
            yield Schedule(1, columns, deep, unroll, rows, across, -(-channel_tiles // count))


def words_at_once(spec: ConvSpec, found: Schedule, wide: MicroKernel) -> int:
    """Words of a tile of channels that are transformed and multiplied at a time: not all where they are many and tiles few."""
    words, form, (images, rows) = -(-spec.in_channels // wide.depth), shape_of(spec), images_and_rows(spec, found)
    word = form.points * form.size * found.vectors * wide.depth  # bytes of each lane
    sums = 4 * form.points * found.vectors * images * rows * tiles(spec)[1]  # also by lane, read and written with every part
    if words * word <= KEPT or 8 * sums > PART:
        return words
    part = max(count for count in range(1, max(1, PART // word) + 1) if words % count == 0)
    return part if 4 * part * word > 3 * PART else words


def images_and_rows(spec: ConvSpec, found: Schedule) -> tuple[int, int]:
    """Images of a task, and the rows of tiles that it takes of each."""
    down, _ = tiles(spec)
    return max(1, found.block_rows // down), min(found.block_rows, down)


def _workspace(spec: ConvSpec, count: int, channels: int) -> int:
    """Bytes of transformed data and weights and of the sums, of a task with `count` tiles."""
    form = shape_of(spec)
    return form.points * (form.size * spec.in_channels * (count + channels) + 4 * count * channels)


def _far(spec: ConvSpec, found: Schedule, count: int, wide: MicroKernel) -> float:
    """Cache lines of transformed data and sums that a pass over a task's tiles meets no more in the second cache.

    What is gone through again and again is lost altogether once it is half as large again as the cache.
    """
    form, channels = shape_of(spec), found.vectors * wide.lanes
    weights = form.points * form.size * channels * wide.depth * words_at_once(spec, found, wide)
    data, sums = form.points * form.size * count * spec.in_channels, 4 * form.points * count * channels
    cache = SMALL_CACHE if wide.lanes <= 8 else LARGE_CACHE
    beyond = 1 - cache / (data + sums + weights)
    return min(1.0, max(0.0, 2 * beyond)) * (data + 2 * sums) / 64


def _best_tile(spec: ConvSpec, count: int, wide: MicroKernel) -> tuple[int, int]:
    """(vectors, columns) of the products of `count` tiles: as many vectors as may be, as each reads the data again."""
    shape = products(spec, count, spec.out_channels, spec.in_channels)
    deep = min(MOST_VECTORS, shape.vectors(wide.lanes))
    able = {columns for rows, columns, vectors in schedule.tiles_of(shape, wide) if (rows, vectors) == (1, deep)}
    few = [columns for columns in sorted(able) if columns <= MOST_COLUMNS]
    return deep, min(few, key=lambda columns: schedule.cycles(shape, wide, 1, columns, deep))


def cycles(spec: ConvSpec, found: Schedule, micro: MicroKernel, cores: int = 1) -> float:
    """Estimated cycles of the busiest core."""
    parts = Parts.of(spec, found, micro)
    return -(-parts.tasks // cores) * parts.cycles


@dataclasses.dataclass(frozen=True)
class Parts:
    """What one task does, in vectors that are transformed and cycles of products, and how many tasks there are."""

    form: Shape
    tasks: int
    tiles: int
    vectors: int  # of channels
    words: int
    patches: int
    multiplied: float
    far: float = 0.0  # cache lines that a task reads from beyond the second cache

    @staticmethod
    def of(spec: ConvSpec, found: Schedule, micro: MicroKernel) -> Parts:
        down, across = tiles(spec)
        wide = multiplier(spec, micro)
        block = found.vectors * found.block_tiles
        every = -(-spec.out_channels // micro.lanes)
        form = shape_of(spec)
        images, rows = images_and_rows(spec, found)
        count, vectors = images * rows * across, min(every, block)
        shape = products(spec, count, vectors * micro.lanes, spec.in_channels)
        multiplied = form.points * schedule.cycles(shape, wide, 1, found.tile_columns, found.vectors)
        tasks = spec.batch // images * -(-down // rows) * -(-every // block)
        patches = count * -(-spec.in_channels // form.lanes(micro))
        passes = -(-vectors // found.vectors)
        far = passes * _far(spec, found, count, wide)
        return Parts(form, tasks, count, vectors, -(-spec.in_channels // wide.depth), patches, multiplied, far)

    @property
    def weights(self) -> int:
        return self.vectors * self.words

    @property
    def results(self) -> int:
        return self.tiles * self.vectors

    @property
    def cycles(self) -> float:
        form = self.form
        moved = self.patches * form.data_cycles + self.weights * form.weight_cycles + self.results * form.result_cycles
        return moved + self.multiplied + FAR * self.far

    def kept_bytes(self, channels: int, lanes: int) -> float:
        """Transformed data, and weights of `lanes` channels: what the products read."""
        return float(self.form.size * self.form.points * channels * (self.tiles + lanes))
