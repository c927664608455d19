"""The table of the demo model: what is said of a recovered artifact beside its float build."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import trainings, ways
from benchmarks.findings import FLOAT, Findings, Setting
from benchmarks.recovered import JOINT, UNTRAINED, Bench, Images, table
from benchmarks.zoo import Missing


class Fake:
    """An artifact that names the class of every image with some right; the images hold their own numbers."""

    def __init__(self, right: int, weights: int, path: Path, recovery: Mapping[str, Any] | None = None) -> None:
        sizes = {"weight_bytes": weights, "library_weight_bytes": 10 * weights if weights == 100 else 10000}
        self.right, self.path, self.report = right, path, {"result": sizes, "recovery": recovery}
        path.mkdir()
        (path / "libnet.so").write_bytes(bytes(1100 + weights if weights == 100 else 3000))

    def runner(self, feeds: Mapping[str, np.ndarray], threads: int | None = None) -> Callable[[], None]:
        return lambda: None

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        number = int(feeds["image"].reshape(-1)[0] * 255)
        return {"logits": np.eye(2)[0 if number < self.right else 1]}


class Few(Images):
    def part(self, name: str, rows: slice, labels: bool = True) -> dict[str, np.ndarray]:
        images = (np.arange(100) / 255).reshape(-1, 1, 1, 1).astype(np.float32)
        return {"image": images, "labels": np.zeros(100, np.int64)}


def test_the_table_says_what_training_gave_back(tmp_path: Path) -> None:
    setting, found = Setting(tmp_path, tmp_path, tmp_path), Findings()
    bench = Bench(found, setting, Few(Path()))
    bench.artifacts |= {  # type: ignore[arg-type]
        FLOAT: Fake(90, 2000, tmp_path / "a"), JOINT: Fake(89, 100, tmp_path / "b", {"seconds": 7.0}),
        UNTRAINED: Fake(60, 100, tmp_path / "c"),
    }  # fmt: skip
    bench.seconds |= {JOINT: 9.0, UNTRAINED: 2.0}
    table(bench)
    assert {row.case for row in found.rows} == {f"demo {JOINT}", f"demo {UNTRAINED}"} and len(found.rows) == 10
    summary = found.summary
    assert summary["demo_joint_distilled_model_weights_times_smaller"] == 20
    assert summary["demo_joint_distilled_library_weights_times_smaller"] == 10
    assert summary["demo_joint_distilled_library_file_times_smaller"] == 3000 / 1200
    assert summary["demo_joint_distilled_drop"] == pytest.approx(0.01) and summary["demo_joint_distilled_speedup"] > 0
    assert summary["demo_joint_same_plan_untrained_drop"] == pytest.approx(0.3)
    assert summary["demo_joint_distilled_training_seconds"] == 7 and summary["demo_joint_distilled_compile_seconds"] == 9
    assert summary["demo_joint_distilled_drop_low"] < 0.01 < summary["demo_joint_distilled_drop_high"]


def test_missing_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(Missing, match="dataset-fashion-mnist"):
        Images(tmp_path).part("train", slice(0, 1))


def method(bench: object, seed: int) -> dict[str, float]:
    """Two tenths ahead of one counterpart; ahead of the other in one of three seeds only; the last seed fails with some."""
    return {"ours": 0.8 + seed / 100, "naive": 0.6 + seed / 100, "lucky": 0.9 - seed / 5}


def broken(bench: object, seed: int) -> dict[str, float]:
    if seed == 2:
        raise ValueError("no plan")
    return method(bench, seed)


def test_methods_are_compared_seed_by_seed_and_a_run_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trainings, "ProcessPoolExecutor", lambda cores, _: ThreadPoolExecutor(cores))
    found, against = Findings(), {"ours": ("naive", "lucky")}
    experiments = tuple(
        trainings.Experiment(name, work, lambda effort: 1.0, against) for name, work in (("fine", method), ("odd case", broken))
    )
    trainings.compared(found, Setting(tmp_path, tmp_path, tmp_path, 1, quick=True), "methods", experiments)
    summary = found.summary
    assert summary["fine_ours_score"] == pytest.approx(0.81) and summary["fine_ours_spread"] == pytest.approx(0.01)
    assert summary["fine_ours_over_naive_gain"] == pytest.approx(0.2) == pytest.approx(summary["fine_ours_over_naive_gain_low"])
    assert summary["fine_ours_over_lucky_gain_low"] < 0 < summary["fine_ours_over_lucky_gain"]
    assert "fine_failed" not in summary and summary["odd_case_failed"] == 1
    notes = "\n".join(found.notes)
    assert "odd case, seed 2 failed: ValueError: no plan" in notes
    assert "fine: ours (+0.2000 +- 0.0000 in accuracy, better in 3 of 3 seeds) beats naive" in notes
    assert "fine: ours (+0.1100 +- 0.2100 in accuracy, better in 2 of 3 seeds) is ahead of, within the spread, lucky" in notes


def test_where_time_is_short_all_trainings_get_fewer_steps() -> None:
    whole = ways.Effort()
    half = whole.times(0.5)
    assert (half.prune, half.distill, half.base) == (whole.prune // 2, whole.distill // 2, whole.base // 2)
    assert (half.tested, half.held_out) == (whole.tested, whole.held_out)
