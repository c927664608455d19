"""Sizes that ONNX's shape inference gets otherwise than ONNX Runtime, whose results hwopt promises.

Resize by scales: ONNX Runtime multiplies in float32, so that ten rows by 1.3 are 13; ONNX in float64, which makes 12.
Pools with ceil_mode: ONNX Runtime drops a last window that starts behind the data, as torch does; ONNX counts it up to opset 21.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hwopt.ir.graph import Graph, Node
from hwopt.ir.types import Dim, TensorType

POOLS = ("MaxPool", "AveragePool", "LpPool")
SCALED = ("Resize", "Upsample")
WITH_REGION = 11  # the opset in which Resize got its region of interest in front of the scales


def corrected(graph: Graph) -> Mapping[str, TensorType]:
    """Value -> its type in ONNX Runtime, for all whose inferred type is another one."""
    found = {}
    for node in graph.nodes:
        if node.domain not in ("", "ai.onnx") or node.op not in (*POOLS, *SCALED):
            continue
        shape, out = (graph.tensor(value).shape for value in (node.inputs[0], node.output))
        if shape is None or out is None or len(shape) != len(out):
            continue
        right = _resized(graph, node, shape) if node.op in SCALED else _pooled(node, shape)
        merged = tuple(old if new is None else new for old, new in zip(out, right, strict=True))
        if merged != out:
            found.update({value: TensorType(graph.tensor(value).dtype, merged) for value in node.outputs if value})
    return found


def _pooled(node: Node, shape: Sequence[Dim]) -> list[Dim]:
    if not node.attr("ceil_mode", 0) or node.attr("auto_pad", "NOTSET") != "NOTSET":
        return [None] * len(shape)
    counts = (windows(node, axis, size) if isinstance(size, int) else None for axis, size in enumerate(shape[2:]))
    return [None, None, *counts]


def windows(node: Node, axis: int, size: int) -> int:
    """How many a pool with ceil_mode and explicit pads has along an axis of the image of this size."""
    kernel = node.attr("kernel_shape")
    rank = len(kernel)
    pads = node.attr("pads", (0,) * 2 * rank)
    stride, hole = (node.attr(key, (1,) * rank)[axis] for key in ("strides", "dilations"))
    room = size + pads[axis] + pads[rank + axis] - (kernel[axis] - 1) * hole - 1
    count = -(-room // stride) + 1
    return int(count - 1 if (count - 1) * stride >= size + pads[axis] else count)


def _resized(graph: Graph, node: Node, shape: Sequence[Dim]) -> list[Dim]:
    place = 2 if node.op == "Resize" and graph.opsets.get("", WITH_REGION) >= WITH_REGION else 1
    scales = graph.constant(node.inputs[place]) if len(node.inputs) > place else node.attr("scales")
    axes = [axis % len(shape) for axis in node.attr("axes", range(len(shape)))]
    found: list[Dim] = [None] * len(shape)
    if scales is None or np.size(scales) != len(axes):
        return found
    for axis, scale in zip(axes, np.asarray(scales, np.float32), strict=True):
        size = shape[axis]
        found[axis] = int(np.floor(np.float32(size) * scale)) if isinstance(size, int) else None
    return found
