"""Tuned schedules that lose between a model's other kernels are withdrawn; times are told here, not measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from hwopt.backends.tvm.build import reading
from hwopt.backends.tvm.tune.database import CONFIRM, Database, Trial
from hwopt.backends.tvm.tune.runner import Runner
from hwopt.backends.tvm.tune.session import Effort, Progress, State
from hwopt.backends.tvm.tune.settle import SLOWER, settle
from hwopt.backends.tvm.tune.task import Task, tasks_of
from hwopt.errors import ToolchainError
from hwopt.plugins import find_target
from hwopt.tuning import _withdraw_all
from tests.test_compiler import small_net

HOST = find_target("host")


class Told:
    """Measures nothing: the calls with default schedules take a second, the tuned ones what they are told to, others `rest`."""

    def __init__(self, folder: Path, seconds: Sequence[float], rest: float = 1.0) -> None:
        self.folder, self.seconds, self.rest, self.asked = folder, seconds, rest, 0

    def time_calls(self, objects: Sequence[bytes], command: Mapping[str, Any]) -> tuple[list[list[float]], float, float]:
        symbols = [symbol for symbol, _ in command["calls"]]
        half = len(symbols) // 2
        changed = [place for place in range(half) if symbols[place] != symbols[half + place]]
        times = [1.0] * half + [self.rest] * half
        for place, seconds in zip(changed, self.seconds, strict=False):
            times[half + place] = seconds
        self.asked += 1
        return [times] * 20, 1.0, 1.0


class Crashing(Told):
    """Tuned kernels end the process; with `always`, default ones, too."""

    def __init__(self, folder: Path, always: bool) -> None:
        super().__init__(folder, ())
        self.always, self.first = always, 0

    def time_calls(self, objects: Sequence[bytes], command: Mapping[str, Any]) -> tuple[list[list[float]], float, float]:
        self.first = self.first or len(command["calls"])
        if self.always or len(command["calls"]) == self.first:
            raise ToolchainError("cannot be timed")
        return [[1.0] * len(command["calls"])] * 20, 1.0, 1.0


def tuned(folder: Path) -> tuple[Database, list[Task]]:
    """A database that knows a better and a second best schedule of a model's first two kernels."""
    database, tasks = Database(folder / "t.jsonl"), list(tasks_of(small_net(), HOST, 1))[:2]
    for task in tasks:
        for columns, ratio in ((1, 0.5), (2, 0.7)):
            schedule = dataclasses.replace(task.default, tile_columns=columns, block_columns=2 * columns, unroll=1)
            database.add(task, [Trial(schedule, "ok", ratio, 1.0, ratio, CONFIRM)])
    return database, tasks


def settled(database: Database, runner: Any) -> list[Task]:
    return settle(lambda choose: reading(small_net(), HOST, 1, choose), "model", HOST, database, runner)


def test_what_wins_in_the_model_stays(tmp_path: Path) -> None:
    database, tasks = tuned(tmp_path)
    runner = Told(tmp_path, (0.5, 0.6))
    assert settled(database, runner) == [] and runner.asked == 1
    assert all(database.best(task) for task in tasks)


def test_a_kernel_that_loses_in_the_model_tries_its_second_best_and_then_runs_as_the_default_does(tmp_path: Path) -> None:
    database, tasks = tuned(tmp_path)
    runner = Told(tmp_path, (0.5, 1.01))
    assert settled(database, runner) == [tasks[1]] and runner.asked == 3
    assert database.best(tasks[0]) and database.best(tasks[1]) is None
    assert {(one.status, one.reason) for one in database.trials(tasks[1])} == {
        (SLOWER, "1.010 times the default's seconds there")
    }


def test_kernels_that_slow_the_others_down_are_withdrawn(tmp_path: Path) -> None:
    database, tasks = tuned(tmp_path)
    assert settled(database, Told(tmp_path, (0.9, 0.9), rest=1.5)) == tasks
    assert not any(database.best(task) for task in tasks)


@pytest.mark.parametrize("always", [False, True])
def test_a_schedule_that_fails_in_the_model_is_withdrawn_unless_the_default_fails_too(tmp_path: Path, always: bool) -> None:
    database, tasks = tuned(tmp_path)
    runner = Crashing(tmp_path, always)
    if always:
        with pytest.raises(ToolchainError):
            settled(database, runner)
        assert all(database.best(task) for task in tasks)
    else:
        assert settled(database, runner) == tasks
        assert database.best(tasks[0]) is None


def test_a_model_is_timed_call_by_call_in_a_process_of_its_own(tmp_path: Path) -> None:
    database, tasks = tuned(tmp_path)
    with Runner(1) as runner:
        lost = settled(database, runner)
    assert set(lost) <= set(tasks)
    assert all(SLOWER in {one.status for one in database.trials(task)} for task in lost)


def test_where_the_whole_model_is_slower_on_a_device_all_schedules_are_withdrawn(tmp_path: Path) -> None:
    database, tasks = tuned(tmp_path)
    state = State([Progress(task, 1, None, best=[0.5]) for task in tasks], Effort(trials=1))
    assert state.gained
    _withdraw_all(state, database, 1.02)
    assert not state.gained and not any(database.best(task) for task in tasks)
    assert {one.reason for one in state.tasks} == {"no schedule was faster in the whole model"}
