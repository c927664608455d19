"""Criteria that ask the gradients what a unit's removal does to the outputs. They need torch; other models and passes do not.

Every unit has a gate: whoever reads the unit multiplies it by 1, and removal is the gate at 0. The gate's gradient is
sum(a * dL/da) over everything the unit says to its readers. With labels L is their cross entropy; without, the gradients are
those of hwopt.analysis.fisher: directions whose squares give the KL of the outputs from the original ones (all classes where
there are few, random signs elsewhere).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from hwopt.analysis.coupling import Coupling, Group, Weight, analyse
from hwopt.analysis.fisher import gate_name, require_gradients, sweeps
from hwopt.analysis.memo import remembered
from hwopt.errors import DataError
from hwopt.ir import Graph
from hwopt.pipeline import Context
from hwopt.samples import Samples, batch_of
from passes._prune_scores import Scores, by_unit, l1

SAMPLES = 64
DRAWS = 4  # random directions of a sample without labels, where the classes are many
Gates = dict[tuple[str, int], tuple[int, ...]]


def taylor(graph: Graph, groups: Sequence[Group], ctx: Context) -> list[Scores]:
    """Mean over examples of |sum(a dL/da)|, the first-order change of the loss (Molchanov et al., arXiv:1611.06440)."""
    return _gated(graph, groups, ctx, "taylor", lambda gradients, weights: weights @ np.abs(gradients))


def fisher(graph: Graph, groups: Sequence[Group], ctx: Context) -> list[Scores]:
    """1/2 mean over examples of (sum(a dL/da))^2, the Fisher information of the gate (Theis et al., arXiv:1801.05787)."""
    return _gated(graph, groups, ctx, "fisher", lambda gradients, weights: 0.5 * (weights @ gradients**2))


def obd(graph: Graph, groups: Sequence[Group], ctx: Context) -> list[Scores]:
    """1/2 sum of w^2 h over the unit's weights, h being the mean over samples of (dL/dw)^2 (LeCun et al., "Optimal Brain
    Damage").
    """
    samples = _samples(graph, ctx, "obd")
    squares = weight_gradients(graph, samples, ctx.seed)
    scores = []
    for group in groups:
        total = np.zeros(group.size)
        for weight in group.weights:
            if weight.value in squares:
                total += by_unit(weight, _along(squares[weight.value], weight), group.size)
        scores.append(0.5 * total)
    return scores


def _samples(graph: Graph, ctx: Context, criterion: str) -> Samples:
    if ctx.calibration is None:
        hint = "give --calibrate data.npz, or use criterion=l2"
        raise DataError(f"criterion={criterion} needs calibration data", place="prune-channels", hint=hint)
    require_gradients(graph, f"prune-channels{{criterion={criterion}}}")
    return ctx.calibration


def _gated(
    graph: Graph, groups: Sequence[Group], ctx: Context, criterion: str, summed: Callable[[np.ndarray, np.ndarray], Scores]
) -> list[Scores]:
    """`summed` makes one number a unit of [directions, units] gradients; L1 counts where nobody reads the units by weights."""
    gradients, weights = gate_gradients(graph, _samples(graph, ctx, criterion), ctx.seed)
    scores = []
    for group in groups:
        found = gradients.get(group.name)
        scores.append(l1(graph, [group], ctx)[0] if found is None else summed(found, weights))
    return scores


@remembered
def gate_gradients(graph: Graph, samples: Samples, seed: int) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
    """Group name -> gradients of its gates, [directions, units], and the weight of each direction (they average samples)."""
    found = analyse(graph)
    readers = [(group, weight) for group in found.groups if not group.frozen for weight in group.weights if weight.data]
    samples = samples.head(max(SAMPLES, batch_of(graph)))
    gates = _gates(graph, [weight for _, weight in readers])
    rows: dict[str, list[np.ndarray]] = {}
    weights: list[np.ndarray] = []
    for sweep in sweeps(graph, samples, (), draws=DRAWS, expected=True, seed=seed, gates=gates):
        totals: dict[str, np.ndarray] = {}
        for group, weight in readers:
            gradient = sweep.gradients.get(gate_name((weight.node, 0)))
            if gradient is not None:
                one = _by_gate(found, group, weight, gradient, sweep.batch)
                totals[group.name] = totals[group.name] + one if group.name in totals else one
        for name, total in totals.items():
            rows.setdefault(name, []).append(total)
        weights.append(np.full(sweep.batch, sweep.weight))
    count = len(samples) // batch_of(graph) * batch_of(graph)
    stacked = {name: np.concatenate(parts) for name, parts in rows.items()}
    return MappingProxyType(stacked), np.concatenate(weights) / count


def _gates(graph: Graph, readers: Sequence[Weight]) -> Gates:
    """A gate for each axis that somebody reads units along, one for each sample where the leading axis holds samples."""
    batch = batch_of(graph)
    gates: Gates = {}
    for weight in readers:
        shape = graph.tensor(weight.data).dims
        axis = weight.data_axis % len(shape)
        known = gates.get((weight.node, 0), (batch if shape[0] == batch and axis else 1,) + (1,) * (len(shape) - 1))
        gates[weight.node, 0] = tuple(shape[i] if i == axis else size for i, size in enumerate(known))
    return gates


def _by_gate(found: Coupling, group: Group, weight: Weight, gradient: np.ndarray, batch: int) -> np.ndarray:
    """[batch, units]: the gradients of one reader's gate. Samples that cannot be told apart share theirs evenly."""
    ids = found.values[weight.data][weight.data_axis]
    units = None if ids is None else group.elements.units(ids, group.number)
    if units is None:
        return np.zeros((batch, group.size))
    axis = weight.data_axis % gradient.ndim
    rows = np.moveaxis(gradient, axis, -1).astype(np.float64)
    rows = rows.reshape(len(rows), -1, len(units)).sum(1) if axis else rows.reshape(1, -1, len(units)).sum(1)
    inside = units >= 0
    total = np.stack([np.bincount(units[inside], row[inside], minlength=group.size) for row in rows])
    return total if len(total) == batch else np.repeat(total / batch, batch, axis=0)


@remembered
def weight_gradients(graph: Graph, samples: Samples, seed: int) -> Mapping[str, np.ndarray]:
    """Weight -> w^2 times the mean square of its gradient, elementwise, for all weights of free groups."""
    groups = [group for group in analyse(graph).groups if not group.frozen]
    values = dict.fromkeys(weight.value for group in groups for weight in group.weights)
    samples = samples.head(max(SAMPLES, batch_of(graph)))
    sums: dict[str, np.ndarray] = {}
    held: dict[str, np.ndarray] = {}
    for sweep in sweeps(graph, samples, values, draws=DRAWS, expected=True, seed=seed, apart=True):
        for name, gradient in sweep.gradients.items():
            square = sweep.weight * gradient.astype(np.float64) ** 2
            sums[name] = sums[name] + square if name in sums else square
            held[name] = sweep.values[name]
    count = len(samples) // batch_of(graph) * batch_of(graph)
    return MappingProxyType({name: held[name].astype(np.float64) ** 2 * total / count for name, total in sums.items()})


def _along(array: np.ndarray, weight: Weight) -> np.ndarray:
    rest = tuple(axis for axis in range(array.ndim) if axis != weight.axis % array.ndim)
    return array.sum(rest)
