"""What was measured, one kernel a line of JSON in a file that only grows; and the table that is made of it."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hwopt.analysis.workload import rounded
from hwopt.backends.tvm.learn.counted import Counted
from hwopt.backends.tvm.learn.features import counted
from hwopt.backends.tvm.learn.measure import NOISE, Profile
from hwopt.backends.tvm.learn.predictor import Predictor, fitted
from hwopt.backends.tvm.learn.stock import work_from
from hwopt.backends.tvm.learn.table import Table, instructions, instructions_of, processor, work_key
from hwopt.backends.tvm.learn.trees import MEMBERS
from hwopt.errors import UsageError
from hwopt.target import Target, Workload

CLEAN = 0.2  # noise above which a sample is not believed
DRIFT = 1.15  # of the reference that others on the same core slow down, over its best tenth
HELD = 5  # one kernel of so many is kept out of training to say how good it is
ENOUGH = 150  # kernels from which a number of threads is known to a table; the best known one always is
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
    code: str = ""  # of the templates that were measured
    units: float = 0.0  # seconds of the reference that others on the same core slow down

    @property
    def believed(self) -> bool:
        return self.shared == 1 and self.noise <= CLEAN and self.seconds > 0 and self.clock > 0


def records_of(found: Profile, threads: int, seed: int, form: str, evict: int = 0, code: str = "") -> list[Record]:
    """What passed through the caches between two passes counts as weights of the model."""
    works = (dataclasses.replace(one.work, footprint=rounded(one.work.footprint + evict)) for one in found.samples)
    return [
        Record(work, one.seconds, one.noise, found.clock, threads, seed, form, one.shared, code, found.units)
        for work, one in zip(works, found.samples, strict=True)
    ]


def calm(turns: Sequence[Sequence[Record]], best: float) -> list[Sequence[Record]]:
    """Visits during which nobody else used the same core: the reference took no longer than its `best` seconds allow."""
    return [turn for turn in turns if turn and turn[0].units <= DRIFT * best]


def together(turns: Sequence[Sequence[Record]]) -> list[Record]:
    """Several visits to one network as one: the fastest, as if the clock had been the same; how they differ is noise, too.

    Visits that others disturbed are left out, unless all were.
    """
    found = []
    best = min(turn[0].units for turn in turns if turn)
    for same in zip(*calm(turns, best), strict=True):
        times = [one.seconds / one.clock for one in same]
        best = same[times.index(min(times))]
        differ = float(np.median(times)) / min(times) - 1 if min(times) > 0 else 0.0
        found.append(dataclasses.replace(best, noise=max(best.noise, differ)))
    return found


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
    return Record(**{**data, "work": work_from(data["work"])})


def clocked(records: Sequence[Record]) -> list[Record]:
    """Believed records as if the clock had been the same, the median one, all the time.

    Those are left out during which somebody else used the same core: kernels slow down by more or less than the reference.
    """
    kept = [record for record in records if record.believed]
    best = float(np.percentile([record.units for record in kept], 10)) if kept else 0.0
    kept = [record for record in kept if record.units <= DRIFT * best]
    usual = float(np.median([record.clock for record in kept])) if kept else 1.0
    return [dataclasses.replace(one, seconds=one.seconds * usual / one.clock, clock=usual) for one in kept]


def counts(records: Sequence[Record], target: Target) -> list[Counted]:
    return [counted(record.work, target.microkernels, record.threads) for record in records]


def fastest(records: Sequence[Record]) -> list[Record]:
    """Of several records of one kernel the fastest: whatever disturbs only adds. Those that varied are left out.

    Several threads wait for the slowest of them and vary more: all that is believed counts there.
    """
    found: dict[tuple[str, int], Record] = {}
    steady = (one for one in records if one.noise <= (NOISE if one.threads == 1 else CLEAN))
    for one in sorted(steady, key=lambda one: -one.seconds):
        found[work_key(one.work, one.threads), one.work.footprint] = one
    return list(found.values())


def learned(records: Sequence[Record], target: Target, members: int = MEMBERS, seed: int = 0) -> Predictor:
    """A predictor for believed, clocked records."""
    records = fastest(records)
    threads = [record.threads for record in records]
    seconds, noise = (np.array([getattr(record, name) for record in records]) for name in ("seconds", "noise"))
    return fitted(counts(records, target), threads, seconds, noise, members, seed)


@dataclass(frozen=True)
class Quality:
    """How predictions of kernels that training did not see compare with the measurement; also by family: (kernels, share)."""

    kernels: int
    within_10: float  # share
    median: float  # relative error
    covered: float  # share of the measurements inside of the stated interval
    families: dict[str, tuple[int, float]] = field(default_factory=dict)
    networks_within_10: float | None = None  # the share where whole networks were kept out of training, not kernels


def quality(records: Sequence[Record], target: Target) -> Quality | None:
    """Trained without one of HELD kernels, chosen by their keys, and judged on those that take 1 us and were measured well.

    None for too few. A measurement that varies by more than 8 % itself says little about 10 %.
    """
    rest = [one for one in records if not held_out(one)]
    known = [one for one in records if held_out(one) and one.seconds >= SHORT and one.noise <= NOISE]
    held = list({work_key(one.work, one.threads): one for one in known}.values())
    found = judged(learned(rest, target), held, target) if len(held) >= HELD and len(rest) >= 10 * HELD else None
    return dataclasses.replace(found, networks_within_10=_by_networks(records, target)) if found else None


def _by_networks(records: Sequence[Record], target: Target) -> float | None:
    """The same where one of HELD networks is kept out, and whichever of its kernels another one has, too."""
    rest = [one for one in records if one.seed % HELD != HELD - 1]
    known = {work_key(one.work, one.threads) for one in rest}
    good = [one for one in records if one.seed % HELD == HELD - 1 and one.seconds >= SHORT and one.noise <= NOISE]
    held = list({key: one for one in good if (key := work_key(one.work, one.threads)) not in known}.values())
    found = judged(learned(rest, target), held, target) if len(held) >= HELD and len(rest) >= 10 * HELD else None
    return found.within_10 if found else None


def held_out(record: Record) -> bool:
    return int(work_key(record.work, record.threads), 16) % HELD == HELD - 1


def judged(model: Predictor, records: Sequence[Record], target: Target) -> Quality | None:
    """Of the kernels whose family the predictor knows; None if there are none."""
    errors, inside, families = [], [], []
    for record, found in zip(records, counts(records, target), strict=True):
        if model.knows(found, record.threads):
            mean, half = model.predict(found, record.threads)
            errors.append(abs(math.exp(mean) / record.seconds - 1))
            inside.append(abs(mean - math.log(record.seconds)) <= half)
            families.append(f"{record.work.kind} {record.work.dtype} x{record.threads}")
    if not errors:
        return None
    near = np.array(errors) <= NEAR
    shares = {name: near[[one == name for one in families]] for name in sorted(set(families))}
    split = {name: (len(some), round(float(some.mean()), 4)) for name, some in shares.items()}
    return Quality(len(errors), float(near.mean()), float(np.median(errors)), float(np.mean(inside)), split)


def table_of(records: Sequence[Record], target: Target, found: Quality | None, date: str = "") -> Table:
    """The table to ship: trained on everything, with what was measured by key (the fastest of several steady ones)."""
    kept = clocked(records)
    if len(kept) < 2 * HELD:
        raise UsageError(f"only {len(kept)} kernels were measured well enough", place="profile", hint="measure for longer")
    measured: dict[str, tuple[float, float, int]] = {}
    for one in sorted(fastest(kept), key=lambda record: -record.seconds):
        measured[work_key(one.work, one.threads)] = (float(f"{one.seconds:.5g}"), round(one.noise, 4), one.work.footprint)
    facts = {
        "date": date or datetime.date.today().isoformat(), "kernels": len(kept), "networks": len({one.seed for one in kept}),
        "target": target.name, "instructions": instructions_of(target.microkernels), "clock_seconds": kept[0].clock,
        **(_rounded(found) if found else {}),
        "versions": {name: importlib.metadata.version(name) for name in ("hwopt", "apache-tvm", "scikit-learn")},
    }  # fmt: skip
    counted_by = Counter(record.threads for record in kept)
    enough = min(ENOUGH, max(counted_by.values()))
    threads = tuple(sorted(count for count, kernels in counted_by.items() if kernels >= enough))
    return Table(processor(), instructions(target.tvm), threads, measured, learned(kept, target), facts)


def _rounded(found: Quality) -> dict[str, Any]:
    figures = dataclasses.asdict(found)
    return {f"held_out_{name}": round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}
