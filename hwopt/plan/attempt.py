"""One solution applied for real: what the search works with, and what it measured of one choice."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from hwopt.analysis.held import held_bytes
from hwopt.analysis.liveness import peak_activation_bytes
from hwopt.analysis.memo import remembered
from hwopt.backends.ort import Session
from hwopt.errors import DataError
from hwopt.evaluate import Comparison, Scorer, compare
from hwopt.ir import Graph
from hwopt.pipeline import Context, Pass, PassManager, Refusal, merged
from hwopt.plan.budget import Amounts, Budget, exceeded
from hwopt.plan.doubts import Measuring, settled
from hwopt.plan.errors import Known, errors_behind, measure_errors
from hwopt.plan.fisher import by_gradients, error_pairs
from hwopt.plan.options import Base, Option, Pair, Pricer, Progress, collect, option_of, useful
from hwopt.plan.pairs import pairs_of
from hwopt.plan.plan import Plan, Round
from hwopt.plan.prepared import Chains, prepared
from hwopt.plan.solve import Limits, Solution
from hwopt.samples import Samples
from hwopt.target import Target

SENSITIVITY_SAMPLES = 64


@dataclass(frozen=True, eq=False)
class Search:
    """Everything one search works with. The scales are measured over predicted time, memory and weights, 1 where nothing was
    measured.

    `knobs` sets options of whole families (`quantize.calibrator`), `known` keeps errors from search to search, `tie` lets
    isomorphic layers be decided together where that is proven to lose nothing. `sensitivity` is how errors are found (see
    measure_errors), `pairwise` adds what neighbours cost together. `measuring` times kernels whose prices are in doubt.
    `refine` rounds the plan that is found with more care (see hwopt.plan.finer): no use where it is trained anyway. `thorough`
    looks for the nearest budgets that can be met where this one is not, which takes long: no use where others are tried next.
    """

    graph: Graph
    ctx: Context
    target: Target
    passes: tuple[type[Pass], ...]
    scorer: Scorer
    budget: Budget
    threads: int
    workers: int
    progress: Progress
    scale: float = 1.0
    memory_scale: float = 1.0
    weight_scale: float = 1.0
    knobs: Mapping[str, Any] = field(default_factory=dict)
    known: Known = field(default_factory=dict)
    tie: bool = True
    sensitivity: str = "auto"
    pairwise: bool = False
    measuring: Measuring | None = None
    refine: bool = True
    thorough: bool = True

    @cached_property
    def pricer(self) -> Pricer:
        return Pricer(self.target, self.threads, self.scale)

    def amounts(self, graph: Graph) -> Amounts:
        """What a graph is predicted to cost, in measured units."""
        cost, peak = self.pricer.graph(graph), peak_activation_bytes(graph) * self.memory_scale
        packed = 1.0 if graph is self.graph else self.weight_scale  # which the layouts of a plan's library made
        return Amounts(cost.seconds * self.scale, held_bytes(graph) * packed, peak, cost.joules)

    def exceeded(self, amounts: Amounts) -> str:
        """Which limit is broken, with the numbers; empty if none."""
        return exceeded(self.budget, amounts)

    def first_limits(self) -> Limits:
        """The budget in the cost model's units."""
        budget = self.budget
        seconds = None if budget.latency_seconds is None else budget.latency_seconds / self.scale
        peak = None if budget.activation_bytes is None else budget.activation_bytes / self.memory_scale
        size = None if budget.weight_bytes is None else budget.weight_bytes / self.weight_scale
        return Limits(None, seconds, size, peak, budget.joules)


@dataclass(frozen=True, eq=False)
class Priced:
    """What does not depend on the limits: the options with their prices and errors, and the scores of the unchanged model.

    `applied` remembers what choices of one graph, calibration and scorer made: searches with other limits, or over fewer
    families, ask for many of them again.
    """

    base: Base
    options: tuple[Option, ...]
    pairs: tuple[Pair, ...]
    refused: tuple[Refusal, ...]
    baseline: np.ndarray
    applied: dict[tuple[Pass, ...], tuple[Graph, Comparison]] = field(default_factory=dict)

    def only(self, *families: str) -> Priced:
        """The same with the options that use no other family."""
        return self._with(o for o in self.options if all(one.name in families for one in o.passes))

    @property
    def forms(self) -> tuple[str, ...]:
        """The dtypes that layers may be computed in instead of theirs."""
        return tuple(dict.fromkeys(option.form for option in self.options if option.form))

    def in_form(self, form: str) -> Priced:
        """The same with the options that change no dtype, or to this one."""
        return self._with(option for option in self.options if option.form in ("", form))

    def _with(self, kept: Iterable[Option]) -> Priced:
        options = tuple(kept)
        inside = {id(option) for option in options}
        pairs = tuple(pair for pair in self.pairs if id(pair.one) in inside and id(pair.other) in inside)
        return dataclasses.replace(self, options=options, pairs=pairs)


@dataclass(frozen=True, eq=False)
class Found:
    """The best plan, the graph it makes, and how that compares with the original (None without evaluation data).

    `others` are further plans within the budget, predicted to be slower: a measurement may disagree. `uniform`: every layer in
    one precision. `training_seconds` is what recovery took.
    """

    plan: Plan
    graph: Graph
    comparison: Comparison | None
    others: tuple[Found, ...] = ()
    uniform: bool = False
    training_seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Attempt:
    """One solution that was applied and scored; `refused` is what was tried to make it better."""

    solution: Solution
    graph: Graph
    comparison: Comparison
    amounts: Amounts
    round: Round
    refused: tuple[Refusal, ...] = ()


def price(task: Search) -> Priced:
    """Collect the options, price them on the target, measure what each does to the outputs."""
    samples = task.ctx.calibration
    if samples is None:
        raise DataError("planning needs calibration data", place="plan", hint="give --calibrate data.npz")
    base, options, refused = _offered(task)
    head = samples.head(SENSITIVITY_SAMPLES)
    fitted = dataclasses.replace(task.ctx, calibration=rest_of(samples) or samples)
    options = measure_errors(task.graph, fitted, options, head, task.workers, task.progress, task.known, task.sensitivity)
    finite = [option for option in options if math.isfinite(option.error)]
    behind, reasons = _behind(task, fitted, base, finite, head)
    finite, refused = [*finite, *behind], [*refused, *reasons]
    pairs = pairs_of(task.graph, task.ctx, base, finite, task.pricer)
    if task.pairwise:
        pairs = (*pairs, *error_pairs(task.graph, fitted, finite, head))
    return Priced(base, tuple(finite), pairs, tuple(refused), task.scorer(Session(task.graph).run))


def _behind(
    task: Search, fitted: Context, base: Base, options: Sequence[Option], samples: Samples
) -> tuple[list[Option], list[Refusal]]:
    """Options that err less behind a pass that prepares them."""
    rough = task.ctx.roughly(task.graph)
    single = [one for option in options for one in option.passes]
    gradients = by_gradients(task.sensitivity, task.graph, single, samples)

    def price(chain: tuple[Pass, ...]) -> Option | Refusal:
        return option_of(chain, task.graph, base, rough, task.pricer, task.budget)

    def judge(changed: Graph, chains: Chains) -> list[float]:
        unknown = [(option, chain) for option, chain in chains if chain.text not in task.known]
        plain = [option for option, _ in unknown]
        found = errors_behind(task.graph, changed, fitted, plain, samples, task.workers, task.progress, gradients=gradients)
        task.known.update(zip((chain.text for _, chain in unknown), found, strict=True))
        return [task.known[chain.text] for _, chain in chains]

    return prepared(task.graph, fitted, task.target, task.passes, options, price, judge)


@remembered
def rest_of(samples: Samples) -> Samples | None:
    """What changes are fitted to while their errors are measured on the first samples: what learned these by heart would seem
    to lose nothing. None where there are too few for both."""
    enough = len(samples) >= 2 * SENSITIVITY_SAMPLES
    return samples.rows(slice(SENSITIVITY_SAMPLES, None)) if enough else None


def _offered(task: Search) -> tuple[Base, list[Option], list[Refusal]]:
    """The options at prices that are sure enough to decide by, as far as the time for measuring goes."""
    arguments = (task.graph, task.ctx, task.passes, task.pricer, task.budget, task.progress, task.knobs)
    if task.measuring is None:
        return collect(*arguments)
    base, options, refused = collect(*arguments, hopeful=True)
    task.progress("measuring kernels", 0, 1)
    base, options = settled(task.graph, task.ctx, base, options, task.pricer, task.measuring)
    return base, useful(options, base, task.pricer, task.budget, refused), refused


def measured(task: Search, priced: Priced, solution: Solution, allowed: float) -> Attempt:
    """Apply a solution and score what comes out, or remember that."""
    passes = merged(one for option in solution.options for one in option.passes)
    if passes not in priced.applied:
        changed = PassManager(passes).run(task.graph, task.ctx).graph
        comparison = compare(task.scorer.metric, priced.baseline, task.scorer(Session(changed).run))
        priced.applied[passes] = changed, comparison
    changed, comparison = priced.applied[passes]
    amounts = task.amounts(changed)
    feasible = comparison.drop <= task.budget.max_drop and not task.exceeded(amounts)
    entry = Round(
        allowed, len(solution.options), amounts.seconds, round(amounts.bytes), comparison.score, comparison.drop, feasible,
        joules=amounts.joules, solved_seconds=solution.seconds * task.scale, gap=solution.gap,
    )  # fmt: skip
    return Attempt(solution, changed, comparison, amounts, entry)


def tightened(task: Search, limits: Limits, attempt: Attempt) -> Limits:
    """The model of sums and pairs is not quite the graph; shrink each limit by as much as the real graph overshot it."""
    changes: dict[str, float] = {}
    for name, allowed in task.budget.limits().items():
        current, found = getattr(limits, name), getattr(attempt.amounts, name)
        if current and found > allowed:
            changes[name] = current * allowed / found
    return dataclasses.replace(limits, **changes)


def versions() -> dict[str, str]:
    """What decided: the versions that can change a plan or a kernel."""
    names = ("hwopt", "apache-tvm", "apache-tvm-ffi", "numpy", "onnx", "onnxruntime", "scipy")
    return {name: importlib.metadata.version(name) for name in names}
