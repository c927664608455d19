"""Devices: the daemon, what it survives, and tuning over it; on this machine, and for aarch64 under emulation."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hwopt.backends.tvm.tune.database import Database
from hwopt.backends.tvm.tune.runner import Kernels, Outcome
from hwopt.device.build import build_daemon
from hwopt.device.runner import DeviceRunner
from hwopt.emit.cpu import host_machine
from hwopt.errors import ToolchainError
from tests._device import BAD, SIGNATURE, Daemon, device_task, kernel
from tests._machines import Machine

HERE = Machine(host_machine())
BOARD = Machine("aarch64", "cortex-a72")


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(HERE.family, tmp_path_factory)


def built(machine: str, folders: pytest.TempPathFactory) -> Path:
    try:
        return build_daemon(machine, folders.mktemp(f"daemon-{machine}"))
    except ToolchainError as error:
        pytest.skip(str(error))


@pytest.fixture
def daemon(program: Path) -> Iterator[Daemon]:
    made = Daemon(program, HERE)
    yield made
    made.kill()


def runner(daemon: Daemon, **options: float) -> DeviceRunner:
    return DeviceRunner(daemon.address, 1, **{"hang": 3.0, "drift": 1e9, "cool": 0.0, "patience": 30.0, **options})


def measured(daemon: Daemon, folder: Path, *names: str) -> dict[str, Outcome]:
    objects = {name: kernel(folder, name, HERE.family) for name in names}
    with runner(daemon) as measuring:
        return measuring.measure(Kernels(objects, SIGNATURE), rounds=9, turn=1e-4)


def test_crashing_hanging_failing_and_wrong_candidates_end_their_session_only(daemon: Daemon, tmp_path: Path) -> None:
    found = measured(daemon, tmp_path, "twice", "crashes", "thrice", "hangs", "nothing", "same", "fails")
    assert {name: one.status for name, one in found.items()} == {
        "twice": "ok", "crashes": "crashed", "thrice": "wrong", "hangs": "hung", "nothing": "wrong", "same": "ok",
        "fails": "failed",
    }  # fmt: skip
    assert found["crashes"].reason == "signal 11"
    assert found["twice"].times and found["same"].times


def chaos(program: Path, machine: Machine, folder: Path, trials: int) -> None:
    """Tune while the daemon is killed and started again twice and the host once; two candidates crash and hang."""
    daemon, path = Daemon(program, machine), folder / "t.jsonl"
    before = b""
    try:
        for limit, victim in ((6, "daemon"), (18, "daemon"), (30, "host"), (trials, "")):
            if limit == 6 or before:
                left = trials - len(Database(path))
                command = [sys.executable, "-m", "tests._device", str(daemon.port), str(path), str(left), machine.family]
                host = subprocess.Popen(command)
            if not victim:
                assert host.wait(120) == 0
                break
            while lines(path) < limit:
                assert host.poll() is None
                time.sleep(0.05)
            if victim == "daemon":
                daemon.kill()
                time.sleep(0.5)
                daemon.start()
            else:
                host.kill()
                host.wait()
                before = path.read_bytes()
    finally:
        daemon.kill()
    task = device_task(machine.family)
    found = Database(path).trials(task)
    assert path.read_bytes().startswith(before)
    assert len(found) == trials
    assert sorted(one.status for one in found if one.status != "ok") == sorted(
        {"crashes": "crashed", "hangs": "hung"}[bad] for bad in BAD.values()
    )


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.skipif(bool(BOARD.missing()), reason=BOARD.missing())
def test_tuning_an_emulated_board_survives_the_death_of_daemon_host_and_candidates(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    chaos(built("aarch64", tmp_path_factory), BOARD, tmp_path, 50)
