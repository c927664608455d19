"""Reductions over the image that the pool template does not compute, channels last."""

from __future__ import annotations

from typing import Any

from hwopt.analysis.regions import reduces_image
from hwopt.backends.tvm import functions
from hwopt.backends.tvm.layout import Values
from hwopt.ir import Graph, Node

REDUCE = {"ReduceMean": "mean", "ReduceSum": "sum", "ReduceMax": "max", "ReduceMin": "min"}


def emit(graph: Graph, node: Node, values: Values, builder: Any) -> bool:
    """Emit a reduction over the image channels last; False where it is none."""
    if node.op in ("GlobalAveragePool", "GlobalMaxPool"):
        rank = len(graph.tensor(node.inputs[0]).dims)
        if rank < 3:
            return False
        return _reduce(node, values, builder, "mean" if node.op == "GlobalAveragePool" else "max", tuple(range(2, rank)), True)
    if node.op in REDUCE and values.is_last(node.inputs[0]):
        axes = tuple(range(2, len(graph.tensor(node.inputs[0]).dims)))
        return reduces_image(graph, node) and _reduce(
            node, values, builder, REDUCE[node.op], axes, bool(node.attr("keepdims", 1))
        )
    return False


def _reduce(node: Node, values: Values, builder: Any, how: str, axes: tuple[int, ...], keep: bool) -> bool:
    from tvm import relax

    data = values.get(node.inputs[0], True)
    ordered = how in ("max", "min") and str(data.ty.dtype) == "float32"
    data = functions.mapped(builder, data, functions.ordered, "ordered") if ordered else data
    result = builder.emit(getattr(relax.op, how)(data, [axis - 1 for axis in axes], keepdims=keep))
    result = functions.mapped(builder, result, functions.disordered, "disordered") if ordered else result
    values.put(node.output, result, keep)
    return True
