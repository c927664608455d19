"""CumSum nodes -> plain loops: TVM's importer would leave them to TVM's runtime, which a C library does not have."""

from __future__ import annotations

from typing import Any

from hwopt.backends.tvm.layout import Values
from hwopt.ir import Graph, Node


def emit(graph: Graph, node: Node, values: Values, builder: Any) -> bool:
    """Emit the node; False where it is none, or its axis is computed."""
    axis = graph.constant(node.inputs[1]) if node.op == "CumSum" else None
    if axis is None or not graph.tensor(node.inputs[0]).static or 0 in graph.tensor(node.inputs[0]).dims:
        return False
    from tvm import topi

    place, reverse = int(axis.reshape(())), bool(node.attr("reverse", 0))
    data = values.get(node.inputs[0])
    data = builder.emit_te(topi.flip, data, axis=place) if reverse else data
    exclusive = bool(node.attr("exclusive", 0))
    data = builder.emit_te(topi.cumsum, data, axis=place, exclusive=exclusive, primfunc_name_hint="cumsum")
    values.put(node.output, builder.emit_te(topi.flip, data, axis=place) if reverse else data)
    return True
