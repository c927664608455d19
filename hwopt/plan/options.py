"""Options: for every layer and every coupling group, the changes worth considering, with their price and their error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hwopt.analysis.held import held_bytes
from hwopt.analysis.liveness import alive_bytes
from hwopt.analysis.workload import kernels
from hwopt.errors import PassError
from hwopt.ir import Graph
from hwopt.pipeline import Context, Pass, PassManager, Phase, Refusal, run_pass
from hwopt.plan.budget import Budget
from hwopt.target import Cost, Target, Workload, total

CONVERSIONS = {"QuantizeLinear", "DequantizeLinear", "Cast"}
PER_GROUP = 6  # options of one family that are measured for one group: enough for a convex staircase
ALIVE = "alive at "  # resources by this name and a kernel's: bytes of activations while it runs
CROWDED = 0.5  # of the memory limit: kernels that more than this is alive at may break it, together with other changes
TOO_LITTLE, SAME = 1e-4, 0.02  # of the whole model's time; of an option's gain and of what is left: prices are not that good
Progress = Callable[[str, int, int], None]
Work = Mapping[str, tuple[Workload, ...]]  # the kernels at each place: several where a layer was factored


@dataclass(frozen=True)
class Option:
    """One way to change one group; the figures are differences. `alive`: of the bytes of activations, kernel by kernel.

    `form` is the dtype that the layer computes in, "" where that stays; `work` are the kernels behind `seconds`.
    """

    group: str
    passes: tuple[Pass, ...]
    gain: float  # seconds that it saves by itself (negative: costs)
    bytes: int
    alive: Mapping[str, int] = field(default_factory=dict)
    error: float = 0.0
    joules: float = 0.0
    left: float = 0.0  # seconds that the kernels take which it changes
    form: str = ""
    work: Work = field(default_factory=dict)
    conversions: tuple[Workload, ...] = ()  # kernels of its own that neighbours may make needless
    note: str = ""  # what a reader of the plan should know
    coarse: Option | None = field(default=None, repr=False)  # the option that was offered, if this does it with more care

    @property
    def offered(self) -> Option:
        """The option as the solver saw it."""
        return self.coarse or self

    @property
    def text(self) -> str:
        return " + ".join(map(str, self.passes))

    @property
    def prunes(self) -> bool:
        """True if it changes widths: of all layers that share the group."""
        return self.passes[0].phase == Phase.PRUNE

    @property
    def likeness(self) -> tuple:
        """Equal for options of isomorphic groups: the same passes elsewhere with the same prices."""
        passes = tuple(str(dataclasses.replace(one, site=())) for one in self.passes)
        return passes, round(self.gain * 1e9, 1), self.bytes, tuple(sorted(self.alive.values()))

    def amount(self, resource: str) -> float:
        """What it adds to the whole model's sum of a resource."""
        if resource.startswith(ALIVE):
            return float(self.alive.get(resource.removeprefix(ALIVE), 0))
        return -self.gain if resource == "seconds" else float(getattr(self, resource))


@dataclass(frozen=True, eq=False)
class Pair:
    """What two options of different groups cost together beyond their sum."""

    one: Option
    other: Option
    seconds: float = 0.0
    joules: float = 0.0
    bytes: float = 0.0
    error: float = 0.0
    alive: Mapping[str, float] = field(default_factory=dict)

    def amounts(self) -> Iterator[tuple[str, float]]:
        """(resource, extra) where there is any."""
        yield from ((name, getattr(self, name)) for name in ("seconds", "joules", "bytes", "error") if getattr(self, name))
        yield from ((ALIVE + place, extra) for place, extra in self.alive.items() if extra)


@dataclass(frozen=True)
class Base:
    """The unchanged graph: kernels by name, what they cost, weight bytes, bytes of activations alive at each kernel."""

    work: Work
    total_seconds: float
    bytes: int
    alive: Mapping[str, int]
    joules: float = 0.0

    def amount(self, resource: str) -> float:
        if resource.startswith(ALIVE):
            return float(self.alive[resource.removeprefix(ALIVE)])
        peak = max(self.alive.values(), default=0)
        values = {"seconds": self.total_seconds, "error": 0.0, "bytes": self.bytes, "peak_bytes": peak}
        return float(values.get(resource, self.joules))


class Pricer:
    """A target's cost model that remembers what it was asked. `scale` is measured over predicted time, for what people read."""

    def __init__(self, target: Target, threads: int, scale: float = 1.0) -> None:
        self.target, self.threads, self.scale = target, threads, scale
        self._known: dict[tuple[Workload, int], Cost] = {}
        self._made: dict[tuple[str, tuple[Pass, ...]], tuple[tuple[Workload, ...], Mapping[str, int]]] = {}

    def forget(self) -> None:
        """Ask again: something was measured."""
        self._known.clear()

    def cost(self, work: Iterable[Workload]) -> Cost:
        """The sum over kernels."""
        return total(self._one(dataclasses.replace(one, name="")) for one in work)

    def graph(self, graph: Graph) -> Cost:
        """One run of the whole graph."""
        return self.cost(work for _, work in kernels(graph))

    def changed(self, graph: Graph, passes: tuple[Pass, ...], ctx: Context) -> Cost:
        """One run of what the passes make of a graph. Its kernels are remembered: data play no part in them."""
        return self.cost(self._make(graph, passes, ctx)[0])

    def alive(self, graph: Graph, passes: tuple[Pass, ...], ctx: Context) -> Mapping[str, int]:
        """Bytes alive at each kernel of what the passes make of a graph, by the names that the graph has for them."""
        return self._make(graph, passes, ctx)[1]

    def _make(self, graph: Graph, passes: tuple[Pass, ...], ctx: Context) -> tuple[tuple[Workload, ...], Mapping[str, int]]:
        key = graph.digest, passes
        if key not in self._made:
            changed = PassManager(passes).run(graph, ctx).graph
            self._made[key] = tuple(work for _, work in kernels(changed)), alive_at(changed, alive_bytes(graph))
        return self._made[key]

    def _one(self, work: Workload) -> Cost:
        key = (work, work.footprint)  # which workloads are equal without
        if key not in self._known:
            self._known[key] = self.target.cost.estimate(work, self.threads)
        return self._known[key]


def base_of(graph: Graph, pricer: Pricer) -> Base:
    work: dict[str, tuple[Workload, ...]] = {}
    for _, one in kernels(graph):
        work[one.name] = (*work.get(one.name, ()), one)
    cost = pricer.graph(graph)
    return Base(work, cost.seconds, held_bytes(graph), alive_bytes(graph), cost.joules)


def alive_at(changed: Graph, places: Mapping[str, int]) -> dict[str, int]:
    """Bytes alive at each of these kernels; what a kernel of another name (a conversion, a factor) takes counts to the next."""
    found: dict[str, int] = dict.fromkeys(places, 0)
    waiting = 0
    for name, size in alive_bytes(changed).items():
        waiting = max(waiting, size)
        if name in found:
            found[name], waiting = max(found[name], waiting), 0
    if found:
        last = next(reversed(found))
        found[last] = max(found[last], waiting)
    return found


def collect(
    graph: Graph, ctx: Context, passes: Iterable[type[Pass]], pricer: Pricer, budget: Budget, progress: Progress,
    knobs: Mapping[str, Any] | None = None, hopeful: bool = False,
) -> tuple[Base, list[Option], list[Refusal]]:  # fmt: skip
    """Every option that gains something on this target, priced but without its error; and every refusal.

    `hopeful` also takes those that gain something only within the interval of their price (see doubts.py, and `useful`).
    """
    if ctx.target is None:
        raise PassError("planning needs a target", place="plan")
    base = base_of(graph, pricer)
    instances, refused = _instances(graph, passes, ctx.target, budget, knobs or {})
    cheap = dataclasses.replace(ctx.roughly(graph), refused=refused)
    options: list[Option] = []

    def consider(chains: Sequence[tuple[Pass, ...]]) -> None:
        for done, chain in enumerate(chains):
            progress("pricing", done, len(chains))
            found = option_of(chain, graph, base, cheap, pricer, budget, hopeful)
            (refused if isinstance(found, Refusal) else options).append(found)  # type: ignore[arg-type]

    consider([(one,) for one in instances])
    consider(_combinations([option.passes[0] for option in options]))
    return base, _right_edges(options, refused, 0.0 if hopeful else _alike(base, budget)), list(dict.fromkeys(refused))


def _instances(
    graph: Graph, passes: Iterable[type[Pass]], target: Target, budget: Budget, knobs: Mapping[str, Any]
) -> tuple[list[Pass], list[Refusal]]:
    """What the families propose, with the knobs (`family.field`) turned as asked, and what they decline."""
    refused: list[Refusal] = []
    instances: list[Pass] = []
    for kind in (kind for kind in passes if kind.prepares is None):
        if budget.weight_bytes is None and kind.saves == {"bytes"}:
            refused.append(Refusal(kind.name, graph.name, "makes weights smaller, not faster, and no size budget asks for that"))
            continue
        turned = {key.partition(".")[2]: value for key, value in knobs.items() if key.partition(".")[0] == kind.name}
        for found in kind.candidates(graph, target):
            if isinstance(found, Refusal):
                refused.append(found)
            else:
                instances.append(found.turned(**turned))
    return list(dict.fromkeys(instances)), refused


def _combinations(useful: Sequence[Pass]) -> list[tuple[Pass, ...]]:
    """On one layer a factorization or shared weights together with quantization, where each of them gains something alone."""
    quantize: dict[str, list[Pass]] = {}
    for one in useful:
        if one.phase == Phase.QUANTIZE and not one.apart:
            quantize.setdefault(_site(one), []).append(one)
    first = (one for one in useful if one.phase in (Phase.FACTOR, Phase.SHARE))
    return [(one, other) for one in first for other in quantize.get(_site(one), ())]


def _site(one: Pass) -> str:
    return "+".join(one.site)


def _group(combination: tuple[Pass, ...]) -> str:
    """Pruning decides about a coupling group, everything else about a layer."""
    site = _site(combination[-1])
    return f"channels of {site}" if combination[0].phase == Phase.PRUNE else site


def option_of(
    combination: tuple[Pass, ...], graph: Graph, base: Base, ctx: Context, pricer: Pricer, budget: Budget, hopeful: bool = False
) -> Option | Refusal:
    """The option, or why it is none."""
    changed = graph
    for one in combination:
        known = len(ctx.refused)
        after = run_pass(one, changed, ctx)
        if after is changed:
            reason = ctx.refused[-1].reason if len(ctx.refused) > known else "changes nothing"
            return Refusal(one.name, _site(combination[-1]), f"{one}: {reason}")
        changed = after
    site = _site(combination[-1])
    work, conversions = _changed_work(changed, base, site)
    alive = {place: size - base.alive[place] for place, size in alive_at(changed, base.alive).items()}
    option = repriced(
        Option(
            group=_group(combination), passes=combination, gain=0.0, bytes=held_bytes(changed) - base.bytes,
            alive={place: change for place, change in alive.items() if change}, work=work,
            form="" if any(one.apart for one in combination) else _form(base, work, site),
            conversions=tuple(conversions),
        ), base, pricer,
    )  # fmt: skip
    reason = _useless(option, base, pricer, budget, hopeful)
    return _refusal(option, reason) if reason else option


def repriced(option: Option, base: Base, pricer: Pricer) -> Option:
    """The same at the prices of now."""
    before, after, extra = _costs(option, base, pricer)
    gain = before.seconds - after.seconds - extra.seconds
    return dataclasses.replace(option, gain=gain, joules=after.joules + extra.joules - before.joules, left=after.seconds)


def useful(options: Iterable[Option], base: Base, pricer: Pricer, budget: Budget, refused: list[Refusal]) -> list[Option]:
    """Those that gain something at the prices of now; refusals of the others are appended."""
    kept = []
    for option in options:
        reason = _useless(option, base, pricer, budget)
        refused.append(_refusal(option, reason)) if reason else kept.append(option)
    return _right_edges(kept, refused, _alike(base, budget))


def _costs(option: Option, base: Base, pricer: Pricer) -> tuple[Cost, Cost, Cost]:
    """Of the kernels that change, before and after, and of the conversions."""
    before = pricer.cost(one for name in option.work for one in base.work.get(name, ()))
    return before, pricer.cost(one for parts in option.work.values() for one in parts), pricer.cost(option.conversions)


def _changed_work(changed: Graph, base: Base, site: str) -> tuple[Work, list[Workload]]:
    """Kernels that differ from before, by the name of the place (`site` for new ones), and conversions of their own."""
    now: dict[str, tuple[Workload, ...]] = {}
    conversions: list[Workload] = []
    for region, one in kernels(changed):
        if one.name not in base.work and all(node.op in CONVERSIONS for node in region.nodes):
            conversions.append(one)
            continue
        name = one.name if one.name in base.work else site
        now[name] = (*now.get(name, ()), one)
    names = dict.fromkeys((*base.work, *now))
    return {name: now.get(name, ()) for name in names if now.get(name, ()) != base.work.get(name, ())}, conversions


def _form(base: Base, work: Work, site: str) -> str:
    """The dtype that a layer computes in, if that changed."""
    before, after = base.work.get(site, ()), work.get(site, ())
    return after[-1].dtype if before and after and after[-1].dtype != before[-1].dtype else ""


def _useless(option: Option, base: Base, pricer: Pricer, budget: Budget, hopeful: bool = False) -> str:
    """Why an option gains nothing that anybody asked for; empty if it does. Neighbours may make its conversions needless."""
    before, after, extra = _costs(option, base, pricer)
    inside = option.gain + (extra.seconds if option.form else 0.0)
    hope = _high(before) - _low(after) - (0.0 if option.form else _low(extra)) if hopeful else inside
    if max(inside, hope) > 0:
        return ""
    most = CROWDED * (budget.activation_bytes or 0.0)
    wanted = (
        (budget.weight_bytes, option.bytes),
        (budget.activation_bytes, min((d for place, d in option.alive.items() if base.alive[place] > most), default=0)),
        (budget.joules, option.joules - (extra.joules if option.form else 0.0)),
    )
    if any(limit is not None and change < 0 for limit, change in wanted):
        return ""
    microseconds = 1e6 * pricer.scale
    return (
        f"not faster on this target ({before.seconds * microseconds:.2f} us -> {(before.seconds - inside) * microseconds:.2f} us)"
    )


def _low(cost: Cost) -> float:
    return cost.seconds if cost.low is None else cost.low


def _high(cost: Cost) -> float:
    return cost.seconds if cost.high is None else cost.high


def _alike(base: Base, budget: Budget) -> float:
    """Seconds that are no difference; 0 where something other than time is short: the smaller of two may then be the better."""
    limits = (budget.weight_bytes, budget.activation_bytes, budget.joules)
    return TOO_LITTLE * base.total_seconds if all(limit is None for limit in limits) else 0.0


def _right_edges(options: Sequence[Option], refused: list[Refusal], alike: float) -> list[Option]:
    """Of each group and family at most PER_GROUP options, evenly spread, and none that costs the time of a gentler one.

    Candidates come gentlest first or last; latency is a staircase, so of equal times only the one that removes least is kept:
    the right edge of its step. Times are equal within `alike` seconds; 0 keeps all where bytes differ.
    """
    families: dict[tuple, list[Option]] = {}
    for option in options:
        families.setdefault((option.group, option.form, tuple(one.name for one in option.passes)), []).append(option)
    kept: list[Option] = []
    for family in families.values():
        steps: list[Option] = []
        for option in sorted(family, key=lambda o: (-o.bytes, o.gain)):  # least removed first
            if not steps or _another_step(option, steps[-1], alike):
                steps.append(option)
            else:
                refused.append(_refusal(option, f"removes more than {steps[-1].text} and is not faster"))
        picked = np.unique(np.linspace(0, len(steps) - 1, PER_GROUP).round().astype(int))
        kept.extend(steps[index] for index in picked)
        passed_over = (step for index, step in enumerate(steps) if index not in picked)
        refused.extend(_refusal(option, f"between two of the {PER_GROUP} steps that were looked at") for option in passed_over)
    return kept


def _another_step(option: Option, last: Option, alike: float) -> bool:
    """True if an option is faster than the last one, or smaller in another time."""
    apart = not alike or abs(option.gain - last.gain) > max(alike, SAME * min(abs(last.gain), last.left))
    return apart and (option.gain > last.gain or option.bytes < last.bytes)


def _refusal(option: Option, reason: str) -> Refusal:
    return Refusal(option.passes[-1].name, option.group, f"{option.text}: {reason}")
