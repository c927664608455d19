"""Choosing a plan: price, solve, apply, measure the score, correct the allowance, solve again; the best feasible plan is kept."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hwopt.analysis.liveness import peak_activation_bytes
from hwopt.analysis.regions import regions
from hwopt.analysis.size import weight_bytes
from hwopt.analysis.workload import kernels, workloads
from hwopt.backends.ort import Session
from hwopt.errors import BudgetError, DataError
from hwopt.evaluate import Comparison, Scorer, compare
from hwopt.ir import Graph
from hwopt.pipeline import Context, Pass, PassManager, Phase, Refusal, merged
from hwopt.plan.budget import Budget, exceeded
from hwopt.plan.options import Base, Option, Progress, collect, measure_errors
from hwopt.plan.plan import Decision, Plan, Round
from hwopt.plan.solve import Edge, Limits, Solution, solve
from hwopt.target import Target, Workload

ROUNDS = 6
SENSITIVITY_SAMPLES = 64
FIRST_ERROR = 2.0  # allowed error per unit of allowed drop in the first round; the rounds correct it
STEP = 4.0  # how far the allowance moves while only one side of the border is known
NARROW = 1.25  # stop when the largest feasible and the smallest infeasible allowance are this close


@dataclass(frozen=True, eq=False)
class Search:
    """Everything one search works with. The scales are measured over predicted time and memory, 1 where nothing was measured."""

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


@dataclass(frozen=True, eq=False)
class Priced:
    """What does not depend on the limits: the options with their prices and errors, and the scores of the unchanged model."""

    base: Base
    options: tuple[Option, ...]
    refused: tuple[Refusal, ...]
    baseline: np.ndarray


@dataclass(frozen=True, eq=False)
class Found:
    """The best plan, the graph it makes, and how that compares with the original (None without evaluation data)."""

    plan: Plan
    graph: Graph
    comparison: Comparison | None


@dataclass(frozen=True, eq=False)
class _Attempt:
    solution: Solution
    graph: Graph
    comparison: Comparison
    seconds: float
    round: Round


def price(task: Search) -> Priced:
    """Collect the options, price them on the target, measure what each does to the outputs."""
    samples = task.ctx.calibration
    if samples is None:
        raise DataError("planning needs calibration data", place="plan", hint="give --calibrate data.npz")
    base, options, refused = collect(task.graph, task.ctx, task.passes, task.threads, task.budget, task.progress)
    head = samples.head(SENSITIVITY_SAMPLES)
    options = measure_errors(task.graph, task.ctx, options, head, task.workers, task.progress)
    finite = tuple(option for option in options if math.isfinite(option.error))
    return Priced(base, finite, tuple(refused), task.scorer(Session(task.graph).run))


def search(task: Search, priced: Priced) -> Found:
    """The fastest plan within the budget. Raises BudgetError, naming the nearest plan, if a limited budget cannot be met.

    A keyboard interrupt during the rounds ends the search with the best plan found so far, whose note says so.
    """
    attempts: list[_Attempt] = []
    note = ""
    try:
        _rounds(task, priced, attempts)
        _single_family(task, priced, attempts)
    except KeyboardInterrupt:
        if not attempts:
            raise
        note = f"interrupted: the best plan of {len(attempts)} round{'s' if len(attempts) > 1 else ''}"
        task.progress(note, 0, 1)
    found = _best(task, priced, attempts)
    return dataclasses.replace(found, plan=dataclasses.replace(found.plan, note=note))


def _single_family(task: Search, priced: Priced, attempts: list[_Attempt]) -> None:
    """Quantization alone, with the largest error that was feasible: the sum of gains may have promised more than it kept."""
    alone = [option for option in priced.options if all(one.phase == Phase.QUANTIZE for one in option.passes)]
    feasible = [attempt.round.allowed_error for attempt in attempts if attempt.round.feasible]
    if not feasible or task.budget.limited or len(alone) == len(priced.options):
        return
    edges = graph_edges(task.graph, task.target, task.threads)
    solution = solve(priced.base, alone, edges, Limits(max(feasible)))
    if solution is not None and all(attempt.solution.options != solution.options for attempt in attempts):
        attempts.append(_measured(task, solution, max(feasible), priced.baseline))


def _rounds(task: Search, priced: Priced, attempts: list[_Attempt]) -> None:
    """Solve -> apply -> measure, moving the allowed error between the largest feasible and the smallest infeasible one."""
    base, options, baseline = priced.base, priced.options, priced.baseline
    edges = graph_edges(task.graph, task.target, task.threads)
    most = sum(option.error for option in options) + 1e-9
    allowed = min(max(FIRST_ERROR * task.budget.max_drop, 1e-6), most)
    low, high = 0.0, math.inf
    limits = _first_limits(task)
    attempt = None
    for number in range(ROUNDS):
        task.progress("solving and measuring", number, ROUNDS)
        solution = solve(base, options, edges, dataclasses.replace(limits, error=allowed))
        known = next((a for a in attempts if solution and a.solution.options == solution.options), None)
        attempt = None
        if solution is None:  # a size, memory or latency limit needs more error than is allowed yet
            low = max(low, allowed)
        else:
            attempt = known or _measured(task, solution, allowed, baseline)
            if attempt is not known:
                attempts.append(attempt)
            limits = _tightened(task, limits, attempt)
            if attempt.comparison.drop <= _aim(task.budget, attempt.comparison):
                low = allowed
            else:
                high = allowed
        if attempt and _exceeded(task, attempt.graph, attempt.seconds):
            continue  # the limit is tightened now; the allowance may well do
        if (low >= most and high == math.inf) or high <= low * NARROW:
            return
        allowed = _next(low, high, most)


def _next(low: float, high: float, most: float) -> float:
    if high == math.inf:
        return min(low * STEP, most)
    return high / STEP if low == 0.0 else math.sqrt(low * high)


def _first_limits(task: Search) -> Limits:
    seconds = None if task.budget.latency_seconds is None else task.budget.latency_seconds / task.scale
    peak = None if task.budget.activation_bytes is None else task.budget.activation_bytes / task.memory_scale
    return Limits(0.0, seconds, task.budget.weight_bytes, peak)


def _aim(budget: Budget, comparison: Comparison) -> float:
    """The drop the search aims at: one standard error (at most half) inside the budget, so that it holds on other data too."""
    low, high = comparison.interval or (0.0, 0.0)
    return budget.max_drop - min((high - low) / 2 / 1.96, budget.max_drop / 2)


def _measured(task: Search, solution: Solution, allowed: float, baseline: np.ndarray) -> _Attempt:
    passes = merged(one for option in solution.options for one in option.passes)
    changed = PassManager(passes).run(task.graph, task.ctx).graph
    comparison = compare(task.scorer.metric, baseline, task.scorer(Session(changed).run))
    seconds = sum(task.target.cost.estimate(w, task.threads).seconds for w in workloads(changed)) * task.scale
    feasible = comparison.drop <= task.budget.max_drop and not _exceeded(task, changed, seconds)
    size = weight_bytes(changed)
    entry = Round(allowed, len(solution.options), seconds, size, comparison.score, comparison.drop, feasible)
    return _Attempt(solution, changed, comparison, seconds, entry)


def _exceeded(task: Search, graph: Graph, seconds: float) -> str:
    """Which limit a graph is predicted to break, with the numbers; empty if none."""
    return exceeded(task.budget, seconds, weight_bytes(graph), _peak(task, graph))


def _peak(task: Search, graph: Graph) -> float:
    return peak_activation_bytes(graph) * task.memory_scale


def _tightened(task: Search, limits: Limits, attempt: _Attempt) -> Limits:
    """The linear model adds what does not quite add; shrink each limit by as much as the real graph overshot it."""
    budget, graph = task.budget, attempt.graph
    changes: dict[str, float] = {}
    if budget.latency_seconds is not None and limits.seconds and attempt.seconds > budget.latency_seconds:
        changes["seconds"] = limits.seconds * budget.latency_seconds / attempt.seconds
    if budget.weight_bytes is not None and limits.bytes and weight_bytes(graph) > budget.weight_bytes:
        changes["bytes"] = limits.bytes * budget.weight_bytes / weight_bytes(graph)
    if budget.activation_bytes is not None and limits.peak_bytes and _peak(task, graph) > budget.activation_bytes:
        changes["peak_bytes"] = limits.peak_bytes * budget.activation_bytes / _peak(task, graph)
    return dataclasses.replace(limits, **changes)


def _best(task: Search, priced: Priced, attempts: Sequence[_Attempt]) -> Found:
    """The fastest feasible attempt; the unchanged model if none is better; BudgetError if limits are set and not met."""
    base, options, refused, baseline = priced.base, priced.options, priced.refused, priced.baseline
    start = sum(task.target.cost.estimate(w, task.threads).seconds for w in workloads(task.graph)) * task.scale
    feasible = [attempt for attempt in attempts if attempt.round.feasible]
    if not task.budget.limited:
        feasible = [attempt for attempt in feasible if attempt.seconds < start]
    careful = [attempt for attempt in feasible if attempt.comparison.drop <= _aim(task.budget, attempt.comparison)]
    best = min(careful or feasible, key=lambda attempt: attempt.seconds, default=None)
    if best is None and _exceeded(task, task.graph, start):
        raise BudgetError(_nearest(task, attempts, start), place="plan", hint="relax the budget or --max-drop")
    chosen = best.solution.options if best else ()
    not_chosen = [_not_chosen(option, chosen, base, task.scale) for option in options if option not in chosen]
    plan = Plan(
        target=task.target.name,
        threads=task.threads,
        graph_digest=task.graph.digest,
        budget=task.budget,
        seed=task.ctx.seed,
        decisions=tuple(_decision(option, base, task.scale) for option in chosen),
        refused=(*refused, *not_chosen),
        rounds=tuple(attempt.round for attempt in attempts),
        seconds_before=start,
        seconds_after=best.seconds if best else start,
        versions=versions(),
    )
    return Found(
        plan, best.graph if best else task.graph, best.comparison if best else compare(task.scorer.metric, baseline, baseline)
    )


def _nearest(task: Search, attempts: Sequence[_Attempt], start: float) -> str:
    if not attempts:
        return f"no combination of changes meets the budget ({_exceeded(task, task.graph, start)} unchanged)"
    near = min(attempts, key=lambda a: (bool(_exceeded(task, a.graph, a.seconds)), a.comparison.drop))
    broken = _exceeded(task, near.graph, near.seconds) or "all limits kept"
    return f"the nearest plan has {broken} at a drop of {near.comparison.drop:.2%} (allowed {task.budget.max_drop:.2%})"


def _decision(option: Option, base: Base, scale: float) -> Decision:
    before, gain = scale * sum(base.seconds.values()), scale * base.gain(option)
    count = len(option.seconds)
    reason = f"{count} kernel{'s' if count > 1 else ''} {gain * 1e6:.2f} us faster, error {option.error:.3g}"
    by = tuple(map(str, option.passes))
    return Decision(by, before, before - gain, base.bytes, base.bytes + option.bytes, option.error, reason)


def _not_chosen(option: Option, chosen: Sequence[Option], base: Base, scale: float) -> Refusal:
    other = next((o for o in chosen if o.group == option.group), None)
    reason = f"{option.text}: {base.gain(option) * scale * 1e6:.2f} us faster for an error of {option.error:.3g}"
    whole = "with its neighbours' conversions and the error allowance of the whole model"
    reason += f"; {other.text} was chosen instead, {whole}" if other else f"; not chosen, {whole}"
    return Refusal(option.passes[0].name, option.group, reason)


def graph_edges(graph: Graph, target: Target, threads: int) -> list[Edge]:
    """Values between kernels with weights, seen through those without; "" at the ends of the network."""
    weighted = {region.output: workload.name for region, workload in kernels(graph) if workload.macs}
    origin: dict[str, frozenset[str]] = {value: frozenset({""}) for value in graph.inputs}
    edges: dict[tuple[str, str], float] = {}
    for region in regions(graph):
        reads = [value for value in region.inputs if value not in graph.params]
        name = weighted.get(region.output)
        sources = frozenset(source for value in reads for source in origin.get(value, frozenset()))
        for value in reads if name else ():
            for source in origin.get(value, frozenset()):
                edges[source, name or ""] = _conversion(graph, value, target, threads)
        for node in region.nodes:
            origin.update(dict.fromkeys(node.outputs, frozenset({name}) if name else sources))
    for value in graph.outputs:
        for source in origin.get(value, frozenset()):
            edges[source, ""] = _conversion(graph, value, target, threads)
    return [Edge(source, reader, seconds) for (source, reader), seconds in edges.items() if source != reader]


def _conversion(graph: Graph, value: str, target: Target, threads: int) -> float:
    """One pass over a value to quantize or dequantize it as a kernel of its own."""
    kind = graph.tensor(value)
    elements = kind.elements if kind.static else 0
    workload = Workload("convert", "elementwise", "float32", elements=elements, read_bytes=4 * elements, write_bytes=elements)
    return target.cost.estimate(workload, threads).seconds


def versions() -> dict[str, str]:
    """What decided: the versions that can change a plan or a kernel."""
    names = ("hwopt", "apache-tvm", "apache-tvm-ffi", "numpy", "onnx", "onnxruntime", "scipy")
    return {name: importlib.metadata.version(name) for name in names}
