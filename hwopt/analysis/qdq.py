"""Reading QuantizeLinear and DequantizeLinear: scales and zero points of quantized values."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from hwopt.analysis.constant import constant
from hwopt.analysis.memo import remembered
from hwopt.analysis.narrow import pairs_of_layer
from hwopt.ir import Graph, Node

INTEGERS = ("uint8", "int8")


@dataclass(frozen=True, eq=False)
class Quantization:
    """real = (value - zero_point) * scale. `scale` and `zero_point` are [] (whole tensor) or [n] along `axis`."""

    scale: np.ndarray
    zero_point: np.ndarray
    axis: int
    dtype: str  # of the integers

    @property
    def whole(self) -> bool:
        """True if one scale holds for the whole tensor."""
        return self.scale.size == 1

    def equals(self, other: Quantization | None) -> bool:
        """True if the same integers mean the same numbers (whole-tensor quantizations only)."""
        if other is None or not self.whole or not other.whole:
            return False
        same = float(self.scale.reshape(())) == float(other.scale.reshape(()))
        return same and self.dtype == other.dtype and int(self.zero_point.reshape(())) == int(other.zero_point.reshape(()))


def quantization(graph: Graph, node: Node | None) -> Quantization | None:
    """What a QuantizeLinear or DequantizeLinear says, if its parameters are constants; None for anything else.

    Blocked quantization (several scales along one axis) has no such form and gives None.
    """
    if node is None or node.op not in ("QuantizeLinear", "DequantizeLinear") or node.attr("block_size", 0):
        return None
    scale = graph.constant(node.inputs[1])
    integer = graph.tensor(node.inputs[0] if node.op == "DequantizeLinear" else node.output)
    if scale is None or scale.ndim > 1 or scale.dtype != np.float32:
        return None
    named = len(node.inputs) > 2 and node.inputs[2] != ""
    kind = integer.dtype if integer.dtype in ("uint8", "int8", "uint16", "int16") else "int32"
    zero_point = graph.constant(node.inputs[2]) if named else np.zeros(scale.shape, kind)
    if zero_point is None or zero_point.shape != scale.shape:
        return None
    rank = len(integer.shape or ())
    axis = node.attr("axis", 1)
    flat = scale.size == 1
    return Quantization(scale.reshape(()) if flat else scale, zero_point.reshape(()) if flat else zero_point,
                        axis + rank if axis < 0 else axis, integer.dtype)  # fmt: skip


def dequantized(graph: Graph, value: str) -> tuple[str, Quantization] | None:
    """The whole-tensor 8-bit value behind a dequantized one, and how to read it; None if there is none."""
    node = graph.producer.get(value)
    found = quantization(graph, node) if node is not None and node.op == "DequantizeLinear" else None
    if node is None or found is None or not found.whole or found.dtype not in INTEGERS:
        return None
    return node.inputs[0], found


def quantized_weight(graph: Graph, value: str, channel_axis: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The int8 array behind a dequantized constant and its scales [channels] (or []), if symmetric; else None.

    Weights of 4 bits are unpacked: the same kernels compute them.
    """
    node = graph.producer.get(value)
    found = quantization(graph, node) if node is not None and node.op == "DequantizeLinear" else None
    array = _decoded(graph, node.inputs[0]) if node is not None and found is not None else None
    array = array.astype(np.int8) if array is not None and array.dtype == ml_dtypes.int4 else array
    if found is None or array is None or array.dtype != np.int8 or np.any(found.zero_point):
        return None
    if not found.whole and found.axis != channel_axis % array.ndim:
        return None
    return array, found.scale


def narrow_weights(graph: Graph, layer: Node) -> int:
    """How many pairs of products with the layer's dequantized constant weights add up in 16 bits (analysis.narrow)."""
    node = graph.producer.get(layer.inputs[1])
    array = _decoded(graph, node.inputs[0]) if node is not None and node.op == "DequantizeLinear" else None
    if array is None or array.dtype not in (np.int8, ml_dtypes.int4):
        return 0
    return pairs_of_layer(array, layer)


_DECODING = ("Gather", "GatherElements", "Reshape", "Transpose", "Cast", "Slice", "BitShift", "BitwiseAnd", "BitwiseOr")


@remembered
def _decoded(graph: Graph, value: str) -> np.ndarray | None:
    """A parameter, or what is looked up in an integer codebook and nothing else; None for computed values."""
    return constant(graph, value, _DECODING)
