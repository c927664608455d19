"""A Pareto front: the score against latency, size or energy, point by point; stopping early keeps what there is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hwopt.errors import UsageError, did_you_mean
from hwopt.files import write_whole
from hwopt.plan.attempt import Attempt, Priced, Search, measured, price
from hwopt.plan.budget import Amounts
from hwopt.plan.search import found_of
from hwopt.plan.solve import Limits, solve
from hwopt.plan.store import identity, keep_plan, open_folder

RESOURCES = {"latency": "seconds", "size": "bytes", "energy": "joules"}
FRONT = "front.json"
RANGE = 1e4  # the largest allowed error over the smallest


@dataclass(frozen=True)
class Point:
    """One plan on the way from the unchanged model (no plan) to the smallest one, predicted costs and measured score."""

    allowed_error: float
    score: float
    drop: float
    seconds: float
    bytes: float
    peak_bytes: float
    joules: float
    plan: str  # file in the folder


def front(task: Search, kind: str, points: int, folder: Path) -> list[Point]:
    """The points in `folder`/front.json, gentlest first, each with its plan-N.json; `plan.json` is the best one in the budget.

    Points that an earlier run left there are not computed again.
    """
    if kind not in RESOURCES:
        raise UsageError(f"unknown cost {kind!r}", place="--pareto", hint=did_you_mean(kind, RESOURCES))
    key = identity(task, f"front of {kind}, {points} points")
    found = [Point(**one) for one in open_folder(folder, FRONT, key).get("points", ())]
    if len(found) == points + 1:
        return found
    start = task.amounts(task.graph)
    if not getattr(start, RESOURCES[kind]):
        raise UsageError(f"the target {task.target.name} states no {kind}", place="--pareto", hint="try latency or size")
    priced = price(_interested(task, kind, start))  # the plans themselves state the user's limits
    if not found:
        score = float(priced.baseline.mean())
        found.append(Point(0.0, score, 0.0, start.seconds, start.bytes, start.peak_bytes, start.joules, ""))
    for number, allowed in list(enumerate(_levels(task, priced, RESOURCES[kind], points)))[len(found) - 1 :]:
        task.progress("points of the front", number, points)
        found.append(_point(task, priced, RESOURCES[kind], allowed, folder / f"plan-{number + 1}.json"))
        write_whole(
            folder / FRONT, json.dumps({"search": key, "cost": kind, "points": list(map(dataclasses.asdict, found))}) + "\n"
        )
        _keep_best(task, found, RESOURCES[kind], folder)
    return found


def _interested(task: Search, kind: str, start: Amounts) -> Search:
    """A budget that the unchanged model meets, so that families which save only this cost are looked at."""
    field = {"latency": {}, "size": {"weight_bytes": start.bytes}, "energy": {"joules": start.joules}}[kind]
    missing = {name: value for name, value in field.items() if getattr(task.budget, name) is None}
    return dataclasses.replace(task, budget=dataclasses.replace(task.budget, **missing))


def _levels(task: Search, priced: Priced, resource: str, points: int) -> list[float]:
    """Allowed errors, from the harshest useful one down in equal ratios, smallest first."""
    harshest = solve(priced.base, priced.options, priced.pairs, Limits(), aim=resource, tie=task.tie)
    most = max(harshest.error if harshest else 0.0, 1e-9)
    return [float(level) for level in np.geomspace(most / RANGE, most, points)]


def _point(task: Search, priced: Priced, resource: str, allowed: float, file: Path) -> Point:
    limits = Limits(error=allowed)
    solution = solve(priced.base, priced.options, priced.pairs, limits, aim=resource, tie=task.tie)
    if solution is None:
        raise UsageError("no choice has an error that small", place="--pareto")
    attempt: Attempt = measured(task, priced, solution, allowed)
    start = task.amounts(task.graph)
    write_whole(file, found_of(task, priced, attempt, [attempt], start).plan.to_json())
    a, c = attempt.amounts, attempt.comparison
    return Point(allowed, c.score, c.drop, a.seconds, a.bytes, a.peak_bytes, a.joules, file.name)


def _keep_best(task: Search, points: Sequence[Point], resource: str, folder: Path) -> None:
    """The cheapest point that keeps the drop and all limits that the user stated."""
    from hwopt.plan.plan import plan_from_json

    good = [p for p in points if p.plan and p.drop <= task.budget.max_drop and not task.exceeded(_amounts(p))]
    if good:
        best = min(good, key=lambda point: getattr(point, resource))
        keep_plan(folder, plan_from_json((folder / best.plan).read_text(), best.plan))


def _amounts(point: Point) -> Amounts:
    return Amounts(point.seconds, point.bytes, point.peak_bytes, point.joules)
