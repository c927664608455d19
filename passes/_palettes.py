"""Palettes of weights: codebooks and indices, by codebook per tensor or per group of channels, of numbers or of vectors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hwopt.analysis.memo import remembered
from hwopt.ir import frozen
from passes._kmeans import CELLS, nearest, optimal_codebook
from passes._vectors import vector_codebook


@dataclass(frozen=True)
class Form:
    """2^`bits` entries of `dim` neighbouring weights in each of the `codebooks`; `scaled`: one scale per output channel."""

    bits: int
    codebooks: int = 1
    dim: int = 1
    scaled: bool = False


@dataclass(frozen=True, eq=False)
class Palette:
    """Codebooks [codebooks, 2^bits] or [1, 2^bits, dim], indices uint8 [codebooks, elements / codebooks / dim], scales or None.

    With several codebooks output channels come first. `scales` have the weights' rank, one for each output channel.
    """

    books: np.ndarray
    indices: np.ndarray
    scales: np.ndarray | None

    def weights(self, shape: tuple[int, ...], channels_last: bool) -> np.ndarray:
        """What the decoding nodes compute."""
        if self.books.ndim == 3:
            values = self.books[0][self.indices[0]].reshape(shape)
        else:
            values = np.take_along_axis(self.books, self.indices.astype(np.int64), axis=1)
            swapped = channels_last and len(self.books) > 1
            values = values.reshape(shape[::-1]).T if swapped else values.reshape(shape)
        return values if self.scales is None else values * self.scales


@remembered
def palette_of(weight: np.ndarray, moments: np.ndarray | None, form: Form, channels_last: bool, groups: int) -> Palette:
    """The palette with the least squared error, in which a weight counts by the mean square of its input channel.

    `moments` is [2, input channels], mean and mean square (which serves better than the variance, measured on two networks).
    `groups` is that of a convolution.
    """
    importance = None if moments is None else _importance(weight, moments[1], channels_last, groups)
    if not form.scaled:
        return _plain(weight, importance, form, channels_last, None)
    axes = tuple(axis for axis in range(weight.ndim) if axis != (weight.ndim - 1 if channels_last else 0))
    scales = np.abs(weight).max(axis=axes, keepdims=True).astype(np.float64)
    scales = np.where(scales > 0, scales, 1.0)
    counts = np.square(scales) * (np.ones(weight.shape) if importance is None else importance)
    found = _plain((weight / scales).astype(weight.dtype), counts, form, channels_last, scales)
    values = Palette(found.books, found.indices, None).weights(weight.shape, channels_last).astype(np.float64)
    power = (counts * values**2).sum(axis=axes, keepdims=True)
    best = (counts * values * weight).sum(axis=axes, keepdims=True) / np.where(power > 0, power, 1.0)  # least squares
    return Palette(found.books, found.indices, frozen(np.where(power > 0, best, scales).astype(weight.dtype)))


def rough_palette(weight: np.ndarray, form: Form, channels_last: bool) -> Palette:
    """Of the shapes and the size of `palette_of`, with evenly spread entries: it serves to be priced."""
    entries = np.linspace(weight.min(), weight.max(), 2**form.bits, dtype=weight.dtype)
    books = np.repeat(entries[None, :, None], form.dim, 2) if form.dim > 1 else np.repeat(entries[None], form.codebooks, 0)
    indices = (np.arange(weight.size // form.dim) % 2**form.bits).astype(np.uint8).reshape(form.codebooks, -1)
    shape = [weight.shape[axis] if axis == (weight.ndim - 1 if channels_last else 0) else 1 for axis in range(weight.ndim)]
    return Palette(frozen(books), frozen(indices), frozen(np.ones(shape, weight.dtype)) if form.scaled else None)


def _plain(
    weight: np.ndarray, importance: np.ndarray | None, form: Form, channels_last: bool, scales: np.ndarray | None
) -> Palette:
    if form.dim > 1:
        counts = None if importance is None else importance.reshape(-1, form.dim)
        book, found = vector_codebook(weight.reshape(-1, form.dim), counts, 2**form.bits)
        return Palette(frozen(book[None].astype(weight.dtype)), frozen(found.astype(np.uint8)[None]), scales)
    swap = channels_last and form.codebooks > 1
    rows = (weight.T if swap else weight).reshape(form.codebooks, -1)
    weights = None if importance is None else (importance.T if swap else importance).reshape(form.codebooks, -1)
    cells = CELLS if form.codebooks == 1 else CELLS // 4
    books = np.zeros((form.codebooks, 2**form.bits), weight.dtype)
    indices = np.zeros(rows.shape, np.uint8)
    for one in range(form.codebooks):
        best = optimal_codebook(rows[one], None if weights is None else weights[one], 2**form.bits, cells)
        books[one] = np.pad(best, (0, 2**form.bits - len(best)), mode="edge")
        indices[one] = nearest(rows[one], books[one])
    return Palette(frozen(books), frozen(indices), scales)


def _importance(weight: np.ndarray, squares: np.ndarray, channels_last: bool, groups: int) -> np.ndarray:
    """Mean square of the input channel of every weight, in the weight's shape."""
    if channels_last:
        return np.broadcast_to(squares[:, None], weight.shape)
    rows = np.repeat(squares.reshape(groups, -1), len(weight) // groups, axis=0)
    return np.broadcast_to(rows.reshape(*rows.shape, *(1,) * (weight.ndim - 2)), weight.shape)
