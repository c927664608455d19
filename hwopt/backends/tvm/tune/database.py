"""The tuning database: one JSON object a line, only ever appended to, shared by models, runs and processes."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hwopt.backends.tvm import kernels
from hwopt.backends.tvm.kernels import Schedule
from hwopt.backends.tvm.tune.task import Spec, Task, make_task, plain, schedule_from
from hwopt.errors import HwoptError
from hwopt.target import MicroKernel, Target

FORMAT = 1
ROUNDS, CONFIRM = 9, 31  # rounds of a candidate in a search, and of the best ones when they are compared once more
DOUBT = 0.06  # relative: how far off one round may be; a schedule must win by more than that / sqrt(rounds)


@dataclass(frozen=True)
class Trial:
    """One measured candidate. `ratio` is its time over the default schedule's in the same rounds; 0 where it has none."""

    schedule: Schedule
    status: str  # ok, wrong, crashed, hung, failed
    seconds: float = 0.0
    reference: float = 0.0  # the default schedule's seconds
    ratio: float = 0.0
    rounds: int = 0
    reason: str = ""

    @property
    def ok(self) -> bool:
        return self.status == "ok" and self.ratio > 0

    @property
    def doubted(self) -> float:
        """The ratio, raised by what few rounds leave in doubt."""
        return self.ratio * (1 + DOUBT / math.sqrt(self.rounds)) if self.ok and self.rounds else math.inf


class Database:
    """Records by task. Lines that were cut off, or that other versions wrote, are skipped and stay in the file.

    With `cpu`, a processor's name, records of other processors are skipped too, and new ones carry the name.
    """

    def __init__(self, path: Path | str | None = None, *, cpu: str = "") -> None:
        self.path, self.cpu = Path(path) if path is not None else default_path(), cpu
        self._trials: dict[str, dict[Schedule, Trial]] = {}
        self._read = 0  # bytes

    def trials(self, task: Task) -> list[Trial]:
        """What is known of a task, the latest record of each schedule (the one with the most rounds)."""
        self._refresh()
        return list(self._trials.get(task.key, {}).values())

    def best(self, task: Task) -> Schedule | None:
        """The schedule that beats the default one, or None."""
        found = self.winner(task)
        return found.schedule if found else None

    def winner(self, task: Task) -> Trial | None:
        """The best trial if it beats the default: of those that were confirmed, else of those with all rounds of a search."""
        trials = self.trials(task)
        confirmed = [trial for trial in trials if trial.rounds >= CONFIRM]
        found = min(confirmed or [one for one in trials if one.rounds >= ROUNDS], key=lambda one: one.doubted, default=None)
        return found if found and found.doubted < 1 else None

    def add(self, task: Task, trials: Iterable[Trial], **facts: Any) -> None:
        """Append records in one write under a lock; raises HwoptError if the file cannot be written."""
        head = {"format": FORMAT, "key": task.key, "workload": task.workload, "cpu": self.cpu, **facts}
        lines = [json.dumps({**head, **_fields(trial)}, sort_keys=True) for trial in trials]
        if lines:
            try:
                self._append(("\n".join(lines) + "\n").encode())
            except OSError as error:
                raise HwoptError(f"cannot be written: {error.strerror}", place=str(self.path)) from error

    def __len__(self) -> int:
        self._refresh()
        return sum(map(len, self._trials.values()))

    def _append(self, data: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_size and not _ends_line(self.path):
                data = b"\n" + data  # another process died in the middle of a line
            written = os.write(file.fileno(), data)
            while written < len(data):
                written += os.write(file.fileno(), data[written:])

    def _refresh(self) -> None:
        """Read what was appended since the last time, whole lines only."""
        if not self.path.exists():
            return
        try:
            with self.path.open("rb") as file:
                file.seek(self._read)
                data = file.read()
        except OSError as error:
            raise HwoptError(f"cannot be read: {error.strerror}", place=str(self.path)) from error
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        for key, trial in filter(None, (_parsed(line, self.cpu) for line in whole.splitlines())):
            known = self._trials.setdefault(key, {})
            before = known.get(trial.schedule)
            if before is None or trial.rounds >= before.rounds:
                known[trial.schedule] = trial


def _fields(trial: Trial) -> dict[str, Any]:
    return {
        "schedule": plain(trial.schedule), "status": trial.status, "seconds": trial.seconds, "reference": trial.reference,
        "ratio": trial.ratio, "rounds": trial.rounds, "reason": trial.reason,
    }  # fmt: skip


def _parsed(line: bytes, cpu: str) -> tuple[str, Trial] | None:
    """A record of this processor ("": of any), of a format and of schedules that we know, else None."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, Mapping) or record.get("format") != FORMAT or (cpu and record.get("cpu") != cpu):
        return None
    schedule, key = schedule_from(record.get("schedule")), record.get("key")
    numbers: list[Any] = [record.get(name) for name in ("seconds", "reference", "ratio", "rounds")]
    if schedule is None or not isinstance(key, str) or not all(isinstance(one, int | float) for one in numbers):
        return None
    seconds, reference, ratio, rounds = numbers
    return key, Trial(schedule, str(record.get("status")), seconds, reference, ratio, rounds, str(record.get("reason", "")))


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def default_path(environment: Mapping[str, str] = os.environ) -> Path:
    """The user's own database: $XDG_CACHE_HOME/hwopt/tuning.jsonl."""
    base = environment.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "hwopt" / "tuning.jsonl"


class Tuned:
    """Chooses schedules for a compilation: the database's where it has a better one than the default; counts them."""

    def __init__(self, database: Database, target: Target) -> None:
        self.database, self.target = database, target
        self.asked: dict[Task, Schedule | None] = {}

    def __call__(self, spec: Spec, micro: MicroKernel, threads: int) -> Schedule:
        task = make_task(spec, micro, self.target, threads)
        self.asked[task] = self.database.best(task)
        return self.asked[task] or kernels.default_schedule(spec, micro, threads)

    @property
    def tuned(self) -> int:
        return sum(found is not None for found in self.asked.values())

    def note(self) -> str:
        """For the report: a database that was named is expected to know the kernels; "" for a model without any."""
        known = sum(bool(self.database.trials(task)) for task in self.asked)
        if not self.asked:
            return ""
        return f"{self.tuned} of {len(self.asked)} kernels run with tuned schedules, {known} were tuned"
