"""Measuring on a device: what backends/tvm/tune/runner.py does here, over a network that fails, on a board that gets hot.

A session that ends early is looked into: the same daemon says how it ended (a signal: the candidate crashed; killed after
its client left: it hung), a daemon that was started anew knows nothing (nobody is blamed, the batch is measured again).
"""

from __future__ import annotations

import base64
import contextlib
import json
import queue
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from hwopt.backends.tvm.tune.runner import Kernels, Outcome, Runner, take
from hwopt.device import link
from hwopt.device.link import Address
from hwopt.emit.toolchain import find_compiler
from hwopt.errors import DeviceError

HANG_SECONDS = 20.0  # one turn takes milliseconds there, an upload longer
SESSION_SECONDS = 1800  # of one batch, at most
START_SECONDS = 120.0  # until TVM is imported on a busy machine
PATIENCE_SECONDS = 300.0  # for a device that reboots
STRIKES = 2  # hangs after which a candidate is said to hang: networks and busy boards stall, too
BLAMED = 3  # a candidate at which the device itself went away so often is to blame
DRIFT = 0.05  # the reference's time may differ by that between the halves of a batch: more, and the clock moved
DISTURBED = 1.3  # a round in which the reference takes that much longer than usual says nothing
ATTEMPTS = 2  # for a batch during which the clock moved
COOL_SECONDS = 3.0  # between them


class DeviceRunner(Runner):
    """A context manager. `drift` is how far the reference may move within a batch; `patience` is for a device that is away."""

    program = "hwopt.device.worker"

    def __init__(
        self,
        address: Address,
        threads: int = 1,
        *,
        hang: float = HANG_SECONDS,
        seed: int = 0,
        drift: float = DRIFT,
        patience: float = PATIENCE_SECONDS,
        cool: float = COOL_SECONDS,
    ) -> None:
        super().__init__(threads, (), hang, seed)
        self.address, self.drift, self.patience, self.cool = address, drift, patience, cool
        self.device = link.facts(address)
        if self.device["key"] != address.key:
            raise DeviceError(f"serves the key {self.device['key']!r}", place=str(address), hint="give it as --key")
        self.losses: Counter[str] = Counter()  # by the candidate that was running when the device went away
        self.stalls: Counter[str] = Counter()
        self._places: dict[str, int] = {}
        self._session = ""  # the device's name for the one at work

    def measure(self, kernels: Kernels, rounds: int = 9, turn: float = 1.5e-3) -> dict[str, Outcome]:
        """An outcome for every symbol: "unsteady" for what ran, but while the clock moved, also when it was measured again."""
        outcomes: dict[str, Outcome] = {}
        first, *rest = kernels.objects
        left = rest
        for attempt in range(ATTEMPTS):
            wanted = {name: kernels.objects[name] for name in (first, *left)}
            found = super().measure(replace(kernels, objects=wanted), rounds, turn)
            moved = settle(found, first, self.drift) if rest else ""
            outcomes.update(found)
            left = [name for name in left if found[name].status == "ok"]
            if not moved or not left:
                return outcomes
            if attempt + 1 < ATTEMPTS:
                time.sleep(self.cool)
        return outcomes | {name: Outcome("unsteady", moved) for name in left}

    def _try(self, symbols: list[str], library: Path, kernels: Kernels, rounds: int, turn: float) -> dict[str, Outcome]:
        """As there; again while the device, not the candidate, is what fails. Raises DeviceError when patience ends."""
        command = {
            "library": str(library), "symbols": symbols, "places": [self._places[one] for one in symbols],
            "signature": kernels.signature, "threads": self.threads, "rounds": rounds, "turn": turn, "seed": self.seed,
        }  # fmt: skip
        end = time.monotonic() + self.patience
        while True:
            self._session, at, ended = "", -1, None
            found: dict[str, Outcome] = {}
            self._send(command)
            while ended is None:
                answer = self._answer()
                ended = answer if isinstance(answer, Outcome) else _lost(answer)
                if isinstance(answer, Outcome) or ended:
                    continue
                if "refused" in answer:
                    raise DeviceError(f"refuses a batch: {answer['refused']}", place=str(self.address))
                self._session, at = str(answer.get("session", self._session)), int(answer.get("at", at))
                if "checked" in answer:
                    end = time.monotonic() + self.patience  # it gets on
                if take(answer, symbols, found):
                    return found
            blamed = self._blamed(ended, symbols[at] if at >= 0 else "", end)
            if blamed:
                return {symbols[at]: blamed}

    def _blamed(self, ended: Outcome, symbol: str, end: float) -> Outcome | None:
        """The candidate's outcome if it is why the session ended; None, once the device is back, if it is not."""
        session = self._session
        if session and symbol and ended.status != "crashed":  # that was our own worker
            verdict = self._verdict(session)
            if ended.status == "hung" or verdict in ("hung", "timeout"):
                self.stalls[symbol] += bool(verdict)
                if verdict and self.stalls[symbol] >= STRIKES:
                    return Outcome("hung", ended.reason)
            elif verdict and verdict != "exit 0":
                return Outcome("crashed", verdict)
            self.losses[symbol] += not verdict
            if self.losses[symbol] >= BLAMED:
                return Outcome("crashed", f"the device went away {BLAMED} times while it ran")
        self._await(end, ended.reason)
        return None

    def _unblock(self) -> None:
        """Let the device end the session, so that the worker, which takes seconds to start, can go on."""
        with contextlib.suppress(DeviceError, queue.Empty):
            if self._session:
                link.ask(self.address, f"end {self._session.split()[1]}")
                while "lost" not in json.loads(self._answers.get(timeout=self.hang) or '{"lost": ""}'):
                    pass
                return
        self._stop()

    def _verdict(self, session: str) -> str:
        """How a session ended, says the daemon that ran it; "" if it is gone itself."""
        instance, serial = session.split()
        for _ in range(40):
            try:
                found, _, verdict = link.ask(self.address, f"ended {serial}").partition(" ")
            except DeviceError:
                return ""
            if found != instance or verdict == "unknown":
                return ""
            if verdict != "running":
                return verdict
            time.sleep(0.25)
        return "hung"

    def _await(self, end: float, reason: str) -> None:
        """Until the device answers again; raises DeviceError when it is too late for that."""
        pause = 0.2
        while True:
            with contextlib.suppress(DeviceError):
                link.ask(self.address, "info")
                if time.monotonic() < end:
                    time.sleep(pause)
                    return
            if time.monotonic() >= end:
                hint = "what was measured is kept; start the daemon and tune again"
                raise DeviceError(f"away for {self.patience:g} s: {reason}", place=str(self.address), hint=hint)
            time.sleep(pause)
            pause = min(5.0, 2 * pause)

    def _start(self) -> Any:
        process = super()._start()
        where = {"host": self.address.host, "port": self.address.port, "key": self.address.key}
        secret = base64.b64encode(self.address.secret).decode()
        self._send({"device": {**where, "secret": secret}, "seconds": SESSION_SECONDS})
        with contextlib.suppress(queue.Empty):  # then the first command says what is wrong
            self._answers.get(timeout=START_SECONDS)
        return process

    def _link(self, objects: Mapping[str, bytes]) -> Path:
        """The same for the device: nothing but our functions is visible, candidates are called by their place in a table."""
        self._places = {symbol: index for index, symbol in enumerate(objects)}
        (self.folder / "table.c").write_text(_table(list(objects)))
        (self.folder / "visible.map").write_text("{ global: __tvm_ffi_hwopt_*; local: *; };\n")
        compiler = find_compiler(str(self.device["machine"]))
        options = ["-Wl,--version-script=visible.map", "-s"]
        return self._library(objects, Path(__file__).with_name("measure.c"), compiler, ["table.c"], options)


def _lost(answer: Mapping[str, Any]) -> Outcome | None:
    return Outcome("lost", str(answer["lost"])) if "lost" in answer else None


def _table(symbols: list[str]) -> str:
    declared = "\n".join(f"int __tvm_ffi_{one}(void *, const TVMFFIAny *, int32_t, TVMFFIAny *);" for one in symbols)
    listed = ", ".join(f"__tvm_ffi_{one}" for one in symbols)
    head = '#include "hwopt_types.h"\n#include "hwopt_runtime.h"\n'
    kernels = f"const hwopt_kernel hwopt_kernels[] = {{{listed}}};"
    return f"{head}{declared}\n{kernels}\nconst int32_t hwopt_kernels_count = {len(symbols)};\n"


def settle(found: Mapping[str, Outcome], reference: str, drift: float) -> str:
    """Drop disturbed rounds from all outcomes; say why if the clock moved all the same, else "".

    Disturbances only add to a time, so the fastest of a half shows the clock: the reference's halves must agree.
    """
    times = found[reference].times
    if len(times) < 4:
        return ""
    usual = median(times)
    kept = [at for at, seconds in enumerate(times) if seconds <= DISTURBED * usual]
    if 2 * len(kept) <= len(times):
        return f"{len(times) - len(kept)} of {len(times)} rounds were disturbed"
    early, late = min(times[: len(times) // 2]), min(times[len(times) // 2 :])
    moved = max(early, late) / min(early, late) - 1
    for one in found.values():
        one.times = [one.times[at] for at in kept if at < len(one.times)]
    if moved > drift:
        return f"the reference's time moved by {moved:.1%} within a batch"
    return ""
