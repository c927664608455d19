"""Named targets: what they cost, and so what is decided for them, does not depend on the machine that builds."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path

import pytest

from hwopt.backends.tvm.kernels.spec import ConvSpec
from hwopt.backends.tvm.learn import table
from hwopt.backends.tvm.learn.table import path_for
from hwopt.backends.tvm.tune.database import Database, Trial
from hwopt.backends.tvm.tune.task import make_task
from hwopt.errors import UsageError
from hwopt.plugins import find_target
from hwopt.profiling import profile_target
from hwopt.target import Target, table_of
from hwopt.tuning import read_database
from targets import _learned

LEVELS = ("x86-64-v2", "x86-64-v3", "x86-64-v4")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Another machine, whose user has measured tables of all levels."""
    known = [find_target(name) for name in LEVELS]  # as this machine sees them; targets are found once
    monkeypatch.setattr(table, "processor", lambda: "Another Processor 1 2")
    monkeypatch.setattr(_learned, "user_folder", lambda: tmp_path)
    monkeypatch.setattr("targets._x86_level.cpu_features", lambda: frozenset({"sse4_2"}))
    for target in known:
        path_for(target, tmp_path).write_text("{}")
    return tmp_path


def read_again(name: str) -> Target:
    """The target as a process on that machine finds it."""
    return runpy.run_path(str(_learned.SHIPPED.parent / f"{name.replace('-', '_')}.py"))["TARGET"]


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("name", LEVELS)
def test_a_level_is_priced_alike_on_every_machine(name: str) -> None:
    here, there = find_target(name), read_again(name)
    assert not there.runs_here
    assert (there.cost, there.peak, there.memories, there.tvm) == (here.cost, here.peak, here.memories, here.tvm)


@pytest.mark.usefixtures("elsewhere")
def test_a_table_ships_for_avx2_and_is_chosen_by_the_instructions_alone() -> None:
    target = read_again("x86-64-v3")
    path = table_of(target.cost)
    assert path is not None and path.parent == _learned.SHIPPED
    assert table.load_table(path).isa == table.instructions(target.tvm)


def test_a_tuning_database_gives_a_named_target_the_same_schedules_on_every_machine(tmp_path: Path) -> None:
    target = find_target("x86-64-v3")
    work = make_task(ConvSpec(1, 8, 8, 8, 40, (3, 3)), target.microkernels["float32"], target, 1)
    better = dataclasses.replace(work.default, unroll=work.default.unroll + 1)
    Database(tmp_path / "t.jsonl", cpu="Another Processor").add(work, [Trial(better, "ok", 0.5, 1.0, 0.5, 31)])
    assert read_database(tmp_path / "t.jsonl", target).best(work) == better
    assert read_database(tmp_path / "t.jsonl", dataclasses.replace(target, name="host")).best(work) is None


def test_profiling_a_named_target_needs_a_file_as_nobody_would_read_the_users_table() -> None:
    if not find_target("x86-64-v2").runs_here:
        pytest.skip("this machine is no x86-64-v2")
    with pytest.raises(UsageError, match="alike on all machines"):
        profile_target("x86-64-v2", 1)
