"""Leave one out: no change stays in a plan unless the built model is measurably slower without it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from hwopt.build import Built
from hwopt.ir import Graph
from hwopt.job import Job
from hwopt.measure import difference, side_by_side
from hwopt.pipeline import Refusal, parse
from hwopt.plan.attempt import Found
from hwopt.plan.plan import Decision, Offer, Plan, apply_plan
from hwopt.plugins import find_passes

CHECKS = ("none", "doubtful", "all")
DOUBT = 0.03  # changes that are predicted to save less than this share of the whole are built without
SURE = 2.0  # standard errors of the timing: a change that saves less than this is not worth what it does to the outputs
CLEAR, TIMINGS, ROUNDS = 4.0, 3, 16  # more timings, at most so many of so many rounds, until an effect is this clear
Build = Callable[[Found], Built]
Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class State:
    """A plan with its library, as changes are taken out of it; `first` is the library with all of them."""

    found: Found
    result: Built
    first: Built


@dataclass(frozen=True)
class Effect:
    """Seconds that a change saves, and that the model without it is slower than it was with all; both with standard errors."""

    saved: float
    error: float
    lost: float
    lost_error: float

    @property
    def worth_it(self) -> bool:
        """Measurable; or too small to see, as were others that are gone, and together they are seen."""
        return self.saved > 0 and (self.saved >= SURE * self.error or self.lost >= SURE * self.lost_error)

    @property
    def text(self) -> str:
        if self.saved < 0:
            return f"measured: the model is {-self.saved * 1e6:.2f} us faster without it"
        return f"measured: it saves {self.saved * 1e6:.2f} us, within the timing's error of {SURE * self.error * 1e6:.2f} us"


def proved(job: Job, found: Found, result: Built, build: Build, feeds: Feeds, kept: Callable[[Built], bool]) -> State:
    """The plan without the changes that save nothing that can be measured, the doubtful ones looked at or all (`job.check`).

    Each is taken out, the rest built, both timed in turns. `kept` says if a library keeps the budget: a change that another
    limit needs stays.
    """
    state = State(found, result, result)
    waiting = list(_doubtful(job, found))
    for number, (decision, without) in enumerate(waiting):
        job.progress("leaving out one change after the other", number, len(waiting))
        if state.found is not found:
            without = _without(job, state.found, decision)
        state = _tried(job, state, decision, without, build, feeds, kept)
    return state


def _doubtful(job: Job, found: Found) -> Iterator[tuple[Decision, Graph]]:
    """The decisions to check, least promising first, each with the graph without it."""
    whole = job.predicted(found.graph).seconds
    roughly = _roughly(job)
    gains = [job.predicted(_without(roughly, found, one)).seconds - whole for one in found.plan.decisions]
    for place in sorted(range(len(gains)), key=gains.__getitem__):
        if job.check == "all" or gains[place] < DOUBT * whole:
            yield found.plan.decisions[place], _without(job, found, found.plan.decisions[place])


def _roughly(job: Job) -> Job:
    """The same with one batch of calibration data: enough for graphs that are only priced."""
    return dataclasses.replace(job, ctx=job.ctx.roughly(job.graph))


def _tried(
    job: Job, state: State, decision: Decision, without: Graph, build: Build, feeds: Feeds, kept: Callable[[Built], bool]
) -> State:
    plan = _less(state.found.plan, decision)
    other = build(Found(plan, without, None))
    effect = _effect(state, other, feeds)
    if not effect.worth_it and kept(other):
        text = " + ".join(decision.by)
        reason = f"{text}: {effect.text}"
        refused = (*plan.refused, Refusal(decision.by[-1].partition("{")[0], _place(decision), reason))
        scale = state.found.plan.seconds_after / max(job.predicted(state.found.graph).seconds, 1e-12)
        plan = dataclasses.replace(plan, refused=refused, seconds_after=job.predicted(without).seconds * scale)
        plan = dataclasses.replace(plan, offers=tuple(_unchosen(one, text) for one in plan.offers))
        return State(Found(plan, without, None), other, state.first)
    measured = dataclasses.replace(decision, measured_seconds=effect.saved)
    decisions = tuple(measured if one.by == decision.by else one for one in state.found.plan.decisions)
    plan = dataclasses.replace(state.found.plan, decisions=decisions)
    return dataclasses.replace(state, found=dataclasses.replace(state.found, plan=plan))


def _effect(state: State, without: Built, feeds: Feeds) -> Effect:
    """Timed in turns, again while it is not clear."""
    libraries = {"with": state.result, "without": without, "first": state.first}
    runners = {name: built.artifact.runner(feeds) for name, built in libraries.items()}
    turns: list[dict[str, np.ndarray]] = []
    for _ in range(TIMINGS):
        turns.append(side_by_side(runners, ROUNDS))
        seconds = {name: np.concatenate([turn[name] for turn in turns]) for name in runners}
        saved, error = difference(seconds["without"], seconds["with"])
        if abs(saved) >= CLEAR * error:
            break
    return Effect(saved, error, *difference(seconds["without"], seconds["first"]))


def _without(job: Job, found: Found, decision: Decision) -> Graph:
    return apply_plan(job.graph, _less(found.plan, decision), job.ctx, find_passes()).graph


def _less(plan: Plan, decision: Decision) -> Plan:
    return dataclasses.replace(plan, decisions=tuple(one for one in plan.decisions if one.by != decision.by))


def _unchosen(offer: Offer, text: str) -> Offer:
    return dataclasses.replace(offer, chosen=False) if offer.text == text else offer


def _place(decision: Decision) -> str:
    return "+".join(parse(decision.by[-1], find_passes()).site)
