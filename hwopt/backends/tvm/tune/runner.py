"""Measuring candidates in a child process: crashes and hangs of a candidate are its result, not ours."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hwopt.emit.toolchain import find_compiler, run_compiler
from hwopt.errors import ToolchainError

RUNTIME = Path(__file__).parents[3] / "emit"
FLAGS = ("-std=c11", "-O2", "-fPIC", "-pthread", "-DHWOPT_PTHREAD", f"-I{RUNTIME}", f"-I{Path(__file__).parent}")
HANG_SECONDS = 5.0  # one turn of a candidate takes milliseconds


@dataclass(frozen=True)
class Kernels:
    """Object code to measure: symbol -> object; the first symbol is the reference."""

    objects: Mapping[str, bytes]
    signature: tuple[tuple[str, str, int, float, float], ...]  # name, dtype, elements, and the range of random values


@dataclass
class Outcome:
    """What became of one candidate; `times` are seconds by round."""

    status: str
    reason: str = ""
    times: list[float] = field(default_factory=list)


class Runner:
    """The child process with its cores; a context manager. `hang` is how many seconds without an answer mean a hang."""

    program = "hwopt.backends.tvm.tune.child"

    def __init__(self, threads: int = 1, cores: Sequence[int] = (), hang: float = HANG_SECONDS, seed: int = 0) -> None:
        self.threads, self.cores, self.hang, self.seed = threads, tuple(cores), hang, seed
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._folder = tempfile.TemporaryDirectory(prefix="hwopt-tune-")
        self._libraries = 0

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stop()
        self._folder.cleanup()

    def measure(self, kernels: Kernels, rounds: int = 9, turn: float = 1.5e-3) -> dict[str, Outcome]:
        """An outcome for every symbol; rounds are interleaved, so that times of the same round compare.

        Raises ToolchainError if the reference itself does not run.
        """
        outcomes: dict[str, Outcome] = {}
        symbols = list(kernels.objects)
        library = self._link(kernels.objects)
        try:
            while len(left := [one for one in symbols if one not in outcomes]) > 1 or not outcomes:
                found = self._try(left, library, kernels, rounds, turn)
                outcomes.update(found)
                if symbols[0] in found and found[symbols[0]].status != "ok":
                    raise ToolchainError(f"the default schedule {found[symbols[0]].status}: {found[symbols[0]].reason}")
        finally:
            library.unlink(missing_ok=True)
        return outcomes

    def time_calls(self, objects: Sequence[bytes], command: Mapping[str, Any]) -> tuple[list[list[float]], float, float]:
        """A whole program (see whole.py): the seconds of every call by pass, and of the references for clock and units.

        Raises ToolchainError if a kernel fails, crashes or hangs.
        """
        library = self._link({str(index): data for index, data in enumerate(objects)})
        try:
            self._send({"library": str(library), "threads": self.threads, "seed": self.seed, **command})
            while True:
                answer = self._answer()
                if isinstance(answer, Outcome) or "failed" in answer:
                    reason = answer.reason if isinstance(answer, Outcome) else "a kernel failed"
                    raise ToolchainError(f"cannot be timed: {reason}", place="profile")
                if "passes" in answer:
                    return answer["passes"], float(answer["clock"]), float(answer["units"])
        finally:
            library.unlink(missing_ok=True)

    @property
    def folder(self) -> Path:
        """For files that the child reads; gone when the runner closes."""
        return Path(self._folder.name)

    def _try(self, symbols: list[str], library: Path, kernels: Kernels, rounds: int, turn: float) -> dict[str, Outcome]:
        """One command: outcomes of all symbols, or, if one kills the child, of that one only."""
        self._send(
            {
                "library": str(library), "symbols": symbols, "signature": kernels.signature, "threads": self.threads,
                "rounds": rounds, "turn": turn, "seed": self.seed,
            }
        )  # fmt: skip
        found: dict[str, Outcome] = {}
        at = 0
        while True:
            answer = self._answer()
            if isinstance(answer, Outcome):
                return {symbols[at]: answer}
            at = int(answer.get("at", at))
            if take(answer, symbols, found):
                return found

    def _answer(self) -> dict[str, Any] | Outcome:
        """The child's next answer, or how it ended."""
        try:
            line = self._answers.get(timeout=self.hang)
        except queue.Empty:
            self._unblock()
            return Outcome("hung", f"no answer within {self.hang:g} s")
        if line is not None:
            return json.loads(line)
        code = self._process.wait() if self._process else 0
        self._stop()
        return Outcome("crashed", f"signal {-code}" if code < 0 else f"exit code {code}")

    def _unblock(self) -> None:
        """Whatever hangs: end it."""
        self._stop()

    def _send(self, command: Mapping[str, Any]) -> None:
        stdin = (self._process or self._start()).stdin
        with contextlib.suppress(BrokenPipeError):  # a dead child is found by its missing answer
            if stdin is not None:
                stdin.write(json.dumps(command) + "\n")
                stdin.flush()

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", self.program]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
            start_new_session=True,  # an interrupt at the terminal is ours to handle
        )  # fmt: skip
        self._answers = queue.Queue()
        threading.Thread(target=_forward, args=(self._process.stdout, self._answers), daemon=True).start()
        if self.cores:
            self._send({"cores": self.cores})
        return self._process

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
        self._process = None

    def _link(self, objects: Mapping[str, bytes]) -> Path:
        """One shared library with all candidates and the runtime."""
        return self._library(objects, Path(__file__).with_name("timing.c"), find_compiler())

    def _library(
        self, objects: Mapping[str, bytes], loop: Path, compiler: Sequence[str], sources: Sequence[str] = (),
        options: Sequence[str] = (),
    ) -> Path:  # fmt: skip
        """Candidates linked with the loop that times them, which is compiled once, and with small sources of their own."""
        folder, timing = self.folder, f"{loop.stem}.o"
        if not (folder / timing).exists():
            run_compiler([*compiler, *FLAGS, "-c", str(loop), "-o", timing], folder)
        names = [f"k{index}.o" for index in range(len(objects))]
        for name, data in zip(names, objects.values(), strict=True):
            (folder / name).write_bytes(data)
        self._libraries += 1
        library = f"batch{self._libraries}.so"
        run_compiler([*compiler, *FLAGS, "-shared", *options, "-o", library, *sources, timing, *names, "-lm"], folder)
        return folder / library


def take(answer: Mapping[str, Any], symbols: Sequence[str], found: dict[str, Outcome]) -> bool:
    """Add what the child says to the outcomes; True if that was all."""
    if "checked" in answer:
        found[symbols[answer["checked"]]] = Outcome(answer["status"])
    for index, times in answer.get("times", {}).items():
        found[symbols[int(index)]].times = times
    return "times" in answer


def _forward(stream: Any, answers: queue.Queue[str | None]) -> None:
    with contextlib.suppress(ValueError, OSError):  # closed under us: the child is gone
        for line in stream:
            answers.put(line)
    answers.put(None)


def ratio(candidate: Sequence[float], reference: Sequence[float]) -> float:
    """The fastest of the candidate's rounds over the reference's fastest in the same rounds: disturbances only add."""
    return min(candidate) / min(reference[: len(candidate)])
