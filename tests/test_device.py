"""Devices: the daemon, what it survives, and tuning over it; on this machine, and for aarch64 under emulation."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hwopt.backends.tvm.tune.database import Database
from hwopt.backends.tvm.tune.runner import Kernels, Outcome
from hwopt.backends.tvm.tune.session import Effort, tune
from hwopt.build import build as build_artifact
from hwopt.cli import main
from hwopt.device import link
from hwopt.device.build import build_daemon
from hwopt.device.link import Address
from hwopt.device.runner import DeviceRunner, settle
from hwopt.emit.cpu import host_machine
from hwopt.errors import DeviceError, ToolchainError, UsageError
from hwopt.io.onnx import save
from hwopt.plugins import find_target
from hwopt.tuning import open_database, tune_model
from tests._device import SIGNATURE, Daemon, Here, device_target, device_task, kernel
from tests._machines import Machine
from tests.test_compiler import small_net

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
    with Daemon(program, HERE) as made:
        yield made


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
    assert (found["crashes"].reason, found["hangs"].reason) == ("signal 11", "no answer within 3 s")
    assert found["twice"].times and found["same"].times


class Unlucky(DeviceRunner):
    """Its daemon dies, and is started again, when the first candidate was checked."""

    daemon: Daemon | None = None

    def _answer(self) -> Any:
        answer = super()._answer()
        if self.daemon and isinstance(answer, dict) and answer.get("checked") == 1:
            daemon, self.daemon = self.daemon, None
            daemon.kill()
            daemon.start()
        return answer


def test_a_batch_is_measured_again_when_the_daemon_dies_and_nobody_is_blamed(daemon: Daemon, tmp_path: Path) -> None:
    objects = {name: kernel(tmp_path, name, HERE.family) for name in ("twice", "same")}
    with Unlucky(daemon.address, 1, hang=3.0, drift=1e9, patience=30.0) as measuring:
        measuring.daemon = daemon
        found = measuring.measure(Kernels(objects, SIGNATURE))
    assert [one.status for one in found.values()] == ["ok", "ok"]
    assert measuring.losses.total() == 1


def test_a_device_that_stays_away_ends_the_measurement_with_an_error(daemon: Daemon, tmp_path: Path) -> None:
    objects = {name: kernel(tmp_path, name, HERE.family) for name in ("twice", "same")}
    with runner(daemon, patience=1.0) as measuring:
        daemon.kill()
        with pytest.raises(DeviceError, match=r"away for 1 s: .*; what was measured is kept"):
            measuring.measure(Kernels(objects, SIGNATURE))
        daemon.start()


def test_a_batch_for_another_processor_is_refused_and_the_daemon_lives(daemon: Daemon, tmp_path: Path) -> None:
    with runner(daemon) as measuring:
        measuring._link = lambda _: foreign(tmp_path)  # type: ignore[method-assign]
        measuring._places = {"twice": 0}
        with pytest.raises(DeviceError, match="refuses a batch: "):
            measuring.measure(Kernels({"twice": b""}, SIGNATURE))
    assert link.facts(daemon.address)["machine"] == HERE.family


def foreign(folder: Path) -> Path:
    """A library whose header names a processor that nobody has."""
    source, made = folder / "empty.c", folder / "foreign.so"
    source.write_text("int nothing;")
    subprocess.run(["cc", "-shared", "-o", made, source], check=True)
    data = bytearray(made.read_bytes())
    data[18:20] = b"\xee\xee"  # e_machine
    made.write_bytes(data)
    return made


def outcomes(*reference: float) -> dict[str, Outcome]:
    return {"reference": Outcome("ok", times=list(reference)), "other": Outcome("ok", times=[3.0] * len(reference))}


def test_a_reference_that_gets_slower_within_a_batch_makes_it_unsteady() -> None:
    assert "moved by 10.0% within a batch" in settle(outcomes(1.0, 1.0, 1.0, 1.1, 1.1, 1.1), "reference", 0.05)
    assert settle(outcomes(1.0, 1.0, 1.0, 1.04, 1.04, 1.04), "reference", 0.05) == ""


def test_rounds_in_which_the_reference_was_disturbed_do_not_count() -> None:
    found = outcomes(1.0, 1.0, 9.0, 1.0, 1.0, 1.0)
    found["other"].times = [3.0, 3.0, 2.0, 3.0]
    assert settle(found, "reference", 0.05) == ""
    assert found["reference"].times == [1.0] * 5 and found["other"].times == [3.0] * 3


def test_a_batch_that_is_disturbed_most_of_the_time_says_nothing() -> None:
    assert "3 of 6 rounds were disturbed" in settle(outcomes(1.0, 1.0, 9.0, 9.0, 1.0, 9.0), "reference", 9.0)


def test_what_ran_while_the_clock_moved_is_measured_again_and_then_not_recorded(daemon: Daemon, tmp_path: Path) -> None:
    """A drift of less than nothing is always too much."""
    runner_ = runner(daemon, drift=-1.0)
    database = Database(tmp_path / "t.jsonl")
    target = device_target(HERE.family)
    state = tune({device_task(HERE.family): 1}, target, database, Effort(trials=2), executor=Here(), batch=2, runner=runner_)
    assert state.failures == {"unsteady": 2}
    assert len(database) == 0


# The daemon


def test_an_address_that_is_not_loopback_needs_a_secret(program: Path) -> None:
    done = subprocess.run([program, "--host", "0.0.0.0", "--port", "0"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "whoever connects runs code here, so give --secret-file" in done.stderr


@pytest.fixture
def guarded(program: Path, tmp_path: Path) -> Iterator[Daemon]:
    file = tmp_path / "secret"
    file.write_text("a secret of many letters\n")
    with Daemon(program, HERE, "--host", "0.0.0.0", "--secret-file", str(file)) as made:
        yield made


def test_a_secret_opens_the_door(guarded: Daemon) -> None:
    address = replace(guarded.address, secret=b"a secret of many letters")
    assert link.facts(address)["machine"] == HERE.family
    link.open_session(address, 10).close()


@pytest.mark.parametrize("size", [16, 64, 65, 200])
def test_secrets_of_any_length_are_proven(program: Path, tmp_path: Path, size: int) -> None:
    """Keys longer than a block of the hash are hashed first."""
    (tmp_path / "secret").write_bytes(b"s" * size)
    with Daemon(program, HERE, "--secret-file", str(tmp_path / "secret")) as made:
        assert link.facts(replace(made.address, secret=b"s" * size))["cores"] >= 1


@pytest.mark.parametrize(
    ("secret", "said"), [(b"", "asks for a secret|makes no sense|does not"), (b"another of many letters", "refuses the secret")]
)
def test_without_the_secret_nothing_is_answered(guarded: Daemon, secret: bytes, said: str) -> None:
    address = replace(guarded.address, secret=secret)
    for attempt in (lambda: link.ask(address, "info"), lambda: link.open_session(address, 10)):
        with pytest.raises(DeviceError, match=said):
            attempt()


def test_a_client_with_a_secret_does_not_talk_to_a_device_without_one(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "CONNECT_SECONDS", 0.3)
    with pytest.raises(DeviceError, match="asks for no secret"):
        link.facts(replace(daemon.address, secret=b"a secret of many letters"))


def test_another_key_is_refused(daemon: Daemon) -> None:
    with pytest.raises(DeviceError, match="serves another key than 'mine'"):
        link.open_session(replace(daemon.address, key="mine"), 10)


def test_the_work_folder_is_gone_after_the_daemon_stops_or_the_next_one_starts(program: Path, tmp_path: Path) -> None:
    with Daemon(program, HERE, "--work", str(tmp_path)) as made, link.open_session(made.address, 10):
        made.kill()
        assert list(tmp_path.iterdir())
        made.start()
        assert len(list(tmp_path.iterdir())) == 1
        made.kill(signal.SIGTERM)
        assert not list(tmp_path.iterdir())


def test_a_session_that_takes_too_long_is_ended(program: Path) -> None:
    with Daemon(program, HERE, "--timeout", "1") as made, link.open_session(made.address, 600) as session:
        session.settimeout(20)
        assert session.recv(1) == b""


def test_a_second_session_waits_and_questions_do_not(daemon: Daemon) -> None:
    with link.open_session(daemon.address, 60):
        with pytest.raises(DeviceError, match="does not answer"):
            link.open_session(daemon.address, 60, wait=0.5)
        assert link.facts(daemon.address)["machine"] == HERE.family
    link.open_session(daemon.address, 60, wait=10).close()


def test_features_are_read_from_the_bits_of_the_auxiliary_vector() -> None:
    found = link.features({"machine": "aarch64", "hwcap": 1 << 20 | 2, "hwcap2": 1 << 13, "flags": ""})
    assert found == {"asimd", "asimddp", "i8mm"}


# Trackers


def test_a_device_is_found_by_its_key_at_tvms_tracker(program: Path) -> None:
    pytest.importorskip("tornado")
    from tvm.rpc.tracker import Tracker

    tracker = Tracker("127.0.0.1", 9390, 9490)
    place = Address("127.0.0.1", tracker.port)
    made = Daemon(program, HERE, "--key", "board", "--tracker", str(place))
    try:
        deadline = time.monotonic() + 20
        while not (rows := link.devices(place)) or not rows[0]["free"]:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert (rows[0]["key"], rows[0]["port"]) == ("board", made.port)
        found = link.request(place, "board", wait=5)
        assert (found.port, link.facts(found)["key"]) == (made.port, "board")
        with pytest.raises(DeviceError, match="no device with the key 'other' is registered; known: board"):
            link.request(place, "other")
    finally:
        made.kill()
        tracker.terminate()


def test_a_tracker_that_is_not_there_or_says_nothing_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "CONNECT_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        with pytest.raises(DeviceError, match="cannot be reached"):
            link.devices(Address("127.0.0.1", silent.getsockname()[1]))
        silent.listen()
        with pytest.raises(DeviceError, match="does not answer"):
            link.devices(Address("127.0.0.1", silent.getsockname()[1]))


# Models


@pytest.mark.slow
def test_a_model_is_tuned_on_a_device_and_timed_there(daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hwopt.device.runner.settle", lambda *_: "")  # this machine's other work is not what is tested here
    save(small_net(), tmp_path / "small.onnx")
    path = tmp_path / "t.jsonl"
    found = tune_model(tmp_path / "small.onnx", Effort(trials=2), threads=1, tuning_db=path, device=daemon.address)
    assert found.before.median > 0 and found.after.median > 0
    names = {json.loads(line)["cpu"] for line in path.read_text().splitlines()}
    assert names == {link.facts(daemon.address)["name"]}


def test_a_device_that_is_not_the_target_is_refused(daemon: Daemon, tmp_path: Path) -> None:
    save(small_net(), tmp_path / "small.onnx")
    foreign_target = "cortex-a72" if HERE.family != "aarch64" else "riscv64"
    with pytest.raises(DeviceError, match=f"is a {HERE.family}, the target {foreign_target}"):
        tune_model(tmp_path / "small.onnx", Effort(trials=2), target=foreign_target, threads=1, device=daemon.address)
    with pytest.raises(UsageError, match="1000 threads on"):
        tune_model(tmp_path / "small.onnx", Effort(trials=2), threads=1000, device=daemon.address)


def test_the_command_line_knows_devices(daemon: Daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = build_artifact(small_net(), find_target("host"), 1, tmp_path / "a").artifact
    where = f"127.0.0.1:{daemon.port}"
    assert command("device", "info", "--device", where) == 0
    assert HERE.family in capsys.readouterr().out
    assert command("device", "bench", str(artifact.path), "--device", where, "--json") == 0
    assert json.loads(capsys.readouterr().out)["median ms"] > 0
    assert command("tune", "model.onnx", "--trials", "1", "--device", where, "--tracker", where) == 2
    assert "give --device or --tracker" in capsys.readouterr().err


def command(*words: str) -> Any:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return ended.value.code


# Chaos


def chaos(program: Path, machine: Machine, folder: Path, trials: int, batch: int) -> None:
    """Tune while the daemon is killed and started again twice and the host once; two candidates crash and hang."""
    daemon, path, before = Daemon(program, machine), folder / "t.jsonl", b""
    host = tuning_host(daemon, path, trials, batch, machine)
    try:
        for limit in (1, batch + 1):
            wait_for_lines(path, limit, host)
            daemon.kill()
            time.sleep(0.5)
            daemon.start()
        wait_for_lines(path, 2 * batch + 1, host)
        host.kill()
        host.wait()
        before = path.read_bytes()
        host = tuning_host(daemon, path, trials, batch, machine)
        assert host.wait(200) == 0
    finally:
        host.kill()
        daemon.kill()
    assert path.read_bytes().startswith(before)
    found = open_database(path, device_target(machine.family)).trials(device_task(machine.family))  # as a compilation reads it
    assert len(found) == trials
    assert sorted(one.status for one in found if one.status != "ok") == ["crashed", "hung"]


def tuning_host(daemon: Daemon, path: Path, trials: int, batch: int, machine: Machine) -> subprocess.Popen[bytes]:
    """Another process that tunes for as many candidates as the database lacks."""
    words = [daemon.port, path, trials - len(Database(path)), batch, machine.family]
    return subprocess.Popen([sys.executable, "-m", "tests._device", *map(str, words)])


def wait_for_lines(path: Path, count: int, host: subprocess.Popen[bytes]) -> None:
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert host.poll() is None
        time.sleep(0.05)


@pytest.mark.slow
def test_tuning_survives_the_death_of_daemon_host_and_candidates(program: Path, tmp_path: Path) -> None:
    chaos(program, HERE, tmp_path, 20, 5)


@pytest.mark.slow
@pytest.mark.skipif(bool(BOARD.missing()), reason=BOARD.missing())
def test_tuning_an_emulated_board_survives_the_same(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    chaos(built("aarch64", tmp_path_factory), BOARD, tmp_path, 50, 10)
