"""netadapt: take predicted time away in rounds, each time where it costs the least, with a short training after each cut."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

from hwopt.analysis.workload import workloads
from hwopt.errors import HwoptError, UsageError
from hwopt.ir import Graph
from hwopt.pipeline import Pass, Phase, parse, run_pass
from hwopt.plugins import find_passes
from hwopt.recover.case import Case, Check, Outcome
from hwopt.recover.recipe import Recipe
from hwopt.recover.schedules import NOTHING, Run, Schedule, stop_of
from hwopt.target import Target, total

MOST = 64  # rounds


@dataclass(frozen=True)
class NetAdapt(Schedule):
    """Cut a share of the predicted latency where the held-out loss then is least, recover a little, and again; then recover long.

    Yang et al. 2018 (arXiv:1804.03230). Proposals are the candidates of the pruning passes on the target's granule, at each place
    the widest that saves enough by the target's cost model. The best `tries` of them are trained for `short` epochs each. If the
    score on held-out samples then is more than `drop` below that of the graph that was given, later rounds are taken back.
    """

    name: ClassVar[str] = "netadapt"
    summary: ClassVar[str] = "cut predicted latency round by round where it costs least, recover after each cut"

    latency: float = 0.7  # of the predicted seconds to reach
    share: float = 0.05  # of them that the first round takes away
    decay: float = 0.96  # of the next round's share
    tries: int = 2  # proposals of a round that are trained
    short: float = 0.1  # epochs after each cut
    drop: float = 0.01  # of the score that may be lost in the end
    cores: int = 0  # that latency is predicted for; 0: the target's
    cuts: tuple[str, ...] = ()  # that were made; filled in

    def conditions(self) -> tuple[tuple[str, bool], ...]:
        inside = [(name, 0 < getattr(self, name) <= 1) for name in ("latency", "share", "decay")]
        return (*inside, ("tries", self.tries >= 1), ("short", self.short > 0), ("drop", self.drop >= 0))

    def usual(self) -> Self:
        return dataclasses.replace(super().usual(), cuts=())

    def recover(self, case: Case) -> Outcome:
        """A graph that is predicted to be faster and keeps the score, or the one that was given."""
        if self.stops:
            return self._again(case)
        if case.ctx.target is None:
            raise UsageError(
                "needs the cost model of a target",
                place=str(self),
                hint="give --target, or a context that has one: Context(find_target('host'))",
            )
        rounds = _Rounds(case, self, case.ctx.target)
        rounds.go()
        return rounds.settle()

    def _again(self, case: Case) -> Outcome:
        run, graph = Run(case, self), case.graph
        if self.stops == (NOTHING,):
            return Outcome(graph, self, 0.0)
        for text in self.cuts:
            graph = run_pass(parse(text, find_passes()), graph, case.ctx)
            graph = run.train(graph, 1.0)
        return Outcome(run.train(graph, 1.0), self, 0.0)


@dataclass(frozen=True, eq=False)
class _State:
    """After a round: the graph, its predicted seconds, and how it came about."""

    graph: Graph
    seconds: float
    cuts: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()


class _Rounds:
    def __init__(self, case: Case, recipe: NetAdapt, target: Target) -> None:
        self.case, self.recipe, self.target = case, recipe, target
        self.run = Run(case, recipe)
        self.kinds = [kind for kind in find_passes().values() if kind.phase == Phase.PRUNE]
        self.states = [_State(case.graph, self.price(case.graph))]
        self.before = self.run.look(case.graph)

    def price(self, graph: Graph) -> float:
        threads = self.recipe.cores or self.target.cores
        return total(self.target.cost.estimate(work, threads) for work in workloads(graph)).seconds

    def go(self) -> None:
        """Cut until the latency is reached, nothing saves enough, or half of the minutes are over."""
        first, saved = self.states[0].seconds, self.recipe.share * self.states[0].seconds
        for _ in range(MOST):
            last = self.states[-1]
            late = len(self.states) > 1 and 0 < self.recipe.minutes / 2 <= self._gone()
            if last.seconds <= self.recipe.latency * first or self.run.interrupted or late:
                return
            allowed = max(last.seconds - saved, self.recipe.latency * first)
            try:
                found = self._best(list(self._proposals(last, allowed)))
            except KeyboardInterrupt:  # between two trainings: the rounds so far count
                self.run.interrupted = True
                return
            if found is None:
                return
            self.states.append(found)
            saved *= self.recipe.decay
            self.case.progress(f"predicted latency {found.seconds / first:.2f} of what it was", len(self.states) - 1, MOST)

    def _proposals(self, state: _State, allowed: float) -> Iterator[tuple[Pass, Graph, float]]:
        """At each place the first candidate, widest first, that is fast enough."""
        done: set[tuple[str, ...]] = set()
        for kind in self.kinds:
            for one in kind.candidates(state.graph, self.target):
                if not isinstance(one, Pass) or one.site in done:
                    continue
                try:
                    graph = run_pass(one, state.graph, self.case.ctx)
                except HwoptError:  # a criterion that needs data which are not there
                    continue
                seconds = self.price(graph)
                if seconds <= allowed:
                    done.add(one.site)
                    yield one, graph, seconds

    def _best(self, proposals: list[tuple[Pass, Graph, float]]) -> _State | None:
        """The proposal that is best after a short training; only the best ones without are trained."""
        last = self.states[-1]
        looked = sorted(enumerate(proposals), key=lambda item: (self.run.look(item[1][1]).value, item[0]))
        found: tuple[float, _State] | None = None
        for _, (by, graph, seconds) in looked[: self.recipe.tries]:
            number = len(last.stops)
            recipe = self.recipe.at(number, 1.0, epochs=self.recipe.short, steps=0, minutes=0.0)
            outcome = self.run.note(self._train(graph, recipe))
            value = outcome.after.value if outcome.after else math.inf
            state = _State(outcome.graph, seconds, (*last.cuts, str(by)), (*last.stops, stop_of(outcome)))
            if found is None or value < found[0]:
                found = value, state
            if self.run.interrupted:
                break
        return found[1] if found else None

    def _train(self, graph: Graph, recipe: Recipe) -> Outcome:
        from hwopt.recover.torch.train import train

        return train(self.case.on(graph), recipe)

    def _gone(self) -> float:
        """Minutes since the beginning."""
        return (time.perf_counter() - self.run.started) / 60

    def _left(self) -> float:
        """Minutes of those that are stated, at least a second; 0 where none are."""
        return max(self.recipe.minutes - self._gone(), 1 / 60) if self.recipe.minutes else 0.0

    def settle(self) -> Outcome:
        """The last state that keeps the score after the long training; half of the rounds are taken back each time."""
        place = len(self.states) - 1
        while place > 0:
            state = self.states[place]
            self.run.stops = list(state.stops)
            graph = self.run.train(state.graph, 1.0, minutes=self._left())
            after: Check = self.run.look(graph)
            if after.score >= self.before.score - self.recipe.drop:
                return self.run.outcome(graph, self.before, after, cuts=state.cuts)
            place //= 2
        self.run.stops = [NOTHING]
        return self.run.outcome(self.case.graph, self.before, self.before)
