"""The schedules that are legal for a task, as points of a small grid, and a model of their time to rank them by."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hwopt.backends.tvm.kernels import Schedule, amx_layout, amx_schedule, depthwise, schedule, winograd_schedule
from hwopt.backends.tvm.kernels.geometry import Geometry, geometry
from hwopt.backends.tvm.kernels.loops import LANE_COUNTS, VECTOR_COUNTS, LoopsSpec
from hwopt.backends.tvm.kernels.packed import DIRECT_ROWS, WORKSPACE, PackedSpec, widths, workspace_bytes
from hwopt.backends.tvm.kernels.spec import PoolSpec
from hwopt.backends.tvm.kernels.winograd_schedule import WinogradSpec
from hwopt.backends.tvm.tune.database import Trial
from hwopt.backends.tvm.tune.task import Spec, Task

BODY = 128  # accumulators x unrolled words in one tile: more takes long to compile and overflows the decoded-instruction cache
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # blocks along one axis
EXPLORE = 0.15  # share of the candidates that is drawn at random
RIDGE = 1.0
Point = tuple[int, ...]  # one value per knob


@dataclass(frozen=True)
class Space:
    """Knobs and their values; `tiles` are the legal combinations of the first three (none: knobs are independent)."""

    task: Task
    knobs: Mapping[str, tuple[int, ...]]
    tiles: frozenset[tuple[int, int, int]] = frozenset()

    def legal(self, point: Point) -> bool:
        inside = all(value in values for value, values in zip(point, self.knobs.values(), strict=True))
        small = not self.tiles or (point[:3] in self.tiles and (math.prod(point[:4]) <= BODY or point[3] == 1))
        return inside and small and self._fits(point)

    def _fits(self, point: Point) -> bool:
        """False where decoded weights take more workspace than they may by default, or accumulators do not fit the registers."""
        spec, micro = self.task.spec, self.task.micro
        if isinstance(spec, WinogradSpec):
            columns, vectors = point[:2]
            return columns * vectors + vectors + 1 <= micro.registers
        if not isinstance(spec, PackedSpec):
            return True
        most = max(WORKSPACE, workspace_bytes(spec, self.task.default, micro))
        return workspace_bytes(spec, self.schedule(point), micro) <= most

    def schedule(self, point: Point) -> Schedule:
        """The schedule of a point: numbers of blocks become sizes that are multiples of the tile's."""
        values = dict(zip(self.knobs, point, strict=True))
        default = self.task.default
        parallel = bool(values.pop("parallel", default.parallel))
        if not self.tiles:
            return dataclasses.replace(default, parallel=parallel, **values)
        shape = shape_of(self.task.spec)
        rows, columns, vectors = point[:3]
        tiles = -(-shape.vectors(self.task.micro.lanes) // vectors)
        found = dataclasses.replace(
            default, tile_rows=rows, tile_columns=columns, vectors=vectors, unroll=values["unroll"], parallel=parallel,
            block_rows=_block(shape.rows, values["row_blocks"], rows),
            block_columns=_block(shape.columns, values["column_blocks"], columns),
            block_tiles=-(-tiles // values["tile_blocks"]), prefetch=0,
        )  # fmt: skip
        return amx_schedule.with_prefetch(found, shape, self.task.micro) if values.get("prefetch") else found

    def point(self, schedule: Schedule) -> Point:
        """The nearest point of a schedule."""
        names = [name for name in self.knobs if name not in ("parallel", "prefetch")]
        if not self.tiles:
            values = [getattr(schedule, name) for name in names]
        else:
            shape = shape_of(self.task.spec)
            tiles = -(-shape.vectors(self.task.micro.lanes) // schedule.vectors)
            values = [
                schedule.tile_rows, schedule.tile_columns, schedule.vectors, schedule.unroll,
                -(-shape.rows // schedule.block_rows), -(-shape.columns // schedule.block_columns),
                -(-tiles // schedule.block_tiles),
            ]  # fmt: skip
        if "prefetch" in self.knobs:
            values.append(int(schedule.prefetch > 0))
        if "parallel" in self.knobs:
            values.append(int(schedule.parallel))
        return tuple(
            min(known, key=lambda one: (abs(one - value), one)) for value, known in zip(values, self.knobs.values(), strict=True)
        )

    def neighbours(self, point: Point) -> Iterator[Point]:
        """One knob to its next values; two of the tile's at once, as their product is bounded."""
        for index, (value, values) in enumerate(zip(point, self.knobs.values(), strict=True)):
            place = values.index(value)
            for other in (place - 2, place - 1, place + 1, place + 2):
                if 0 <= other < len(values):
                    yield (*point[:index], values[other], *point[index + 1 :])
        for tile in sorted(self.tiles):
            if sum(abs(math.log2(a / b)) for a, b in zip(tile, point, strict=False)) <= 2.1:
                yield (*tile, *point[3:])

    def sample(self, generator: random.Random) -> Point:
        tile = generator.choice(sorted(self.tiles)) if self.tiles else ()
        rest = list(self.knobs.values())[len(tile) :]
        return (*tile, *(generator.choice(values) for values in rest))

    @property
    def size(self) -> int:
        """An upper bound of the number of schedules."""
        counts = [len(values) for values in self.knobs.values()]
        return len(self.tiles) * math.prod(counts[3:]) if self.tiles else math.prod(counts)


def shape_of(spec: Spec) -> Geometry:
    """The products behind a kernel of gemm's form."""
    return spec.dense if isinstance(spec, PackedSpec) else geometry(spec)  # type: ignore[arg-type]


def space_of(task: Task) -> Space | None:
    """None where the templates leave nothing to choose."""
    if not isinstance(task.default, Schedule):
        return None
    knobs = _knobs(task)
    if task.threads > 1:
        knobs["parallel"] = (0, 1)
    tiles = frozenset(_tiles(task)) if "unroll" in knobs else frozenset()
    space = Space(task, knobs, tiles)
    return space if space.size > 1 else None


def _knobs(task: Task) -> dict[str, tuple[int, ...]]:
    spec, lanes = task.spec, task.micro.lanes
    if isinstance(spec, LoopsSpec):
        return {"tile_columns": LANE_COUNTS, "vectors": VECTOR_COUNTS}
    if isinstance(spec, PoolSpec):
        tiles = -(-spec.channels // lanes)
        return {"vectors": _upto(min(8, tiles)), "block_tiles": _upto(tiles)}
    if isinstance(spec, WinogradSpec):
        down, across = winograd_schedule.tiles(spec)
        images = [down * count for count in COUNTS if spec.batch % count == 0]
        return {
            "tile_columns": _upto(min(30, down * across)), "vectors": _upto(min(4, -(-spec.out_channels // lanes))),
            "block_rows": tuple(sorted({*(-(-down // count) for count in COUNTS), *images})),
            "block_tiles": _upto(-(-spec.out_channels // lanes)),
        }  # fmt: skip
    if depthwise.is_depthwise(spec):
        return {"tile_columns": _upto(min(16, spec.out_width)), "block_rows": _upto(spec.out_height)}
    if isinstance(spec, PackedSpec) and spec.m <= DIRECT_ROWS:
        return {
            "tile_columns": _upto(spec.m),
            "vectors": tuple(widths(spec, task.micro)),
            "block_tiles": _upto(-(-spec.n // lanes)),
        }
    shape = shape_of(spec)
    legal = sorted(_tiles(task))
    if amx_schedule.is_tile(task.micro):
        return _tile_knobs(task, shape, legal)
    words, vectors = shape.words(task.micro.depth), shape.vectors(lanes)
    whole = schedule.copies_rows(shape, task.micro) or shape.computed or shape.pooled
    rows, columns, deep = ({tile[axis] for tile in legal} for axis in range(3))
    return {
        "tile_rows": tuple(sorted(rows)), "tile_columns": tuple(sorted(columns)), "vectors": tuple(sorted(deep)),
        "unroll": tuple(count for count in (1, 2, 4, 8) if count <= words) or (1,),
        "row_blocks": (1,) if shape.pooled else _counts(shape.rows),
        "column_blocks": (1,) if whole else _counts(shape.columns),
        "tile_blocks": _counts(vectors),
    }  # fmt: skip


def _tile_knobs(task: Task, shape: Geometry, legal: Sequence[tuple[int, int, int]]) -> dict[str, tuple[int, ...]]:
    """Of a matrix unit: a block is whole rows, or positions of data that are read in place."""
    in_place = shape.rows == 1 and not shape.computed and not amx_layout.layout_of(shape, task.micro).staged
    return {
        "tile_rows": (1,), "tile_columns": tuple(sorted({tile[1] for tile in legal})),
        "vectors": tuple(sorted({tile[2] for tile in legal})), "unroll": (1,), "row_blocks": _counts(shape.rows),
        "column_blocks": _counts(-(-shape.columns // 16)) if in_place else (1,),
        "tile_blocks": _counts(shape.vectors(task.micro.lanes)) if shape.groups == 1 else (1,),
        "prefetch": (0,) if shape.computed else (0, 1),
    }  # fmt: skip


def _tiles(task: Task) -> Iterator[tuple[int, int, int]]:
    shape = shape_of(task.spec)
    default = task.default
    yield default.tile_rows, default.tile_columns, default.vectors
    yield from (amx_schedule if amx_schedule.is_tile(task.micro) else schedule).tiles_of(shape, task.micro)


def _upto(most: int) -> tuple[int, ...]:
    return tuple(value for value in range(1, most + 1) if value <= 16 or value % 8 == 0 or value == most)


def _counts(size: int) -> tuple[int, ...]:
    return tuple(sorted({count for count in (*COUNTS, size) if count <= size}))


def _block(size: int, count: int, tile: int) -> int:
    """The size of one of `count` blocks, in whole tiles."""
    share = -(-size // count)
    return -(-share // tile) * tile


class Proposer:
    """Candidates for one task: the neighbours of the best first, by a ridge regression on what was measured.

    The prior is the analytical model's estimate of cycles; the regression learns log(ratio / prior) from few features.
    """

    def __init__(self, space: Space, seed: int) -> None:
        self.space, self.seed = space, seed
        self._prior = {space.point(space.task.default): 0.0}

    def propose(self, trials: Sequence[Trial], count: int, pending: Sequence[Schedule] = ()) -> list[Schedule]:
        """Up to `count` schedules that have not been tried; fewer where the space is exhausted."""
        space = self.space
        generator = random.Random(f"{self.seed} {space.task.key} {len(trials) + len(pending)}")
        known = {space.task.default, *pending, *(trial.schedule for trial in trials)}
        fresh: dict[Schedule, Point] = {}
        for point in self._pool(trials, generator):
            if space.legal(point) and (schedule := space.schedule(point)) not in known:
                fresh.setdefault(schedule, point)
        ranked = self._ranked(trials, fresh)
        explored = sum(generator.random() < EXPLORE for _ in range(count))
        chosen = ranked[: count - explored]
        rest = ranked[count - explored :]
        return chosen + generator.sample(rest, min(explored, len(rest)))

    def _pool(self, trials: Sequence[Trial], generator: random.Random) -> Iterator[Point]:
        space = self.space
        best = sorted((one for one in trials if one.ok), key=lambda one: one.doubted)[:4]
        for start in [*(one.schedule for one in best), space.task.default]:
            yield from space.neighbours(space.point(start))
        if space.size <= 2000 and not space.tiles:
            yield from itertools.product(*space.knobs.values())
        else:
            yield from (space.sample(generator) for _ in range(200))

    def _ranked(self, trials: Sequence[Trial], fresh: Mapping[Schedule, Point]) -> list[Schedule]:
        """By predicted time; ties in a fixed order."""
        points = list(fresh.values())
        if not points:
            return []
        prior = np.array([self.prior(point) for point in points])
        measured = [(self.space.point(one.schedule), math.log(one.ratio)) for one in trials if one.ok]
        predicted = prior + _regression(measured, points, self.space, self.prior)
        return [schedule for _, schedule in sorted(zip(predicted, fresh, strict=True), key=lambda item: float(item[0]))]

    def prior(self, point: Point) -> float:
        """log(estimated time / the default schedule's); 0 where there is no estimate."""
        task = self.space.task
        if isinstance(task.spec, WinogradSpec):
            estimates = (
                winograd_schedule.cycles(task.spec, one, task.micro, task.threads if one.parallel else 1)
                for one in (self.space.schedule(point), task.default)
            )
            return math.log(next(estimates) / next(estimates))
        if not self.space.tiles:
            return 0.0
        tile = point[:3]
        if tile not in self._prior:
            shape = shape_of(self.space.task.spec)
            default = self.space.point(self.space.task.default)[:3]
            micro = self.space.task.micro
            cycles = (amx_schedule if amx_schedule.is_tile(micro) else schedule).cycles
            self._prior[tile] = math.log(cycles(shape, micro, *tile) / cycles(shape, micro, *default))
        return self._prior[tile]


def _regression(measured: Sequence[tuple[Point, float]], points: Sequence[Point], space: Space, prior: Any) -> np.ndarray:
    """The correction of the prior for every point, learned from (point, log ratio); zero without data."""
    if len(measured) < 4:
        return np.zeros(len(points))
    known, logs = [point for point, _ in measured], np.array([value - prior(point) for point, value in measured])
    x, origin = _features(known), _features([space.point(space.task.default)])
    centred = x - origin  # the default's ratio is 1: the correction is zero there
    weights = np.linalg.solve(centred.T @ centred + RIDGE * np.eye(x.shape[1]), centred.T @ logs)
    return (_features(points) - origin) @ weights


def _features(points: Sequence[Point]) -> np.ndarray:
    """Logarithms of the knobs, their squares and products of neighbours."""
    logs = np.log2(np.array(points, dtype=float) + 1)
    return np.hstack([logs, logs**2 / 4, logs[:, :-1] * logs[:, 1:] / 4])
