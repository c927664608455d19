"""What is left after a cut is fitted to what was there: least squares over calibration data.

Who reads removed channels x_R reads x_R ~ A x_S + c instead, the best linear guess from those that stay:

    W_S x_S + W_R x_R + b   becomes   (W_S + W_R A) x_S + (b + W_R c),    A = C_RS C_SS^-1,  c = E[x_R] - A E[x_S]

with the covariance C. For products and 1x1 convolutions this is the least-squares optimum of the layer's own output (He et al.,
"Channel pruning for accelerating very deep neural networks", ICCV 2017, arXiv:1707.06168, without its search). Where windows
reach into padding no constant is right, so that A comes from second moments and c is 0.

Which channels the others make up for is asked by removing them a few at a time, all others refitted, as optimal brain surgeons
do (Hassibi and Stork 1992; columns: Kurtic et al., "ZipLM", arXiv:2302.04089): the removal of columns q of W costs
tr(W_q ([C^-1]_qq)^-1 W_q^T).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from hwopt.analysis.coupling import Group, coupling
from hwopt.analysis.covariance import damped, fewness, moments_and_means
from hwopt.analysis.memo import remembered
from hwopt.errors import DataError
from hwopt.ir import Graph, Node, part
from hwopt.pipeline import Context
from hwopt.samples import Samples
from passes._bias import bias_place
from passes._prune_cut import Cut
from passes._prune_scores import Scores, activation

DAMPING = 0.01  # of the mean square
WIDEST = 4096  # channels: larger matrices take too long
STEPS = 64  # in which all units of a group are removed


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that sums over channels: which axis of its weight they are, and whether a constant can be added for all windows."""

    node: Node
    axis: int
    centred: bool

    @property
    def weight(self) -> str:
        return self.node.inputs[1]


def reader_of(graph: Graph, node: Node) -> Reader | None:
    """The node, if its weight can be refitted: a floating-point parameter of its own, with all channels in one sum."""
    axis = _summed_axis(node)
    if axis is None or node.inputs[1] not in graph.params or graph.sole_user(node.inputs[1]) is None:
        return None
    weight = graph.params[node.inputs[1]]
    if (
        weight.dtype.kind != "f"
        or (weight.ndim != 2 and node.op != "Conv")
        or weight.shape[axis] > WIDEST
        or node.inputs[0] in graph.params
    ):
        return None
    return Reader(node, axis % weight.ndim, bias_place(graph, node) is not None and not any(node.attr("pads", ())))


def _summed_axis(node: Node) -> int | None:
    if node.op == "Conv" and node.attr("group", 1) == 1 and node.attr("auto_pad", "NOTSET") == "NOTSET":
        return 1
    if node.op == "Gemm" and not node.attr("transA", 0):
        return 1 if node.attr("transB", 0) else 0
    return -2 if node.op == "MatMul" else None


def _data_axis(graph: Graph, node: Node) -> int:
    return 1 if node.op == "Conv" else len(graph.tensor(node.inputs[0]).shape or ()) - 1


def _moments(graph: Graph, samples: Samples, nodes: Iterable[Node]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By node: (covariance, mean), or (second moment, zeros) where no constant can be added. Asked often, all are measured.

    Damped by a share of the mean square, not of the variance, which may be nothing but rounding.
    """
    wanted = [reader for node in nodes if (reader := reader_of(graph, node))]
    read = {weight.node for group in coupling(graph) if not group.frozen for weight in group.weights if weight.data}
    others = [node for node in graph.nodes if node.name in read and reader_of(graph, node)]
    found = moments_and_means(graph, samples, [reader.node for reader in wanted], others)
    moments = {}
    for reader in wanted:
        second, mean = found[reader.node.name]
        mean = mean if reader.centred else np.zeros_like(mean)
        share = DAMPING * fewness(graph, reader.node, samples)
        moments[reader.node.name] = damped(second, share) - np.outer(mean, mean), mean
    return moments


# --- refitting ---


def repair(work: Cut, samples: Samples) -> None:
    """Refit every reader of what is cut, as part of the cut."""
    graph = work.graph
    found = [reader for node in graph.nodes if (reader := reader_of(graph, node))]
    cut = [one for one in found if work.is_cut(one.node.inputs[0], _data_axis(graph, one.node))]
    moments = _moments(graph, samples, [one.node for one in cut])
    for reader in cut:
        node = reader.node
        stays = np.asarray(work.stays(node.inputs[0], _data_axis(graph, node)))
        weight = np.moveaxis(graph.params[reader.weight].astype(np.float64), reader.axis, -1)
        covariance, mean = moments[node.name]
        guess = guesses(covariance, stays)
        fitted = weight[..., stays] + weight[..., ~stays] @ guess
        work.edit.set_param(reader.weight, _cut_rows(work, reader, np.moveaxis(fitted, -1, reader.axis)))
        if reader.centred:
            _add_constant(work, node, weight[..., ~stays] @ (mean[~stays] - guess @ mean[stays]))


def guesses(covariance: np.ndarray, stays: np.ndarray) -> np.ndarray:
    """A [removed, kept]: the removed channels from those that stay."""
    inside, across = covariance[np.ix_(stays, stays)], covariance[np.ix_(stays, ~stays)]
    return scipy.linalg.solve(inside, across, assume_a="pos", check_finite=False).T


def _cut_rows(work: Cut, reader: Reader, weight: np.ndarray) -> np.ndarray:
    """The weight on its other axes as these are cut, in its own dtype."""
    for axis in range(weight.ndim):
        ids = work.coupling.params.get((reader.weight, axis))
        if axis != reader.axis and ids is not None:
            weight = np.compress(work.kept[ids], weight, axis)
    return np.ascontiguousarray(weight, work.graph.params[reader.weight].dtype)


def _add_constant(work: Cut, node: Node, constant: np.ndarray) -> None:
    """Add what the removed channels give on average; `constant` is [outputs, windows ...] before the cut."""
    place = bias_place(work.graph, node)
    if place is None:
        return
    holder, index = place
    stays = work.stays(node.output, 1 if node.op == "Conv" else len(work.coupling.values[node.output]) - 1)
    shift = constant.reshape(len(constant), -1).sum(1)
    if node.op == "Gemm":
        shift *= float(node.attr("alpha", 1.0)) / float(node.attr("beta", 1.0))
    name = holder.inputs[index] if len(holder.inputs) > index else ""
    old = work.graph.constant(name) if name else None
    bias = (shift if old is None else old + shift)[slice(None) if stays is None else stays]
    bias = bias.astype(work.graph.params[node.inputs[1]].dtype if old is None else old.dtype)
    now = work.now(holder).inputs[index] if name else ""
    if now and (now != name or work.graph.sole_user(name)):  # a copy of its own, or nobody else's
        work.edit.set_param(now, bias)
    else:
        work.reads(holder, index, work.edit.param(part(node, "bias"), bias))


# --- choosing ---


def obs(graph: Graph, groups: Sequence[Group], ctx: Context) -> list[Scores]:
    """When each unit goes: those first that the others make up for best, in all layers that read them; see above.

    By activation where nothing that reads the units can be refitted.
    """
    if ctx.calibration is None:
        raise DataError("criterion=obs needs calibration data", hint="give --calibrate data.npz, or use criterion=l2")
    names = {weight.node for group in groups for weight in group.weights if weight.data and not weight.writes}
    moments = _moments(graph, ctx.calibration, [node for node in graph.nodes if node.name in names])
    scores = []
    for group in groups:
        order = removal_order(graph, ctx.calibration, group.name) if moments else None
        scores.append(activation(graph, [group], ctx)[0] if order is None else order)
    return scores


@remembered
def removal_order(graph: Graph, samples: Samples, name: str) -> Scores | None:
    """[units], higher goes later; None if nothing that reads them can be refitted."""
    group = next(one for one in coupling(graph) if one.name == name)
    sums = list(_sums(graph, samples, group))
    if not sums:
        return None
    alive, found = np.ones(group.size, bool), np.zeros(group.size)
    step = max(1, group.size // STEPS)
    for start in range(0, group.size, step):
        costs = np.sum([one.costs() for one in sums], axis=0)
        going = np.argsort(np.where(alive, costs, np.inf), kind="stable")[: min(step, group.size - start)]
        found[going] = start + np.arange(len(going))
        alive[going] = False
        for one in sums:
            one.remove(going)
    return found


def _sums(graph: Graph, samples: Samples, group: Group) -> Iterator[_Sum]:
    """Of every layer that reads the group, relative to its output."""
    reading = [one for one in group.weights if one.data and not one.writes]
    moments = _moments(graph, samples, [graph.node[one.node] for one in reading])
    for one in reading:
        reader = reader_of(graph, graph.node[one.node])
        if reader is None or one.axis % graph.params[one.value].ndim != reader.axis:
            continue
        covariance, _ = moments[one.node]
        weight = np.moveaxis(graph.params[one.value].astype(np.float64), reader.axis, -1).reshape(-1, len(covariance))
        gram = weight.T @ weight
        energy = float(np.sum(gram * covariance))
        yield _Sum(np.linalg.inv(covariance), gram / energy if energy > 0 else gram, one.unit, group.size)


class _Sum:
    """One layer's sum over channels while units are removed: the inverse covariance, and W^T W of the refitted weight."""

    def __init__(self, inverse: np.ndarray, gram: np.ndarray, unit: np.ndarray, units: int) -> None:
        self.inverse, self.gram = inverse, gram
        self.columns = [np.flatnonzero(unit == one) for one in range(units)]

    def costs(self) -> np.ndarray:
        """[units]: what the removal of each adds to the squared error."""
        if all(len(columns) == 1 for columns in self.columns):
            places = np.concatenate(self.columns)
            return np.diag(self.gram)[places] / np.maximum(np.diag(self.inverse)[places], 1e-30)
        return np.array([self._cost(columns) for columns in self.columns])

    def _cost(self, columns: np.ndarray) -> float:
        block = np.ix_(columns, columns)
        inverse = self.inverse[block]
        if not inverse.any():
            return 0.0  # it is gone
        return float(np.trace(np.linalg.solve(inverse, self.gram[block])))

    def remove(self, units: np.ndarray) -> None:
        """Refit the others: W' = W - W_q M with M = ([C^-1]_qq)^-1 [C^-1]_q."""
        gone = np.concatenate([self.columns[unit] for unit in units])
        if not len(gone):
            return
        fit = np.linalg.solve(self.inverse[np.ix_(gone, gone)], self.inverse[gone])
        across = self.gram[:, gone] @ fit
        self.gram = self.gram - across - across.T + fit.T @ self.gram[np.ix_(gone, gone)] @ fit
        self.inverse = self.inverse - self.inverse[:, gone] @ fit
        for matrix in (self.gram, self.inverse):
            matrix[gone] = 0.0
            matrix[:, gone] = 0.0
