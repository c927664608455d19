"""Blocks of layers that are rounded together: what lies between two places where one value is all that goes on.

A residual block, the two halves of a transformer layer, or a few layers in a row where nothing branches off.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from hwopt.ir import Graph, Node

LAYERS = 3  # of a chain without branches, in one block: as many as a bottleneck has


@dataclass(frozen=True)
class Block:
    """`layers` in graph order, and the node whose output is to be right; none where the block ends in no such node."""

    layers: tuple[str, ...]
    end: str = ""


@dataclass
class _Open:
    """What the nodes so far have computed from layers and later ones read, by the number of reads to come."""

    graph: Graph
    reads: dict[str, int]

    def after(self, node: Node, is_layer: bool) -> None:
        """Take in what the node reads and writes."""
        descends = is_layer or any(value in self.reads for value in node.reads)
        for value in node.reads:
            if value in self.reads:
                self.reads[value] -= 1
                if not self.reads[value]:
                    del self.reads[value]
        if descends:
            for value in node.outputs:
                count = len(self.graph.users.get(value, ())) + (value in self.graph.outputs)
                if count:
                    self.reads[value] = count


def blocks(graph: Graph, quantized: Graph, names: Collection[str]) -> Iterator[Block]:
    """The layers `names` in blocks, in graph order; `quantized` must compute a block's end by the same operator."""
    still, end, joins = _Open(graph, {}), "", False
    layers: list[str] = []
    for node in graph.nodes:
        still.after(node, node.name in names)
        if node.name in names:
            layers.append(node.name)
        joins = joins or len(still.reads) > 1
        if set(still.reads) != {node.output}:
            continue
        if layers and _comparable(node, quantized):
            end = node.name
        if layers and (joins or still.reads[node.output] > 1 or len(layers) >= LAYERS):
            yield Block(tuple(layers), end)
            layers, end = [], ""
        joins = False
    if layers:
        yield Block(tuple(layers), end)


def _comparable(node: Node, quantized: Graph) -> bool:
    """True if both graphs have the node, and it computes floats."""
    same = quantized.node.get(node.name)
    return same is not None and same.op == node.op and quantized.tensor(same.output).dtype == "float32"
