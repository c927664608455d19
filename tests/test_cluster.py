"""Candidates built by a Dask cluster of several workers, each a process of its own."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from hwopt.backends.tvm.tune.builder import Built, build_candidate, cluster
from hwopt.backends.tvm.tune.database import Database
from hwopt.backends.tvm.tune.session import Effort, tune
from hwopt.backends.tvm.tune.task import Task
from hwopt.compiler import compile_model
from hwopt.errors import ToolchainError, UsageError
from hwopt.io.proto import to_model
from hwopt.plugins import find_target
from tests.test_compiler import small_net
from tests.test_tune import task

LOCAL = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
distributed = pytest.importorskip("distributed")


class Noting:
    """Builds a candidate and writes down which process did, once at least two are at it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, work: Task, schedule: object, symbol: str) -> Built:
        import os

        (self.folder / str(os.getpid())).touch()
        return build_candidate(work, schedule, symbol)  # type: ignore[arg-type]


@pytest.mark.slow
def test_several_workers_of_a_cluster_build_what_is_measured_here(tmp_path: Path) -> None:
    workers, database = tmp_path / "workers", Database(tmp_path / "t.jsonl")
    workers.mkdir()
    with distributed.LocalCluster(**LOCAL) as local, cluster(local.scheduler_address) as executor:
        state = tune(
            {task(): 1}, find_target("host"), database, Effort(trials=8), executor=executor, build=Noting(workers), batch=8
        )
    assert state.trials == 8 and not state.failures
    assert len(database.trials(task())) == 8
    assert len(list(workers.iterdir())) == 2


@pytest.mark.slow
def test_compiling_tunes_on_a_cluster(tmp_path: Path) -> None:
    onnx.save(to_model(small_net()), tmp_path / "small.onnx")
    with distributed.LocalCluster(**LOCAL) as local:
        compiled = compile_model(
            tmp_path / "small.onnx", out=tmp_path / "small", tune=Effort(trials=4), workers=local.scheduler_address,
            tuning_db=tmp_path / "t.jsonl", threads=1,
        )  # fmt: skip
        built = {entry[0] for entry in local.scheduler.transition_log if entry[2] == "memory"}
    assert compiled.path.is_dir()
    assert len(built) >= len((tmp_path / "t.jsonl").read_text().splitlines()) > 0


def test_a_cluster_without_tuning_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is nothing to build"):
        compile_model(tmp_path / "small.onnx", out=tmp_path / "small", workers="tcp://127.0.0.1:1")


def test_a_wrong_address_is_told_before_the_model_is_read(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="no Dask scheduler answers"):
        compile_model(tmp_path / "none.onnx", out=tmp_path / "small", tune=Effort(trials=4), workers="tcp://127.0.0.1:1")
