"""Weights in 7 bits whose products with bytes add up in 16 bits over two words: see hwopt.analysis.narrow.

Few sums are too large, most of them in small layers. A channel's weights are made to fit, or it takes larger steps, whatever errs
less: for normally distributed weights of 16 to 500 inputs that costs at most 5 % of the error of rounding.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from hwopt.analysis.narrow import NARROW, fits, fitted
from hwopt.ir import Graph, Node

COSTS = 0.25  # as much more squared error than rounding makes is not worth the speed
LIMITS = range(NARROW, NARROW // 2 - 1, -4)  # of a channel's largest weight; with the last one everything fits


def paired(weight: np.ndarray, scale: np.ndarray, axis: int | None, node: Node) -> tuple[np.ndarray, np.ndarray]:
    """(int8 steps, scale) of a layer whose largest weights are NARROW times `scale` ([channels] on `axis`, or [])."""
    steps = _rounded(weight, scale, axis)
    found, sizes = steps.copy(), scale.copy()
    if not fits(found, node):
        _improve(weight, found, sizes, axis, node)
    error, plain = float(_error(weight, found, sizes, axis).sum()), float(_error(weight, steps, scale, axis).sum())
    return (found, sizes) if fits(found, node) and error <= (1 + COSTS) * plain else (steps, scale)


def kept(after: Graph, before: Graph, names: Iterable[str], by: str) -> Graph:
    """`after`, with weights of these layers that no longer fit made to fit again: rounding by outputs moves them by a step."""
    edit = after.edit()
    for node in (before.node[name] for name in names):
        source = before.producer.get(node.inputs[1])
        name = source.inputs[0] if source is not None and source.op == "DequantizeLinear" else ""
        if name in before.params and before.params[name].dtype == np.int8 and fits(before.params[name], node):
            steps = after.params[name]
            if not fits(steps, node):
                edit.set_param(name, fitted(steps.astype(np.float32), np.clip(steps, -NARROW, NARROW), node))
    return edit.finish(by)


def _improve(weight: np.ndarray, steps: np.ndarray, scale: np.ndarray, axis: int | None, node: Node) -> None:
    """Replaces the steps and scales of channels that do not fit by the nearest that do."""
    some = _changed(steps, _fitted(weight, steps, scale, axis, node), axis)
    mine = weight if axis is None else np.take(weight, some, axis)
    sizes = scale.reshape(-1)[some]
    best = np.full(len(some), np.inf)
    for limit in LIMITS:
        size = (sizes * np.float32(NARROW / limit)).reshape(() if axis is None else -1)
        now = _fitted(mine, _rounded(mine, size, axis), size, axis, node)
        error = np.atleast_1d(_error(mine, now, size, axis))
        better = error < best
        best = np.where(better, error, best)
        if better.any() and axis is None:
            steps[...] = now
        elif better.any() and axis is not None:
            np.moveaxis(steps, axis, 0)[some[better]] = np.moveaxis(now, axis, 0)[better]
        scale.reshape(-1)[some[better]] = np.atleast_1d(size)[better]


def _changed(one: np.ndarray, other: np.ndarray, axis: int | None) -> np.ndarray:
    """Indices of the channels that differ."""
    if axis is None:
        return np.zeros(1, np.int64)
    return np.flatnonzero((one != other).any(axis=tuple(index for index in range(one.ndim) if index != axis)))


def _fitted(weight: np.ndarray, steps: np.ndarray, scale: np.ndarray, axis: int | None, node: Node) -> np.ndarray:
    return fitted(weight / _along(scale, axis, weight.ndim), steps, node)


def _rounded(weight: np.ndarray, scale: np.ndarray, axis: int | None) -> np.ndarray:
    return np.clip(np.rint(weight / _along(scale, axis, weight.ndim)), -NARROW, NARROW).astype(np.int8)


def _error(weight: np.ndarray, steps: np.ndarray, scale: np.ndarray, axis: int | None) -> np.ndarray:
    """Squared, by channel."""
    others = None if axis is None else tuple(index for index in range(weight.ndim) if index != axis)
    return np.asarray(np.square(steps * _along(scale, axis, weight.ndim) - weight).sum(axis=others, dtype=np.float64))


def _along(scale: np.ndarray, axis: int | None, rank: int) -> np.ndarray:
    return scale if axis is None else scale.reshape([-1 if index == axis else 1 for index in range(rank)])
