"""Codebooks of vectors: Lloyd's k-means in a few dimensions, in which every coordinate has a weight of its own.

Gray, "Vector quantization", 1984; for networks Stock et al., "And the bit goes down", ICLR 2020: errors count by the inputs.
"""

from __future__ import annotations

import numpy as np

STEPS, SETTLED = 30, 1e-4  # of Lloyd, and the relative gain at which they end
CHUNK = 2**15  # vectors whose distances are looked at together


def vector_codebook(vectors: np.ndarray, weights: np.ndarray | None, size: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `size` vectors [size, d] and the index of each of [n, d], with the least sum of weights * (x - c)^2 that is found.

    Starts from equal shares along the direction in which the vectors differ most: no randomness.
    """
    points = vectors.astype(np.float64)
    counts = np.ones_like(points) if weights is None else np.maximum(weights / max(weights.mean(), 1e-300), 1e-6)
    book = _start(points, size)
    before = np.inf
    for _ in range(STEPS):
        indices, error = _assigned(points, counts, book)
        if before - error <= SETTLED * error:
            break
        before = error
        book = _means(points, counts, indices, book)
    return book, _assigned(points, counts, book)[0]


def _start(points: np.ndarray, size: int) -> np.ndarray:
    """Means of shares of equal size: halved again and again across the widest coordinate."""
    shares = [np.arange(len(points))]
    widths = [_width(points)]  # of each share
    while len(shares) < size:
        widest = int(np.argmax(widths))
        if widths.pop(widest) <= 0:
            break
        share = shares.pop(widest)
        order = share[np.argsort(points[share, points[share].std(0).argmax()], kind="stable")]
        halves = [order[: len(order) // 2], order[len(order) // 2 :]]
        shares += halves
        widths += [_width(points[half]) for half in halves]
    found = np.array([points[share].mean(0) for share in shares])
    return np.concatenate([found, np.repeat(found[-1:], size - len(found), axis=0)])


def _width(points: np.ndarray) -> float:
    """How much the points differ along one axis, times their number; below zero where nothing can be halved."""
    return float(points.std(0).max() * len(points)) if len(points) > 1 else -1.0


def _assigned(points: np.ndarray, counts: np.ndarray, book: np.ndarray) -> tuple[np.ndarray, float]:
    """The nearest entry of each point, and the summed error."""
    indices, error = np.zeros(len(points), np.int64), 0.0
    for first in range(0, len(points), CHUNK):
        rows = slice(first, first + CHUNK)
        weighted = counts[rows] * points[rows]
        distances = counts[rows] @ np.square(book).T - 2 * weighted @ book.T
        indices[rows] = distances.argmin(1)
        nearest = np.take_along_axis(distances, indices[rows, None], 1).sum()
        error += max(float(nearest + (weighted * points[rows]).sum()), 0.0)
    return indices, error


def _means(points: np.ndarray, counts: np.ndarray, indices: np.ndarray, book: np.ndarray) -> np.ndarray:
    """Of the points of each entry; an entry without points stays."""
    moved = book.copy()
    for axis in range(points.shape[1]):
        total = np.bincount(indices, counts[:, axis], len(book))
        summed = np.bincount(indices, counts[:, axis] * points[:, axis], len(book))
        moved[:, axis] = np.where(total > 0, summed / np.where(total > 0, total, 1.0), book[:, axis])
    return moved
