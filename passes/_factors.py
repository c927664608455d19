"""The numerics of low-rank: truncated SVD and Tucker-2, plain or weighted by the second moment of the layer's input."""

from __future__ import annotations

import numpy as np
import scipy.linalg

from hwopt.analysis.covariance import damped
from hwopt.analysis.memo import remembered
from hwopt.ir import frozen

Factors = tuple[np.ndarray, np.ndarray]
SWEEPS = 4  # alternating updates after the HOSVD start; the fit moves by less than 0.1 % afterwards on real convolutions


@remembered
def svd_factors(weight: np.ndarray, moment: np.ndarray | None, damping: float) -> Factors:
    """U [k, r], V [r, n] for every r at once: the first r columns and rows minimise E||x (W - U V)||^2, float32.

    With S = L L^T the moment, the optimum truncates the SVD of L^T W = P D Q^T. Mapped back by L^-T it is (W Q_r) Q_r^T: no
    inverse is needed. `weight` is [k, n]. The scale is split evenly, so that neither factor is hard to quantize.
    """
    weight64 = weight.astype(np.float64)
    whitened = weight64 if moment is None else np.linalg.cholesky(damped(moment, damping)).T @ weight64
    _, values, right = scipy.linalg.svd(whitened, full_matrices=False, check_finite=False)
    right = _signed(right)
    split = np.sqrt(np.maximum(values, np.finfo(np.float32).tiny))[:, None]
    left = weight64 @ (right / split).T
    left[:, values <= np.finfo(np.float64).eps * values.max(initial=0.0)] = 0.0
    return frozen(left.astype(np.float32)), frozen((right * split).astype(np.float32))


@remembered
def tucker_factors(
    weight: np.ndarray, moment: np.ndarray | None, damping: float, rank_in: int, rank_out: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inner [rank_in, c], core [rank_out, rank_in, taps], outer [o, rank_out] of weights [o, c, taps], float32.

    Tucker-2 by higher-order orthogonal iteration (De Lathauwer 2000; Kim et al. 2016) of the weights whitened along the input
    channels: W' = W x_c L^T. Orthogonal bases A, B of W' give outer = A, core = A^T W' B, inner = B^T L^-1.
    """
    changed, lower = whitened(weight, moment, damping)
    basis_out, basis_in = _hosvd(weight, moment, damping)
    a, b = basis_out[:, :rank_out], basis_in[:, :rank_in]
    for _ in range(SWEEPS):
        a = leading(np.einsum("oct,ci->oit", changed, b, optimize=True), rank_out)
        b = leading(np.einsum("oct,op->cpt", changed, a, optimize=True), rank_in)
    core = np.einsum("oct,op,ci->pit", changed, a, b, optimize=True)
    inner = b.T if lower is None else scipy.linalg.solve_triangular(lower, b, lower=True, trans="T").T
    sizes = np.linalg.norm(inner, axis=1, keepdims=True)  # equal rows are easier to quantize
    inner, core = inner / sizes, core * sizes[None]
    return frozen(inner.astype(np.float32)), frozen(core.astype(np.float32)), frozen(a.astype(np.float32))


@remembered
def whitened(weight: np.ndarray, moment: np.ndarray | None, damping: float) -> tuple[np.ndarray, np.ndarray | None]:
    """W x_c L^T of weights [o, c, taps], and L, the Cholesky factor of the damped moment."""
    if moment is None:
        return weight.astype(np.float64), None
    lower = np.linalg.cholesky(damped(moment, damping))
    return np.einsum("oct,ci->oit", weight, lower, optimize=True), lower


@remembered
def _hosvd(weight: np.ndarray, moment: np.ndarray | None, damping: float) -> Factors:
    """All left singular vectors of both unfoldings, strongest first."""
    changed, _ = whitened(weight, moment, damping)
    return leading(changed, changed.shape[0]), leading(changed.transpose(1, 0, 2), changed.shape[1])


def leading(tensor: np.ndarray, rank: int) -> np.ndarray:
    """The `rank` strongest left singular vectors of the first unfolding, by the eigenvectors of its Gram matrix."""
    unfolded = tensor.reshape(len(tensor), -1)
    size = len(unfolded)
    _, vectors = scipy.linalg.eigh(unfolded @ unfolded.T, subset_by_index=(size - rank, size - 1), check_finite=False)
    return _signed(vectors[:, ::-1].T).T


def _signed(rows: np.ndarray) -> np.ndarray:
    """Rows with their largest entry made positive: LAPACK leaves the signs open, and plans must replay to the same bytes."""
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=1, keepdims=True), axis=1)
    return rows * np.where(largest < 0, -1.0, 1.0)
