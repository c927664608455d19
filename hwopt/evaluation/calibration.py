"""Whether a classifier is as sure as it is right: the expected calibration error, with its bins.

Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017): answers are sorted by confidence into bins of equal width;
the error is the mean over the bins, weighted by their counts, of |accuracy - confidence|.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hwopt.evaluate import are_chances, log_softmax

BINS = 15  # of Guo et al.
RESAMPLES = 500  # of the paired bootstrap


def calibration_data(logits: tuple[np.ndarray, np.ndarray], labels: np.ndarray, seed: int, bins: int = BINS) -> dict[str, Any]:
    """Both models' calibration for report.json, and what changed, with a 95 % interval by a paired bootstrap over samples."""
    logs = [log_softmax(one, are_chances(logits[0])) for one in logits]
    sides = [_sure_and_right(one, labels) for one in logs]
    told = {name: _side(*side, one, labels, bins) for name, side, one in zip(("float", "compressed"), sides, logs, strict=True)}
    random, count = np.random.default_rng([seed, 17]), len(labels)
    changes = []
    for _ in range(RESAMPLES):
        rows = random.integers(0, count, count)
        before, after = (expected_error(sure[rows], right[rows], bins) for sure, right in sides)
        changes.append(after - before)
    low, high = np.percentile(changes, (2.5, 97.5))
    change = told["compressed"]["ece"] - told["float"]["ece"]
    return {"bins": bins, **told, "ece_change": change, "ece_change_interval": (float(low), float(high))}


def _sure_and_right(logs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The confidence of each answer, and 1 where it is right."""
    chances = np.exp(logs)
    return chances.max(1), (chances.argmax(1) == labels).astype(np.float64)


def bin_table(sure: np.ndarray, right: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[bins] each: how many answers, the mean confidence, the accuracy; zeros in empty bins. Bin i is (i, i + 1] / bins."""
    place = np.clip(np.ceil(sure * bins).astype(np.int64) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    sums = (np.bincount(place, weights, bins) / np.maximum(count, 1) for weights in (sure, right))
    confidence, accuracy = sums
    return count, confidence, accuracy


def expected_error(sure: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """The expected calibration error of confidences and hits, [samples] each."""
    count, confidence, accuracy = bin_table(sure, right, bins)
    return float((count * np.abs(accuracy - confidence)).sum() / max(count.sum(), 1))


def _side(sure: np.ndarray, right: np.ndarray, logs: np.ndarray, labels: np.ndarray, bins: int) -> dict[str, Any]:
    count, confidence, accuracy = bin_table(sure, right, bins)
    chosen = logs[np.arange(len(labels)), labels]
    rows = [
        {"low": place / bins, "high": (place + 1) / bins, "samples": int(n), "confidence": float(c), "accuracy": float(a)}
        for place, (n, c, a) in enumerate(zip(count, confidence, accuracy, strict=True))
        if n
    ]
    return {
        "ece": expected_error(sure, right, bins),
        "mean_confidence": float(sure.mean()),
        "accuracy": float(right.mean()),
        "negative_log_likelihood": float(-chosen.mean()),
        "bins": rows,
    }
