"""Errors of candidates by gradients instead of one run of the whole model each; a few of each family are measured for the level.

Gradients see the quadratic part of an error: they rank candidates of one family well and judge large changes (pruning) too
mildly. So each family has a scale of its own, measured over predicted errors of CHECKED candidates, fitted in logarithms. How
whole configurations compare is reported.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hwopt.analysis.fisher import missing
from hwopt.analysis.sensitivity import Calibration, Sensitivity, calibrated, neighbours, sensitivity
from hwopt.analysis.workload import workloads
from hwopt.errors import UsageError, did_you_mean
from hwopt.ir import Graph
from hwopt.pipeline import Context, Pass, PassManager, Phase, merged, run_pass
from hwopt.plan.options import Option, Pair
from hwopt.samples import Samples, batch_of

CHECKED = 3  # candidates of each family whose error is measured
CONFIGURATIONS = 4  # of random candidates, measured as a whole
PLACES = 24  # that one of them changes at most: every change that differs takes a sweep over the data of its own
WAYS = ("auto", "fisher", "measured")
MACS = 1e12  # about a minute on two cores: below it every candidate is measured by itself, which is more exact
Measure = Callable[[Graph], float]  # the divergence of a changed graph's outputs


@dataclass(frozen=True, eq=False)
class Estimate:
    """Errors by candidate, and how whole configurations compare with their prediction."""

    found: Sensitivity
    scales: Mapping[str, float]  # by family
    calibration: Calibration | None

    def error(self, one: Pass) -> float:
        return self.scales[one.name] * self.found.error(one)


def by_gradients(how: str, graph: Graph, candidates: Sequence[Pass], samples: Samples) -> bool:
    """Whether errors come from gradients. Raises UsageError where that was asked for and cannot be."""
    if how not in WAYS:
        raise UsageError(f"unknown way {how!r}", place="--sensitivity", hint=did_you_mean(how, WAYS))
    work = sum(one.macs for one in workloads(graph)) / batch_of(graph) * len(samples) * len(candidates)
    if how == "measured" or (how == "auto" and work < MACS):
        return False
    reason = missing(graph)
    if reason and how == "fisher":
        raise UsageError(reason, place="--sensitivity fisher", hint="use --sensitivity measured")
    return not reason


def estimated(graph: Graph, ctx: Context, candidates: Sequence[Pass], samples: Samples, measure: Measure) -> Estimate:
    """One backward pass per sample batch for all candidates, then the level of each family."""
    found = sensitivity(graph, candidates, samples, lambda one: run_pass(one, graph, ctx), seed=ctx.seed)
    families: dict[str, list[Pass]] = {}
    for one in candidates:
        families.setdefault(one.name, []).append(one)
    scales = {name: _scale(found, members, graph, ctx, measure) for name, members in families.items()}
    estimate = Estimate(found, scales, None)
    together = _configurations(candidates, ctx.seed)
    actual = {chosen: measure(PassManager(merged(chosen)).run(graph, ctx).graph) for chosen in together}
    known = {chosen: error for chosen, error in actual.items() if 0 < error < np.inf and 0 < found.error(*chosen) < np.inf}
    return Estimate(found, scales, calibrated(found, known)[1]) if known else estimate


def error_pairs(graph: Graph, ctx: Context, options: Sequence[Option], samples: Samples) -> Iterator[Pair]:
    """What options of neighbouring groups cost together beyond their sum. Errors that cancel are not relied on: none is negative.

    Responses come from gradients; the level is that of the options' own errors. Raises ToolchainError without gradients.
    """
    single = list(dict.fromkeys(one for option in options for one in option.passes))
    found = sensitivity(graph, single, samples, lambda one: run_pass(one, graph, ctx), seed=ctx.seed)
    terms = {frozenset((one, other)): term for one, other, term in neighbours(graph, found, {one: one.site for one in single})}
    level = {id(option): option.error / max(sum(map(found.error, option.passes)), 1e-30) for option in options}
    for one, other in itertools.combinations(options, 2):
        if one.group != other.group:
            term = sum(terms.get(frozenset(pair), 0.0) for pair in itertools.product(one.passes, other.passes))
            term *= (level[id(one)] * level[id(other)]) ** 0.5
            if term > 0:
                yield Pair(one, other, error=term)


def _scale(found: Sensitivity, members: Sequence[Pass], graph: Graph, ctx: Context, measure: Measure) -> float:
    """Measured over predicted errors, geometric mean over candidates spread evenly; 1 if there are none."""
    usable = sorted((one for one in members if 0 < found.error(one) < np.inf), key=found.error)
    if not usable:
        return 1.0
    picked = [usable[place] for place in np.unique(np.linspace(0, len(usable) - 1, CHECKED + 2).round().astype(int)[1:-1])]
    pairs = [(found.error(one), measure(run_pass(one, graph, ctx))) for one in picked]
    logs = [np.log(actual / predicted) for predicted, actual in pairs if 0 < actual < np.inf]
    return float(np.exp(np.mean(logs))) if logs else 1.0


def _configurations(candidates: Sequence[Pass], seed: int) -> list[tuple[Pass, ...]]:
    """For a random share of the places one candidate each: what a plan may look like."""
    random = np.random.default_rng(seed)
    places: dict[tuple[bool, tuple[str, ...]], list[Pass]] = {}
    for one in candidates:
        places.setdefault((one.phase == Phase.PRUNE, one.site), []).append(one)
    shares = np.linspace(0.2, 0.8, CONFIGURATIONS) * min(1.0, PLACES / max(len(places), 1))
    chosen = [tuple(some[random.integers(len(some))] for some in places.values() if random.random() < share) for share in shares]
    return [one for one in dict.fromkeys(chosen) if one]
