"""Training on labels of tokens: a class for each place of an output, from arrays, from a file and from a loader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hwopt.errors import DataError
from hwopt.ir import Graph
from hwopt.recover import Case, recovered
from hwopt.sources import samples_from
from tests.random_graphs import Builder

pytest.importorskip("torch")
RECIPE = "qat{steps=20,batch=20,checks=2,threads=1,lr=0.01}"


def tagger() -> Graph:
    """One of five classes for each of four tokens of a sample."""
    build = Builder(np.random.default_rng(0))
    build.outputs.append(build.op("MatMul", [build.input((1, 4, 6)), build.weight(6, 5, fan_in=6)], (1, 4, 5)))
    return build.graph()


def tagged(count: int = 60) -> dict[str, np.ndarray]:
    """Tokens, their classes, and -100 where nothing counts."""
    random = np.random.default_rng(1)
    tokens = random.standard_normal((count, 4, 6)).astype(np.float32)
    labels = tokens[..., :5].argmax(-1)
    return {"x0": tokens, "labels": np.where(random.random(labels.shape) < 0.3, -100, labels)}


@pytest.mark.parametrize("kind", ["arrays", "file", "loader"])
def test_every_token_has_a_label_to_train_on(kind: str, tmp_path: Path) -> None:
    graph, data = tagger(), tagged()
    np.savez(tmp_path / "train.npz", **data)
    loader = [(data["x0"][start : start + 20], data["labels"][start : start + 20]) for start in (0, 20, 40)]
    stored = samples_from(str(tmp_path / "train.npz"), graph, places=True)
    found = recovered(Case(graph, graph, {"arrays": data, "file": stored, "loader": loader}[kind]), RECIPE)
    assert found.after is not None and found.before is not None and found.after.value < 0.9 * found.before.value


def test_other_labels_than_classes_are_refused_and_scores_take_one_label_a_sample() -> None:
    graph, data = tagger(), tagged()
    wrong = {**data, "labels": np.where(data["labels"] < 0, -1, data["labels"])}
    with pytest.raises(DataError, match="the least is -1"):
        recovered(Case(graph, graph, wrong), RECIPE)
    with pytest.raises(DataError, match=r"labels have shape \[60, 4\]"):
        samples_from(data, graph)
