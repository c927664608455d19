"""The embedded example: a small residual CNN trained on Fashion-MNIST (MIT), see benchmarks/train_demo.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hwopt.compiler import compile_model
from hwopt.job import quiet
from hwopt.plan.budget import Budget
from hwopt.plan.options import Progress
from hwopt.samples import LABELS, read_npz

MODEL = Path(__file__).with_name("fashion.onnx")
DATA = Path(__file__).with_name("fashion.npz")
SHAPES = {"image": (1, 1, 28, 28)}


def demo_data() -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
    """Calibration images from the training half; evaluation images with labels from the test half. float32 in 0..1."""
    stored = read_npz(DATA)
    calibrate = {"image": stored["calibrate"].astype(np.float32) / 255}
    return calibrate, {"image": stored["evaluate"].astype(np.float32) / 255, LABELS: stored[LABELS]}


def run_demo(
    out: Path, *, target: str = "host", threads: int | None = None, progress: Progress = quiet, max_drop: float = 0.01
) -> dict[str, Any]:
    """Compress and compile the demo model; the artifact stays in `out`. Returns its report."""
    calibrate, evaluate = demo_data()
    artifact = compile_model(
        MODEL, out=out, target=target, shapes=SHAPES, calibrate=calibrate, evaluate=evaluate,
        budget=Budget(max_drop), threads=threads, progress=progress,
    )  # fmt: skip
    return artifact.report


def evaluation_data() -> Mapping[str, np.ndarray]:
    """The evaluation half with its labels: `hwopt evaluate build/demo --data hwopt.demo:evaluation_data`."""
    classes = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
    return {**demo_data()[1], "classes": np.array(classes)}
