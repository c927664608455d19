"""Optimal one-dimensional k-means: dynamic programming over a histogram, then Lloyd's steps on the values themselves.

In one dimension clusters are intervals, so D_k(i) = min_j D_(k-1)(j) + cost(j, i) is exact (Wang and Song 2011, Ckmeans.1d.dp).
The best j grows with i, so half of the i bound the search of the other half: O(k n log n), no randomness.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CELLS = 2048  # of the histogram; with fewer distinct values than this, the result is the optimum itself
LLOYD_STEPS = 50


def optimal_codebook(values: np.ndarray, weights: np.ndarray | None, size: int, cells: int = CELLS) -> np.ndarray:
    """At most `size` ascending float64 numbers with the least sum of weights * (value - nearest number)^2."""
    points = _sorted(values, weights)
    distinct = np.flatnonzero(np.diff(points.values, prepend=-np.inf))
    if len(distinct) <= size:
        return points.values[distinct] + points.origin
    starts = np.append(distinct if len(distinct) <= cells else _histogram(points, cells), len(points.values))
    chosen = starts[_best_cuts(points.sums[:, starts], size)]
    return _lloyd(points, chosen) + points.origin


def nearest(values: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Index of the nearest entry of an ascending codebook for each value (of two equally near ones the lower), uint8."""
    entries = codebook.astype(np.float64)
    return np.searchsorted((entries[1:] + entries[:-1]) / 2, values, side="left").astype(np.uint8)


@dataclass(frozen=True, eq=False)
class Points:
    """Ascending values less `origin`, and the running sums [3, n + 1] of weight, weight * value, weight * value^2."""

    values: np.ndarray
    sums: np.ndarray
    origin: float


def _sorted(values: np.ndarray, weights: np.ndarray | None) -> Points:
    flat = values.ravel()  # sorted in its own precision: twice as fast
    origin = float(flat.mean(dtype=np.float64))  # sums of squares around the mean lose no digits
    if weights is None:
        ordered, weight = np.sort(flat).astype(np.float64) - origin, np.ones(flat.size)
    else:
        order = np.argsort(flat, kind="stable")
        ordered, weight = flat[order].astype(np.float64) - origin, weights.ravel()[order].astype(np.float64)
        mean = weight.mean()
        weight = np.maximum(weight / mean, 1e-6) if mean > 0 else np.ones(flat.size)
    terms = np.stack([weight, weight * ordered, weight * ordered * ordered])
    return Points(ordered, np.concatenate([np.zeros((3, 1)), np.cumsum(terms, axis=1)], axis=1), origin)


def _histogram(points: Points, cells: int) -> np.ndarray:
    """First index of each cell: half of the cells equally wide, for the tails, half equally full, for the bulk."""
    low, high = points.values[0], points.values[-1]
    wide = np.searchsorted(points.values, np.linspace(low, high, cells // 2, endpoint=False))
    full = np.linspace(0, len(points.values), cells // 2, endpoint=False).astype(np.int64)
    return np.union1d(wide, full)


def _best_cuts(sums: np.ndarray, clusters: int) -> np.ndarray:
    """Which of the n + 1 cell borders bound the optimal clusters: `clusters` + 1 ascending numbers from 0 to n."""
    count = sums.shape[1] - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        best = np.nan_to_num(_cost(sums, np.zeros(count + 1, np.int64), np.arange(count + 1)))
    cuts = []
    for _ in range(1, clusters):
        best, cut = _one_more(sums, best)
        cuts.append(cut)
    border = [count]
    for cut in reversed(cuts):
        border.append(int(cut[border[-1]]))
    return np.array([0, *reversed(border)])


def _one_more(sums: np.ndarray, best: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From the least costs of cells 0..i with k clusters those with k + 1, and where the last of these begins."""
    count = len(best) - 1
    after, cut = np.zeros(count + 1), np.zeros(count + 1, np.int64)
    step = 1 << (count.bit_length() - 1)
    while step:
        ends = np.arange(step, count + 1, 2 * step)  # their neighbours, a step away on each side, are known by now
        lows = cut[ends - step]
        beyond = np.minimum(ends + step, count)
        highs = np.where(ends + step <= count, np.minimum(cut[beyond], ends - 1), ends - 1)
        lengths = highs - lows + 1
        first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        begins = np.arange(lengths.sum()) + np.repeat(lows - first, lengths)
        costs = best[begins] + _cost(sums, begins, np.repeat(ends, lengths))
        after[ends] = np.minimum.reduceat(costs, first)
        ties = np.flatnonzero(costs == np.repeat(after[ends], lengths))
        cut[ends] = begins[ties[np.searchsorted(ties, first)]]
        step >>= 1
    return after, cut


def _cost(sums: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Weighted squared distance to their mean of the values between two borders."""
    weight, first, second = sums[:, ends] - sums[:, begins]
    return np.maximum(second - first * first / weight, 0.0)


def _lloyd(points: Points, borders: np.ndarray) -> np.ndarray:
    """Means of the clusters, borders moved to the middle between means until nothing moves; the error never grows."""
    weight, first, _ = np.diff(points.sums[:, borders], axis=1)
    means = first / weight
    for _ in range(LLOYD_STEPS):
        inner = np.searchsorted(points.values, (means[1:] + means[:-1]) / 2, side="right")
        moved = np.concatenate([[0], inner, [len(points.values)]])
        if np.array_equal(moved, borders):
            break
        weight, first, _ = np.diff(points.sums[:, moved], axis=1)
        means, borders = np.where(weight > 0, first / np.where(weight > 0, weight, 1.0), means), moved
    return np.sort(means)
