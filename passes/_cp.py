"""CP decomposition of convolutions, W[o, c, t] = sum_r A[o, r] B[c, r] C[t, r], without degenerate terms.

Lebedev et al., "Speeding-up convolutional neural networks using fine-tuned CP-decomposition", ICLR 2015. Alternating least
squares lets large terms of opposite signs cancel: tiny changes, as of quantization or training, then ruin the sum. Error-
preserving correction (Phan et al., "Stable low-rank tensor decomposition for compression of convolutional neural network",
ECCV 2020) looks, among the factors with no larger error, for those with the least sensitivity.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from hwopt.analysis.memo import remembered
from hwopt.ir import frozen
from passes._factors import leading, whitened

SWEEPS, SETTLED = 60, 1e-5  # of least squares, and the relative gain at which they end
CORRECTIONS = 20  # sweeps of the correction
BISECTIONS = 40
Triple = tuple[np.ndarray, np.ndarray, np.ndarray]


@remembered
def cp_factors(weight: np.ndarray, moment: np.ndarray | None, damping: float, rank: int) -> Triple:
    """Inner [rank, c], core [rank, taps], outer [o, rank] of weights [o, c, taps], float32, all terms evenly split.

    With the second moment of the inputs S = L L^T, the weights are W x_c L^T on the way, so that the output's error counts.
    """
    changed, lower = whitened(weight, moment, damping)
    factors = corrected(changed, least_squares(changed, rank))
    outer, inner, core = factors
    if lower is not None:
        inner = scipy.linalg.solve_triangular(lower, inner, lower=True, trans="T")
    sizes = [np.maximum(np.linalg.norm(one, axis=0), 1e-30) for one in (outer, inner, core)]
    even = np.prod(sizes, axis=0) ** (1 / 3)
    outer, inner, core = (one / size * even for one, size in zip((outer, inner, core), sizes, strict=True))
    return frozen(inner.T.astype(np.float32)), frozen(core.T.astype(np.float32)), frozen(outer.astype(np.float32))


def least_squares(tensor: np.ndarray, rank: int) -> Triple:
    """A, B, C by alternating least squares from the strongest directions of every axis."""
    random = np.random.default_rng(0)
    factors = [_start(np.moveaxis(tensor, axis, 0), rank, random) for axis in range(3)]
    size, before = float(np.square(tensor).sum()), np.inf
    for _ in range(SWEEPS):
        for axis in range(3):
            product, gram = _normal(tensor, factors, axis)
            ridge = 1e-9 * np.trace(gram) / rank * np.eye(rank)
            factors[axis] = np.linalg.solve(gram + ridge, product.T).T
        error = _error(size, factors, product, gram)
        if before - error < SETTLED * size:
            break
        before = error
    return factors[0], factors[1], factors[2]


def _start(unfolded: np.ndarray, rank: int, random: np.random.Generator) -> np.ndarray:
    """Left singular vectors, and random columns where the rank is larger than the axis."""
    length = len(unfolded)
    known = leading(unfolded, min(rank, length))
    return np.concatenate([known, random.standard_normal((length, rank - known.shape[1])) / np.sqrt(length)], axis=1)


def _normal(tensor: np.ndarray, factors: list[np.ndarray], axis: int) -> tuple[np.ndarray, np.ndarray]:
    """The normal equations of one factor, X gram = product: the tensor times the others, and the others' Gram matrix."""
    one, other = (factors[i] for i in range(3) if i != axis)
    part = np.moveaxis(tensor, axis, 0)
    product = np.einsum("xyr,yr->xr", part.transpose(0, 2, 1) @ one, other)
    return product, (one.T @ one) * (other.T @ other)


def _error(size: float, factors: list[np.ndarray], product: np.ndarray, gram: np.ndarray) -> float:
    """Squared, from the normal equations of the last axis."""
    last = factors[2]
    return max(size - 2 * float((last * product).sum()) + float(((last @ gram) * last).sum()), 0.0)


def sensitivity(factors: Triple) -> float:
    """E||change of the tensor||^2 for small independent changes of all factors' entries, per variance (Phan 2020, eq. 4)."""
    squares = [np.square(one).sum(0) for one in factors]
    return float(sum(len(factors[i]) * (squares[(i + 1) % 3] * squares[(i + 2) % 3]).sum() for i in range(3)))


def corrected(tensor: np.ndarray, factors: Triple) -> Triple:
    """Factors with no larger error and the least sensitivity: each in turn, the others fixed, which is convex."""
    found, size = list(factors), float(np.square(tensor).sum())
    product, gram = _normal(tensor, found, 2)
    bound = _error(size, found, product, gram) + 1e-9 * size
    for _ in range(CORRECTIONS):
        for axis in range(3):
            product, gram = _normal(tensor, found, axis)
            others = [i for i in range(3) if i != axis]
            squares = {i: np.square(found[i]).sum(0) for i in others}
            costs = sum(len(found[i]) * squares[j] for i, j in (others, others[::-1]))
            found[axis] = _smallest(product, gram, np.maximum(costs, 1e-30), size, bound)
    return found[0], found[1], found[2]


def _smallest(product: np.ndarray, gram: np.ndarray, costs: np.ndarray, size: float, bound: float) -> np.ndarray:
    """X with the least sum of costs_r |x_r|^2 whose error size - 2 <X, product> + <X gram, X> stays within the bound.

    X = product (gram + mu diag(costs))^-1 with the largest mu that does: the error grows with mu, so it is bisected.
    """
    root = np.sqrt(costs)
    values, vectors = scipy.linalg.eigh(gram / root[:, None] / root, check_finite=False)
    values, turned = np.maximum(values, 0), (product / root) @ vectors
    energy = np.square(turned).sum(0)

    def error(mu: float) -> float:
        share = 1 / (values + mu)
        return size - float((energy * (2 * share - values * share**2)).sum())

    low, high = 1e-15 * values.max(), 1e3 * values.max()
    for _ in range(BISECTIONS):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if error(middle) <= bound else (low, middle)
    return (turned / (values + low)) @ vectors.T / root
