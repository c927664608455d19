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


# A pass that splits node `fc1` calls the new nodes `fc1:down`, `fc1:core`, ...; the one that computes the old result keeps
# the name. So a site of the original model names all of its parts later: factor fc1, then quantize{site=fc1}.
PART = ":"


def part(node: Node, suffix: str) -> str:
    """The name of a node that a pass splits off `node`: `fc1:down`."""
    return f"{node.name}{PART}{suffix}"


def descends(name: str, site: str) -> bool:
    """True if the node of this name is the site or was split off it."""
    return name == site or name.startswith(site + PART)


def descended(graph: Graph, site: str) -> tuple[Node, ...]:
    """What has become of a node: itself and the parts split off it, in graph order."""
    return tuple(node for node in graph.nodes if descends(node.name, site))
