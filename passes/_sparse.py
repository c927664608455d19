"""Sparse weights: which of them stay, and their storage as a mask of bits and the values that are left.

    W = values[cumsum(mask) - 1] * mask

in standard operators, so that the model runs everywhere and training it moves the kept values only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from hwopt.analysis.covariance import channel_moments
from hwopt.analysis.fisher import require_gradients, sweeps
from hwopt.errors import PassError
from hwopt.ir import Edit, Graph, Node, onnx_dtype, part
from hwopt.pipeline import Context
from hwopt.samples import Samples, batch_of
from passes._packing import pack

CRITERIA = ("magnitude", "activation", "obd")
SAMPLES, DRAWS = 64, 4  # that gradients look at, and random directions of each
OVERHEAD_BYTES = 160  # shifts, bounds and shapes of the decoding nodes


def scores_of(graph: Graph, chosen: Mapping[str, Node], criterion: str, ctx: Context, place: str) -> dict[str, np.ndarray]:
    """How much each weight matters, in the weights' shapes."""
    weights = {name: graph.params[name].astype(np.float64) for name in chosen}
    if criterion == "magnitude":
        return {name: np.abs(weight) for name, weight in weights.items()}
    if ctx.calibration is None:
        raise PassError(f"criterion={criterion} needs calibration data", place=place, hint="give some with --calibrate")
    if criterion == "activation":
        moments = channel_moments(graph, ctx.calibration, chosen.values())
        sizes = {name: _by_input(node, np.sqrt(moments[node.name][1]), weights[name]) for name, node in chosen.items()}
        return {name: np.abs(weight) * sizes[name] for name, weight in weights.items()}
    require_gradients(graph, place)
    squares = gradient_squares(graph, ctx.calibration, tuple(chosen), ctx.seed)
    return {name: 0.5 * weight**2 * squares[name] for name, weight in weights.items()}


def _by_input(node: Node, channels: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """One number for each input channel, spread over the weights' shape."""
    if node.op != "Conv":
        return np.broadcast_to(channels if node.attr("transB", 0) else channels[:, None], weight.shape)
    groups = int(node.attr("group", 1))
    rows = np.repeat(channels.reshape(groups, -1), len(weight) // groups, axis=0)
    return np.broadcast_to(rows.reshape(*rows.shape, *(1,) * (weight.ndim - 2)), weight.shape)


def gradient_squares(graph: Graph, samples: Samples, values: tuple[str, ...], seed: int) -> dict[str, np.ndarray]:
    """Mean over samples of the square of dL/dw, elementwise, sample by sample."""
    samples = samples.head(max(SAMPLES, batch_of(graph)))
    sums = {name: np.zeros(graph.params[name].shape) for name in values}
    for sweep in sweeps(graph, samples, values, draws=DRAWS, expected=True, seed=seed, apart=True):
        for name in values:
            sums[name] += sweep.weight * sweep.gradients[name].astype(np.float64) ** 2
    count = len(samples) // batch_of(graph) * batch_of(graph)
    return {name: total / count for name, total in sums.items()}


def ratio_of(ratio: float, group: tuple[int, int] | None) -> float:
    """The share of the weights that go."""
    return ratio if group is None else 1 - group[0] / group[1]


def kept_of(node: Node, scores: np.ndarray, ratio: float, group: tuple[int, int] | None) -> np.ndarray:
    """True for the weights that stay; of equals the first ones."""
    if group is None:
        wanted = max(1, scores.size - round(scores.size * ratio))
        order = np.argsort(-scores.ravel(), kind="stable")[:wanted]
        kept = np.zeros(scores.size, bool)
        kept[order] = True
        return kept.reshape(scores.shape)
    count, size = group
    axis = 1 if node.op == "Conv" or node.attr("transB", 0) else scores.ndim - 2
    rows = np.moveaxis(scores, axis, -1)
    blocks = rows.reshape(-1, size)
    kept = np.zeros(blocks.shape, bool)
    np.put_along_axis(kept, np.argsort(-blocks, axis=1, kind="stable")[:, :count], True, axis=1)
    return np.moveaxis(kept.reshape(rows.shape), -1, axis)


def stored_bytes(size: int, share: float) -> int:
    """Of so many float32 weights of which this share is left."""
    return math.ceil(size / 8) + math.ceil(size * share) * 4 + OVERHEAD_BYTES


def store(edit: Edit, graph: Graph, node: Node, kept: np.ndarray) -> None:
    """The layer's weights from a mask of bits and the values that are left."""
    weight = graph.params[node.inputs[1]]

    def emit(op: str, *inputs: str, **attrs: object) -> str:
        return edit.emit(op, inputs, attrs=attrs, name=part(node, "unpack"), like=node)

    def param(hint: str, array: np.ndarray) -> str:
        return edit.param(part(node, hint), array)

    mask = param("mask", pack(kept.ravel().astype(np.uint8), 1))
    shifted = emit("BitShift", mask, param("shifts", np.arange(8, dtype=np.uint8)), direction="RIGHT")
    bits = emit("Reshape", emit("BitwiseAnd", shifted, param("one", np.array([1], np.uint8))), param("flat", np.array([-1])))
    if kept.size % 8:
        bits = emit("Slice", bits, param("first", np.array([0])), param("end", np.array([kept.size])))
    counts = emit("CumSum", emit("Cast", bits, to=onnx_dtype("int32")), param("axis", np.array(0, np.int32)))
    places = emit("Max", emit("Sub", counts, param("before", np.array(1, np.int32))), param("least", np.array(0, np.int32)))
    values = emit("Gather", param("values", weight[kept]), places)
    dense = emit("Mul", values, emit("Cast", bits, to=onnx_dtype("float32")))
    edit.forward(node.inputs[1], emit("Reshape", dense, param("shape", np.array(weight.shape))))
