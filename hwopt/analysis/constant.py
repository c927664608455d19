"""Values that depend on parameters only, computed where an analysis has to know them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from types import MappingProxyType

import numpy as np

from hwopt.backends.ort import run
from hwopt.ir import Graph, Node


def constant(graph: Graph, value: str, operators: Collection[str] | None = None) -> np.ndarray | None:
    """The array of a value, or None if an input of the graph decides it, or an operator that is not among `operators`."""
    if value in graph.params:
        return graph.params[value]
    nodes: dict[str, Node] = {}
    waiting = [value]
    while waiting:
        name = waiting.pop()
        node = graph.producer.get(name)
        if name in graph.params or (node is not None and node.name in nodes):
            continue
        if node is None or (operators is not None and node.op not in operators):
            return None
        nodes[node.name] = node
        waiting.extend(node.reads)
    read = {name for node in nodes.values() for name in node.reads}
    params = MappingProxyType({name: array for name, array in graph.params.items() if name in read})
    ordered = tuple(node for node in graph.nodes if node.name in nodes)
    return run(dataclasses.replace(graph, inputs=(), outputs=(value,), nodes=ordered, params=params), {})[value]
