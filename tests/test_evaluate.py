"""Scores and paired comparisons."""

from __future__ import annotations

import numpy as np
import pytest

from hwopt.errors import DataError, UsageError
from hwopt.evaluate import Agreement, Cosine, TopOne, UserScore, compare, divergence, is_classifier, make_scorer, user_scorer
from hwopt.samples import Samples
from tests.test_ir import tiny


def test_comparison_counts_flips_and_states_the_interval() -> None:
    before = np.array([1.0] * 90 + [0.0] * 10)
    after = before.copy()
    after[:4], after[95:97] = 0.0, 1.0
    found = compare("accuracy", before, after)
    assert (found.right_to_wrong, found.wrong_to_right) == (4, 2)
    assert found.drop == pytest.approx(0.02)
    assert found.interval[0] < 0.02 < found.interval[1]
    assert found.mcnemar_p == pytest.approx(0.6875)  # binomial test of 4 in 6


def test_equal_models_have_no_drop() -> None:
    same = np.array([1.0, 0.0, 1.0])
    assert compare("accuracy", same, same).interval == (0.0, 0.0)


def test_no_flips_among_few_samples_do_not_prove_that_there_are_none() -> None:
    right = np.ones(250)
    low, high = compare("accuracy", right, right.copy()).interval
    assert high == pytest.approx(1.96 * np.sqrt(2 / 252 / 252))  # 1.1 points; the rule of three says 1.2
    assert low == -high


def test_divergence_of_logits_is_their_kl() -> None:
    reference = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]]))
    found = np.log(np.array([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1]]))
    expected = (0.7 * np.log(0.7 / 0.6) + 0.2 * np.log(0.2 / 0.3)) / 2
    assert divergence(reference, found) == pytest.approx(expected)
    assert divergence(reference + 5, reference) == pytest.approx(0, abs=1e-12)


def test_divergence_of_anything_else_is_relative_squared_error() -> None:
    reference = np.ones((2, 3, 4))
    assert divergence(reference, reference * 1.1) == pytest.approx(0.01)


def test_scorer_follows_the_data() -> None:
    graph = tiny()
    x = np.arange(24, dtype=np.float32).reshape(6, 4)

    def run(feeds: dict) -> dict:
        return {"y": feeds["x"][:, :3]}

    labelled = make_scorer(graph, Samples({"x": x}, np.array([2, 2, 2, 2, 2, 0])), run)
    assert isinstance(labelled, TopOne)
    assert labelled(run).tolist() == [1, 1, 1, 1, 1, 0]
    assert isinstance(make_scorer(graph, Samples({"x": x}), run), Cosine)  # every sample is of class 2: agreement shows nothing
    x[0] = x[0, ::-1]
    assert isinstance(make_scorer(graph, Samples({"x": x}), run), Agreement)
    unit = x / np.linalg.norm(x[:, :3], axis=1, keepdims=True) * np.array([1, -1, 1, 1], np.float32)
    similar = make_scorer(graph, Samples({"x": unit}), run)
    assert isinstance(similar, Cosine)
    np.testing.assert_allclose(similar(run), 1)


def test_embeddings_are_no_classifier() -> None:
    rows = np.random.default_rng(0).standard_normal((8, 5))
    assert is_classifier(rows)
    assert not is_classifier(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    assert not is_classifier(rows[:, :1])


def test_labels_the_model_cannot_give_are_an_error() -> None:
    graph, x = tiny(), np.ones((2, 4), np.float32)
    with pytest.raises(DataError, match="label 7 for a model with 3 classes"):
        TopOne(graph, Samples({"x": x}, np.array([0, 7])))(lambda feeds: {"y": feeds["x"][:, :3]})


@pytest.mark.parametrize("result", [np.nan, None, "high", []])
def test_a_scoring_function_must_return_numbers(result: object) -> None:
    with pytest.raises(DataError, match="scoring function mine"):
        UserScore(lambda run: result, "mine")(dict)  # type: ignore[arg-type,return-value]


def test_a_failing_scoring_function_is_named() -> None:
    with pytest.raises(DataError, match="scoring function mine: failed: ZeroDivisionError"):
        UserScore(lambda run: 1 / 0, "mine")(dict)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["nowhere.at.all:score", "math:no_such_function", "math:"])
def test_unknown_scoring_function_is_an_error(text: str) -> None:
    with pytest.raises(UsageError, match="cannot import"):
        user_scorer(text)
