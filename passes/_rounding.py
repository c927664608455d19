"""Rounding a matrix of weights to integers: scales that minimise the error, and the one place that decides how to round."""

from __future__ import annotations

import numpy as np

SHRINK = np.linspace(1.0, 0.7, 16)  # of the scale that loses nothing: clipping few large weights serves the many small ones
TINY = float(np.finfo(np.float32).tiny)


def scales_of(rows: np.ndarray, bits: int, group: int, squares: np.ndarray | None = None) -> np.ndarray:
    """Scales float32 [n, k / group] of weights [n, k] whose steps lie in [-2^(bits-1) + 1, 2^(bits-1) - 1].

    Below 8 bits the best of 16 clippings by the squared error, in which an input counts by its mean square (`squares` [k]).
    """
    limit = 2 ** (bits - 1) - 1
    blocks = rows.reshape(len(rows), -1, group)
    largest = np.maximum(np.abs(blocks).max(2) / limit, TINY).astype(np.float32)
    if bits >= 8:
        return largest
    weights = np.ones(blocks.shape[1:], np.float32) if squares is None else squares.reshape(blocks.shape[1:]).astype(np.float32)
    best, least = largest, np.full(largest.shape, np.inf, np.float32)
    for share in SHRINK:
        scale = largest * np.float32(share)
        steps = np.clip(np.rint(blocks / scale[:, :, None]), -limit, limit)
        error = ((steps * scale[:, :, None] - blocks) ** 2 * weights).sum(2)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return np.maximum(best, TINY)


def round_rows(rows: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """Integers int8 [n, k] for weights [n, k] in steps of `scales` [n, k].

    To the nearest; what looks at the covariance [k, k] of the inputs (GPTQ, AdaRound) belongs here.
    """
    limit = 2 ** (bits - 1) - 1
    return np.clip(np.rint(rows / scales), -limit, limit).astype(np.int8)
