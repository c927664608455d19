"""What a search found, timed where it will run: the whole model with default and with tuned schedules, in turns, call by call.

A candidate is measured by itself, with caches that hold what it needs; between other kernels it may lose. A kernel whose tuned
schedule does not win there by more than the noise gets its next best one, and then the default again.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hwopt.backends.tvm.kernels import Schedule
from hwopt.backends.tvm.kernels.loops import LoopsSpec
from hwopt.backends.tvm.learn.measure import command
from hwopt.backends.tvm.tune.database import Database, Tuned
from hwopt.backends.tvm.tune.runner import Runner
from hwopt.backends.tvm.tune.task import Spec, Task, make_task
from hwopt.emit.program import Program
from hwopt.errors import ToolchainError
from hwopt.measure import difference
from hwopt.target import MicroKernel, Target

if TYPE_CHECKING:
    from hwopt.backends.tvm.read import Reading

SECONDS = 1.5  # of every comparison
ROUNDS = 3  # comparisons; what loses in the last one, or a second time, runs as the default does
ERRORS = 2.0  # standard errors that a gain must exceed
SLOWER = "slower in a model"

Read = Callable[["Noted"], "Reading"]


class Noted(Tuned):
    """Chooses as Tuned does, or the defaults alone, and notes which task each function of the module is."""

    def __init__(self, database: Database, target: Target, default: bool) -> None:
        super().__init__(database, target)
        self.default, self.tasks = default, dict[str, Task]()

    def __call__(self, spec: Spec, micro: MicroKernel, threads: int) -> Schedule:
        chosen, task = super().__call__(spec, micro, threads), make_task(spec, micro, self.target, threads)
        templates = sum(name.startswith("kernel_") for name in self.tasks)
        self.tasks[spec.name if isinstance(spec, LoopsSpec) else f"kernel_{templates}"] = task  # as Templates names them
        return task.default if self.default else chosen


@dataclass(frozen=True)
class Version:
    """The model with some schedules; `tasks` are those of its calls, None where a kernel has nothing to tune."""

    program: Program
    functions: Mapping[str, Any]
    tasks: tuple[Task | None, ...]


@dataclass(frozen=True)
class Found:
    """Seconds that a task's tuned schedule saves in one run of the model, their standard error, and the default's seconds."""

    saved: float
    error: float
    before: float

    @property
    def wins(self) -> bool:
        return self.saved > ERRORS * self.error

    @property
    def ratio(self) -> float:
        return 1 - self.saved / self.before if self.before else 1.0

    @property
    def reason(self) -> str:
        return f"{self.ratio:.3f} times the default's seconds there" if self.before else "the model fails with it"


def settle(read: Read, name: str, target: Target, database: Database, runner: Runner) -> list[Task]:
    """Withdraw the tuned schedules that do not win in the model that `read` reads; returns their tasks.

    `name` begins the kernels' symbols. What is withdrawn stays in the database, with the reason. Raises ToolchainError where the
    model cannot be timed with default schedules either.
    """
    plain = _version(read, name, Noted(database, target, True))
    withdrawn: list[Task] = []
    for number in range(ROUNDS):
        tuned = _version(read, name, Noted(database, target, False))
        compared = _compared(plain, tuned, target, runner)
        losers = [task for task, found in compared.items() if not found.wins]
        for task in losers:
            found = compared[task]
            withdraw(database, task, found.ratio, found.reason, number + 1 == ROUNDS or task in withdrawn)
        withdrawn += losers
        if not losers:
            break
    return list(dict.fromkeys(withdrawn))


def _version(read: Read, name: str, choose: Noted) -> Version:
    from hwopt.backends.tvm.build import named

    reading = read(choose)
    program, functions = named(reading, name)
    return Version(program, functions, tuple(choose.tasks.get(call.symbol) for call in reading.calls))


def _compared(plain: Version, tuned: Version, target: Target, runner: Runner) -> dict[Task, Found]:
    """What every task with a tuned schedule saves; where the whole model is no faster, none of them has won."""
    places: dict[Task, list[int]] = {}
    for place, (task, one, other) in enumerate(zip(plain.tasks, plain.program.calls, tuned.program.calls, strict=True)):
        if task is not None and one.symbol != other.symbol:
            places.setdefault(task, []).append(place)
    if not places:
        return {}
    try:
        before, after = _timed((plain, tuned), target, runner)
    except ToolchainError:
        _timed((plain,), target, runner)
        return dict.fromkeys(places, Found(0.0, 0.0, 0.0))
    found = {task: _found(before[:, calls], after[:, calls]) for task, calls in places.items()}
    if _found(before, after).wins or not all(one.wins for one in found.values()):
        return found
    return {task: dataclasses.replace(one, saved=0.0) for task, one in found.items()}


def _timed(versions: Sequence[Version], target: Target, runner: Runner) -> list[np.ndarray]:
    """Seconds of every call, [passes, calls] for each version: they share buffers and take turns."""
    from hwopt.backends.tvm.build import build_objects

    objects = build_objects({name: one for version in versions for name, one in version.functions.items()}, target)
    program = versions[0].program
    index = {name: place for place, name in enumerate(program.buffers)}
    calls = [[call.symbol, [index[one] for one in call.args]] for version in versions for call in version.program.calls]
    with tempfile.TemporaryDirectory(dir=runner.folder) as folder:
        turns = {**command(program, Path(folder)), "calls": calls, "seconds": SECONDS}
        passes, *_ = runner.time_calls(objects, turns)
    return np.split(np.array(passes), len(versions), axis=1)


def _found(before: np.ndarray, after: np.ndarray) -> Found:
    slower, faster = before.sum(1), after.sum(1)
    return Found(*difference(slower, faster), float(np.median(slower)))


def withdraw(database: Database, task: Task, ratio: float, reason: str, every: bool) -> None:
    """The best schedule of a task, or every one that beats the default, counts no more; `ratio` is to the default's time."""
    while (winner := database.winner(task)) is not None:
        database.add(task, [dataclasses.replace(winner, status=SLOWER, ratio=max(ratio, winner.ratio), reason=reason)])
        if not every:
            return
