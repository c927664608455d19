"""Pad nodes that repeat what lies at the borders (reflect, edge, wrap), in either order of axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hwopt.backends.tvm.layout import Values, dims_of, to_last
from hwopt.ir import Graph, Node

MODES = ("reflect", "edge", "wrap")


def emit(graph: Graph, node: Node, values: Values, builder: Any) -> bool:
    """Emit the node; False where it is none of these, or its sizes are not known."""
    mode = node.attr("mode", "constant")
    pads = pads_of(graph, node) if node.op == "Pad" and mode in MODES else None
    if pads is None:
        return False
    dims = graph.tensor(node.inputs[0]).dims
    left = [size + min(before, 0) + min(after, 0) for size, (before, after) in zip(dims, pads, strict=True)]
    if min(left, default=1) < 1 or (mode == "reflect" and any(max(pair) >= most for pair, most in zip(pads, left, strict=True))):
        return False  # more than is there: reflected several times
    last = len(dims) > 2 and values.is_last(node.inputs[0])
    data = values.get(node.inputs[0], last)
    ordered = [pads[axis] for axis in to_last(len(dims))] if last else pads
    values.put(node.output, builder.emit_te(_padded, data, ordered, dims_of(data), mode, primfunc_name_hint=f"pad_{mode}"), last)
    return True


def pads_of(graph: Graph, node: Node) -> list[tuple[int, int]] | None:
    """(before, after) of every axis; None where they are computed."""
    kind = graph.tensor(node.inputs[0])
    given = graph.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    named = node.inputs[3] if len(node.inputs) > 3 else ""
    axes = graph.constant(named) if named else None
    if given is None or not kind.static or (named and axes is None):
        return None
    rank, numbers = len(kind.dims), [int(pad) for pad in given]
    chosen = range(rank) if axes is None else [int(axis) % rank for axis in axes]
    found = [(0, 0)] * rank
    for place, axis in enumerate(chosen):
        found[axis] = (numbers[place], numbers[place + len(numbers) // 2])
    return found


def _padded(data: Any, pads: Sequence[tuple[int, int]], dims: Sequence[int], mode: str) -> Any:
    from tvm import te

    shape = [size + before + after for size, (before, after) in zip(dims, pads, strict=True)]

    def element(*indices: Any) -> Any:
        places = zip(indices, pads, dims, strict=True)
        return data(*(_source(index, pair, size, mode) if any(pair) else index for index, pair, size in places))

    return te.compute(shape, element, f"pad_{mode}")


def _source(index: Any, pads: tuple[int, int], size: int, mode: str) -> Any:
    """The place in the data of a result along one axis; what negative pads take away is not there to be repeated."""
    from tvm import tirx

    before, after = pads
    first, last = max(0, -before), size - 1 + min(0, after)
    place = index - before
    if mode == "edge":
        return tirx.Max(tirx.Min(place, last), first)
    if mode == "wrap":
        return first + tirx.floormod(place - first, last - first + 1)
    place = tirx.Max(place, 2 * first - place)
    return tirx.Min(place, 2 * last - place)
