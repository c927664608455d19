"""Profiles of devices: a target file with what was measured there, that prices by it; and an end for devices that hang."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from hwopt.artifact import write_artifact
from hwopt.backends.tvm.learn import trees
from hwopt.backends.tvm.learn.measure import NOISE
from hwopt.backends.tvm.learn.records import read
from hwopt.backends.tvm.learn.table import load_table
from hwopt.build import build
from hwopt.cli import main
from hwopt.device import link, profile
from hwopt.device.bench import bench
from hwopt.device.probe import steady
from hwopt.device.profile import UnsteadyError, profile_device, timed_calls
from hwopt.emit.build import build_library
from hwopt.emit.stamps import build_stamped
from hwopt.errors import DeviceError, UsageError
from hwopt.plugins import find_target
from hwopt.profiling import State
from hwopt.target import table_of
from tests._device import Daemon, kernel
from tests._kernels import program as calls
from tests.test_compiler import small_net
from tests.test_device import HERE, daemon, program

__all__ = ["daemon", "program"]  # fixtures


@pytest.mark.slow
def test_a_device_gets_a_target_file_that_prices_by_what_was_measured(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted when there are kernels enough for a table: what was measured is kept."""
    out, known = tmp_path / "my_board.toml", []

    def enough(state: State) -> None:
        known[:] = state.records
        if sum(one.believed for one in known) > 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(profile, "SECONDS", 0.05)
    monkeypatch.setattr(trees, "TREES", 6)
    with pytest.raises(KeyboardInterrupt):
        profile_device(daemon.address, 600.0, out, drift=1e9, watch=enough)
    target = find_target(str(out))
    device = link.facts(daemon.address)
    assert (target.name, target.cores, target.kind) == ("my_board", device["cores"], "cpu")
    assert set(target.features) <= set(device["features"])
    assert [one.name for one in target.memories][-1] == "dram"
    assert target.memories[0].bytes_per_second > target.memories[-1].bytes_per_second > 1e8
    assert all(rate > 1e8 for rate in target.peak.values())
    assert known == read(out.with_suffix(".jsonl"))
    assert table_of(target.cost) == out.with_suffix(".json")
    steady = [one for one in known if one.believed and one.noise <= NOISE]  # none where the machine is busy
    assert all(target.cost.estimate(one.work, 1).source == "measured" for one in steady)
    assert load_table(out.with_suffix(".json")).cpu == device["name"]


def test_what_ran_while_the_clock_moved_is_not_recorded(daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "COOL_SECONDS", 0.0)
    seen: list[int] = []

    def unsteady(*_: object) -> np.ndarray:
        seen.append(1)
        return np.array([[1.0, 1.0]] * 4 + [[1.0, 1.2]] * 4)

    monkeypatch.setattr(profile, "timed_calls", unsteady)
    with pytest.raises(UnsteadyError, match=r"its clock moved by 20.0% while it was measured"):
        profile._measured(small_net(), find_target("host"), 1, daemon.address, 0.05)
    assert len(seen) == 2


def test_a_clock_that_is_disturbed_half_of_the_time_says_nothing() -> None:
    assert "2 of 4 rounds were disturbed" in steady([1.0, 9.0, 9.0, 1.0], 0.1)
    assert steady([1.0, 9.0, 1.0, 1.0, 1.02, 1.0], 0.05) == ""


def test_every_call_is_timed_in_every_pass_beside_the_clock(daemon: Daemon, tmp_path: Path) -> None:
    made = build_stamped(calls(("double", "x", "t"), ("add", "t", "x", "y")), tmp_path / "m")
    times = timed_calls(daemon.address, made, 1, 0.01)
    assert times.shape[0] >= profile.LEAST and times.shape[1] == 3
    assert (times > 0).all()


def test_a_profile_of_a_device_is_a_target_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="is a target file"):
        profile_device(link.Address("127.0.0.1", 9), 1.0, tmp_path / "table.json")
    with pytest.raises(SystemExit) as stopped:
        main(["profile", "--device", "127.0.0.1:9", "--time", "1s"])
    assert stopped.value.code == 2
    assert "my_board.toml" in capsys.readouterr().err
    for unheeded in (["--target", "cortex-a72"], ["--core", "1"], ["--prepare", "1s"]):
        with pytest.raises(SystemExit) as stopped:
            main(["profile", "--device", "127.0.0.1:9", "--time", "1s", "-o", "b.toml", *unheeded])
        assert stopped.value.code == 2
        assert "leave out --target" in capsys.readouterr().err


def test_a_table_must_lie_beside_its_target_file(tmp_path: Path) -> None:
    text = 'name = "b"\nkind = "cpu"\nmachine = "x86_64"\ncores = 1\nclock_hz = 1e9\nfloat32_ops_per_cycle = 8\n'
    text += 'int8_ops_per_cycle = 8\ntable = "gone.json"\nmemories = [{name = "dram", bytes = 1, bytes_per_second = 1.0}]\n'
    (tmp_path / "b.toml").write_text(text)
    with pytest.raises(UsageError, match=r"b.toml:8: table: no file 'gone.json'"):
        find_target(str(tmp_path / "b.toml"))


@pytest.mark.slow
def test_a_model_that_hangs_on_the_device_is_given_up_and_the_daemon_lives(daemon: Daemon, tmp_path: Path) -> None:
    artifact = build(small_net(), find_target("host"), 1, tmp_path / "a").artifact
    stuck = dataclasses.replace(calls(("double", "x", "y")), objects=(kernel(tmp_path, "double", HERE.family, "hangs"),))
    library = build_library(stuck, tmp_path / "m")
    hangs = write_artifact(tmp_path / "hangs", library, target="host", model=b"", plan={}, report={}, graph="")
    with pytest.raises(DeviceError, match="no answer within 1 s"):
        bench({"hangs": hangs.path}, daemon.address, rounds=2, hang=1.0)
    assert bench({"good": artifact.path}, daemon.address, rounds=2)["good"].median > 0
