"""Prices that are not sure enough to decide by are measured: many layers in one graph, for a bounded time.

A learned price states an interval. Where the gains of two options of a group overlap within theirs (keeping the layer as it is
counts as one), their kernels are timed on this machine, in graphs in which every group takes the option in doubt; the kernels of
neighbours that change together and of layers that change alone are not the same, so every second group is changed, too.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from hwopt.analysis.workload import workloads
from hwopt.errors import HwoptError
from hwopt.ir import Graph
from hwopt.pipeline import Context, PassManager, merged
from hwopt.plan.options import Base, Option, Pricer, base_of, repriced
from hwopt.target import Cost, Target, Workload

if TYPE_CHECKING:  # TVM is imported when something is measured
    from hwopt.backends.tvm.learn.measure import Profile

SECONDS = 20.0  # that one plan may spend on it
STRANGE = 30.0  # the same on a processor that no table knows
RUN = 0.3  # how long each graph is run
KERNEL = 0.2  # seconds that a new kernel takes to compile, about: nothing is begun that would not end in time
MATTERS = 0.002  # of the whole model's time: smaller doubts are left


@runtime_checkable
class Measurable(Protocol):
    """A cost model that takes measurements."""

    @property
    def own(self) -> bool:
        """Whether its prices are of this very processor."""

    def measures(self, threads: int) -> bool:
        """Whether those on so many threads are taken."""

    def learn(self, found: Profile, threads: int) -> None:
        """Take what kernels took."""


@dataclass
class Measuring:
    """Timing kernels of graphs, as long as there is time `left`, for a cost model that takes measurements."""

    target: Target
    threads: int
    left: float = SECONDS
    graphs: int = 0  # that were timed
    _seen: set[Workload] = field(default_factory=set)

    def learn(self, graph: Graph) -> bool:
        """Time the kernels of a graph; False where there is no time for it, or it cannot be run."""
        unknown = {one for one in workloads(graph) if self._doubted(one)} - self._seen
        if not unknown:
            return True
        if KERNEL * len(unknown) + RUN > self.left:
            return False
        began = time.monotonic()
        try:
            self._time(graph)
        except HwoptError:  # a plan can be made without
            return False
        finally:
            self.left -= time.monotonic() - began
        self._seen |= unknown
        self.graphs += 1
        return True

    def _doubted(self, work: Workload) -> bool:
        return self.target.cost.estimate(work, self.threads).source != "measured"

    def _time(self, graph: Graph) -> None:
        from hwopt.backends.tvm.learn.measure import profile
        from hwopt.backends.tvm.tune.runner import Runner

        with Runner(self.threads) as runner:
            found = profile(graph, self.target, self.threads, runner, RUN)
        if isinstance(self.target.cost, Measurable):
            self.target.cost.learn(found, self.threads)


def own_prices(target: Target) -> Target:
    """The target with prices of its own, which what is measured while planning changes."""
    fresh = getattr(target.cost, "fresh", None)
    return target if fresh is None else dataclasses.replace(target, cost=fresh())


def measuring_on(target: Target, threads: int) -> Measuring | None:
    """What measures for these prices; None where nothing can be measured."""
    cost = target.cost
    if not isinstance(cost, Measurable) or not target.runs_here or not cost.measures(threads):
        return None
    return Measuring(target, threads, SECONDS if cost.own else STRANGE)


def settled(
    graph: Graph, ctx: Context, base: Base, options: Sequence[Option], pricer: Pricer, measuring: Measuring | None
) -> tuple[Base, list[Option]]:
    """The same with prices that were measured wherever a decision depends on them and the time was enough."""
    if measuring is None:
        return base, list(options)
    ctx = ctx.roughly(graph)
    measuring.learn(graph)
    tried: set[int] = set()
    pricer.forget()
    while picked := _picked(base, options, pricer, tried):
        tried |= {id(option) for option in picked}
        if not all(map(measuring.learn, _graphs(graph, ctx, picked))):
            break
        pricer.forget()
    pricer.forget()
    base = base_of(graph, pricer)
    return base, [repriced(option, base, pricer) for option in options]


def _graphs(graph: Graph, ctx: Context, picked: Sequence[Option]) -> Iterator[Graph]:
    """All of them together, and every second one."""
    for some in (picked, picked[::2], picked[1::2]):
        if some:
            yield PassManager(merged(one for option in some for one in option.passes)).run(graph, ctx).graph


def _picked(base: Base, options: Sequence[Option], pricer: Pricer, tried: set[int]) -> list[Option]:
    """Of each group the option in most doubt, all of one kind: the kind that all its doubts together make the first."""
    groups: dict[str, list[tuple[Option, float, float]]] = {}
    for option in options:
        gain, half = _gain(option, base, pricer)
        groups.setdefault(option.group, []).append((option, gain, half))
    kinds: dict[tuple[str, ...], list[tuple[float, Option]]] = {}
    for found in groups.values():
        best: dict[tuple[str, ...], tuple[float, Option]] = {}
        for option, gain, half in found:
            others = [(0.0, 0.0), *((g, h) for one, g, h in found if one is not option)]
            doubtful = half > MATTERS * base.total_seconds and any(abs(gain - g) < half + h for g, h in others)
            kind = (option.form, *(one.name for one in option.passes))
            if doubtful and id(option) not in tried and half > best.get(kind, (0.0, None))[0]:
                best[kind] = (half, option)
        for kind, one in best.items():
            kinds.setdefault(kind, []).append(one)
    chosen = max(kinds.values(), key=lambda some: sum(half for half, _ in some), default=[])
    return [option for _, option in chosen]


def _gain(option: Option, base: Base, pricer: Pricer) -> tuple[float, float]:
    """Seconds that an option saves, and how far that may be off: errors of kernels are not the same, so squares add up."""
    before = [pricer.cost([one]) for name in option.work for one in base.work.get(name, ())]
    after = [pricer.cost([one]) for parts in (*option.work.values(), option.conversions) for one in parts]
    gain = sum(one.seconds for one in before) - sum(one.seconds for one in after)
    return gain, math.sqrt(sum(_half(one) ** 2 for one in (*before, *after)))


def _half(cost: Cost) -> float:
    if cost.source == "measured" or cost.low is None or cost.high is None:
        return 0.0
    return (cost.high - cost.low) / 2
