"""Indices that come with the data: kept inside of the tensor, since a kernel that trusts them reads or writes foreign memory.

ONNX leaves an index out of bounds undefined and ONNX Runtime refuses it; a kernel cannot, so it takes the nearest valid one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hwopt.backends.tvm.layout import Expr, constant
from hwopt.ir import Graph, Node

ALONG_AXIS = ("Gather", "GatherElements", "ScatterElements")
TUPLES = ("GatherND", "ScatterND")


def bounded(builder: Any, graph: Graph, node: Node, inputs: list[Expr | None]) -> list[Expr | None]:
    """The inputs with the indices of a gather or scatter clipped to [-size, size - 1]; constant indices stay."""
    if node.op not in (*ALONG_AXIS, *TUPLES) or inputs[1] is None or graph.constant(node.inputs[1]) is not None:
        return inputs
    sizes = _sizes(graph, node)
    if not sizes.size or not sizes.all():
        return inputs
    from tvm import relax

    dtype = str(inputs[1].ty.dtype)
    low, high = (constant(bound.astype(dtype)) for bound in (-sizes, sizes - 1))
    clipped = builder.emit(relax.op.minimum(relax.op.maximum(inputs[1], low), high))
    return [inputs[0], clipped, *inputs[2:]]


def take(builder: Any, call: Any) -> Expr:
    """How relax.take is computed: as TVM's own "fast" way, whose warning of indices out of bounds is none for bounded ones."""
    return builder.call_te(_taken, *call.args, int(call.attrs.axis), primfunc_name_hint="take")


def _taken(data: Any, indices: Any, axis: int) -> Any:
    from tvm import te

    rank = len(indices.shape)

    def element(*at: Any) -> Any:
        return data(*at[:axis], indices(*at[axis : axis + rank]), *at[axis + rank :])

    return te.compute([*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]], element, name="T_take", tag="injective")


def _sizes(graph: Graph, node: Node) -> np.ndarray:
    """The extent that each index counts in: one number, or one for each column of index tuples."""
    shape = graph.tensor(node.inputs[0]).dims
    if node.op in ALONG_AXIS:
        return np.array(shape[node.attr("axis", 0)] if shape else 0, np.int64)
    batch = node.attr("batch_dims", 0)
    columns = graph.tensor(node.inputs[1]).dims[-1]
    return np.array(shape[batch : batch + columns], np.int64)
