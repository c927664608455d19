"""Pools and means over the image, channels last."""

from __future__ import annotations

import math
from typing import Any

from hwopt.analysis.regions import reduces_image
from hwopt.backends.tvm import functions
from hwopt.backends.tvm.layout import Values
from hwopt.ir import Graph, Node

REDUCE = {"ReduceMean": "mean", "ReduceSum": "sum", "ReduceMax": "max", "ReduceMin": "min"}


def emit(graph: Graph, node: Node, values: Values, builder: Any) -> bool:
    """Emit a pool channels last; False where it is not one, or one that only TVM's converter knows."""
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
    dtype = graph.tensor(node.output).dtype
    windowed = node.op in ("MaxPool", "AveragePool") and len(node.outputs) == 1
    if windowed and (dtype.startswith("float") or (node.op == "MaxPool" and dtype in ("uint8", "int8"))):
        return _window(graph, node, values, builder)
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


def _window(graph: Graph, node: Node, values: Values, builder: Any) -> bool:
    from tvm import relax

    dims, out = graph.tensor(node.inputs[0]).dims, graph.tensor(node.output).dims
    if len(dims) != 4 or node.attr("auto_pad", "NOTSET") != "NOTSET" or 0 in out:
        return False
    kernel, strides = node.attr("kernel_shape"), node.attr("strides", (1, 1))
    pads, dilations = node.attr("pads", (0, 0, 0, 0)), node.attr("dilations", (1, 1))
    if node.attr("ceil_mode", 0) or any(_extent(dims, pads, kernel, strides, dilations, i) != out[2 + i] for i in (0, 1)):
        return False
    options = {"pool_size": kernel, "strides": strides, "padding": pads, "dilation": dilations, "layout": "NHWC"}
    data = values.get(node.inputs[0], True)
    if node.op == "MaxPool":
        result = relax.op.nn.max_pool2d(data, **options)
    else:
        result = relax.op.nn.avg_pool2d(data, count_include_pad=bool(node.attr("count_include_pad", 0)), **options)
    values.put(node.output, builder.emit(result), True)
    return True


def _extent(dims: Any, pads: Any, kernel: Any, strides: Any, dilations: Any, axis: int) -> int:
    room = dims[2 + axis] + pads[axis] + pads[2 + axis] - (kernel[axis] - 1) * dilations[axis] - 1
    return math.floor(room / strides[axis]) + 1
