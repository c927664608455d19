"""Planning at length: searches over knobs, Pareto fronts, and what their reports show."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hwopt.compiler import one_blas_thread
from hwopt.decide import decided, make_task, replayed
from hwopt.errors import BudgetError, UsageError
from hwopt.files import write_whole
from hwopt.job import Job, prepare, quiet, with_training
from hwopt.plan.attempt import Found, Search
from hwopt.plan.front import FRONT, Point, front
from hwopt.plan.plan import plan_from_json
from hwopt.plan.store import PLAN
from hwopt.plan.trials import Trained, search_knobs
from hwopt.recover.data import source_of
from hwopt.recover.knobs import recovery_knobs
from hwopt.recovery import data_of, settled, trial
from hwopt.report.outcome import plan_report
from hwopt.report.page import page

OPTIONS = ("shapes", "binds", "calibrate", "evaluate", "budget", "passes", "threads", "preprocess")


def job_of(model: Any, options: Mapping[str, Any]) -> Job:
    """compile_model's arguments as a checked job."""
    given = {name: options.get(name) for name in OPTIONS}
    job = prepare(
        model, target=options.get("target", "host"), seed=options.get("seed", 0), progress=options.get("progress", quiet), **given
    )
    return with_training(job, *(options.get(name) for name in ("recover", "train", "loss", "checkpoints")))


@one_blas_thread
def plan_once(job: Job, *, tie: bool = True) -> Found:
    """One search, as compile does it without measuring."""
    return decided(job, None, tie=tie)


@one_blas_thread
def plan_trials(job: Job, method: str, trials: int, folder: Path, *, tie: bool = True) -> Found:
    """The best plan over the knobs of the families; see hwopt.plan.trials."""
    return replayed(job, search_knobs(_task(job, tie), method, trials, folder, _trained(job)))


@one_blas_thread
def plan_front(job: Job, kind: str, points: int, folder: Path, *, tie: bool = True) -> tuple[list[Point], Found | None]:
    """The points of a Pareto front and the best plan inside of the budget, if a point is; see hwopt.plan.front."""
    found = front(_task(job, tie), kind, points, folder)
    best = folder / PLAN
    return found, replayed(job, plan_from_json(best.read_text(), str(best))) if best.exists() else None


def planned(
    job: Job, out: Path, *, method: str | None, trials: int, cost: str | None, points: int, tie: bool
) -> tuple[Found, Path, str, list[Point]]:
    """What `hwopt plan` does: (plan, the file that holds it, the page, the front). Raises UsageError for two ways at once."""
    if method and cost:
        raise UsageError("search knobs or draw a front, one after the other", place="hwopt plan", hint="--search or --pareto")
    points_found: list[Point] = []
    if method:
        found: Found | None = plan_trials(job, method, trials, out, tie=tie)
    elif cost:
        points_found, found = plan_front(job, cost, points, out, tie=tie)
    else:
        found = plan_once(job, tie=tie)
        write_whole(out, found.plan.to_json())
    settled(job)
    if found is None:
        hint = f"all points are in {out / FRONT}; relax --max-drop or the limits"
        raise BudgetError("no point of the front is within the budget", place=str(out), hint=hint)
    html = page(plan_report(job, found), found.plan, [dataclasses.asdict(point) for point in points_found])
    return found, out / PLAN if method or cost else out, html, points_found


def _trained(job: Job) -> Trained | None:
    """What the trials do besides where there is a recipe."""
    recipe = job.training.recipe
    if recipe is None:
        return None
    data = data_of(job)
    what = f"{recipe} {source_of(job.graph, data).digest or type(data).__name__}"
    plan = lambda task, knobs, report: trial(job, task, knobs, lambda check, depth: report(check.score, depth))  # noqa: E731
    return Trained(what, recovery_knobs(recipe), plan)


def _task(job: Job, tie: bool) -> Search:
    task = make_task(job, tie=tie)
    if task is None:
        hint = "give --calibrate and --evaluate, and families without braces"
        raise UsageError("needs data and families to search with", place=job.graph.name, hint=hint)
    return task
