"""What was measured, one kernel a line of JSON in a file that only grows; and the table that is made of it."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hwopt.backends.tvm.learn.features import NAMES, described
from hwopt.backends.tvm.learn.measure import Profile
from hwopt.backends.tvm.learn.table import Table, instructions, processor, work_key
from hwopt.backends.tvm.learn.trees import MEMBERS, Ensemble, train
from hwopt.errors import UsageError
from hwopt.target import Coded, Target, Workload

CLEAN = 0.12  # noise above which a sample is not believed
HELD = 5  # one kernel of so many is kept out of training to say how good it is
SHORT = 1e-6  # shorter kernels are not judged: a clock reads to some 30 ns
NEAR = 0.1


@dataclass(frozen=True)
class Record:
    """One kernel of one network (`seed`, -1 for a model or a kernel that was asked for) in one dtype. `clock` is the reference's
    time in the same process: a machine that runs slower for a while shows it there."""

    work: Workload
    seconds: float
    noise: float
    clock: float
    threads: int
    seed: int
    form: str
    shared: int = 1

    @property
    def believed(self) -> bool:
        return self.shared == 1 and self.noise <= CLEAN and self.seconds > 0 and self.clock > 0


def records_of(found: Profile, threads: int, seed: int, form: str) -> list[Record]:
    return [Record(one.work, one.seconds, one.noise, found.clock, threads, seed, form, one.shared) for one in found.samples]


def append(path: Path, records: Iterable[Record]) -> None:
    """Adds whole lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(dataclasses.asdict(record), sort_keys=True) + "\n" for record in records)
    with path.open("a") as file:
        file.write(text)


def read(path: Path) -> list[Record]:
    """Every record; a last line that was cut off is dropped. Raises UsageError that names the file and the line."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(_record(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise UsageError(f"line {number}: {error}", place=str(path), hint="remove the line") from error
    return found


def _record(data: dict[str, Any]) -> Record:
    work: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data["work"].items()}
    coded = work.get("coded")
    work["coded"] = Coded(**coded) if coded else None
    return Record(**{**data, "work": Workload(**work)})


def clocked(records: Sequence[Record]) -> list[Record]:
    """Believed records as if the clock had been the same, the median one, all the time."""
    kept = [record for record in records if record.believed]
    usual = float(np.median([record.clock for record in kept])) if kept else 1.0
    return [dataclasses.replace(one, seconds=one.seconds * usual / one.clock, clock=usual) for one in kept]


def matrix(records: Sequence[Record], target: Target) -> tuple[np.ndarray, np.ndarray]:
    """Features by row, and log(measured / prior)."""
    made = [described(record.work, target.microkernels, record.threads) for record in records]
    rows = np.array([features for _, features in made]).reshape(-1, len(NAMES))
    return rows, np.log([record.seconds / prior for record, (prior, _) in zip(records, made, strict=True)])


def fitted(records: Sequence[Record], target: Target, members: int = MEMBERS, seed: int = 0) -> Ensemble:
    """An ensemble for believed, clocked records."""
    rows, wanted = matrix(records, target)
    noise = np.array([record.noise for record in records])
    return train(rows, wanted, 1 / (0.03 + noise), seed, members)


@dataclass(frozen=True)
class Quality:
    """How predictions of kernels that training did not see compare with the measurement."""

    kernels: int
    within_10: float  # share
    median: float  # relative error
    covered: float  # share of the measurements inside of the stated interval


def quality(records: Sequence[Record], target: Target) -> Quality | None:
    """Trained without one of HELD kernels, chosen by their keys, and judged on those that take 1 us; None for too few."""
    rest = [one for one in records if not held_out(one)]
    held = list({work_key(one.work, one.threads): one for one in records if held_out(one) and one.seconds >= SHORT}.values())
    return judged(fitted(rest, target), held, target) if len(held) >= HELD and len(rest) >= 10 * HELD else None


def held_out(record: Record) -> bool:
    return int(work_key(record.work, record.threads), 16) % HELD == HELD - 1


def judged(model: Ensemble, records: Sequence[Record], target: Target) -> Quality:
    rows, wanted = matrix(records, target)
    mean, half = model.predict(rows)
    error = np.abs(np.exp(mean - wanted) - 1)
    inside = np.abs(mean - wanted) <= half
    return Quality(len(records), float((error <= NEAR).mean()), float(np.median(error)), float(inside.mean()))


def table_of(records: Sequence[Record], target: Target, found: Quality | None, date: str = "") -> Table:
    """The table to ship: trained on everything, with what was measured by key (the fastest of several)."""
    kept = clocked(records)
    if len(kept) < 2 * HELD:
        raise UsageError(f"only {len(kept)} kernels were measured well enough", place="profile", hint="measure for longer")
    measured: dict[str, tuple[float, float]] = {}
    for one in sorted(kept, key=lambda record: -record.seconds):
        measured[work_key(one.work, one.threads)] = (float(f"{one.seconds:.5g}"), round(one.noise, 4))
    facts = {
        "date": date or datetime.date.today().isoformat(), "kernels": len(kept), "networks": len({one.seed for one in kept}),
        "target": target.name, "clock_seconds": kept[0].clock, **(_rounded(found) if found else {}),
        "versions": {name: importlib.metadata.version(name) for name in ("hwopt", "apache-tvm", "scikit-learn")},
    }  # fmt: skip
    threads = tuple(sorted({record.threads for record in kept}))
    return Table(processor(), instructions(target.tvm), threads, measured, fitted(kept, target), facts)


def _rounded(found: Quality) -> dict[str, float]:
    return {f"held_out_{name}": round(value, 4) for name, value in dataclasses.asdict(found).items()}
