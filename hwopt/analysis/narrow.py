"""Weights so small that products with bytes add up in 16 bits, which some instructions do (x86 without VNNI: vpmaddubsw).

Such kernels go along a tap's neighbouring weights in words of four, two pairs each. One pair of products fits where every
weight is within NARROW. The sums of one more word fit, too, where of the four weights that then meet in one sum neither the
positive nor the negative ones add up to more than twice that.
"""

from __future__ import annotations

import numpy as np

from hwopt.analysis.memo import remembered
from hwopt.ir import Node

NARROW = 64  # 2 x 255 x 64 is less than 2 to the 15th
PAIR, PAIRS, WORDS = 2, 2, 2  # weights of a product's pair, such pairs in a word, words whose sums meet
STEP = PAIR * PAIRS * WORDS
_DIMENSIONS = {"Conv": (3, 4), "MatMul": (2,), "Gemm": (2,)}  # of weights


def pairs_that_fit(weights: np.ndarray, groups: int = 1, dilation: int = 1) -> int:
    """How many pairs of products add up in 16 bits (0, 1 or 2), for weights [out, in / groups, ...] or [k, n].

    `dilation` is that along rows: without one, a kernel's row is one tap.
    """
    if not weights.size or weights.min() < -NARROW or weights.max() > NARROW:
        return 0
    if weights.ndim not in (2, 3, 4):
        return 1
    sums = _sums(_words(_taps(weights, groups, dilation)))
    return 2 if max(int(one.max()) for one in sums) <= PAIR * NARROW else 1


def pairs_of_layer(weights: np.ndarray, node: Node) -> int:
    """The same for the weights of a Conv, MatMul or Gemm, in ONNX's layout; they are not changed afterwards."""
    return _remembered(weights, *_layout(node))


@remembered
def _remembered(weights: np.ndarray, turned: bool, groups: int, dilation: int) -> int:
    weights = weights.astype(np.int8, copy=False)
    return pairs_that_fit(weights.T if turned else weights, groups, dilation)


def fits(weights: np.ndarray, node: Node) -> bool:
    """Whether both words fit; True for operators whose kernels do not add so."""
    turned, groups, dilation = _layout(node)
    return not _adds(node, weights) or pairs_that_fit(weights.T if turned else weights, groups, dilation) == WORDS


def fitted(weights: np.ndarray, steps: np.ndarray, node: Node) -> np.ndarray:
    """`steps`, a layer's rounded weights within NARROW, made smaller where both words would not fit.

    `weights` are those before rounding, in steps: the squared difference from them is the least.
    """
    if not _adds(node, steps):
        return steps
    turned, groups, dilation = _layout(node)
    rows, exact = (_taps(one.T if turned else one, groups, dilation) for one in (steps, weights))
    words = _smaller(_words(rows), _words(exact))
    found = _back(words.reshape(*rows.shape[:-1], -1)[..., : rows.shape[-1]], (steps.T if turned else steps).shape)
    return np.ascontiguousarray(found.T if turned else found)


def _adds(node: Node, weights: np.ndarray) -> bool:
    return weights.ndim in _DIMENSIONS.get(node.op, ())


def _layout(node: Node) -> tuple[bool, int, int]:
    """Whether weights are [n, k], groups, dilation along rows."""
    turned = node.op == "Gemm" and bool(node.attr("transB", 0))
    dilations = node.attr("dilations", ()) if node.op == "Conv" else ()
    return turned, node.attr("group", 1) if node.op == "Conv" else 1, dilations[-1] if dilations else 1


def _taps(weights: np.ndarray, groups: int, dilation: int) -> np.ndarray:
    """[n, taps, run]: what lies side by side in channels-last data is one run."""
    if weights.ndim == 2:
        return weights.T[:, None]
    last = np.moveaxis(weights, 1, -1)  # [n, ..., across, k]
    joined = groups == 1 and (dilation == 1 or last.shape[-2] == 1)
    run = last.shape[-2] * last.shape[-1] if joined else last.shape[-1]
    return last.reshape(len(last), -1, run)


def _back(rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """[n, taps, run] in the layout they came from."""
    if len(shape) == 2:
        return rows[:, 0].T
    return np.moveaxis(rows.reshape(shape[0], *shape[2:], shape[1]), -1, 1)


def _words(rows: np.ndarray) -> np.ndarray:
    """[..., words, pairs, pair] of runs, filled up with zeros."""
    more = -rows.shape[-1] % STEP
    full = np.pad(rows, ((0, 0), (0, 0), (0, more))) if more else rows
    return full.reshape(-1, WORDS, PAIRS, PAIR)


def _sums(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[steps, pairs] of positive and of negative weights that meet in one sum."""
    wide = words.astype(np.int16)
    return np.maximum(wide, 0).sum((1, 3), dtype=np.int16), np.maximum(-wide, 0).sum((1, 3), dtype=np.int16)


def _smaller(words: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """The same with the numbers of sums that are too large moved towards zero, as near to the exact ones as may be."""
    found = words.copy()
    for sign, sums in zip((1, -1), _sums(words), strict=True):
        step, pair = np.nonzero(sums > PAIR * NARROW)
        near = _within(sign * found[step, :, pair].astype(np.int64), sign * exact[step, :, pair])
        found[step, :, pair] = sign * near
    return found


def _within(numbers: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """[sums, words, pair] numbers, made smaller one by one until the positive ones of a sum fit: the least squared error."""
    found, close = numbers.reshape(-1, WORDS * PAIR).copy(), exact.reshape(-1, WORDS * PAIR)
    while True:
        over = np.flatnonzero(np.maximum(found, 0).sum(1) > PAIR * NARROW)
        if not len(over):
            return found.reshape(numbers.shape)
        gains = np.where(found[over] > 0, found[over] - close[over], -np.inf)
        found[over, gains.argmax(1)] -= 1
