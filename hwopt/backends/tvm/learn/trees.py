"""Boosted trees that are data: evaluated here with numpy, written as JSON, trained by scikit-learn (extra `profile`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hwopt.errors import UsageError

MEMBERS = 2  # of an ensemble, each trained on other rows
TREES, DEPTH, RATE = 150, 4, 0.1  # fewer trees for fewer rows than trees
LEAST_TREES = 60
FAR = 1.5  # nobody knows more than a factor of four and a half less
SHARE = 0.8  # of the rows that one member sees


@dataclass(frozen=True, eq=False)
class Trees:
    """One booster: `nodes` holds (feature, threshold, left, right) of every tree, a leaf has feature -1 and its value instead."""

    base: float
    nodes: tuple[tuple[tuple[float, float, int, int], ...], ...]

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        most = max(len(tree) for tree in self.nodes)
        table = np.zeros((len(self.nodes), most, 4))
        for index, tree in enumerate(self.nodes):
            table[index, : len(tree)] = tree
        return table[..., 0].astype(np.int64), table[..., 1], table[..., 2:].astype(np.int64)

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """A value for every row of features."""
        feature, threshold, children = self._arrays
        trees = np.arange(len(self.nodes))
        at = np.zeros((len(rows), len(trees)), np.int64)
        while True:
            wanted = feature[trees, at]
            inner = wanted >= 0
            if not inner.any():
                return np.asarray(self.base + threshold[trees, at].sum(1))
            values = np.take_along_axis(rows, np.maximum(wanted, 0), 1).astype(np.float32)
            right = (values > threshold[trees, at]).astype(np.int64)
            at = np.where(inner, children[trees, at, right], at)

    def to_data(self) -> dict[str, Any]:
        """Features and values of each tree's nodes; a node's left child is the next one."""
        return {
            "base": self.base,
            "trees": [[[int(node[0]) for node in tree], [node[1] for node in tree]] for tree in self.nodes],
        }

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> Trees:
        """Raises UsageError that names what is wrong."""
        trees = tuple(_tree(tree) for tree in data["trees"])
        if not trees or not all(trees):
            raise UsageError("has an empty tree", place="trees")
        return Trees(float(data["base"]), trees)


def _tree(data: Sequence[Any]) -> tuple[tuple[float, float, int, int], ...]:
    """The nodes with their children: the right one follows the left one's subtree."""
    features, values = [int(one) for one in data[0]], [float(one) for one in data[1]]
    if len(features) != len(values) or not np.isfinite(values).all():
        raise UsageError("has nodes that cannot be", place="trees")
    ends = [0] * len(features)
    for index in reversed(range(len(features))):
        ends[index] = index + 1
        for _ in range(2 if features[index] >= 0 else 0):
            if ends[index] >= len(features):
                raise UsageError("has a node without children", place="trees")
            ends[index] = ends[ends[index]]
    if features and ends[0] != len(features):
        raise UsageError("has nodes that nothing leads to", place="trees")
    return tuple(
        (feature, value, index + 1, ends[index + 1]) if feature >= 0 else (-1, value, 0, 0)
        for index, (feature, value) in enumerate(zip(features, values, strict=True))
    )


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Boosters trained on other rows each. The mean predicts; `spread` of them times `widening` says how sure that is.

    `residual` is the error on rows that a member did not see, so that an interval is never narrower than the noise. Trees are
    flat outside of the features that they saw, from `low` to `high`: beyond them the interval grows with the distance.
    """

    members: tuple[Trees, ...]
    residual: float
    low: tuple[float, ...]
    high: tuple[float, ...]
    widening: float = 1.0

    def predict(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mean, half width of the interval that 90 % of the measurements lie in), in the logarithm."""
        found = np.stack([member.predict(rows) for member in self.members])
        half = self.widening * np.sqrt(found.var(0) + self.residual**2)
        return found.mean(0), half + self._outside(rows)

    def _outside(self, rows: np.ndarray) -> np.ndarray:
        """How far beyond the features that were seen, in their spans."""
        low, high = np.array(self.low), np.array(self.high)
        beyond = np.maximum(np.maximum(rows - high, low - rows), 0)
        return np.minimum((beyond / np.where(high > low, high - low, 1.0)).max(1), FAR)

    def to_data(self) -> dict[str, Any]:
        return {
            "residual": self.residual, "widening": self.widening, "low": list(self.low), "high": list(self.high),
            "members": [member.to_data() for member in self.members],
        }  # fmt: skip

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> Ensemble:
        low, high = (tuple(map(float, data[name])) for name in ("low", "high"))
        members = tuple(Trees.from_data(one) for one in data["members"])
        return Ensemble(members, float(data["residual"]), low, high, float(data["widening"]))


def train(rows: np.ndarray, wanted: np.ndarray, weights: np.ndarray, seed: int = 0, members: int = MEMBERS) -> Ensemble:
    """Boosters for `wanted`, the interval calibrated on the rows that each member did not see."""
    try:
        from sklearn.ensemble import GradientBoostingRegressor
    except ImportError as error:
        raise UsageError("scikit-learn is not installed", place="training", hint='pip install "hwopt[profile]"') from error
    random = np.random.default_rng(seed)
    found, outside = [], np.full((members, len(rows)), np.nan)
    for index in range(members):
        inside = random.random(len(rows)) < SHARE
        booster = GradientBoostingRegressor(
            loss="huber", alpha=0.95, n_estimators=min(TREES, max(LEAST_TREES, len(rows))), max_depth=DEPTH,
            learning_rate=RATE, subsample=0.7, max_features=0.4,
            min_samples_leaf=3, random_state=seed + index,
        )  # fmt: skip
        booster.fit(rows[inside], wanted[inside], weights[inside])
        found.append(from_sklearn(booster))
        outside[index, ~inside] = found[-1].predict(rows[~inside])
    seen = ~np.isnan(outside).all(0)
    counts = np.maximum((~np.isnan(outside)).sum(0), 1)
    missed = np.abs(np.nansum(outside, 0) / counts - wanted)[seen]
    low, high = (tuple(map(float, one)) for one in (rows.min(0), rows.max(0)))
    return _calibrated(Ensemble(tuple(found), float(np.median(missed)) / 0.6745, low, high), rows[seen], missed)


def untrained(rows: np.ndarray, wanted: np.ndarray) -> Ensemble:
    """One that predicts nothing beyond what is known already; its interval holds 90 % of `wanted`."""
    nothing = Trees(0.0, (((-1, 0.0, 0, 0),),))
    low, high = (tuple(map(float, one)) for one in (rows.min(0), rows.max(0)))
    missed = np.abs(wanted)
    return _calibrated(Ensemble((nothing,), max(1e-3, float(np.median(missed)) / 0.6745), low, high), rows, missed)


def _calibrated(ensemble: Ensemble, rows: np.ndarray, error: np.ndarray) -> Ensemble:
    """The widening with which 90 % of the errors lie in the interval (split conformal prediction, Vovk et al. 2005)."""
    _, half = ensemble.predict(rows)
    widening = float(np.quantile(error / np.maximum(half, 1e-9), 0.9))
    return dataclasses.replace(ensemble, widening=widening)


def from_sklearn(booster: Any) -> Trees:
    """The trained trees with the learning rate in their leaves; features are compared as float32, as scikit-learn does."""
    trees = []
    for (estimator,) in booster.estimators_:
        tree = estimator.tree_
        nodes = []
        for index in range(tree.node_count):
            leaf = tree.children_left[index] < 0
            value = booster.learning_rate * tree.value[index, 0, 0] if leaf else tree.threshold[index]
            value = float(f"{value:.5g}" if leaf else f"{value:.7g}")
            left, right = (0, 0) if leaf else (int(tree.children_left[index]), int(tree.children_right[index]))
            nodes.append(
                (-1 if leaf else int(tree.feature[index]), float(f"{value:.5g}" if leaf else f"{value:.7g}"), left, right)
            )
        trees.append(tuple(nodes))
    base = float(booster.init_.predict(np.zeros((1, booster.n_features_in_)))[0])
    return Trees(base, tuple(trees))
