"""NonMaxSuppression as TVM's machine can run it: what it gets wrong is written otherwise, or refused."""

from __future__ import annotations

import numpy as np

from hwopt.ir import Graph, Node, of_op, scalar

TINY = 1e-30  # for a threshold of overlap of 0, which TVM takes for none
MOVES = (
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Transpose", "Slice", "Split", "Gather", "GatherElements", "TopK",
    "Concat", "Cast", "ReduceMax", "ReduceMin", "ReduceMean", "Max", "Mul", "Expand", "DequantizeLinear", "QuantizeLinear",
)  # fmt: skip
POSITIVE = ("Sigmoid", "Softmax", "HardSigmoid", "Relu", "Exp", "Softplus", "Abs")
SEVERAL = ("Concat", "Max", "Mul")  # of which all inputs count


def wrong_suppression(graph: Graph, node: Node) -> str:
    """Why TVM would keep other boxes, or ""."""
    given = [value for value in node.inputs[2:5] if value]
    if any(graph.constant(value) is None for value in given):
        return "TVM reads thresholds of a suppression when it compiles: they must be constants"
    threshold = _threshold(graph, node)
    if threshold is not None and threshold >= 0:
        return ""
    return "" if _positive(graph, node.inputs[1], 0) else "TVM drops boxes with negative scores"


def _threshold(graph: Graph, node: Node) -> float | None:
    return scalar(graph, node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] else None


def _positive(graph: Graph, value: str, depth: int) -> bool:
    """True if the value cannot be negative."""
    array, node = graph.constant(value), graph.producer.get(value)
    if array is not None:
        return bool((array >= 0).all())
    if node is None or node.domain or depth > 100:
        return False
    if node.op in POSITIVE or (node.op == "Clip" and len(node.inputs) > 1 and (scalar(graph, node.inputs[1]) or -1) >= 0):
        return True
    sources = node.inputs if node.op in SEVERAL else node.inputs[:1]
    return node.op in MOVES and all(_positive(graph, one, depth + 1) for one in sources)


def bounded_suppressions(graph: Graph) -> Graph:
    """No more boxes than there are (exporters write the largest integer), and thresholds that TVM takes as ONNX does."""
    edit = graph.edit()
    for node in of_op(graph, "NonMaxSuppression"):
        boxes = graph.tensor(node.inputs[0]).shape
        count = graph.constant(node.inputs[2]) if len(node.inputs) > 2 else None
        overlap = scalar(graph, node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] else 0.0
        inputs = [*node.inputs, *[""] * (5 - len(node.inputs))]
        if count is not None and boxes and isinstance(boxes[1], int) and count.reshape(-1)[0] > boxes[1]:
            inputs[2] = edit.param(f"{node.name}_count", np.array([boxes[1]], np.int64))
        if overlap == 0.0:
            inputs[3] = edit.param(f"{node.name}_overlap", np.array([TINY], np.float32))
        if (_threshold(graph, node) or 0.0) < 0:
            inputs[4] = ""
        while not inputs[-1]:
            inputs.pop()
        if tuple(inputs) != node.inputs:
            edit.replace(node, inputs=tuple(inputs))
    return edit.finish("bounded-suppressions")
