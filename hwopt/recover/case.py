"""What a recovery works on, and what comes of it. A schedule composes these: `train(case.on(graph), recipe) -> Outcome`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hwopt.ir import Graph
from hwopt.pipeline import Context, Pass

if TYPE_CHECKING:
    from hwopt.recover.recipe import Recipe

Progress = Callable[[str, int, int], None]
Run = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


def quiet(stage: str, done: int, total: int) -> None:
    """The progress of nobody who looks."""


def unwatched(check: Check, depth: int = 0) -> None:
    """What nobody does with a check."""


@dataclass(eq=False)
class Checkpoints:
    """A folder of unfinished trainings. Those of one job stay until all of it is over: it may be killed in any of them."""

    folder: Path
    used: set[Path] = dataclasses.field(default_factory=set)  # written or found again

    def file(self, name: str) -> Path:
        path = self.folder / name
        self.used.add(path)
        return path

    def clear(self) -> None:
        """Remove them, and nothing else that is in the folder."""
        for path in self.used:
            path.unlink(missing_ok=True)
        self.used.clear()


@dataclass(frozen=True, eq=False)
class Case:
    """`graph` is trained to be like `teacher` on `data` (Samples, arrays by name, or a loader).

    `held_out` (Samples or arrays) chooses the best state instead of a part of the data, `score` (higher is better, given
    run({input: array})) instead of the loss. `loss` is the user's: loss(outputs, teacher's outputs, labels) -> torch number.
    `checkpoints` is a folder where unfinished training is kept and found again; its file is removed when all is done. `ctx` is
    what passes need that a schedule runs, `passes` are those that made the graph of the teacher, for schedules that do them step
    by step. `watch` sees every check of the held-out samples; what it raises ends the training. `answers` are the teacher's, kept
    for the next training.
    """

    graph: Graph
    teacher: Graph
    data: Any
    held_out: Any = None
    score: Callable[[Run], float | np.ndarray] | None = None
    loss: Callable[..., Any] | None = None
    progress: Progress = quiet
    checkpoints: Path | Checkpoints | None = None
    ctx: Context = dataclasses.field(default_factory=Context)
    passes: tuple[Pass, ...] = ()
    watch: Callable[[Check], None] = unwatched
    answers: dict[str, Any] = dataclasses.field(default_factory=dict)

    def on(self, graph: Graph) -> Case:
        """The same for another graph."""
        return dataclasses.replace(self, graph=graph)


@dataclass(frozen=True, eq=False)
class Training:
    """What a job knows of recovery: the recipe (None: a plan's own, if it has one), the data (None: those of calibration).

    `watch` sees every check, and how deep the plan is that is trained: 0 the deepest. `answers` are the float model's, which
    all trainings of the job ask for.
    """

    recipe: Recipe | None = None
    data: Any = None
    loss: Callable[..., Any] | None = None
    checkpoints: Checkpoints | None = None
    watch: Callable[[Check, int], None] = unwatched
    answers: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """The student on the held-out samples after so many steps: the value that is minimized, and a score to look at."""

    step: int
    value: float
    score: float


@dataclass(frozen=True, eq=False)
class Outcome:
    """The trained graph (the same one if nothing was better), and the recipe that makes it again.

    `before` and `after` are the checks of the untrained and of the chosen state; None where a stated number of steps was run.
    """

    graph: Graph
    recipe: Recipe
    seconds: float
    checks: tuple[Check, ...] = ()
    before: Check | None = None
    after: Check | None = None
    interrupted: bool = False
