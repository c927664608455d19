"""GPTQ: weights rounded one input after the other, what each rounding spoils is made up for by the inputs still to come.

Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: accurate post-training quantization for generative pre-trained
transformers", ICLR 2023.
"""

from __future__ import annotations

import numpy as np
from scipy import linalg

from hwopt.analysis.covariance import damped
from passes._rounding import round_rows, scales_of

BLOCK = 128  # inputs between two updates of all later ones, as in the paper: one matrix product instead of many vectors
DAMPING = 0.01  # of the mean diagonal, the paper's


def gptq_rows(
    rows: np.ndarray, moment: np.ndarray, bits: int, group: int, *, act_order: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Integers int8 [n, k] and scales float32 [n, k / group] of weights [n, k] under inputs with the second moment [k, k].

    Minimises E||(W - W') x||^2 greedily, always over what is left of an output channel. With `act_order` the strongest inputs
    come first, in the groups that they have in storage, whose scales are then those of the weights as they were; otherwise a
    group's scales are found when its turn comes, from the weights as they are by then.
    """
    inputs = rows.shape[1]
    squares = np.maximum(np.diag(moment), 0)
    order = np.argsort(-squares, kind="stable") if act_order else np.arange(inputs)
    upper = _inverse_factor(damped(moment, DAMPING)[np.ix_(order, order)])
    weights = rows.astype(np.float64)[:, order]
    scales = scales_of(rows, bits, group, squares)
    steps = np.empty(rows.shape, np.int8)
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        errors = np.zeros((len(rows), stop - start))
        for index in range(start, stop):
            column = int(order[index])
            if not act_order and index % group == 0 and index:  # the first group is as it was
                ahead = _caught_up(weights, errors, upper, start, stop, index, group)
                scales[:, index // group] = scales_of(ahead, bits, group, squares[index : index + group])[:, 0]
            scale = scales[:, column // group]
            steps[:, column] = round_rows(weights[:, index], scale, bits)
            error = (weights[:, index] - steps[:, column] * scale.astype(np.float64)) / upper[index, index]
            weights[:, index + 1 : stop] -= np.outer(error, upper[index, index + 1 : stop])
            errors[:, index - start] = error
        weights[:, stop:] -= errors @ upper[start:stop, stop:]
    return steps, scales


def _inverse_factor(moment: np.ndarray) -> np.ndarray:
    """U, upper triangular, with U^T U = moment^-1: row i is what rounding input i asks of the later ones."""
    inverse = linalg.cho_solve(linalg.cho_factor(moment, lower=True), np.eye(len(moment)))
    factor: np.ndarray = linalg.cholesky((inverse + inverse.T) / 2, lower=False)
    return factor


def _caught_up(
    weights: np.ndarray, errors: np.ndarray, upper: np.ndarray, start: int, stop: int, index: int, group: int
) -> np.ndarray:
    """The weights of the group at `index` after all roundings so far, also where the block's update is still to come."""
    ahead = weights[:, index : index + group].copy()
    if index + group > stop:
        inside = max(stop - index, 0)
        ahead[:, inside:] -= errors[:, : index - start] @ upper[start:index, stop : index + group]
    return ahead.astype(np.float32)
