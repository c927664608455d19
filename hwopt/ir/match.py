"""Small questions that passes ask of a Graph."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hwopt.ir.graph import Graph, Node


def of_op(graph: Graph, *ops: str) -> Iterator[Node]:
    """The nodes of these ONNX operators, in graph order."""
    return (node for node in graph.nodes if node.op in ops and node.domain in ("", "ai.onnx"))


def scalar(graph: Graph, value: str) -> float | None:
    """The number that a one-element parameter holds, else None."""
    array = graph.constant(value)
    if array is None or array.size != 1 or not np.issubdtype(array.dtype, np.number):
        return None
    return float(array.reshape(()))
