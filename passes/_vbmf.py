"""How many directions of a matrix are signal: variational Bayesian matrix factorization, its global solution in closed form.

Nakajima, Sugiyama, Babacan and Tomioka, "Global analytic solution of fully-observed variational Bayesian matrix
factorization", JMLR 14, 2013: theorem 2 (the threshold of singular values) and corollary 3 with theorem 9 (the noise).
"""

from __future__ import annotations

import numpy as np
from scipy import linalg, optimize

THRESHOLD = 2.5129  # of theorem 2: tau = this * sqrt(alpha) approximates its root within a percent


def vbmf_rank(matrix: np.ndarray) -> int:
    """The rank of the factorization [n, m] = signal + noise whose noise is estimated too; 0 if all is noise."""
    short, long = sorted(matrix.shape)
    squares = np.maximum(_squared_values(matrix.astype(np.float64)), 0) / long
    alpha = short / long
    tau = THRESHOLD * np.sqrt(alpha)
    border = (1 + tau) * (1 + alpha / tau)
    if not squares.any() or short < 2:
        return int(squares.any())
    variance = _variance(squares, alpha, border)
    return int((squares > variance * border).sum())


def _squared_values(matrix: np.ndarray) -> np.ndarray:
    """Squares of the singular values, largest first, by the smaller of both products: much faster."""
    product = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    found: np.ndarray = linalg.eigvalsh(product, check_finite=False)[::-1]
    return found


def _variance(squares: np.ndarray, alpha: float, border: float) -> float:
    """Of the noise: the minimum of the free energy, between the bounds of theorem 9."""
    most = min(int(np.ceil(len(squares) / (1 + alpha))) - 1, len(squares) - 1)
    low = max(float(squares[most] / border), float(squares[most:].mean()))
    high = float(squares.mean())
    if low <= 0 or low >= high:  # of exactly low rank, or nothing but noise
        return max(low, float(np.finfo(np.float64).eps) * high)
    return float(optimize.minimize_scalar(_free_energy, args=(squares, alpha, border), bounds=(low, high), method="bounded").x)


def _free_energy(variance: float, squares: np.ndarray, alpha: float, border: float) -> float:
    x = np.maximum(squares / variance, 1e-300)
    noise, signal = x[x <= border], x[x > border]
    tau = 0.5 * (signal - (1 + alpha) + np.sqrt(np.maximum((signal - (1 + alpha)) ** 2 - 4 * alpha, 0)))
    inside = float((noise - np.log(noise)).sum())
    return inside + float((signal - tau + np.log((tau + 1) / signal) + alpha * np.log(tau / alpha + 1)).sum())
