"""Weights whose products with bytes add up in 16 bits: the rule, and rounding that keeps to it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwopt.analysis.narrow import NARROW, fits, fitted, pairs_that_fit
from hwopt.ir import Node
from passes._pairs import paired

LAYERS = {
    "conv": (Node("Conv", ("x", "w"), ("y",), "layer", {"dilations": [1, 1], "group": 1}), (6, 9, 3, 3)),
    "groups": (Node("Conv", ("x", "w"), ("y",), "layer", {"group": 2}), (6, 10, 3, 3)),
    "dilated": (Node("Conv", ("x", "w"), ("y",), "layer", {"dilations": [2, 2]}), (6, 8, 3, 3)),
    "row": (Node("Conv", ("x", "w"), ("y",), "layer", {}), (6, 5, 7)),
    "matmul": (Node("MatMul", ("x", "w"), ("y",), "layer", {}), (50, 7)),
    "gemm": (Node("Gemm", ("x", "w"), ("y",), "layer", {"transB": 1}), (7, 50)),
}


def level(node: Node, steps: np.ndarray) -> int:
    turned = steps.T if node.attr("transB", 0) else steps
    return pairs_that_fit(turned, node.attr("group", 1), (node.attr("dilations") or [1])[-1])


def normal(shape: tuple[int, ...], seed: int, spread: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape) * spread


@pytest.mark.parametrize("kind", LAYERS)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), spread=st.floats(5, 60))
def test_weights_that_are_made_to_fit_do_and_become_smaller_only(kind: str, seed: int, spread: float) -> None:
    node, shape = LAYERS[kind]
    weights = np.clip(normal(shape, seed, spread), -NARROW, NARROW)
    steps = np.rint(weights).astype(np.int8)
    found = fitted(weights, steps, node)
    assert fits(found, node) and level(node, found) == 2
    assert (np.abs(found.astype(int)) <= np.abs(steps.astype(int))).all()
    assert not fits(steps, node) or np.array_equal(found, steps)


def test_a_few_large_weights_that_meet_become_smaller_and_all_others_stay() -> None:
    node, shape = LAYERS["conv"]
    small = np.random.default_rng(0).integers(-20, 21, shape)
    rows = small.transpose(0, 2, 3, 1).reshape(6, 3, 27).copy()  # channels last, the taps of a row are neighbours
    rows[2, 1, [8, 9, 12, 13]] = 33  # the first pairs of two words that meet
    steps = np.ascontiguousarray(rows.reshape(6, 3, 3, 9).transpose(0, 3, 1, 2)).astype(np.int8)
    found = fitted(steps + 0.4, steps, node)
    assert level(node, steps) == 1 and level(node, found) == 2
    assert (steps[found != steps] == 33).all() and found.astype(int).sum() == steps.astype(int).sum() - 4


@pytest.mark.parametrize(
    ("kind", "axis", "whole"),
    [(kind, 1 if kind == "matmul" else 0, False) for kind in LAYERS] + [("matmul", 1, True), ("gemm", 0, True)],
)
def test_quantized_weights_fit_at_nearly_the_error_of_rounding(kind: str, axis: int, whole: bool) -> None:
    node, shape = LAYERS[kind]
    weights = normal(shape, 1).astype(np.float32)
    others = tuple(index for index in range(len(shape)) if index != axis)
    scale = (np.abs(weights).max(axis=None if whole else others) / NARROW).astype(np.float32)
    along = scale if whole else np.expand_dims(scale, others)
    steps, sizes = paired(weights, scale, None if whole else axis, node)
    wide = sizes if whole else np.expand_dims(sizes, others)
    plain = np.square(np.rint(weights / along) * along - weights).sum()
    assert fits(steps, node) and steps.dtype == np.int8 and sizes.shape == scale.shape
    assert np.square(steps * wide - weights).sum() <= 1.25 * plain


def test_weights_for_which_fitting_costs_more_than_speed_is_worth_are_rounded_only() -> None:
    node, shape = LAYERS["matmul"]
    draw = np.random.default_rng(0)
    weights = (draw.choice([-1.0, 1.0], shape) * draw.uniform(0.8, 1, shape)).astype(np.float32)
    scale = (np.abs(weights).max(0) / NARROW).astype(np.float32)
    steps, sizes = paired(weights, scale, 1, node)
    assert level(node, steps) == 1 and np.array_equal(sizes, scale)


def test_weights_beyond_the_range_of_pairs_have_no_such_sums() -> None:
    assert pairs_that_fit(np.full((8, 3), NARROW + 1, np.int8)) == 0
    assert pairs_that_fit(np.full((8, 3), NARROW, np.int8)) == 1
    assert pairs_that_fit(np.full((8, 3), NARROW // 2, np.int8)) == 2
