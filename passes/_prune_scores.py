"""How much each unit of a coupling group matters. A criterion sums over everything that the unit's removal takes away."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from hwopt.analysis.activations import mean_magnitudes
from hwopt.analysis.coupling import Group, Weight, coupling
from hwopt.analysis.memo import remembered
from hwopt.backends.ort import run
from hwopt.errors import DataError
from hwopt.ir import Graph
from hwopt.pipeline import Context
from hwopt.samples import Samples, batch_of

SCORED_SAMPLES = 32  # means over channels settle quickly, and each pruning of a sequence measures anew

Scores = np.ndarray  # float64[units], higher matters more
Criterion = Callable[[Graph, Sequence[Group], Context], list[Scores]]


def l1(graph: Graph, groups: Sequence[Group], _: Context) -> list[Scores]:
    """Sum of |w| over all weights that write or read the unit (Li et al., "Pruning Filters", arXiv:1608.08710)."""
    return [_summed(graph, group.weights, group.size, np.abs) for group in groups]


def l2(graph: Graph, groups: Sequence[Group], _: Context) -> list[Scores]:
    """Euclidean norm of all weights that write or read the unit."""
    return [np.sqrt(_summed(graph, group.weights, group.size, np.square)) for group in groups]


def activation(graph: Graph, groups: Sequence[Group], ctx: Context) -> list[Scores]:
    """Sum of |w| mean|x| over the weights that read the unit (Sun et al., "Wanda", arXiv:2306.11695); L1 where none does."""
    if ctx.calibration is None:
        raise DataError("criterion=activation needs calibration data", hint="give --calibrate data.npz, or use criterion=l2")
    means = responses(graph, ctx.calibration)
    return [_weighted(graph, group, means) for group in groups]


@remembered
def responses(graph: Graph, samples: Samples) -> Mapping[tuple[str, int], np.ndarray]:
    """Mean |x| along every axis that weights of free groups read: measured once, for all candidates of a graph."""
    wanted = {(w.data, w.data_axis) for group in coupling(graph) if not group.frozen for w in group.weights if w.data}
    return mean_magnitudes(graph, samples.head(max(SCORED_SAMPLES, batch_of(graph))), sorted(wanted))


def geometric_median(graph: Graph, groups: Sequence[Group], _: Context) -> list[Scores]:
    """Sum of a unit's distances to the others of its group: what lies in the middle can be replaced (FPGM, arXiv:1811.00250)."""
    return [_distances(graph, group) for group in groups]


def random(_: Graph, groups: Sequence[Group], ctx: Context) -> list[Scores]:
    """Random numbers: the control that every criterion must beat. The same for the same seed and group."""
    return [np.random.default_rng([ctx.seed, zlib.crc32(group.name.encode())]).random(group.size) for group in groups]


def _distances(graph: Graph, group: Group) -> Scores:
    """Over all weights that write the unit, joined."""
    squares = np.zeros((group.size, group.size))
    for weight in (one for one in group.weights if one.writes):
        array = weight_array(graph, weight.value).astype(np.float64, copy=False)
        rows = np.moveaxis(array, weight.axis, 0).reshape(array.shape[weight.axis], -1)
        for unit_rows in _slots(weight.unit, group.size):
            parts = np.where(unit_rows[:, None] >= 0, rows[unit_rows], 0.0)
            norms = (parts**2).sum(1)
            squares += np.maximum(norms[:, None] + norms - 2 * parts @ parts.T, 0)
    return np.sqrt(squares).sum(1)


def _slots(unit: np.ndarray, units: int) -> Iterator[np.ndarray]:
    """The first index of every unit, then the second ...: [units] each, -1 where a unit has no more."""
    places = [np.flatnonzero(unit == one) for one in range(units)]
    for slot in range(max(map(len, places))):
        yield np.array([place[slot] if slot < len(place) else -1 for place in places])


def _weighted(graph: Graph, group: Group, means: Mapping[tuple[str, int], np.ndarray]) -> Scores:
    readers = [weight for weight in group.weights if weight.data]
    if not readers:
        return _summed(graph, group.weights, group.size, np.abs)
    scores = np.zeros(group.size)
    for weight in readers:
        size = _along(graph, weight, np.abs)
        # the groups of a grouped convolution share one axis of its weight: their inputs are averaged
        strength = means[weight.data, weight.data_axis].reshape(-1, len(size)).mean(0)
        scores += by_unit(weight, size * strength, group.size)
    return scores


def _summed(graph: Graph, weights: Sequence[Weight], units: int, measure: Callable) -> Scores:
    scores = np.zeros(units)
    for weight in weights:
        scores += by_unit(weight, _along(graph, weight, measure), units)
    return scores


def by_unit(weight: Weight, amounts: np.ndarray, units: int) -> Scores:
    inside = weight.unit >= 0
    return np.bincount(weight.unit[inside], amounts[inside], minlength=units)


def _along(graph: Graph, weight: Weight, measure: Callable) -> np.ndarray:
    """The measure of a weight's elements, summed over all axes but one, float64."""
    array = weight_array(graph, weight.value)
    rest = tuple(axis for axis in range(array.ndim) if axis != weight.axis % array.ndim)
    return measure(array.astype(np.float32, copy=False)).sum(rest, dtype=np.float64)


def weight_array(graph: Graph, value: str) -> np.ndarray:
    """The numbers of a weight: a parameter, or what is computed from parameters alone (dequantized, looked up)."""
    array = graph.constant(value)
    if array is not None:
        return array
    nodes, queue = [], [value]
    while queue:
        node = graph.producer.get(queue.pop())
        if node is not None and node not in nodes:
            nodes.append(node)
            queue.extend(node.reads)
    ordered = tuple(node for node in graph.nodes if node in nodes)
    params = {name: graph.params[name] for node in ordered for name in node.reads if name in graph.params}
    part = dataclasses.replace(graph, inputs=(), outputs=(value,), nodes=ordered, params=MappingProxyType(params))
    return run(part, {})[value]
