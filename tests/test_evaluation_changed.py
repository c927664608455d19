"""The samples that a compression changed most, as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hwopt.evaluation.changed import changed_rows, save_changed
from hwopt.evaluation.outputs import Pair
from hwopt.evaluation.pixels import Pixels
from hwopt.samples import Samples


def test_a_folder_holds_the_pictures_of_the_latest_evaluation_alone(tmp_path: Path) -> None:
    samples = Samples({"x": np.zeros((3, 1, 2, 2), np.float32)})
    (tmp_path / "mine_sample.png").touch()
    for changed in ((True, True, True), (False, False, True)):
        logits = np.where(np.array(changed)[:, None], [[0.0, 1.0]], [[1.0, 0.0]]).astype(np.float32)
        pair = Pair(samples, (np.tile(np.float32([1, 0]), (3, 1)),), (logits,))
        save_changed(tmp_path, changed_rows(pair, (), 3), pair, Pixels("x", 1, 1.0, False))
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["01_sample2.png", "mine_sample.png"]
