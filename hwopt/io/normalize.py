"""One spelling for what ONNX can say in several ways."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from hwopt.io.proto import dense
from hwopt.ir import Graph, Node, of_op

_WINDOWED = ("Conv", "ConvInteger", "QLinearConv", "MaxPool", "AveragePool", "LpPool", "ConvTranspose")
_POOLS = ("MaxPool", "AveragePool", "LpPool")


def constants_to_params(graph: Graph) -> Graph:
    """`Constant -> y` becomes the parameter y, in all of its forms (Paddle keeps every weight in one)."""
    edit = graph.edit()
    for node in of_op(graph, "Constant"):
        array = _constant(node)
        if array is not None and node.output not in graph.outputs:
            edit.forward(node, edit.param(node.output + "_const", array))
    return edit.finish("constants-to-params")


def _constant(node: Node) -> np.ndarray | None:
    for key, value in node.attrs.items():
        if key == "value":
            return np.asarray(value)
        if key in ("value_float", "value_floats"):
            return np.array(value, np.float32)
        if key in ("value_int", "value_ints"):
            return np.array(value, np.int64)
        if key in ("value_string", "value_strings"):
            return np.array(value, object)
        if key == "sparse_value" and isinstance(value, onnx.AttributeProto):
            return dense(value.sparse_tensor)
    return None


def drop_identities(graph: Graph) -> Graph:
    """`Identity(x) -> y`: whoever reads y reads x; only a graph output that is an input or a parameter keeps its Identity."""
    edit = graph.edit()
    for node in of_op(graph, "Identity"):
        source = node.inputs[0]
        if node.output not in graph.outputs or (source in graph.producer and source not in graph.outputs):
            edit.forward(node, source)
    return edit.finish("drop-identities")


def resolve_auto_pad(graph: Graph) -> Graph:
    """`auto_pad` becomes `pads` wherever the sizes are static; what stays open keeps its auto_pad."""
    edit = graph.edit()
    for node in of_op(graph, *_WINDOWED):
        pads = _pads(graph, node)
        if pads is not None:
            gone = ("auto_pad", "pads", "output_shape", *(("ceil_mode",) if _same(node) else ()))
            attrs = {key: value for key, value in node.attrs.items() if key not in gone}
            edit.replace(node, attrs={**attrs, "pads": pads})
    return edit.finish("resolve-auto-pad")


def _same(node: Node) -> bool:
    return node.attr("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER")


def _pads(graph: Graph, node: Node) -> tuple[int, ...] | None:
    """The explicit pads, beginnings first; None if there is nothing to resolve or sizes are unknown."""
    mode = node.attr("auto_pad", "NOTSET")
    asked = node.op == "ConvTranspose" and "output_shape" in node.attrs
    size = graph.tensor(node.inputs[0]).shape
    if (mode == "NOTSET" and not asked) or size is None:
        return None
    spatial = size[2:]
    if mode == "VALID" and not asked:
        return (0,) * (2 * len(spatial))
    if any(not isinstance(dim, int) for dim in spatial):
        return None
    sizes = [dim for dim in spatial if isinstance(dim, int)]
    kernel = _kernel(graph, node, len(sizes))
    if kernel is None:
        return None
    totals = _transposed_totals(node, sizes, kernel) if node.op == "ConvTranspose" else _totals(node, sizes, kernel)
    return None if totals is None else _split(totals, mode)


def _kernel(graph: Graph, node: Node, rank: int) -> list[int] | None:
    """What a window spans, holes included; None where ONNX Runtime reads SAME with holes in its own way."""
    position = 3 if node.op == "QLinearConv" else 1
    shape: Sequence[object] | None = node.attr("kernel_shape")
    if shape is None:
        shape = (graph.tensor(node.inputs[position]).shape or ())[2:]
    dilations = node.attr("dilations", (1,) * rank)
    if len(shape) != rank or len(dilations) != rank or (node.op in _POOLS and any(d != 1 for d in dilations)):
        return None
    sizes = [size for size in shape if isinstance(size, int)]
    return [(k - 1) * d + 1 for k, d in zip(sizes, dilations, strict=True)] if len(sizes) == rank else None


def _totals(node: Node, sizes: list[int], kernel: list[int]) -> list[int] | None:
    """None where a stride far above the window leaves more than one element over: runtimes disagree which they skip."""
    strides = node.attr("strides", (1,) * len(sizes))
    totals = [(-(-n // s) - 1) * s + k - n for n, k, s in zip(sizes, kernel, strides, strict=True)]
    return None if min(totals) < -1 else [max(0, total) for total in totals]


def _transposed_totals(node: Node, sizes: list[int], kernel: list[int]) -> list[int] | None:
    rank = len(sizes)
    strides = node.attr("strides", (1,) * rank)
    extra = node.attr("output_padding", (0,) * rank)
    wanted = node.attr("output_shape", tuple(n * s for n, s in zip(sizes, strides, strict=True)))[-rank:]
    totals = [s * (n - 1) + e + k - w for n, k, s, e, w in zip(sizes, kernel, strides, extra, wanted, strict=True)]
    return None if any(total < 0 for total in totals) else totals


def _split(totals: list[int], mode: str) -> tuple[int, ...]:
    """SAME_UPPER puts the odd one at the end, everything else at the beginning."""
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return (*small, *large) if mode == "SAME_UPPER" else (*large, *small)
