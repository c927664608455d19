"""Options: for every layer and every coupling group, the changes worth considering, with their price and their error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from hwopt.analysis.liveness import peak_activation_bytes
from hwopt.analysis.size import weight_bytes
from hwopt.analysis.workload import kernels
from hwopt.backends.ort import Session
from hwopt.errors import PassError
from hwopt.evaluate import divergence
from hwopt.ir import Graph
from hwopt.pipeline import Context, Pass, Phase, Refusal, run_pass
from hwopt.plan.budget import Budget
from hwopt.samples import Samples
from hwopt.target import Target

CONVERSIONS = {"QuantizeLinear", "DequantizeLinear"}
PER_GROUP = 4  # options of one family that are measured for one group: enough for a convex staircase
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Option:
    """One way to change one group. `seconds` maps each kernel that changes to its new time; the other fields are differences."""

    group: str
    passes: tuple[Pass, ...]
    seconds: Mapping[str, float]
    bytes: int
    peak_bytes: int
    error: float = 0.0
    integer: bool = False

    @property
    def text(self) -> str:
        return " + ".join(map(str, self.passes))


@dataclass(frozen=True)
class Base:
    """The unchanged graph: kernel times, weight bytes, peak activation bytes."""

    seconds: Mapping[str, float]
    bytes: int
    peak_bytes: int

    def gain(self, option: Option) -> float:
        """Seconds that the option saves by itself (negative: costs)."""
        return sum(self.seconds.get(kernel, 0.0) - time for kernel, time in option.seconds.items())


def base_of(graph: Graph, target: Target, threads: int) -> Base:
    return Base(_kernel_seconds(graph, target, threads), weight_bytes(graph), peak_activation_bytes(graph))


def collect(
    graph: Graph, ctx: Context, passes: Iterable[type[Pass]], threads: int, budget: Budget, progress: Progress
) -> tuple[Base, list[Option], list[Refusal]]:
    """Every option that gains something on this target, priced but without its error; and every refusal."""
    target = _target(ctx)
    base = base_of(graph, target, threads)
    refused: list[Refusal] = []
    instances: list[Pass] = []
    for kind in passes:
        if budget.weight_bytes is None and kind.saves == {"bytes"}:
            refused.append(Refusal(kind.name, graph.name, "makes weights smaller, not faster, and no size budget asks for that"))
            continue
        for found in kind.candidates(graph, target):
            (refused if isinstance(found, Refusal) else instances).append(found)  # type: ignore[arg-type]
    cheap = dataclasses.replace(ctx, calibration=ctx.calibration.head(1) if ctx.calibration else None, refused=refused)
    options: list[Option] = []
    for done, combination in enumerate(chains := _combinations(instances)):
        progress("pricing", done, len(chains))
        option = _priced(combination, graph, base, cheap, target, threads)
        if isinstance(option, Refusal):
            refused.append(option)
        elif reason := _useless(option, base, budget):
            refused.append(Refusal(combination[-1].name, option.group, f"{option.text}: {reason}"))
        else:
            options.append(option)
    kept = _right_edges(options, base)
    return base, kept, list(dict.fromkeys(refused))


def measure_errors(
    graph: Graph, ctx: Context, options: Sequence[Option], samples: Samples, workers: int, progress: Progress
) -> list[Option]:
    """The options with the divergence of the outputs that each pass causes alone; those of a combination add up."""
    session = Session(graph)
    reference = _outputs(session, graph, samples)
    single = list(dict.fromkeys(one for option in options for one in option.passes))
    errors: dict[Pass, float] = {}
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(_error, one, graph, ctx, samples, reference) for one in single]
        try:
            for done, (one, future) in enumerate(zip(single, futures, strict=True)):
                progress("measuring sensitivity", done, len(single))
                errors[one] = future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [dataclasses.replace(option, error=sum(errors[one] for one in option.passes)) for option in options]


def _target(ctx: Context) -> Target:
    if ctx.target is None:
        raise PassError("planning needs a target", place="plan")
    return ctx.target


def _combinations(instances: Sequence[Pass]) -> list[tuple[Pass, ...]]:
    """Each instance alone, and on one layer a factorization or shared weights together with quantization."""
    quantize: dict[str, list[Pass]] = {}
    for one in instances:
        if one.phase == Phase.QUANTIZE:
            quantize.setdefault(_site(one), []).append(one)
    chains: list[tuple[Pass, ...]] = []
    for one in instances:
        chains.append((one,))
        if one.phase in (Phase.FACTOR, Phase.SHARE):
            chains.extend((one, other) for other in quantize.get(_site(one), ()))
    return chains


def _site(one: Pass) -> str:
    return "+".join(one.site)


def _group(combination: tuple[Pass, ...]) -> str:
    """Pruning decides about a coupling group, everything else about a layer."""
    site = _site(combination[0])
    return f"channels of {site}" if combination[0].phase == Phase.PRUNE else site


def _priced(
    combination: tuple[Pass, ...], graph: Graph, base: Base, ctx: Context, target: Target, threads: int
) -> Option | Refusal:
    changed = graph
    for one in combination:
        known = len(ctx.refused)
        after = run_pass(one, changed, ctx)
        if after is changed:
            reason = ctx.refused[-1].reason if len(ctx.refused) > known else "changes nothing"
            return Refusal(one.name, _site(one), f"{one}: {reason}")
        changed = after
    seconds = dict(_kernel_seconds(changed, target, threads))
    site = _site(combination[0])
    for kernel in [kernel for kernel in seconds if kernel not in base.seconds]:  # the parts of a factored layer
        seconds[site] = seconds.get(site, 0.0) + seconds.pop(kernel)
    gone = {kernel: 0.0 for kernel in base.seconds if kernel not in seconds}
    differing = {kernel: time for kernel, time in (seconds | gone).items() if time != base.seconds.get(kernel)}
    integer = any(one.phase == Phase.QUANTIZE for one in combination)
    size = weight_bytes(changed) - base.bytes
    return Option(
        _group(combination), combination, differing, size, peak_activation_bytes(changed) - base.peak_bytes, 0.0, integer
    )


def _kernel_seconds(graph: Graph, target: Target, threads: int) -> Mapping[str, float]:
    """Time of each kernel by name. Conversions that stand alone are left out: the solver prices them on the edges."""
    seconds: dict[str, float] = {}
    for region, workload in kernels(graph):
        if not all(node.op in CONVERSIONS for node in region.nodes):
            time = target.cost.estimate(workload, threads).seconds
            seconds[workload.name] = seconds.get(workload.name, 0.0) + time
    return seconds


def _useless(option: Option, base: Base, budget: Budget) -> str:
    """Why an option gains nothing that anybody asked for; empty if it does."""
    gain = base.gain(option)
    if gain > 0:
        return ""
    if budget.weight_bytes is not None and option.bytes < 0:
        return ""
    if budget.activation_bytes is not None and option.peak_bytes < 0:
        return ""
    before = sum(base.seconds.get(kernel, 0.0) for kernel in option.seconds)
    return f"not faster on this target ({before * 1e6:.2f} us -> {(before - gain) * 1e6:.2f} us)"


def _right_edges(options: Sequence[Option], base: Base) -> list[Option]:
    """Of each group and family at most PER_GROUP options, evenly spread, and none that costs the time of a gentler one.

    Candidates come gentlest first or last; latency is a staircase, so of equal times only the one that removes least is kept.
    """
    families: dict[tuple[str, tuple[str, ...]], list[Option]] = {}
    for option in options:
        families.setdefault((option.group, tuple(one.name for one in option.passes)), []).append(option)
    kept: list[Option] = []
    for family in families.values():
        steps: list[Option] = []
        for option in sorted(family, key=lambda o: (-o.bytes, base.gain(o))):  # least removed first
            if not steps or base.gain(option) > base.gain(steps[-1]) or option.bytes < steps[-1].bytes:
                steps.append(option)
        picked = np.unique(np.linspace(0, len(steps) - 1, PER_GROUP).round().astype(int))
        kept.extend(steps[index] for index in picked)
    return kept


def _outputs(session: Session, graph: Graph, samples: Samples) -> list[np.ndarray]:
    """Every floating-point output over all samples."""
    runs = [session.run(feeds) for feeds in samples.feeds(graph)]
    found = [np.concatenate([np.atleast_1d(run[name]) for run in runs]) for name in graph.outputs]
    return [output for output in found if np.issubdtype(output.dtype, np.floating)]


def _error(one: Pass, graph: Graph, ctx: Context, samples: Samples, reference: list[np.ndarray]) -> float:
    changed = run_pass(one, graph, ctx)
    if changed is graph:
        return 0.0
    found = _outputs(Session(changed), changed, samples)
    return sum(divergence(before, after) for before, after in zip(reference, found, strict=True))
