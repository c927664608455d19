"""Which layers can be quantized, and their weights: int8, symmetric, one scale per output channel; int32 biases."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from hwopt.analysis.memo import remembered
from hwopt.analysis.narrow import NARROW
from hwopt.analysis.regions import constant_nodes, integer_operands
from hwopt.errors import ModelError
from hwopt.ir import Graph, Node
from passes._pairs import paired
from passes._rounding import scales_of

OPS = ("Conv", "Gemm", "MatMul", "ConvTranspose")
ACCUMULATOR = 2**31 - 1
PRODUCT = 255 * 127  # the largest |activation x weight| that one accumulation adds
TINY = float(np.finfo(np.float32).tiny)
QUANTIZED = "is quantized already"

_constants = remembered(constant_nodes)


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer that integer kernels can compute. Without `weight`, the right side is computed too (attention).

    `weight` is float32 with the output channels on `axis` (None: one scale for all); `bias` is [channels]. Where weights are
    looked up in a codebook, `lookup` are the nodes from the Gather on, and `weight` is the codebook.
    """

    node: Node
    weight: np.ndarray | None = None
    axis: int | None = None
    bias: np.ndarray | None = None
    lookup: tuple[Node, ...] = ()
    reach: float = 0.0  # the largest |sum of products| that the accumulators can meet


@dataclass(frozen=True, eq=False)
class Integers:
    """int8 or int4 weights with their scales ([channels] or []), and int32 biases that count in steps of input x weight scale."""

    weight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray | None
    bias_scale: np.ndarray
    shift: np.ndarray | None = None  # the mean error of the output that the bias makes up for, [channels]


def layer_of(graph: Graph, node: Node) -> Layer | str:
    """The layer, or why it must stay float."""
    reason = unfit(graph, node)
    if reason:
        return reason
    weight = graph.constant(node.inputs[1])
    if weight is not None:
        return _constant(graph, node, weight)
    lookup = lookup_of(graph, node.inputs[1])
    if lookup:
        return _weighted(graph, node, graph.params[lookup[0].inputs[0]], None, lookup)
    if node.op != "MatMul":
        return "weights are computed"
    depth = (graph.tensor(node.inputs[0]).shape or (None,))[-1]
    if not isinstance(depth, int):
        return "the length of its dot products is not known"
    return Layer(node, reach=depth * PRODUCT) if depth * PRODUCT <= ACCUMULATOR else _overflow(depth)


def lookup_of(graph: Graph, value: str) -> tuple[Node, ...]:
    """The nodes that look a weight up in a float codebook, Gather first; () if it is computed in another way."""
    chain = [graph.producer.get(value)]
    while chain[0] is not None and chain[0].op in ("Reshape", "Transpose"):
        chain.insert(0, graph.producer.get(chain[0].inputs[0]))
    nodes = tuple(node for node in chain if node is not None)
    found = len(nodes) == len(chain) and nodes[0].op in ("Gather", "GatherElements")
    codebook = graph.constant(nodes[0].inputs[0]) if found else None
    constant = codebook is not None and codebook.dtype == np.float32 and nodes[-1].name in _constants(graph)
    return nodes if constant else ()


def unfit(graph: Graph, node: Node) -> str:
    """What rules the node out, whatever its weights are."""
    if node.op not in OPS or node.domain not in ("", "ai.onnx"):
        return f"{node.op} has no integer kernel"
    if integer_operands(graph, node) is not None:
        return QUANTIZED
    data = graph.tensor(node.inputs[0])
    if node.inputs[0] in graph.params:
        return "its data are constant: the weights stand on the left"
    if data.dtype != "float32":
        return f"its data are {data.dtype}, not float32"
    if node.op in ("Conv", "ConvTranspose") and len(data.shape or ()) not in (3, 4):
        return f"there is no integer kernel for convolutions of {data}"
    if node.op == "Gemm" and node.attr("transA", 0):
        return "its data are transposed (transA)"
    return ""


def _constant(graph: Graph, node: Node, weight: np.ndarray) -> Layer | str:
    if weight.dtype != np.float32:
        return f"its weights are {weight.dtype}, not float32"
    if node.op == "MatMul" and weight.ndim < 2:
        return "it multiplies with a vector"
    if node.op == "ConvTranspose":  # with groups, ONNX has a scale per channel of one group only, which is shared by all
        return _weighted(graph, node, weight, 1 if node.attr("group", 1) == 1 else None, ())
    rows = node.op == "Conv" or bool(node.attr("transB", 0))
    return _weighted(graph, node, weight, 0 if rows else weight.ndim - 1, ())


def _weighted(graph: Graph, node: Node, weight: np.ndarray, axis: int | None, lookup: tuple[Node, ...]) -> Layer | str:
    if not np.isfinite(weight).all():
        raise ModelError("the weights hold NaN or infinity", place=f"value {node.inputs[1]}")
    bias = _bias(graph, node)
    if isinstance(bias, str):
        return bias
    if node.op == "Gemm":
        weight = weight * np.float32(node.attr("alpha", 1.0))
        bias = None if bias is None else bias * np.float32(node.attr("beta", 1.0))
    depth, reach = _reach(graph, node, weight, axis)
    return Layer(node, weight, axis, bias, lookup, reach) if reach < ACCUMULATOR else _overflow(depth)


def _overflow(depth: int) -> str:
    return f"int32 accumulation could overflow: k = {depth}"


def _reach(graph: Graph, node: Node, weight: np.ndarray, axis: int | None) -> tuple[int, float]:
    """Products per output, and a bound of their sum's magnitude: by the real weights where the simple bound is too large."""
    shape = [dim for dim in graph.tensor(node.inputs[1]).shape or () if isinstance(dim, int)]
    if node.op == "ConvTranspose":  # at most: with strides, an output meets some of the taps only
        outputs, depth = shape[1], int(np.prod([*shape[:1], *shape[2:]])) // int(node.attr("group", 1))
    elif node.op == "Conv":
        outputs, depth = shape[0], int(np.prod(shape[1:]))
    else:
        outputs = shape[0] if node.attr("transB", 0) else shape[-1]
        depth = int(np.prod(shape[-2:])) // max(outputs, 1)
    if depth * PRODUCT < ACCUMULATOR or axis is None:
        return depth, float(depth * PRODUCT)
    steps = np.abs(np.moveaxis(weight, axis, 0).reshape(outputs, -1).astype(np.float64))
    largest = np.maximum(steps.max(1), TINY)
    return depth, float((255 * (steps.sum(1) / largest * 127 + depth / 2)).max())


def _bias(graph: Graph, node: Node) -> np.ndarray | str | None:
    """[channels], or why the integer kernel cannot add it."""
    name = node.inputs[2] if len(node.inputs) > 2 else ""
    if not name:
        return None
    bias = graph.constant(name)
    channels = (graph.tensor(node.output).shape or (None, None))[1]
    if bias is None or bias.dtype != np.float32 or not isinstance(channels, int):
        return "its bias is computed"
    if bias.size not in (1, channels) or (bias.size == channels and bias.shape[-1:] != (channels,)):
        return f"its bias has shape {list(bias.shape)}: not one number per channel"
    if not np.isfinite(bias).all():
        raise ModelError("the bias holds NaN or infinity", place=f"value {name}")
    return np.broadcast_to(bias.ravel(), (channels,))


def integers_of(layer: Layer, data_scale: float, mean: np.ndarray | None, *, reduce_range: bool, bits: int = 8) -> Integers:
    """The layer's numbers for inputs that count in steps of `data_scale`.

    A channel's scale is its largest |weight| / 127 (/ 64 with reduce_range: pairs of products then fit 16 bits, and two such
    pairs where that costs little, see passes/_pairs.py), in 4 bits the one with the least squared error
    (codebooks stay in 8 bits: they are small). It is made larger where the bias would not fit beside the products, and follows
    the bias where all weights are zero. With the `mean` of the input's channels, the bias makes up for what rounding the
    weights adds to the mean of the output.
    """
    coded = bits < 8 and not layer.lookup
    weight, limit = layer.weight, 2 ** (bits - 1) - 1 if coded else NARROW if reduce_range else 127
    if weight is None:
        raise ValueError(f"{layer.node} has no constant weights")
    others = tuple(axis for axis in range(weight.ndim) if axis != layer.axis) if layer.axis is not None else None
    scale = np.abs(weight).max(axis=others).astype(np.float64) / limit
    if coded:
        scale = scales_of(_channels(weight, layer.axis), bits, weight.size // max(scale.size, 1))[:, 0].reshape(scale.shape)
        scale = np.where(scale > 2 * TINY, scale, 0).astype(np.float64)
    bias = np.zeros(1) if layer.bias is None else np.abs(layer.bias.astype(np.float64))
    bias = bias.max() if scale.ndim == 0 else np.broadcast_to(bias, scale.shape)
    room = min(2.0**30, ACCUMULATOR - layer.reach)
    precise = np.where(bias > 0, bias / data_scale / 2.0**24, 1.0)
    scale = np.where(scale > 0, scale, precise)
    scale = np.maximum(scale, np.maximum(bias / room, TINY) / data_scale).astype(np.float32)
    shape = [-1 if axis == layer.axis else 1 for axis in range(weight.ndim)] if scale.ndim else ()
    steps = np.clip(np.rint(weight / scale.reshape(shape)), -limit, limit).astype(np.int8)
    if reduce_range and not coded and not layer.lookup:
        steps, scale = paired(weight, scale, layer.axis if scale.ndim else None, layer.node)
    bias_scale = (scale * np.float32(data_scale)).astype(np.float32)
    shift = None if mean is None else shift_of(layer, steps * scale.reshape(shape).astype(np.float64) - weight, mean)
    steps = steps.astype(ml_dtypes.int4) if coded else steps
    return Integers(steps, scale, _bias_steps(layer, shift, bias_scale), bias_scale, shift)


def _channels(weight: np.ndarray, axis: int | None) -> np.ndarray:
    """[channels, all others] of weights; one row where all share a scale."""
    return weight.reshape(1, -1) if axis is None else np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)


def shift_of(layer: Layer, error: np.ndarray, mean: np.ndarray) -> np.ndarray | None:
    """What an error of the weights adds to the mean of each output channel, E[y_q - y]: error @ E[x].

    Nagel et al., "Data-free quantization through weight equalization and bias correction", 2019 (here with measured means).
    """
    node = layer.node
    if layer.lookup or (node.op == "MatMul" and error.ndim != 2):
        return None
    if node.op == "ConvTranspose":
        return _transposed_shift(node, error, mean)
    if node.op != "Conv":
        return (error if node.attr("transB", 0) else error.T) @ mean
    per_input = error.reshape(*error.shape[:2], -1).sum(2)
    groups = int(node.attr("group", 1))
    return (per_input * np.repeat(mean.reshape(groups, -1), len(per_input) // groups, axis=0)).sum(1)


def _transposed_shift(node: Node, error: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Each output meets one of `strides` taps along an axis: the mean over all of them."""
    per_input = error.reshape(*error.shape[:2], -1).sum(2) / float(np.prod(node.attr("strides", (1,))))
    groups = int(node.attr("group", 1))
    return np.einsum("gkn,gk->gn", per_input.reshape(groups, -1, per_input.shape[1]), mean.reshape(groups, -1)).ravel()


def _bias_steps(layer: Layer, shift: np.ndarray | None, scale: np.ndarray) -> np.ndarray | None:
    bias = layer.bias
    if shift is not None and layer.node.op != "MatMul":
        bias = -shift if bias is None else bias - shift
    if bias is None:
        return None
    return np.clip(np.rint(bias / scale.astype(np.float64)), -ACCUMULATOR, ACCUMULATOR).astype(np.int32)
