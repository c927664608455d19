"""InstanceNormalization and GroupNormalization, channels last: two reductions, then a factor and a shift per channel.

The factor and the shift, and what follows element by element, become one kernel, as TVM fuses them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hwopt.backends.tvm.layout import Expr, Values, constant, dims_of
from hwopt.ir import Graph, Node

OPS = ("InstanceNormalization", "GroupNormalization")


def emit(graph: Graph, node: Node, values: Values, builder: Any) -> bool:
    """Emit the node; False where it is none of these, or its parameters are computed."""
    if node.op not in OPS or node.domain:
        return False
    kind = graph.tensor(node.inputs[0])
    given = [values.constant(value) for value in node.inputs[1:3]]
    if kind.dtype != "float32" or not kind.static or len(kind.dims) < 3 or 0 in kind.dims:
        return False
    channels = kind.dims[1]
    groups = channels if node.op == "InstanceNormalization" else node.attr("num_groups", 1)
    if any(array is None or array.size != channels for array in given):
        return False
    data = values.get(node.inputs[0], True)
    gamma, beta = (constant(np.asarray(array, np.float32).reshape(-1)) for array in given)
    values.put(node.output, _normalized(builder, data, (gamma, beta), groups, float(node.attr("epsilon", 1e-5))), True)
    return True


def _normalized(builder: Any, data: Expr, parameters: tuple[Expr, Expr], groups: int, epsilon: float) -> Expr:
    from tvm import relax

    op, gamma, beta = relax.op, *parameters
    mean = _mean(builder, data, groups)
    centred = builder.emit(op.subtract(data, mean))
    variance = _mean(builder, builder.emit(op.multiply(centred, centred)), groups)
    root = builder.emit(op.sqrt(op.add(variance, constant(np.array(epsilon, np.float32)))))
    scale = builder.emit(op.divide(gamma, root))
    shift = builder.emit(op.subtract(beta, builder.emit(op.multiply(mean, scale))))
    return builder.emit(op.add(builder.emit(op.multiply(data, scale)), shift))


def _mean(builder: Any, data: Expr, groups: int) -> Expr:
    """[n, ..., channels] -> [n, 1 ..., channels]: the mean of each channel's group, axis by axis, so that sums stay short."""
    from tvm import relax

    dims, op = dims_of(data), relax.op
    for axis in reversed(range(1, len(dims) - 1)):
        data = builder.emit(op.mean(data, [axis], keepdims=True))
    if groups == dims[-1]:
        return data
    parts = [dims[0], groups, dims[-1] // groups]
    data = builder.emit(op.mean(builder.emit(op.reshape(data, parts)), [2], keepdims=True))
    data = builder.emit(op.broadcast_to(data, parts))
    return builder.emit(op.reshape(data, [dims[0], *[1] * (len(dims) - 2), math.prod(parts[1:])]))
