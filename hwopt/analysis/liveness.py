"""How much activation memory a graph needs at once, before any kernel exists: the planner's estimate of the arena."""

from __future__ import annotations

from collections.abc import Mapping

from hwopt.analysis.memo import remembered
from hwopt.analysis.qdq import dequantized
from hwopt.analysis.regions import Region, regions
from hwopt.analysis.workload import is_view
from hwopt.ir import Graph


def peak_activation_bytes(graph: Graph) -> int:
    """Largest sum of bytes of values alive at one kernel."""
    return max(alive_bytes(graph).values(), default=0)


@remembered
def alive_bytes(graph: Graph) -> Mapping[str, int]:
    """Region -> bytes of the values alive while it runs, in running order; inputs and outputs of the network are the caller's
    and not counted.

    Values inside of a fused kernel never exist. Views share the memory of what they view, residual sums that of what they add
    where that is read no more. Values without a static shape count as nothing.
    """
    order = regions(graph)
    owner = _owners(graph, order)
    last: dict[str, int] = {}
    for index, region in enumerate(order):
        for value in region.inputs:
            if value in owner:
                last[owner[value]] = index
    external = {owner[value] for value in graph.outputs if value in owner}
    alive, found = 0, {}
    for index, region in enumerate(order):
        made = [v for v in region.outputs if owner.get(v) == v and v not in external]
        alive += sum(_bytes(graph, value) for value in made)
        over = owner.get(_addend(graph, region), "")
        in_place = over not in external and last.get(over) == index and [_bytes(graph, over)] == [_bytes(graph, v) for v in made]
        found[region.name] = alive - _bytes(graph, over) if in_place else alive
        done = [value for value, end in last.items() if end == index and value not in external]
        alive -= sum(_bytes(graph, value) for value in done)
        alive -= sum(_bytes(graph, value) for value in made if value not in last)
    return found


def _addend(graph: Graph, region: Region) -> str:
    """The value that a product's kernel adds to its results, as it lies in memory; "" where there is none."""
    if region.kind not in ("conv", "matmul"):
        return ""
    inside = {value for node in (region.anchor, *region.epilogue) for value in node.outputs}
    added = [value for node in region.epilogue if node.op == "Add" for value in node.inputs if value not in inside]
    full = [value for value in added if graph.tensor(value).shape == graph.tensor(region.anchor.output).shape]
    sources = [found[0] if (found := dequantized(graph, value)) else value for value in full]
    read = [found[0] if (found := dequantized(graph, value)) else value for value in region.anchor.inputs if value]
    return next((value for value in sources if value in region.inputs and value not in read), "")


def _owners(graph: Graph, order: tuple) -> dict[str, str]:
    """Value -> the value whose memory it uses: itself, or what a chain of views starts from."""
    owner: dict[str, str] = {}
    for region in order:
        source = owner.get(region.inputs[0]) if region.inputs and is_view(graph, region) else None
        owner.update({value: source or value for value in region.outputs})
    return owner


def _bytes(graph: Graph, value: str) -> int:
    kind = graph.tensor(value)
    return kind.bytes if kind.static and kind.dtype not in ("string", "undefined") else 0
