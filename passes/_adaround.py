"""AdaRound: every weight rounds up or down such that the layer's outputs, not its weights, stay near the float model's.

Nagel, Amjad, van Baalen, Louizos and Blankevoort, "Up or down? Adaptive rounding for post-training quantization", ICML
2020: a soft choice h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1) per weight, the squared error of the outputs and a regularizer that
drives h to 0 or 1. The outputs of a linear layer enter through second moments, so the gradient is exact and needs neither
batches nor automatic differentiation: the result depends on nothing but the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from hwopt.backends.ort import Session
from hwopt.errors import DataError
from hwopt.ir import Graph, Node
from hwopt.ir.graph import in_order
from hwopt.samples import Samples, batch_of

SAMPLES = 32, 128  # at least and at most, as many as give ROWS rows for each product
ROWS = 4
POSITIONS = 96  # of a convolution's output that count in each sample, evenly spread
ITERATIONS, WARM = 400, 0.2  # of these, the first share without the regularizer
RATE, WEIGHT = 0.03, 0.02  # of Adam; of the regularizer beside errors in squared steps
BETA = (20.0, 2.0)  # the regularizer's exponent, from the first to the last iteration
DAMPING = 0.01  # of the mean diagonal: what few samples do not show stays near the nearest number
LARGEST = 2304  # products per output: with more, the moments of a layer take too long
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Moments:
    """Of a layer's quantized inputs x [groups, k] and float outputs y [groups, n], centred where a bias takes the means."""

    covariance: np.ndarray  # E[x x^T], float64 [groups, k, k]
    cross: np.ndarray  # E[y x^T], [groups, n, k]
    inputs: np.ndarray  # E[x], [groups, k]
    outputs: np.ndarray  # E[y], [groups, n]


def adapted(
    graph: Graph, quantized: Graph, names: Iterable[str], samples: Samples, by: str, progress: Progress | None = None
) -> Graph:
    """The quantized graph with the integer weights of these layers rounded anew, one after the other in graph order.

    Each layer sees what the layers before it, rounded already, hand it, and aims at the float layer's outputs. A layer's int32
    bias takes what is left of the mean. At most 128 samples count; memory does not grow with them.
    """
    wanted = [node for node in graph.nodes if node.name in set(names)]
    for done, node in enumerate(wanted):
        if progress is not None:
            progress(f"rounding {node.name}", done, len(wanted))
        layer = quantized.node[node.name]
        if unfit(quantized, layer):
            continue
        edit = quantized.edit()
        for name, array in _solved(graph, node, quantized, layer, samples).items():
            edit.set_param(name, array)
        quantized = edit.finish(by)
    return quantized


def unfit(graph: Graph, node: Node) -> str:
    """Why the weights of a quantized layer keep their rounding; empty if they are adapted."""
    source = graph.producer.get(node.inputs[1])
    weight = None if source is None or source.op != "DequantizeLinear" else graph.constant(source.inputs[0])
    if weight is None:
        return "its weights are looked up or computed"
    if node.op == "ConvTranspose" or (node.op != "Conv" and weight.ndim != 2) or node.attr("transA", 0):
        return f"weights {list(weight.shape)} of a {node.op} are no matrix of taps"
    if node.op == "Conv" and node.attr("auto_pad", b"NOTSET") not in (b"NOTSET", "NOTSET", b"VALID", "VALID"):
        return "its padding is automatic"
    products = int(np.prod(weight.shape[1:])) if node.op == "Conv" else _rows(node, weight)[0].shape[-1]
    return f"{products} products per output are more than {LARGEST}" if products > LARGEST else ""


def _solved(graph: Graph, node: Node, quantized: Graph, layer: Node, samples: Samples) -> dict[str, np.ndarray]:
    """New integers of the weights, and of the bias if the layer has one."""
    source = quantized.producer[layer.inputs[1]]
    stored = quantized.params[source.inputs[0]]
    steps, restore = _rows(layer, stored)
    scale = np.broadcast_to(quantized.params[source.inputs[1]].astype(np.float64).reshape(-1), steps.shape[0] * steps.shape[1])
    scale = scale.reshape(steps.shape[0], steps.shape[1], 1)
    bias = quantized.producer.get(layer.inputs[2]) if len(layer.inputs) > 2 else None
    biased = bias is not None and bias.op == "DequantizeLinear" and bias.inputs[0] in quantized.params
    exact = _rows(node, float_weight(graph, node))[0].astype(np.float64)
    few = samples.head(max(_needed(graph, node, steps.shape[2]), batch_of(graph)))
    moments = _moments(_pairs(graph, node, quantized, layer, few), centred=biased)
    limit = max(int(np.abs(steps.astype(np.int8)).max(initial=1)), 1)  # every layer has a channel that reaches it
    found = best_rounding(exact / scale, moments.covariance, moments.cross / scale, steps.astype(np.float64), limit)
    changed = {source.inputs[0]: restore(found).astype(stored.dtype)}
    if biased and bias is not None:
        left = moments.outputs - np.einsum("gnk,gk->gn", found * scale, moments.inputs)
        unit = quantized.params[bias.inputs[1]].astype(np.float64).reshape(-1)
        changed[bias.inputs[0]] = np.clip(np.rint(left.reshape(-1) / unit), -(2.0**31 - 1), 2.0**31 - 1).astype(np.int32)
    return changed


def _needed(graph: Graph, node: Node, products: int) -> int:
    """How many samples to look at: a layer with many positions shows all it has on few of them."""
    shape = graph.tensor(node.output).shape or ()
    space = shape[2:] if node.op == "Conv" else shape[1:-1]
    positions = min(math.prod(dim if isinstance(dim, int) else 1 for dim in space), POSITIONS if node.op == "Conv" else 2**31)
    return int(np.clip(-(-ROWS * products // max(positions, 1)), *SAMPLES))


def best_rounding(exact: np.ndarray, covariance: np.ndarray, cross: np.ndarray, nearest: np.ndarray, limit: int) -> np.ndarray:
    """Integers [groups, n, k] for weights `exact` [groups, n, k], all in steps, that bring u x nearest to y in the mean square.

    `covariance` [groups, k, k] is E[x x^T], `cross` [groups, n, k] E[y x^T] in steps. The better of AdaRound's choice and the
    nearest, after both have been improved by single weights while that helps.
    """
    inputs = exact.shape[2]
    unit = np.trace(covariance, axis1=1, axis2=2)[:, None, None] / inputs
    unit = np.where(unit > 0, unit, 1.0)  # nothing was seen: the damping alone asks for the nearest
    hessian = covariance / unit + DAMPING * np.eye(inputs)
    aim = cross / unit + DAMPING * exact
    soft = _soft_rounding(exact, hessian, aim, limit).astype(np.float64)
    found = [_polished(start, hessian, aim, limit) for start in (soft, nearest)]
    errors = [((one @ hessian - 2 * aim) * one).sum(2) for one in found]
    return np.where((errors[0] <= errors[1])[..., None], found[0], found[1]).astype(np.int8)


def _soft_rounding(exact: np.ndarray, hessian: np.ndarray, aim: np.ndarray, limit: int) -> np.ndarray:
    """AdaRound by Adam on exact gradients."""
    hessian, aim = hessian.astype(np.float32), aim.astype(np.float32)
    floor = np.clip(np.floor(exact), -limit, limit - 1).astype(np.float32)
    rest = np.clip(exact - floor, 0.01, 0.99).astype(np.float32)
    chosen = -np.log(1.2 / (rest + 0.1) - 1)
    mean, square = np.zeros_like(chosen), np.zeros_like(chosen)
    for step in range(ITERATIONS):
        sigmoid = 1 / (1 + np.exp(-chosen))
        soft = np.clip(1.2 * sigmoid - 0.1, 0, 1)
        gradient = 2 * ((floor + soft) @ hessian - aim)
        share = (step / ITERATIONS - WARM) / (1 - WARM)
        if share > 0:
            beta = BETA[0] + share * (BETA[1] - BETA[0])
            away = 2 * soft - 1
            gradient -= np.float32(WEIGHT * 2 * beta) * np.sign(away) * np.abs(away) ** np.float32(beta - 1)
        gradient *= 1.2 * sigmoid * (1 - sigmoid)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        corrected = mean / (1 - 0.9 ** (step + 1))
        chosen -= RATE * corrected / (np.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8)
    return floor + (chosen >= 0)


def _polished(start: np.ndarray, hessian: np.ndarray, aim: np.ndarray, limit: int) -> np.ndarray:
    """Change one weight of every output by one step, the one that helps most, for as long as any helps."""
    outputs, inputs = start.shape[1:]
    steps = start.reshape(-1, inputs).copy()
    slope = 2 * (start @ hessian - aim).reshape(-1, inputs)
    own = np.repeat(np.diagonal(hessian, axis1=1, axis2=2), outputs, axis=0)
    active = np.arange(len(steps))  # outputs that a change may still help
    for _ in range(4 * inputs):
        now, gradient = steps[active], slope[active]
        up = np.where(now < limit, own[active] + gradient, np.inf)
        down = np.where(now > -limit, own[active] - gradient, np.inf)
        gain = np.minimum(up, down)
        column = gain.argmin(1)
        picked = np.arange(len(active)), column
        helps = gain[picked] < -1e-9
        change = np.where(up[picked] <= down[picked], 1.0, -1.0)[helps]
        active, column = active[helps], column[helps]
        if not len(active):
            break
        steps[active, column] += change
        slope[active] += 2 * change[:, None] * hessian[active // outputs, column]
    return steps.reshape(start.shape)


# --- what a layer sees and should answer ---


def _rows(node: Node, weight: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Weights as [groups, outputs, products], and the way back."""
    if node.op == "Conv":
        groups = int(node.attr("group", 1))
        return weight.reshape(groups, weight.shape[0] // groups, -1), lambda rows: rows.reshape(weight.shape)
    if node.attr("transB", 0):
        return weight[None], lambda rows: rows[0]
    return weight.T[None], lambda rows: np.ascontiguousarray(rows[0].T)


def float_weight(graph: Graph, node: Node) -> np.ndarray:
    """What the layer multiplies by, a Gemm's alpha included."""
    weight = graph.params[node.inputs[1]]
    return weight * np.float32(node.attr("alpha", 1.0)) if node.op == "Gemm" else weight


def _pairs(graph: Graph, node: Node, quantized: Graph, layer: Node, samples: Samples) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs [rows, groups, k] of the quantized layer and outputs [rows, groups, n] of the float one, batch by batch."""
    read, wanted = layer.inputs[0], node.output
    seeing = None if read in quantized.inputs else only(quantized, read)
    answering = only(graph, wanted)
    for feeds in samples.feeds(graph):
        data = feeds[read] if seeing is None else seeing.run(feeds)[read]
        answer = answering.run(feeds)[wanted]
        if not (np.isfinite(data).all() and np.isfinite(answer).all()):
            raise DataError("holds NaN or infinity during calibration", place=f"value {wanted}")
        if node.op == "Conv":
            yield _patches(node, data, answer, graph.tensor(node.inputs[1]).dims)
        else:
            yield data.reshape(-1, 1, data.shape[-1]), answer.reshape(-1, 1, answer.shape[-1])


class Part(Session):
    """A part of a model, which reads what it needs of the whole model's inputs."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.inputs = graph.inputs

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return super().run({name: feeds[name] for name in self.inputs})


def only(graph: Graph, *values: str) -> Part:
    """What computes these values and nothing else."""
    nodes = in_order(graph.nodes, values)
    read = {name for node in nodes for name in node.reads}
    params = MappingProxyType({name: array for name, array in graph.params.items() if name in read})
    inputs = tuple(name for name in graph.inputs if name in read)
    return Part(replace(graph, nodes=tuple(nodes), params=params, inputs=inputs, outputs=values))


def _patches(node: Node, data: np.ndarray, answer: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """What some output positions of a convolution read, and the outputs there."""
    space = answer.shape[2:]
    rank, groups = len(space), int(node.attr("group", 1))
    pads = tuple(node.attr("pads", (0,) * (2 * rank)))
    padded = np.pad(data, ((0, 0), (0, 0), *((pads[axis], pads[axis + rank]) for axis in range(rank))))
    picked = np.unique(np.linspace(0, np.prod(space) - 1, POSITIONS).astype(int))
    places: Any = np.unravel_index(picked, space)
    strides, dilations = node.attr("strides", (1,) * rank), node.attr("dilations", (1,) * rank)
    taps = []
    for tap in np.ndindex(*shape[2:]):
        where: Any = tuple(places[axis] * strides[axis] + tap[axis] * dilations[axis] for axis in range(rank))
        taps.append(padded[(slice(None), slice(None), *where)])  # [batch, channels, positions]
    read = np.stack(taps, axis=2)  # [batch, channels, taps, positions]
    read = np.moveaxis(read.reshape(len(data), groups, -1, len(picked)), 3, 1)
    found = np.moveaxis(answer[(slice(None), slice(None), *places)].reshape(len(data), groups, -1, len(picked)), 3, 1)
    return read.reshape(-1, *read.shape[2:]), found.reshape(-1, *found.shape[2:])


def _moments(pairs: Iterable[tuple[np.ndarray, np.ndarray]], *, centred: bool) -> Moments:
    sums: list[np.ndarray | float] = [0.0, 0.0, 0.0, 0.0]
    count = 0
    for inputs, outputs in pairs:
        x, y = inputs.transpose(1, 2, 0), outputs.transpose(1, 2, 0)  # [groups, k, rows], [groups, n, rows]
        parts = (x @ x.transpose(0, 2, 1), y @ x.transpose(0, 2, 1), x.sum(2), y.sum(2))
        sums = [total + part.astype(np.float64) for total, part in zip(sums, parts, strict=True)]
        count += len(inputs)
    if not count:
        raise DataError("the calibration data give no activations", place="adaround")
    covariance, cross, x_mean, y_mean = (np.asarray(total) / count for total in sums)
    if centred:
        covariance = covariance - x_mean[:, :, None] * x_mean[:, None, :]
        cross = cross - y_mean[:, :, None] * x_mean[:, None, :]
    return Moments(covariance, cross, x_mean, y_mean)
