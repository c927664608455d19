"""Counts of depthwise convolutions, as kernels/depthwise.py runs them: vectors of channels, tiles along a row."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hwopt.backends.tvm.learn.counted import (
    FIRST,
    LINE,
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
from hwopt.backends.tvm.learn.counted_products import product
from hwopt.backends.tvm.learn.specs import spec_of
from hwopt.backends.tvm.learn.tiles import cuts
from hwopt.target import MicroKernel, Workload

if TYPE_CHECKING:  # the templates import TVM; listing targets must not
    from hwopt.backends.tvm.kernels.spec import ConvSpec


def depthwise(work: Workload, micro: MicroKernel, threads: int) -> Counted:
    """A depthwise convolution; a grouped one that is none, as a product."""
    from hwopt.backends.tvm.kernels import suited
    from hwopt.backends.tvm.kernels.depthwise import default_schedule
    from hwopt.backends.tvm.kernels.spec import ConvSpec

    spec = spec_of(work, micro)
    if not isinstance(spec, ConvSpec):
        return product(work, micro, threads)
    micro = suited(spec, micro)
    rows = Rows(spec, micro, default_schedule(spec, micro, threads).tile_columns)
    size = work.read_bytes / max(1, spec.batch * spec.height * spec.width * spec.in_channels)
    times = _times(work, rows, size)
    return Counted(f"depthwise {work.dtype}", spread(times, threads, spec.macs / micro.lanes), floats(_facts(work, rows, size)))


class Rows:
    """One kernel: how often what is done in all of its output rows."""

    def __init__(self, spec: ConvSpec, micro: MicroKernel, tile: int) -> None:
        self.spec, self.micro, self.tile = spec, micro, tile
        self.channels, self.lanes = spec.in_channels, micro.lanes
        self.height, self.width = spec.out_height, spec.out_width
        self.down, self.across = spec.kernel
        self.vectors, self.words = -(-self.channels // self.lanes), -(-self.down // micro.depth)
        self.count, self.tiles = spec.batch * self.height, -(-self.width // tile)
        self.loaded = sum(count * self.span(width) for width, count in cuts(self.width, tile))
        self.pieces = pieces(self.channels, self.lanes)
        self.stored = float(self.count * self.width) * (self.channels // self.lanes + self.pieces)

    def span(self, width: int) -> int:
        """Input columns under `width` output positions."""
        return (width - 1) * self.spec.strides[1] + (self.across - 1) * self.spec.dilations[1] + 1

    @property
    def border(self) -> int:
        """Output rows of which some input row is outside."""
        tops = (y * self.spec.strides[0] - self.spec.pads[0] for y in range(self.height))
        last = self.spec.height - (self.down - 1) * self.spec.dilations[0] - 1
        return sum(top < 0 or top > last for top in tops) * self.spec.batch

    @property
    def inside(self) -> int:
        """Tiles of a row that read nothing left or right of the image: they are one loop."""
        firsts = (x * self.spec.strides[1] - self.spec.pads[1] for x in range(0, self.width - self.tile + 1, self.tile))
        return sum(first >= 0 and first + self.span(self.tile) <= self.spec.width for first in firsts)


def _times(work: Workload, rows: Rows, size: float) -> Numbers:
    each = float(rows.count * rows.vectors)
    behind = steps_of(step_names(work)[1:])
    loads, line = each * rows.loaded * rows.down, rows.spec.width * rows.channels * size * rows.down
    return {
        "loads": loads, "words": each * rows.loaded * rows.words, "products": each * rows.width * rows.across * rows.words,
        "tiles": each * rows.tiles, "weight_loads": each * rows.tiles * rows.across * rows.words,
        "border": float(rows.border * rows.vectors * rows.loaded * rows.down), "stores": rows.stored,
        "pieces": float(rows.count * rows.width * rows.pieces),
        "masked": float(rows.count * rows.loaded * rows.down * (rows.channels % rows.lanes > 0)),
        **behind.times(rows.stored), "rows_again": loads * rows.lanes * size * share(line, FIRST) / LINE,
        **traffic(work), **code_of(_code(rows, behind), work.footprint), "call": 100.0,
    }  # fmt: skip


def _code(rows: Rows, behind: Steps) -> float:
    """Instructions of all variants: rows inside and at the border, whole and partial vectors, tiles at the border and inside."""
    spec, width = rows.spec, rows.tile
    variants = (1 + (spec.pads[0] + spec.pads[2] > 0)) * (rows.tiles - max(0, rows.inside - 1))
    tile = rows.span(width) * (rows.down + rows.words) + width * rows.across * rows.words
    whole, partial = rows.channels // rows.lanes > 0, rows.pieces
    once = 1 if behind.heavy else width
    return 100.0 + variants * (tile * (whole + (partial > 0)) + once * behind.instructions * (whole + partial))


def _facts(work: Workload, rows: Rows, size: float) -> Numbers:
    spec, results = rows.spec, float(rows.count * rows.width * rows.channels)
    return {
        "tile_columns": rows.tile, "tiles": rows.tiles, "inside": rows.inside, "kernel_rows": rows.down,
        "kernel_columns": rows.across, "stride_rows": spec.strides[0], "stride_columns": spec.strides[1],
        "vectors": rows.vectors, "lanes": rows.lanes, "depth": rows.micro.depth, "channels": rows.channels,
        "lanes_left": rows.channels % rows.lanes, "pieces": rows.pieces, "columns_left": rows.width % rows.tile / rows.tile,
        "out_height": rows.height, "out_width": rows.width, "border": rows.border / max(1, rows.count),
        "log_line": math.log1p(spec.width * rows.channels * size * rows.down),
        "pixel_power": math.gcd(round(rows.channels * size), 4096), "pads_across": spec.pads[1] + spec.pads[3],
        "pads_down": spec.pads[0] + spec.pads[2], "in_bytes": size, "out_bytes": work.write_bytes / max(1.0, results),
        "log_out": math.log1p(results), **steps_of(step_names(work)[1:]).shape(), **memory_shape(work),
    }  # fmt: skip
