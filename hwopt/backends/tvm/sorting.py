"""TopK nodes -> the kernel that sorts, over the last axis; data along another one are transposed."""

from __future__ import annotations

import math

import numpy as np

from hwopt.backends.tvm.kernels import topk
from hwopt.backends.tvm.layout import OPAQUE, Expr, Values, constant
from hwopt.backends.tvm.support import sorts_here
from hwopt.backends.tvm.templates import Templates
from hwopt.ir import Graph, Node


def emit(graph: Graph, node: Node, values: Values, templates: Templates) -> bool:
    """Emit the node; False where it is none, or its sizes depend on the data."""
    if not sorts_here(graph, node):
        return False
    from tvm import relax

    dims = list(graph.tensor(node.inputs[0]).dims)
    axis, count = node.attr("axis", -1) % len(dims), int(graph.params[node.inputs[1]][0])
    order = [one for one in range(len(dims)) if one != axis] + [axis]
    data = values.get(node.inputs[0])
    moved = axis != len(dims) - 1
    data = templates.builder.emit(relax.op.permute_dims(data, order)) if moved else data
    rest = [dims[one] for one in order[:-1]]
    spec = topk.TopkSpec(math.prod(rest), dims[axis], count, bool(node.attr("largest", 1)))
    for name, expr in zip(node.outputs, _called(templates, spec, data, [*rest, count], node.name), strict=False):
        if name:
            back = sorted(range(len(dims)), key=order.__getitem__)
            values.put(name, templates.builder.emit(relax.op.permute_dims(expr, back)) if moved else expr)
    return True


def _called(templates: Templates, spec: topk.TopkSpec, data: Expr, shape: list[int], label: str) -> list[Expr]:
    """Values and places."""
    from tvm import relax

    builder = templates.builder
    if spec not in templates.row_kernels:
        symbol = f"topk_{len(templates.row_kernels)}"
        built = topk.build(spec, symbol).with_attr({"hwopt.template": 1, **OPAQUE})
        templates.row_kernels[spec] = builder.add_func(built, symbol)
    results = [relax.TensorType(shape, dtype) for dtype in ("float32", "int64")]
    arguments = relax.Tuple([data, constant(np.zeros(1, np.int32))])
    found = builder.emit(relax.call_tir(templates.row_kernels[spec], arguments, results), label)
    templates.labels[found.name] = label
    return [builder.emit(relax.TupleGetItem(found, index)) for index in (0, 1)]
