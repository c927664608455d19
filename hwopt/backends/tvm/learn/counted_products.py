"""Counts of convolutions and matmuls, as the implicit GEMM of kernels/gemm.py runs them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hwopt.backends.tvm.learn.counted import (
    BYTES,
    FIRST,
    LINE,
    SECOND,
    Counted,
    Numbers,
    Steps,
    code_of,
    floats,
    memory_shape,
    pieces,
    share,
    spread,
    step_names,
    steps_of,
    traffic,
)
from hwopt.backends.tvm.learn.counted_winograd import by_winograd
from hwopt.backends.tvm.learn.specs import spec_of
from hwopt.backends.tvm.learn.tiles import LATENCY, cuts, tile_of, unrolled
from hwopt.target import MicroKernel, Workload

if TYPE_CHECKING:  # the templates import TVM; listing targets must not
    from hwopt.backends.tvm.kernels.geometry import Geometry

WORKSPACE = 256 << 10  # as in kernels/schedule.py
TWO_WORDS = 0.8  # of the time of a word by itself, for each of two whose products are added in 16 bits (measured)


@dataclass(frozen=True)
class Tiling:
    """A geometry with the tile that the schedule chooses: how often what is done, and the bytes of what is read again."""

    shape: Geometry
    micro: MicroKernel
    tile: tuple[int, int, int]  # rows, columns, vectors
    cycles: float  # of the schedule's own model
    size: int  # bytes of an element

    @property
    def several(self) -> float:
        return float(self.shape.images * self.shape.groups)

    @property
    def steps(self) -> int:
        return self.shape.taps[0] * self.shape.taps[1] * self.shape.words(self.micro.depth)

    @property
    def vectors(self) -> int:
        return self.shape.vectors(self.micro.lanes)

    @property
    def positions(self) -> float:
        return self.shape.rows * self.shape.columns * self.several

    @property
    def stored(self) -> float:
        """Vectors that are written, the last one in pieces."""
        return self.positions * (self.shape.n // self.micro.lanes + pieces(self.shape.n, self.micro.lanes))

    @property
    def panel(self) -> float:
        """Bytes of weights that one tile goes through."""
        return float(self.steps * self.micro.lanes * self.micro.depth * self.size * self.tile[2])

    @property
    def data(self) -> float:
        """Bytes of one image."""
        return float(self.shape.height * self.shape.width * self.shape.channels * self.size)

    @property
    def tiles(self) -> tuple[int, int]:
        """Of positions and of channels."""
        rows, columns = -(-self.shape.rows // self.tile[0]), -(-self.shape.columns // self.tile[1])
        return rows * columns, -(-self.vectors // self.tile[2])


def product(work: Workload, micro: MicroKernel, threads: int) -> Counted:
    """A convolution or a matmul."""
    from hwopt.backends.tvm.kernels import suited
    from hwopt.backends.tvm.kernels.geometry import geometry

    spec = spec_of(work, micro)
    micro, shape = suited(spec, micro), geometry(spec)
    if transformed := by_winograd(work, micro, threads):
        return transformed
    steps = shape.taps[0] * shape.taps[1] * shape.words(micro.depth)
    cycles, tile = tile_of(shape.rows, shape.columns, shape.n, steps, micro)
    tiling = Tiling(shape, micro, tile, cycles, BYTES.get(work.dtype, 4))
    loop = _loop(tiling)
    times = {name: value * tiling.several for name, value in loop.items()} | _times(work, tiling)
    times |= code_of(_code(tiling, steps_of(step_names(work)[1:])), work.footprint)
    facts = _schedule(tiling, loop) | _sizes(work, tiling) | memory_shape(work)
    family = f"product {work.dtype}" + (" narrow" if micro.narrow else "")  # of one word or two: facts have the depth
    return Counted(family, spread(times, threads, cycles * tiling.several), floats(facts))


def _loop(tiling: Tiling) -> Numbers:
    """Cycles of the inner loop: `issue` as multiply-adds, loads or their latency bound it, `products` by multiply-adds alone."""
    shape, micro, tile, steps = tiling.shape, tiling.micro, tiling.tile, tiling.steps
    found = dict.fromkeys(("issue", "products", "turns", "tiles"), 0.0)
    words = micro.narrow * TWO_WORDS if micro.narrow > 1 else 1.0
    for height, down in cuts(shape.rows, tile[0]):
        for width, across in cuts(shape.columns, tile[1]):
            positions = -(-height * width // micro.rows) * micro.rows
            for deep, along in cuts(tiling.vectors, tile[2]):
                count = down * across * along
                bound = max(positions * deep, positions + micro.rows * deep, LATENCY)
                found["issue"] += count * steps * words * bound / 2
                found["products"] += count * steps * words * positions * deep / 2
                found["turns"] += count * steps
                found["tiles"] += count
    return found


def _code(tiling: Tiling, behind: Steps) -> float:
    """Instructions of all variants of the tile; long epilogues are loops."""
    shape, tile, found = tiling.shape, tiling.tile, 100.0
    turns = min(shape.words(tiling.micro.depth), unrolled(math.prod(tile), max(1, tiling.micro.narrow)))
    for height, width, deep in itertools.product(*(dict(cuts(*one)) for one in zip(
        (shape.rows, shape.columns, tiling.vectors), tile, strict=True
    ))):  # fmt: skip
        positions = height * width
        once = deep if behind.heavy else positions * deep
        found += turns * (positions * deep + positions + deep) + 2 * positions * deep + once * behind.instructions
    return found


def _times(work: Workload, tiling: Tiling) -> Numbers:
    """Besides the inner loop: what is stored and computed behind it, read again, padded, packed, and moved at all."""
    shape, (rows, channels) = tiling.shape, tiling.tiles
    weights = tiling.panel * rows * channels * tiling.several / LINE  # read again for every tile of positions
    block = min(tiling.data, WORKSPACE) if shape.padded else tiling.data
    data = tiling.data * channels * shape.images / LINE  # read again for every tile of channels
    return {
        "stores": tiling.stored, "pieces": tiling.positions * pieces(shape.n, tiling.micro.lanes),
        **steps_of(step_names(work)[1:]).times(tiling.stored),
        "weights_again": weights * share(tiling.panel, FIRST), "weights_far": weights * share(tiling.panel, SECOND),
        "data_again": data * share(block, FIRST), "data_far": data * share(block, SECOND),
        "padded": tiling.data * shape.images / LINE if shape.padded else 0.0,
        "packed": shape.n * shape.run * tiling.several / tiling.micro.lanes if shape.computed else 0.0,
        **traffic(work), "call": 100.0,
    }  # fmt: skip


def _schedule(tiling: Tiling, loop: Numbers) -> Numbers:
    """The tile, and what it leaves over."""
    shape, micro, tile, (rows, channels) = tiling.shape, tiling.micro, tiling.tile, tiling.tiles
    words = shape.words(micro.depth)
    return {
        "tile_rows": tile[0], "tile_columns": tile[1], "tile_vectors": tile[2], "steps": tiling.steps, "words": words,
        "vectors": tiling.vectors, "multiplied": loop["products"] / max(1.0, loop["issue"]), "lanes": micro.lanes,
        "depth": micro.depth, "columns_left": shape.columns % tile[1] / tile[1], "rows_left": shape.rows % tile[0] / tile[0],
        "vectors_left": tiling.vectors % tile[2] / tile[2], "lanes_used": shape.n / (tiling.vectors * micro.lanes),
        "pieces": pieces(shape.n, micro.lanes), "depth_left": shape.run % micro.depth, "words_left": words % 4,
        "position_tiles": rows, "channel_tiles": channels, "log_panel": math.log(tiling.panel),
    }  # fmt: skip


def _sizes(work: Workload, tiling: Tiling) -> Numbers:
    """The geometry itself, and powers of two in what lies behind one another."""
    shape, each = tiling.shape, work.write_bytes / max(1.0, tiling.positions * tiling.shape.n)
    pixel = shape.channels * tiling.size * shape.strides[1]
    return {
        "log_data": math.log1p(tiling.data), "taps": shape.taps[0] * shape.taps[1], "run": shape.run, "rows": shape.rows,
        "columns": shape.columns, "images": shape.images, "groups": shape.groups, "stride": shape.strides[0],
        "padded": shape.padded, "computed": shape.computed, "pixel_power": pixel & -pixel, "out_bytes": each,
        "out_power": math.gcd(round(shape.n * each), 64), "log_positions": math.log(tiling.positions), "log_n": math.log(shape.n),
        "log_steps": math.log(tiling.steps), "read_share": work.read_bytes / max(1.0, tiling.data * shape.images),
        "matmul": work.kind == "matmul", **steps_of(step_names(work)[1:]).shape(),
    }  # fmt: skip
