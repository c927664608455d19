"""Counts of pools that the template computes (kernels/pool.py): vectors of channels, windows in the image and at its borders."""

from __future__ import annotations

import math

from hwopt.backends.tvm.learn.counted import (
    FIRST,
    LINE,
    SECOND,
    Counted,
    Numbers,
    floats,
    memory_shape,
    share,
    spread,
    step_names,
    steps_of,
    traffic,
)
from hwopt.target import MicroKernel, Workload

PLAIN = ("float32", "int8", "uint8")
LARGEST = ("MaxPool", "GlobalMaxPool")  # as in windows.py, which imports TVM
POOLED = (*LARGEST, "AveragePool", "GlobalAveragePool", "ReduceMean")
VECTORS = 4  # of a tile


def pool(work: Workload, micro: MicroKernel | None, threads: int) -> Counted | None:
    """The counts; None for a kernel that is none of the template's."""
    names = step_names(work)
    if micro is None or work.kind != "pool" or work.dtype not in PLAIN or not names or names[0] not in POOLED:
        return None
    if names[0] == "ReduceMean" and "," not in work.steps[0]:  # of rows, which do not lie channels last
        return None
    if len(work.dims) not in (2, 3, 4) or (work.dtype == "float32" and names[0] == "GlobalMaxPool"):
        return None
    seen = Seen(work, names[0], micro.lanes)
    times = _times(seen, names)
    return Counted(
        f"pooled {'bytes' if seen.bytes else 'floats'}",
        spread(times, threads, seen.taps * seen.vectors),
        floats(_facts(seen, names)),
    )


class Seen:
    """How many taps, results and vectors one pool has."""

    def __init__(self, work: Workload, op: str, lanes: int) -> None:
        self.work, self.lanes, self.average = work, lanes, op not in LARGEST
        self.bytes = work.dtype != "float32"
        self.passes = self.bytes and not self.average and len(work.steps) == 1
        batch, channels = work.dims[0], work.dims[1]
        self.channels = channels
        sides = _axes(work)
        self.positions = batch * math.prod(out for out, _, _, _ in sides)
        self.rows = batch * sides[0][0] if sides else batch
        self.kernel = math.prod(taps for _, _, _, taps in sides)
        self.taps = float(batch * math.prod(taps for _, taps, _, _ in sides))
        self.whole = float(batch * self.kernel * math.prod(whole for _, _, whole, _ in sides))
        widest = lanes * (4 if self.passes else 1)
        self.vectors = channels // widest + (channels % widest).bit_count()
        self.tiles = -(-channels // (VECTORS * lanes))


def _axes(work: Workload) -> list[tuple[int, int, int, int]]:
    """(results, taps of them all, results whose window lies in the image, taps of one) of each axis of the image."""
    from hwopt.backends.tvm.kernels.spec import PoolSpec

    if not work.window:
        size = max(1, round(work.elements / max(1, math.prod(work.dims))))
        return [(1, size, 1, size)]
    batch, height, width, *pairs, top, left, bottom, right = work.window
    kernel, strides, dilations = ((pairs[at], pairs[at + 1]) for at in (0, 2, 4))
    spec = PoolSpec(batch, height, width, work.dims[1], kernel, strides, dilations, (top, left, bottom, right))
    sides = [(spec.taps(axis), kernel[axis]) for axis in (0, 1)]
    return [(len(taps), sum(taps), taps.count(most), most) for taps, most in sides]


def _times(seen: Seen, names: list[str]) -> Numbers:
    work, results = seen.work, float(seen.positions * seen.vectors)
    behind = steps_of(names[1:])
    return {
        "taps": seen.whole * seen.vectors, "border_taps": (seen.taps - seen.whole) * seen.vectors, "results": results,
        "widened": seen.taps * seen.vectors * (seen.bytes and not seen.passes), "averages": results * seen.average,
        "positions": float(seen.positions * seen.tiles), "rows": float(seen.rows * seen.tiles), **behind.times(results),
        "again": seen.taps * seen.channels * (1 if seen.bytes else 4) / LINE * share(work.read_bytes, FIRST),
        "again_third": seen.taps * seen.channels * (1 if seen.bytes else 4) / LINE * share(work.read_bytes, SECOND),
        **traffic(work), "call": 100.0,
    }  # fmt: skip


def _facts(seen: Seen, names: list[str]) -> Numbers:
    return {
        "kernel": seen.kernel, "channels": seen.channels, "left": seen.channels % seen.lanes, "vectors": seen.vectors,
        "vectors_left": seen.vectors % VECTORS, "positions": math.log(seen.positions),
        "border": 1 - seen.whole / max(1.0, seen.taps),
        "average": seen.average, "passes": seen.passes, "power": math.gcd(seen.channels * (1 if seen.bytes else 4), 4096),
        "window": bool(seen.work.window), "stride": seen.work.window[5] if seen.work.window else 0,
        **steps_of(names[1:]).shape(), **memory_shape(seen.work),
    }  # fmt: skip
