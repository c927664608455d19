"""Suite `recover`: the demo model, planned deeper than the budget and distilled, against the same plan untrained and each family.

Everything is chosen and trained on training images: the first 512 calibrate, 4,000 judge plans, the others are trained on,
without their labels. Scores are those of the libraries that ship on all 10,000 test images, which nothing else sees; times are
taken side by side in one process.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fashion import dataset
from benchmarks.layout import Row, higher_is_better, lower_is_better, result
from hwopt.artifact import Artifact
from hwopt.compiler import compile_model
from hwopt.demo import MODEL, SHAPES
from hwopt.errors import DataError, HwoptError
from hwopt.evaluate import Comparison, compare
from hwopt.measure import interleaved
from hwopt.plan.budget import Budget
from hwopt.plan.plan import plan_from_json
from hwopt.samples import LABELS

IMAGES = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
CALIBRATE, JUDGE = 512, 4000
MAX_DROP, SMALLER = 0.01, 10.0  # what is allowed on the judging images, and asked for in bytes
MINUTES, QUICK_MINUTES = 4.5, 0.3
FAMILIES = ("prune-channels", "low-rank", "share-weights", "quantize")
FLOAT, JOINT, UNTRAINED, WITHIN = "float", "joint + distilled", "same plan, not trained", "joint within the budget"


def run(threads: int | None = None, data: Path | None = None, quick: bool = False) -> dict[str, Any]:
    """`data` is the folder of the four gzipped IDX files."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), Images(data or IMAGES), threads, QUICK_MINUTES if quick else MINUTES)
        for make in (float_model, joint, *(() if quick else (within, *map(family, FAMILIES)))):
            make(bench)
        rows, summary = table(bench)
    return result("recover", rows, summary, bench.notes)


@dataclasses.dataclass(frozen=True)
class Images:
    """Fashion-MNIST as the demo model takes it: float32 [n, 1, 28, 28] in 0..1."""

    folder: Path

    def part(self, name: str, rows: slice, labels: bool = True) -> dict[str, np.ndarray]:
        images, answers = self._stored[name]
        found = {"image": images[rows, None].astype(np.float32) / 255}
        return found | ({LABELS: answers[rows].astype(np.int64)} if labels else {})

    @cached_property
    def _stored(self) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
        try:
            return {name: dataset(self.folder, name) for name in ("train", "t10k")}
        except OSError as error:
            hint = "install dataset-fashion-mnist, or give --data FOLDER"
            raise DataError("no Fashion-MNIST", place=str(self.folder), hint=hint) from error

    @property
    def sets(self) -> dict[str, Any]:
        """What every compilation gets."""
        return {
            "calibrate": self.part("train", slice(0, CALIBRATE), labels=False),
            "evaluate": self.part("train", slice(60000 - JUDGE, 60000)),
        }


@dataclasses.dataclass
class Bench:
    """The artifacts of one table, made one after the other; a case adds one, or a note why it is not there."""

    folder: Path
    images: Images
    threads: int | None
    minutes: float
    artifacts: dict[str, Artifact] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def compile(self, name: str, **options: Any) -> Artifact | None:
        """The demo model compiled so; None, with a note, where no plan keeps its budget."""
        out, started = self.folder / str(len(self.artifacts)), time.perf_counter()
        try:
            artifact = compile_model(MODEL, out=out, shapes=SHAPES, threads=self.threads, **self.images.sets, **options)
        except HwoptError as error:
            self.notes.append(f"{name}: {error}")
            return None
        self.artifacts[name], self.seconds[name] = artifact, time.perf_counter() - started
        return artifact

    @property
    def train(self) -> dict[str, np.ndarray]:
        return self.images.part("train", slice(CALIBRATE, 60000 - JUDGE), labels=False)


def float_model(bench: Bench) -> None:
    bench.compile(FLOAT, passes="none")


def joint(bench: Bench) -> None:
    """A tenth of the size, as fast as can be, trained; and the very same plan without its training."""
    small = Budget(MAX_DROP, weight_bytes=bench.artifacts[FLOAT].report["result"]["weight_bytes"] / SMALLER)
    recipe = f"distill{{epochs=20,minutes={bench.minutes}}}"
    found = bench.compile(JOINT, budget=small, recover=recipe, train=bench.train)
    if found is None:
        return
    plan = plan_from_json((found.path / "plan.json").read_text())
    bench.notes.append(f"{JOINT}: {', '.join(sorted(plan.families))}; {plan.recovery.recipe if plan.recovery else 'not trained'}")
    if plan.recovery:
        bench.compile(UNTRAINED, plan=dataclasses.replace(plan, recovery=None))


def within(bench: Bench) -> None:
    bench.compile(WITHIN, budget=Budget(MAX_DROP))


def family(name: str) -> Callable[[Bench], None]:
    def alone(bench: Bench) -> None:
        bench.compile(f"{name} alone", budget=Budget(MAX_DROP), passes=name)

    return alone


def table(bench: Bench) -> tuple[list[Row], dict[str, float]]:
    """Every artifact against the float build: times faster, times smaller, drop on the test images."""
    test = bench.images.part("t10k", slice(None))
    feeds = {"image": test["image"][:1]}
    times = interleaved({name: one.runner(feeds) for name, one in bench.artifacts.items()})
    right = {name: answers(one, test) for name, one in bench.artifacts.items()}
    sizes = {name: one.report["result"]["weight_bytes"] for name, one in bench.artifacts.items()}
    rows: list[Row] = []
    summary: dict[str, float] = {}
    for name in bench.artifacts:
        drop = compare("top-1 accuracy", right[FLOAT], right[name])
        rows.append(lower_is_better(name, "latency", "s", times[name].median, {FLOAT: times[FLOAT].median}))
        rows.append(lower_is_better(name, "weights", "B", sizes[name], {FLOAT: sizes[FLOAT]}))
        rows.append(higher_is_better(name, "top-1 accuracy", "1", drop.score, {FLOAT: drop.baseline}))
        found = figures(times[FLOAT].median / times[name].median, sizes[FLOAT] / sizes[name], drop)
        summary |= {f"{name}: {key}": value for key, value in found.items()}
        summary |= found if name == JOINT else {}
    if JOINT in bench.artifacts:
        recovery = bench.artifacts[JOINT].report["recovery"] or {"seconds": 0.0}
        summary |= {"recover_seconds": recovery["seconds"], "whole_seconds": bench.seconds[JOINT]}
    return rows, summary


def figures(speedup: float, times_smaller: float, drop: Comparison) -> dict[str, float]:
    low, high = drop.interval or (drop.drop, drop.drop)
    bounds = {"score_drop": drop.drop, "score_drop_low": low, "score_drop_high": high}
    return {"speedup": speedup, "times_smaller": times_smaller, **bounds}


def answers(artifact: Artifact, test: Mapping[str, np.ndarray]) -> np.ndarray:
    """1 for every test image that the library names rightly."""
    images, labels = test["image"], test[LABELS]
    found = [artifact.run({"image": images[row : row + 1]})["logits"].argmax() for row in range(len(images))]
    return (np.array(found) == labels).astype(np.float64)
