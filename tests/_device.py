"""A daemon for tests, here or under qemu-user; and, run as a program, a tuning host that can be killed.

python -m tests._device PORT DATABASE TRIALS BATCH MACHINE
"""

from __future__ import annotations

import dataclasses
import json
import signal
import socket
import subprocess
import sys
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from hwopt.backends.tvm.kernels import Schedule
from hwopt.backends.tvm.kernels.spec import Bias, ConvSpec
from hwopt.backends.tvm.tune.builder import Built, build_candidate
from hwopt.backends.tvm.tune.database import Database
from hwopt.backends.tvm.tune.session import Effort, tune
from hwopt.backends.tvm.tune.task import Task, make_task
from hwopt.device.link import Address
from hwopt.device.runner import DeviceRunner
from hwopt.emit.toolchain import find_compiler
from hwopt.plugins import find_target
from hwopt.target import Target
from tests._kernels import HEAD
from tests._machines import Machine

BAD = {2: "crashes", 7: "hangs"}  # of the candidates, in the order of their builds: measured before the host is killed
BODIES = {
    "twice": "EACH(i, size(tensor(a, 1))) data(a, 1)[i] = 2 * data(a, 0)[i];",
    "same": "EACH(i, size(tensor(a, 1))) data(a, 1)[i] = data(a, 0)[i] + data(a, 0)[i];",
    "thrice": "EACH(i, size(tensor(a, 1))) data(a, 1)[i] = 3 * data(a, 0)[i];",
    "nothing": "",
    "hangs": "for (volatile int i = 0;; ++i) {}",
    "crashes": "*(volatile int *)8 = 1;",
    "fails": "return -1;",
}
SIGNATURE = (("data", "float32", 64, -1.0, 1.0), ("out", "float32", 64, 0.0, 1.0))


def kernel(folder: Path, name: str, machine: str, body: str = "") -> bytes:
    """Object code of one of the bodies."""
    (folder / "k.c").write_text(f"{HEAD}KERNEL({name}) {{ {BODIES[body or name]} return 0; }}")
    subprocess.run([*find_compiler(machine), "-O1", "-w", "-fPIC", "-c", "k.c", "-o", "k.o"], cwd=folder, check=True)
    return (folder / "k.o").read_bytes()


class Daemon:
    """A process that can be killed and started again on its port."""

    def __init__(self, program: Path, machine: Machine, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = Address("127.0.0.1", self.port)
        self.command = [*machine.command, str(program), "--port", str(self.port), *options]
        self.process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert "ready" in self.process.stdout.readline()

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.returncode is None:
            self.kill()

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        assert self.process is not None and self.process.stdout is not None
        self.process.send_signal(how)
        self.process.wait()
        self.process.stdout.close()


class Here(Executor):
    """Builds in this process."""

    def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Future:
        future: Future = Future()
        future.set_result(function(*arguments, **named))
        return future


class Chaos:
    """Builds candidates; two of them, remembered in a file, are replaced by a crash and by a hang."""

    def __init__(self, folder: Path, machine: str) -> None:
        self.folder, self.machine = folder, machine

    def __call__(self, work: Task, schedule: Schedule, symbol: str) -> Built:
        built = build_candidate(work, schedule, symbol)
        if schedule == work.default or symbol == "probe":
            return built
        file = self.folder / "built.json"
        known = json.loads(file.read_text()) if file.exists() else []
        if symbol not in known:
            known.append(symbol)
            file.write_text(json.dumps(known))
        bad = BAD.get(known.index(symbol))
        return dataclasses.replace(built, data=kernel(self.folder, symbol, self.machine, bad)) if bad else built


def device_target(machine: str) -> Target:
    return find_target("cortex-a72" if machine == "aarch64" else "host")


def device_task(machine: str) -> Task:
    target = device_target(machine)
    spec = ConvSpec(1, 8, 8, 8, 40, (3, 3), pads=(1, 1, 1, 1), epilogue=(Bias(),))
    return make_task(spec, target.microkernels["float32"], target, 1)


def host(port: int, path: Path, trials: int, batch: int, machine: str) -> None:
    """Tune one small kernel; times under emulation mean nothing, so the clock may do what it wants."""
    runner = DeviceRunner(Address("127.0.0.1", port), 1, hang=3.0, drift=1e9, cool=0.0, patience=60.0)
    database = Database(path, cpu=str(runner.device["name"]))
    build = Chaos(path.parent, machine)
    tune(
        {device_task(machine): 1}, device_target(machine), database, Effort(trials=trials), executor=Here(), build=build,
        batch=batch, runner=runner,
    )  # fmt: skip


if __name__ == "__main__":
    host(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
