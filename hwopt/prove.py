"""Leave one out: no change stays in a plan if the built model is faster without it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from hwopt.analysis.workload import workloads
from hwopt.build import Built
from hwopt.ir import Graph
from hwopt.job import Job
from hwopt.measure import interleaved
from hwopt.pipeline import Refusal, parse
from hwopt.plan.attempt import Found
from hwopt.plan.plan import Decision, Offer, Plan, apply_plan
from hwopt.plugins import find_passes
from hwopt.target import total

CHECKS = ("none", "doubtful", "all")
DOUBT = 0.03  # changes that are predicted to save less than this share of the whole are built without
AGREE = 2  # timings that must all say that the model is faster without a change
Build = Callable[[Found], Built]
Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class State:
    """A plan with its library, as changes are taken out of it."""

    found: Found
    result: Built


def proved(job: Job, found: Found, result: Built, build: Build, feeds: Feeds, kept: Callable[[Built], bool]) -> State:
    """The plan without the changes whose measured effect is negative, the doubtful ones looked at or all (`job.check`).

    Each is taken out, the rest built, both timed in turns. `kept` says if a library keeps the budget: a change that another
    limit needs stays.
    """
    state = State(found, result)
    waiting = list(_doubtful(job, found))
    for number, (decision, without) in enumerate(waiting):
        job.progress("leaving out one change after the other", number, len(waiting))
        if state.found is not found:
            without = _without(job, state.found, decision)
        state = _tried(job, state, decision, without, build, feeds, kept)
    return state


def _doubtful(job: Job, found: Found) -> Iterator[tuple[Decision, Graph]]:
    """The decisions to check, least promising first, each with the graph without it."""
    graphs = [(one, _without(job, found, one)) for one in found.plan.decisions]
    whole = _seconds(job, found.graph)
    gains = {id(one): _seconds(job, graph) - whole for one, graph in graphs}
    for one, graph in sorted(graphs, key=lambda pair: gains[id(pair[0])]):
        if job.check == "all" or gains[id(one)] < DOUBT * whole:
            yield one, graph


def _tried(
    job: Job, state: State, decision: Decision, without: Graph, build: Build, feeds: Feeds, kept: Callable[[Built], bool]
) -> State:
    plan = _less(state.found.plan, decision)
    other = build(Found(plan, without, None))
    saved = _saved(state.result, other, feeds)
    if all(seconds < 0 for seconds in saved) and kept(other):
        text = " + ".join(decision.by)
        reason = f"{text}: measured: the model is {-max(saved) * 1e6:.2f} us faster without it"
        refused = (*plan.refused, Refusal(decision.by[-1].partition("{")[0], _place(decision), reason))
        scale = state.found.plan.seconds_after / max(_seconds(job, state.found.graph), 1e-12)
        plan = dataclasses.replace(plan, refused=refused, seconds_after=_seconds(job, without) * scale)
        plan = dataclasses.replace(plan, offers=tuple(_unchosen(one, text) for one in plan.offers))
        return State(Found(plan, without, None), other)
    measured = dataclasses.replace(decision, measured_seconds=max(saved))
    decisions = tuple(measured if one.by == decision.by else one for one in state.found.plan.decisions)
    plan = dataclasses.replace(state.found.plan, decisions=decisions)
    return State(dataclasses.replace(state.found, plan=plan), state.result)


def _saved(result: Built, without: Built, feeds: Feeds) -> list[float]:
    """Seconds that the change saves, of each timing; the second one is taken only if the first says that it costs."""
    saved: list[float] = []
    for _ in range(AGREE):
        times = interleaved({"with": result.artifact.runner(feeds), "without": without.artifact.runner(feeds)})
        saved.append(times["without"].median - times["with"].median)
        if saved[-1] >= 0:
            break
    return saved


def _without(job: Job, found: Found, decision: Decision) -> Graph:
    return apply_plan(job.graph, _less(found.plan, decision), job.ctx, find_passes()).graph


def _less(plan: Plan, decision: Decision) -> Plan:
    return dataclasses.replace(plan, decisions=tuple(one for one in plan.decisions if one.by != decision.by))


def _unchosen(offer: Offer, text: str) -> Offer:
    return dataclasses.replace(offer, chosen=False) if offer.text == text else offer


def _place(decision: Decision) -> str:
    return "+".join(parse(decision.by[0], find_passes()).site)


def _seconds(job: Job, graph: Graph) -> float:
    return total(job.target.cost.estimate(work, job.threads) for work in workloads(graph)).seconds
