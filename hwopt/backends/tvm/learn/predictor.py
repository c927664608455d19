"""Kernel -> seconds with an interval: counts weighed by what was measured, and boosted trees for what the weights leave over.

One predictor for each family of kernels and number of threads: what makes a softmax slow says nothing about a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hwopt.backends.tvm.learn.counted import Counted
from hwopt.backends.tvm.learn.trees import MEMBERS, Ensemble, train, untrained
from hwopt.errors import UsageError

TURNS = 8  # of robust regression
SMALL = 0.03  # relative error that counts as none in it
RESOLUTION = 20e-9  # seconds that a clock is read to, about
SLOWEST_LINE = 20e-9  # seconds of a cache line of data, of which many lie in a row
LINES = {f"{name}{level}" for name in ("read", "write", "weights", "through") for level in ("", "_second", "_third", "_memory")}
LEAST = 12  # kernels from which a family is learned
PLAIN = ("moves", "transposed", "turned")  # each does something else: trees that saw a few dozen mislead, the counts do not


def family_of(counted: Counted, threads: int) -> str:
    return f"{counted.family} x{threads}"


@dataclass(frozen=True, eq=False)
class Family:
    """`times` and `shape` name the counts and facts; `weights` are seconds for each count."""

    times: tuple[str, ...]
    shape: tuple[str, ...]
    weights: tuple[float, ...]
    ensemble: Ensemble

    def guess(self, times: np.ndarray) -> np.ndarray:
        """Seconds by the weights alone, for rows of counts."""
        return np.asarray(np.maximum(times @ np.array(self.weights), 1e-9))

    def predict(self, found: Sequence[Counted]) -> tuple[np.ndarray, np.ndarray]:
        """(log seconds, half width of the interval in it)."""
        times, shape = values_of(found)
        guess = self.guess(times)
        more, half = self.ensemble.predict(features(times, shape, self.weights))
        return np.log(guess) + more, half

    def to_data(self) -> dict[str, Any]:
        """Names stay in their order, also where keys are sorted."""
        times = [[name, weight] for name, weight in zip(self.times, self.weights, strict=True)]
        return {"times": times, "shape": list(self.shape), "trees": self.ensemble.to_data()}

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> Family:
        times = {str(name): float(value) for name, value in data["times"]}
        if not times or not all(math.isfinite(value) and value >= 0 for value in times.values()):
            raise UsageError("has weights that are no times", place="times")
        ensemble = Ensemble.from_data(data["trees"])
        if len(ensemble.low) != len(times) + len(data["shape"]) + 1:
            raise UsageError("has trees over other features", place="trees")
        return Family(tuple(times), tuple(map(str, data["shape"])), tuple(times.values()), ensemble)


@dataclass(frozen=True, eq=False)
class Predictor:
    """The families that were measured."""

    families: Mapping[str, Family] = field(default_factory=dict)

    def knows(self, counted: Counted, threads: int) -> bool:
        """False for a family that was not measured, or whose counts were others."""
        found = self.families.get(family_of(counted, threads))
        return found is not None and found.times == tuple(counted.times) and found.shape == tuple(counted.shape)

    def predict(self, counted: Counted, threads: int) -> tuple[float, float]:
        """(log seconds, half width) of one kernel that it knows."""
        mean, half = self.families[family_of(counted, threads)].predict([counted])
        return float(mean[0]), float(half[0])

    def to_data(self) -> dict[str, Any]:
        return {name: family.to_data() for name, family in sorted(self.families.items())}

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> Predictor:
        """Raises UsageError that names what is wrong."""
        return Predictor({str(name): Family.from_data(family) for name, family in data.items()})


def values_of(found: Sequence[Counted]) -> tuple[np.ndarray, np.ndarray]:
    """Counts and facts by row."""
    return np.array([list(one.times.values()) for one in found]), np.array([list(one.shape.values()) for one in found])


def features(times: np.ndarray, shape: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """What the trees see: which share of the guess each count is, the facts, and the guess itself."""
    parts = times * np.array(weights)
    guess = np.maximum(parts.sum(1), 1e-9)
    return np.hstack([parts / guess[:, None], shape, np.log(guess)[:, None]])


def fitted(
    found: Sequence[Counted],
    threads: Sequence[int],
    seconds: np.ndarray,
    noise: np.ndarray,
    members: int = MEMBERS,
    seed: int = 0,
) -> Predictor:
    """A predictor for kernels that took so many seconds, each family from its own; those with few are left out."""
    places: dict[str, list[int]] = {}
    for index, (one, count) in enumerate(zip(found, threads, strict=True)):
        places.setdefault(family_of(one, count), []).append(index)
    return Predictor({
        name: _family([found[index] for index in some], seconds[some], noise[some], members, seed)
        for name, some in sorted(places.items()) if len(some) >= LEAST
    })  # fmt: skip


def _family(found: Sequence[Counted], seconds: np.ndarray, noise: np.ndarray, members: int, seed: int) -> Family:
    times, shape = values_of(found)
    weights = weighed(times, seconds, most_of(found[0].times))
    rows = features(times, shape, weights.tolist())
    wanted = np.log(seconds / np.maximum(times @ weights, 1e-9))
    if found[0].family in PLAIN:
        ensemble = untrained(rows, wanted)
    else:
        ensemble = train(rows, wanted, 1 / (SMALL + noise + RESOLUTION / seconds), seed, members)
    return Family(tuple(found[0].times), tuple(found[0].shape), tuple(float(f"{one:.6g}") for one in weights), ensemble)


def most_of(names: Iterable[str]) -> np.ndarray:
    """What each count can cost at all: few kernels may read from memory, and what made one of them slow must not be the lines."""
    return np.array([SLOWEST_LINE if name in LINES else np.inf for name in names])


def weighed(times: np.ndarray, seconds: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Weights from 0 to `most` with the least relative error, outliers counting less (iteratively reweighted)."""
    rows, wanted = times / seconds[:, None], np.ones(len(seconds))
    sure = SMALL / (SMALL + RESOLUTION / seconds)
    emphasis, found = sure, np.zeros(times.shape[1])
    for _ in range(TURNS):
        found = _bounded(rows * emphasis[:, None], wanted * emphasis, most)
        emphasis = sure / np.sqrt(np.maximum(np.abs(rows @ found - 1), SMALL))
    return found


def _bounded(rows: np.ndarray, wanted: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Least squares (Lawson and Hanson's NNLS); what comes out above its bound is set to it, and the rest solved again."""
    from scipy.optimize import nnls

    found, bound = np.zeros(len(most)), np.zeros(len(most), bool)
    while not bound.all():
        found[~bound], _ = nnls(rows[:, ~bound], wanted - rows[:, bound] @ most[bound])
        above = found > most
        if not above.any():
            break
        bound |= above
        found[bound] = most[bound]
    return found
