"""Recipes that train several times: pruning by and by, and going back to an earlier state of the weights.

What a schedule did is in its `stops`: with them it does the same again, bit for bit, and looks at nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar

import numpy as np

from hwopt.errors import UsageError
from hwopt.ir import Graph
from hwopt.pipeline import Pass, parse_list
from hwopt.plugins import find_passes
from hwopt.recover.case import Case, Check, Outcome
from hwopt.recover.recipe import Distill, Recipe
from hwopt.recover.rewind import earlier_weights, follow, rewound
from hwopt.recover.stages import Remaining, Stages, cubic, geometric, stages_of

SEEDS = 1000  # between the seeds of trainings that follow each other
Result = TypeVar("Result")
NOTHING = "untrained"  # the only stop of a schedule that made nothing better


@dataclass(frozen=True)
class Schedule(Recipe):
    """A recipe that composes trainings. `epochs`, `minutes` and `steps` are those of all trainings together."""

    stops: tuple[str, ...] = ()  # of each training that was done: after so many/of so many steps; filled in

    def usual(self) -> Self:
        return dataclasses.replace(self, steps=0, until=0, threads=0, stops=())

    def single(self, **changes: Any) -> Distill:
        """One training with these options."""
        own = {one.name: getattr(self, one.name) for one in dataclasses.fields(Recipe)}
        return Distill(**{**own, **changes})

    def at(self, number: int, share: float, **changes: Any) -> Distill:
        """Training `number`, which gets a share of the whole effort."""
        steps = max(round(self.steps * share), 1) if self.steps else 0
        effort = {"epochs": self.epochs * share, "minutes": self.minutes * share, "steps": steps, "until": 0}
        return self.single(seed=self.seed + SEEDS * number, **{**effort, **changes})

    def done(self, run: Run, **changes: Any) -> Self:
        """With what one run filled in."""
        usual = type(self)()
        effort: dict[str, Any] = {"epochs": usual.epochs, "minutes": usual.minutes, "steps": 0}
        effort |= {"threads": run.threads, "holdout": run.holdout, "loss": run.loss}
        return dataclasses.replace(self, stops=tuple(run.stops), **effort, **changes)


@dataclass(eq=False)
class Run:
    """The trainings of a schedule, one after the other; with `stops` they stop where they stopped before."""

    case: Case
    recipe: Schedule
    stops: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    seconds: float = 0.0
    threads: int = 0
    holdout: float = 0.0
    loss: str = ""
    interrupted: bool = False

    def __post_init__(self) -> None:
        self.threads, self.holdout, self.loss = self.recipe.threads, self.recipe.holdout, self.recipe.loss
        self.started = time.perf_counter()

    @property
    def replays(self) -> bool:
        return bool(self.recipe.stops)

    def train(self, graph: Graph, share: float, **changes: Any) -> Graph:
        """The graph after the next training, which is on record; as it is after an interrupt."""
        number = len(self.stops)
        recipe = self.recipe.at(number, share, **changes)
        if self.replays:
            until, total = _numbers(self.recipe, number)
            self.stops.append(f"{until}/{total}")
            again = dataclasses.replace(recipe, steps=total, until=until, epochs=Distill().epochs, minutes=0.0)
            return _train(self.case.on(graph), again).graph if until else graph
        if self.interrupted:
            self.stops.append("0/0")
            return graph
        try:
            outcome = self.note(_train(self.case.on(graph), recipe))
        except KeyboardInterrupt:  # before its first step
            self.interrupted = True
            self.stops.append("0/0")
            return graph
        self.stops.append(stop_of(outcome))
        return outcome.graph

    def note(self, outcome: Outcome) -> Outcome:
        """Remember what a training saw and how it was done."""
        self.checks += outcome.checks
        self.threads, self.holdout, self.loss = outcome.recipe.threads, outcome.recipe.holdout, outcome.recipe.loss
        self.interrupted |= outcome.interrupted
        return outcome

    def look(self, graph: Graph) -> Check:
        """A graph on the held-out samples, by the loss that all trainings have in common."""
        from hwopt.recover.torch.train import look

        return self.finished(lambda: look(self.case.on(graph), self.recipe.single()))

    def finished(self, work: Callable[[], Result]) -> Result:
        """Short work between trainings, which Ctrl-C does not stop: what was trained would be lost."""
        try:
            return work()
        except KeyboardInterrupt:
            self.interrupted = True
            return work()

    def better(self, given: Graph, found: Graph) -> Outcome:
        """What was found if it is better than what it was made from, by the loss on the held-out samples."""
        if self.replays:
            graph = given if self.recipe.stops == (NOTHING,) else found
            return Outcome(graph, self.recipe, time.perf_counter() - self.started)
        before, after = self.look(given), self.look(found)
        useful = after.value < before.value
        if not useful:
            self.stops = [NOTHING]
        return self.outcome(found if useful else given, before, after if useful else before)

    def outcome(self, graph: Graph, before: Check, after: Check, **changes: Any) -> Outcome:
        seconds = time.perf_counter() - self.started
        recipe = self.recipe.done(self, **changes)
        return Outcome(graph, recipe, seconds, tuple(self.checks), before, after, self.interrupted)


@dataclass(frozen=True)
class Stepwise(Schedule):
    """Passes in several steps, with a training after each. `passes` are those of the plan if none are stated."""

    left: ClassVar[Remaining]

    stages: int = 4
    passes: str = ""  # what is done, to the graph that is given; else what made it of the teacher

    def recover(self, case: Case) -> Outcome:
        """The graph that the passes make, trained; the one that they make at once if training made nothing better."""
        given, stages = self._start(case)
        if self.stops == (NOTHING,):
            return Outcome(given, self, 0.0)
        run, graph = Run(case, self), stages.start
        if not stages.widths and not stages.sparse:
            case.progress("the plan has nothing to do step by step: one training", 0, 1)
            return run.better(given, run.train(given, 1.0))
        earlier = self.earlier(case, graph)
        stages = stages.unfitted if earlier else stages  # what goes back is found by its numbers
        for stage in range(1, self.stages + 1):
            last = stage == self.stages
            graph, earlier = run.finished(functools.partial(self._pruned, stages, graph, earlier, stage))
            graph = run.train(graph, 1 / self.stages, keep_zeros=self.keep_zeros or (bool(stages.sparse) and not last))
        return run.better(given, graph)

    def _pruned(
        self, stages: Stages, before: Graph, earlier: Mapping[str, np.ndarray], stage: int
    ) -> tuple[Graph, Mapping[str, np.ndarray]]:
        """A stage's graph before its training, and the weights that later ones go back to."""
        graph = stages.at(before, stage / self.stages, type(self).left)
        earlier = follow(before, graph, earlier)
        graph = rewound(graph, earlier, str(self.usual())) if earlier else graph
        return (stages.finish(graph) if stage == self.stages else graph), earlier

    def earlier(self, _: Case, __: Graph) -> Mapping[str, np.ndarray]:
        """Weights to go back to after each step; none here."""
        return {}

    def conditions(self) -> tuple[tuple[str, bool], ...]:
        return (("stages", self.stages >= 1),)

    def _start(self, case: Case) -> tuple[Graph, Stages]:
        """What the passes make at once, and what there is to do step by step. Raises UsageError where that is nothing."""
        stated = tuple(one for one, _ in parse_list(self.passes, find_passes()))
        passes: tuple[Pass, ...] = stated or case.passes
        stages = stages_of(case.graph if stated else case.teacher, passes, case.ctx)
        if not stages.widths and not stages.sparse and (stated or not case.passes):
            hint = 'give passes="prune-channels{ratio=0.5}", with its quotes, or a plan that prunes'
            raise UsageError("there is nothing to do step by step", place=str(self), hint=hint)
        return stages.whole if stated else case.graph, stages


@dataclass(frozen=True)
class Gradual(Stepwise):
    """Prune, recover, prune more: widths, or sparsity, follow s (1 - (1 - t)^3) (Zhu and Gupta 2017, arXiv:1710.01878).

    All trainings together take the epochs of the recipe: as much as one training after pruning at once.
    """

    name: ClassVar[str] = "gradual"
    summary: ClassVar[str] = "prune in steps and recover after each (cubic schedule)"
    left: ClassVar[Remaining] = staticmethod(cubic)


@dataclass(frozen=True)
class Lottery(Stepwise):
    """Prune, take what is left back to an earlier state, train; each stage prunes the same share of what is left.

    Frankle and Carbin 2019 (arXiv:1803.03635), Frankle et al. 2020 (arXiv:1912.05671): the earlier state is a checkpoint that
    the user names, an ONNX file of the same network; without one the float model itself, as it was before any training here.
    """

    name: ClassVar[str] = "lottery"
    summary: ClassVar[str] = "prune, take the surviving weights back to an earlier checkpoint, and train"
    left: ClassVar[Remaining] = staticmethod(geometric)

    stages: int = 1
    checkpoint: str = ""  # an ONNX file of the same network

    def earlier(self, case: Case, start: Graph) -> Mapping[str, np.ndarray]:
        return earlier_weights(start, case.teacher, self.checkpoint, case.ctx)


def stop_of(outcome: Outcome) -> str:
    """Where a training stopped, of how many steps."""
    return f"{max(outcome.recipe.until, 0)}/{outcome.recipe.steps}"


def _train(case: Case, recipe: Recipe) -> Outcome:
    from hwopt.recover.torch.train import train

    return train(case, recipe)


def _numbers(recipe: Schedule, number: int) -> tuple[int, int]:
    """Until and total steps of a training; raises UsageError where the recipe does not say them."""
    text = recipe.stops[number] if number < len(recipe.stops) else ""
    until, slash, total = text.partition("/")
    if not slash or not until.isdigit() or not total.isdigit():
        raise UsageError(f"stop {number + 1} is {text!r}", place=str(recipe), hint="leave stops out to train anew")
    return int(until), int(total)
