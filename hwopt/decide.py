"""Deciding and building in turns: search a plan, compile it, measure it, and search again where a limit is not kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import psutil

from hwopt.analysis.held import held_bytes
from hwopt.analysis.liveness import peak_activation_bytes
from hwopt.backends.ort import Session
from hwopt.build import Built
from hwopt.errors import BudgetError
from hwopt.evaluate import Scorer, compare, make_scorer, user_scorer
from hwopt.job import Job
from hwopt.measure import interleaved
from hwopt.pipeline import Refusal
from hwopt.plan.backend import lacking
from hwopt.plan.budget import Amounts, exceeded
from hwopt.plan.corrected import search_timed
from hwopt.plan.doubts import measuring_on
from hwopt.plan.plan import Decision, Plan, apply_plan
from hwopt.plan.search import Found, Priced, Search, price, search, versions
from hwopt.plugins import find_passes
from hwopt.prove import proved
from hwopt.recovery import Option, deepened, deepened_unbuilt, retrained, trained_as_stated

CORES = psutil.cpu_count() or 1
NEAR, CONTENDERS = 1.15, 3  # plans that are built and timed beside the best one: how much slower they may seem, how many
TURNS = 3  # searches, each corrected by what the last result measured
Build = Callable[[Found], Built]


def decided(job: Job, replay: Plan | None, *, tie: bool = True) -> Found:
    """A replayed plan, the passes that were stated, or a search, with training where that is asked for; nothing is compiled."""
    task = None if replay else make_task(job, tie=tie)
    if task is None:
        return _given(job, replay)
    priced = price(task)
    if job.training.recipe is None:
        return search(task, priced)
    return deepened_unbuilt(job, task, priced)


def decided_and_built(job: Job, replay: Plan | None, baseline: Built, build: Build) -> tuple[Found, Built]:
    """The same with the library, measured: limits hold for what was measured, and what gains nothing is not shipped."""
    task = None if replay else make_task(job)
    if task is None:
        return _kept(job, baseline, _given(job, replay), build)
    task = as_measured(job, task, baseline)
    priced = price(task)
    if job.training.recipe is None:
        return _searched(job, task, priced, baseline, build)

    def searched(one: Search) -> tuple[Found, Built]:
        return _searched(dataclasses.replace(job, budget=one.budget), one, priced, baseline, build)

    def faster(one: Option, other: Option) -> bool:
        if one[1] is None or other[1] is None:
            return False
        seconds = _seconds(job, other[1], one[1])
        return seconds["result"] < seconds["baseline"]

    found, result = deepened(job, task, priced.baseline, searched, faster, lambda one: _kept(job, baseline, one, build))
    return found, result or build(found)


def as_measured(job: Job, task: Search, baseline: Built) -> Search:
    """The same with prices that are measured where a decision depends on them, in the seconds that the baseline takes here."""
    measuring = measuring_on(job.target, job.threads)
    if measuring:
        job.progress("measuring kernels", 0, 1)
        measuring.learn(job.graph)  # first of all: every other price is compared with the unchanged model's
    return dataclasses.replace(task, measuring=measuring, scale=_time_scale(job, baseline), memory_scale=_memory_scale(baseline))


def _kept(job: Job, baseline: Built, found: Found, build: Build) -> tuple[Found, Built]:
    """A plan that is not searched for, built; raises BudgetError if the library breaks a limit."""
    result = build(found)
    latency = 0.0 if job.budget.latency_seconds is None else _seconds(job, baseline, result)["result"]
    if limit := _broken(job, result, latency):
        raise BudgetError(limit, place=job.graph.name, hint="give data and no plan or passes, so that hwopt searches")
    return found, result


def _searched(job: Job, task: Search, priced: Priced, baseline: Built, build: Build) -> tuple[Found, Built]:
    """Search, build and measure in turns, until the library keeps the limits."""
    for _ in range(TURNS):
        found, priced = search_timed(task, priced)
        found, result = fastest(job, found, build)
        seconds = _seconds(job, baseline, result)
        broken = _broken(job, result, seconds["result"])
        if not broken:
            found, result = _proved(job, task, priced, found, baseline, result, build)
            return (found, result) if job.budget.limited else _worth_it(job, found, baseline, result)
        correction = seconds["result"] / max(found.plan.seconds_after, 1e-12)
        weights = result.library.weight_bytes / max(held_bytes(result.graph), 1)
        task = dataclasses.replace(
            task, scale=task.scale * correction, memory_scale=_memory_scale(result), weight_scale=max(1.0, weights)
        )
    raise BudgetError(f"measured {broken} after {TURNS} plans", place="plan", hint="relax the budget or --max-drop")


def _broken(job: Job, result: Built, seconds: float) -> str:
    """Which limit the built library breaks; empty if none."""
    joules = job.predicted(result.graph).joules
    return exceeded(job.budget, Amounts(seconds, result.library.weight_bytes, result.library.arena_bytes, joules))


def _time_scale(job: Job, baseline: Built) -> float:
    """Measured over predicted time of the unchanged model: budgets are in measured seconds."""
    before = job.predicted(job.graph).seconds
    return _seconds(job, baseline, baseline)["result"] / before if before else 1.0


def _memory_scale(built: Built) -> float:
    """The arena that was planned over the estimate for the same graph."""
    return max(built.library.arena_bytes, 1) / max(peak_activation_bytes(built.graph), 1)


def _seconds(job: Job, baseline: Built, result: Built) -> dict[str, float]:
    """Measured side by side where the target is this machine, else predicted."""
    if not job.target.runs_here:
        return {"baseline": job.predicted(baseline.graph).seconds, "result": job.predicted(result.graph).seconds}
    feeds = sample_feeds(job, baseline)
    runners = {"baseline": baseline.artifact.runner(feeds), "result": result.artifact.runner(feeds)}
    return {name: timing.median for name, timing in interleaved(runners).items()}


def sample_feeds(job: Job, baseline: Built) -> Mapping[str, np.ndarray]:
    """One batch of real data where there is some."""
    samples = job.evaluation or job.ctx.calibration
    return next(iter(samples.feeds(job.graph))) if samples else baseline.artifact.random_inputs(job.ctx.seed)


def make_task(job: Job, *, tie: bool = True) -> Search | None:
    """The search, or None where the user stated the passes or gave no data."""
    if job.fixed or not job.families or job.ctx.calibration is None:
        return None
    scorer = make_job_scorer(job, CORES)
    if scorer is None:
        return None
    return Search(
        graph=job.graph, ctx=job.ctx, target=job.target, passes=job.families, scorer=scorer, budget=job.budget,
        threads=job.threads, workers=CORES, progress=job.progress, tie=tie, sensitivity=job.sensitivity,
        pairwise=job.pairwise,
    )  # fmt: skip


def _given(job: Job, replay: Plan | None) -> Found:
    """What needs no search."""
    if replay is not None or job.fixed:
        stated = replay or _plan_of(job, [(str(one), "stated by the user") for one in job.fixed], ())
        found = replayed(job, stated)
        scorer = make_job_scorer(job, CORES) if job.training.recipe else None
        return trained_as_stated(job, found, scorer, scorer(Session(job.graph).run) if scorer else None)
    reason = "nothing was asked for" if not job.families else "there are no data to choose and to judge by"
    idle = () if job.training.recipe is None else (job.training.recipe.name,)
    refused = tuple(Refusal(name, job.graph.name, reason) for name in (*(kind.name for kind in job.families), *idle))
    return Found(_plan_of(job, (), refused), job.graph, None)


def fastest(job: Job, found: Found, build: Build) -> tuple[Found, Built]:
    """Of the plans within the budget that may be as fast as the best one, and of those in one precision, the fastest one."""
    near = [one for one in found.others if one.plan.seconds_after <= NEAR * found.plan.seconds_after][: CONTENDERS - 1]
    near += [one for one in found.others if len(one.plan.families) == 1 and one not in near][:1]  # the sums may promise too much
    near += [one for one in found.others if one.uniform and one not in near]
    first = build(found)
    if not near or not job.target.runs_here or job.check == "none" or job.budget.limited:
        return found, first
    tried = [(found, first), *((one, build(one)) for one in near)]
    feeds = sample_feeds(job, first)
    times = interleaved({str(place): built.artifact.runner(feeds) for place, (_, built) in enumerate(tried)})
    return tried[min(range(len(tried)), key=lambda place: times[str(place)].median)]


def _proved(
    job: Job, task: Search, priced: Priced, found: Found, baseline: Built, result: Built, build: Build
) -> tuple[Found, Built]:
    """The same without the changes that cost what they should save; see hwopt.prove."""
    if not job.target.runs_here or not found.plan.decisions or job.check == "none":
        return found, result
    feeds = sample_feeds(job, baseline)
    state = proved(job, found, result, build, feeds, lambda one: not _broken(job, one, _seconds(job, baseline, one)["result"]))
    if state.found.graph is found.graph:
        return state.found, state.result
    comparison = compare(task.scorer.metric, priced.baseline, task.scorer(Session(state.found.graph).run))
    if comparison.drop > job.budget.max_drop:  # errors of changes may have cancelled each other
        return found, result
    return dataclasses.replace(state.found, comparison=comparison), state.result


def _worth_it(job: Job, found: Found, baseline: Built, result: Built) -> tuple[Found, Built]:
    """The result, or the unchanged model if the measurement does not confirm what the cost model promised."""
    seconds = _seconds(job, baseline, result)
    before, after = seconds["baseline"], seconds["result"]
    if result is baseline or after < before:
        return found, result
    reason = f"measured: {before * 1e3:.4g} ms before and {after * 1e3:.4g} ms after all changes together"
    texts = [text for one in found.plan.decisions for text in one.by]
    refused = tuple(Refusal(text.partition("{")[0], text, reason) for text in texts)
    plan = dataclasses.replace(found.plan, decisions=(), refused=(*found.plan.refused, *refused), seconds_after=before)
    return Found(plan, job.graph, None), baseline


def _plan_of(job: Job, stated: Sequence[tuple[str, str]], refused: tuple[Refusal, ...]) -> Plan:
    """A plan that was not searched for."""
    decisions = tuple(Decision((by,), 0.0, 0.0, 0, 0, 0.0, reason) for by, reason in stated)
    return Plan(
        target=job.target.name, threads=job.threads, graph_digest=job.graph.digest, budget=job.budget, seed=job.ctx.seed,
        decisions=decisions, refused=refused, versions=versions(), lacking=lacking(job.target, job.fixed),
    )  # fmt: skip


def replayed(job: Job, plan: Plan) -> Found:
    """Do what a plan says and score it; what the passes declined goes into the plan."""
    graph, note = retrained(job, plan, apply_plan(job.graph, plan, job.ctx, find_passes()).graph)
    scorer = make_job_scorer(job, CORES)
    compared = None
    if scorer is not None:
        before, after = (scorer(Session(one).run) for one in (job.graph, graph))
        compared = compare(scorer.metric, before, after)
    refused = tuple(dict.fromkeys((*plan.refused, *job.ctx.refused)))
    here = job.ctx.calibration.digest if job.ctx.calibration else ""
    note = note or plan.note
    if plan.calibration_digest not in ("", here):
        note = "replayed with other calibration data than the plan was made with: ranges and weights may differ"
    return Found(dataclasses.replace(plan, refused=refused, note=note), graph, compared)


def make_job_scorer(job: Job, workers: int) -> Scorer | None:
    """The user's own function, or what fits the evaluation data; None without either."""
    if job.user_score:
        return user_scorer(job.user_score)
    return make_scorer(job.graph, job.evaluation, Session(job.graph).run, workers) if job.evaluation else None
