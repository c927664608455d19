"""The recover suite's table: what is said of a recovered artifact beside its float build."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.recover import FLOAT, JOINT, UNTRAINED, Bench, Images, table
from hwopt.errors import DataError


class Fake:
    """An artifact that names the class of every image with some right; the images hold their own numbers."""

    def __init__(self, right: int, weight_bytes: int, recovery: Mapping[str, Any] | None = None) -> None:
        self.right, self.report = right, {"result": {"weight_bytes": weight_bytes}, "recovery": recovery}

    def runner(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], None]:
        return lambda: None

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        number = int(feeds["image"].reshape(-1)[0] * 255)
        return {"logits": np.eye(2)[0 if number < self.right else 1]}


class Few(Images):
    def part(self, name: str, rows: slice, labels: bool = True) -> dict[str, np.ndarray]:
        images = (np.arange(100) / 255).reshape(-1, 1, 1, 1).astype(np.float32)
        return {"image": images, "labels": np.zeros(100, np.int64)}


def test_the_table_says_what_training_gave_back() -> None:
    bench = Bench(Path(), Few(Path()), 1, 1.0)
    bench.artifacts |= {FLOAT: Fake(90, 2000), JOINT: Fake(89, 100, {"seconds": 7.0}), UNTRAINED: Fake(60, 100)}  # type: ignore[dict-item]
    bench.seconds[JOINT] = 9.0
    rows, summary = table(bench)
    assert {row.case for row in rows} == {FLOAT, JOINT, UNTRAINED} and len(rows) == 9
    assert summary["times_smaller"] == 20 and summary["score_drop"] == pytest.approx(0.01)
    assert summary[f"{UNTRAINED}: score_drop"] == pytest.approx(0.3)
    assert summary["recover_seconds"] == 7 and summary["whole_seconds"] == 9 and summary["speedup"] > 0
    assert summary["score_drop_low"] < 0.01 < summary["score_drop_high"]


def test_missing_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dataset-fashion-mnist"):
        Images(tmp_path).part("train", slice(0, 1))
