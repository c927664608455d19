"""The demo model, planned deeper than the budget and distilled, against the same plan untrained and each family alone.

Everything is chosen and trained on training images: the first 512 calibrate, 4,000 judge plans, the others are trained on,
without their labels. Scores are those of the libraries that ship on all 10,000 test images, which nothing else sees; times are
taken side by side in one process. Bytes are told three ways: of the weights in model.onnx, of the weights as the library packs
them, and of the library's file with its code.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fashion import dataset
from benchmarks.findings import FLOAT, Findings, Setting, figures
from benchmarks.layout import higher_is_better, lower_is_better
from benchmarks.zoo import Missing
from hwopt.artifact import Artifact
from hwopt.compiler import compile_model
from hwopt.demo import MODEL, SHAPES
from hwopt.errors import HwoptError
from hwopt.evaluate import compare
from hwopt.measure import interleaved
from hwopt.plan.budget import Budget
from hwopt.plan.plan import plan_from_json
from hwopt.samples import LABELS

CALIBRATE, JUDGE = 512, 4000
MAX_DROP, SMALLER = 0.01, 10.0  # what is allowed on the judging images, and asked for in bytes
MINUTES, QUICK_MINUTES = 4.5, 0.3
FAMILIES = ("prune-channels", "low-rank", "share-weights", "quantize")
JOINT, UNTRAINED, WITHIN = "joint, distilled", "joint, same plan untrained", "joint, within the budget untrained"
QUICK_TESTED = 2000
UNPROVED = "none"  # no change is left out by way of trial: that takes most of the time, and all libraries are timed in the end


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
            raise Missing("no Fashion-MNIST", place=str(self.folder), hint=hint) from error

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

    findings: Findings
    setting: Setting
    images: Images
    artifacts: dict[str, Artifact] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def compile(self, name: str, **options: Any) -> Artifact | None:
        """The demo model compiled so; None, with a note, where no plan keeps its budget."""
        out, started = self.setting.scratch / f"table{len(self.artifacts)}", time.perf_counter()
        options |= {"shapes": SHAPES, "threads": self.setting.threads, "check": UNPROVED, **self.images.sets}
        try:
            artifact = compile_model(MODEL, out=out, **options)
        except HwoptError as error:
            self.findings.note(f"demo {name}: {error}")
            return None
        self.artifacts[name], self.seconds[name] = artifact, time.perf_counter() - started
        self.findings.say(f"demo {name}: compiled in {self.seconds[name]:.0f} s")
        return artifact


def recovered(findings: Findings, setting: Setting) -> None:
    """The table; the families alone and the plan that keeps the budget untrained are left out where little must do."""
    bench = Bench(findings, setting, Images(setting.fashion))
    bench.compile(FLOAT, passes="none")
    joint(bench, QUICK_MINUTES if setting.quick else MINUTES)
    if not setting.quick:
        bench.compile(WITHIN, budget=Budget(MAX_DROP))
        for name in FAMILIES:
            bench.compile(f"{name} alone", budget=Budget(MAX_DROP), passes=name)
    table(bench)


def joint(bench: Bench, minutes: float) -> None:
    """A tenth of the size, as fast as can be, trained; and the very same plan without its training."""
    small = Budget(MAX_DROP, weight_bytes=bench.artifacts[FLOAT].report["result"]["weight_bytes"] / SMALLER)
    train = bench.images.part("train", slice(CALIBRATE, 60000 - JUDGE), labels=False)
    found = bench.compile(JOINT, budget=small, recover=f"distill{{epochs=20,minutes={minutes}}}", train=train)
    if found is None:
        return
    plan = plan_from_json((found.path / "plan.json").read_text())
    said = plan.recovery.recipe if plan.recovery else "not trained"
    bench.findings.note(f"demo {JOINT}: {', '.join(sorted(plan.families))}; {said}")
    if plan.recovery:
        bench.compile(UNTRAINED, plan=dataclasses.replace(plan, recovery=None))


def table(bench: Bench) -> None:
    """Every artifact against the float build: times faster (on one thread, too), times smaller, drop on the test images."""
    test = bench.images.part("t10k", slice(QUICK_TESTED if bench.setting.quick else None))
    feeds, findings = {"image": test["image"][:1]}, bench.findings
    times = interleaved({name: one.runner(feeds) for name, one in bench.artifacts.items()})
    alone = interleaved({name: one.runner(feeds, threads=1) for name, one in bench.artifacts.items()})
    right = {name: answers(one, test) for name, one in bench.artifacts.items()}
    bytes_of = {name: sizes(one) for name, one in bench.artifacts.items()}
    for name in bench.artifacts:
        if name == FLOAT:
            continue
        case, pair = f"demo {name}", compare("top-1 accuracy", right[FLOAT], right[name])
        findings.add(lower_is_better(case, "latency", "s", times[name].median, {FLOAT: times[FLOAT].median}))
        for what, count in bytes_of[name].items():
            findings.add(lower_is_better(case, what, "B", count, {FLOAT: bytes_of[FLOAT][what]}))
        findings.add(higher_is_better(case, pair.metric, "1", pair.score, {FLOAT: pair.baseline}))
        found = {"speedup": times[FLOAT].median / times[name].median, "compile_seconds": bench.seconds[name], **figures(pair)}
        found["speedup_on_one_thread"] = alone[FLOAT].median / alone[name].median
        found |= {f"{slug(what)}_times_smaller": bytes_of[FLOAT][what] / count for what, count in bytes_of[name].items()}
        findings.summary |= {f"demo_{slug(name)}_{key}": value for key, value in found.items()}
    if JOINT in bench.artifacts:
        recovery = bench.artifacts[JOINT].report["recovery"] or {"seconds": 0.0}
        findings.summary[f"demo_{slug(JOINT)}_training_seconds"] = recovery["seconds"]


def sizes(artifact: Artifact) -> dict[str, int]:
    """Weights in model.onnx, weights as the library packs them, and the library's file."""
    found, (library,) = artifact.report["result"], artifact.path.glob("*.so")
    return {
        "model weights": found["weight_bytes"], "library weights": found["library_weight_bytes"],
        "library file": library.stat().st_size,
    }  # fmt: skip


def slug(name: str) -> str:
    """`joint, distilled` -> `joint_distilled`."""
    return re.sub(r"\W+", "_", name)


def answers(artifact: Artifact, test: Mapping[str, np.ndarray]) -> np.ndarray:
    """1 for every test image that the library names rightly."""
    images, labels = test["image"], test[LABELS]
    found = [artifact.run({"image": images[row : row + 1]})["logits"].argmax() for row in range(len(images))]
    return (np.array(found) == labels).astype(np.float64)
