"""Nodes that TVM would refuse or compute otherwise than ONNX says, written as others that it computes right.

RoiAlign         TVM shifts the regions by half a pixel before it scales them: they are scaled before
ScatterElements  TVM takes updates of fewer rows than the data for as many: each axis is cut to them and put together again
pools            a ceil_mode is pads at the end, and such pools are computed channels last
the rest         Celu, OneHot, exponents in integers, the statistics of LayerNormalization: spelled otherwise
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from hwopt.ir import Edit, Graph, Node
from hwopt.ir.sizes import windows

HALF_PIXEL = 16  # the opset from which on it is RoiAlign's default
AXES_AS_INPUT = 18  # the opset from which on ReduceMean has them
INT64 = 7  # ONNX's number for it


def mended(graph: Graph) -> Graph:
    """The graph with such nodes rewritten; the same one if there are none. Twice is once."""
    edit = graph.edit()
    for node in graph.nodes:
        if node.domain in ("", "ai.onnx") and node.op in RULES:
            RULES[node.op](graph, edit, node)
    return edit.finish("mend")


def _roi_align(graph: Graph, edit: Edit, node: Node) -> None:
    default = "half_pixel" if graph.opsets.get("", HALF_PIXEL) >= HALF_PIXEL else "output_half_pixel"
    scale = node.attr("spatial_scale", 1.0)
    if node.attr("coordinate_transformation_mode", default) != "half_pixel" or scale == 1:
        return
    factor = edit.param(f"{node.name}_scale", np.array(scale, graph.tensor(node.inputs[1]).dtype))
    rois = edit.emit("Mul", (node.inputs[1], factor), name=f"{node.name}_rois", like=node)
    edit.replace(node, inputs=(node.inputs[0], rois, *node.inputs[2:]), attrs={**node.attrs, "spatial_scale": 1.0})


def _scatter(graph: Graph, edit: Edit, node: Node) -> None:
    """`ScatterElements(x)` -> `Concat(ScatterElements(x[:n]), x[n:])` along the first axis of fewer updates, then the next."""
    data, indices = (graph.tensor(value) for value in node.inputs[:2])
    if not data.static or not indices.static or 0 in indices.dims:
        return
    axis = node.attr("axis", 0) % len(data.dims)
    short = [one for one, (n, size) in enumerate(zip(indices.dims, data.dims, strict=True)) if one != axis and n < size]
    value, rests = node.inputs[0], []
    for one in short:
        cut, size = indices.dims[one], data.dims[one]
        rests.append((one, _slice(edit, node, value, one, cut, size)))
        value = _slice(edit, node, value, one, 0, cut)
    if not rests:
        return
    found = edit.emit(node.op, (value, *node.inputs[1:]), attrs=node.attrs, name=f"{node.name}_part", like=node)
    for one, rest in reversed(rests[1:]):
        found = edit.emit("Concat", (found, rest), attrs={"axis": one}, name=f"{node.name}_whole", like=node)
    edit.replace(node, op="Concat", inputs=(found, rests[0][1]), attrs={"axis": rests[0][0]})


def _slice(edit: Edit, node: Node, value: str, axis: int, start: int, end: int) -> str:
    bounds = [edit.param(f"{node.name}_bounds", np.array([one], np.int64)) for one in (start, end, axis)]
    return edit.emit("Slice", (value, *bounds), name=f"{node.name}_cut", like=node)


def _pool(graph: Graph, edit: Edit, node: Node) -> None:
    data = graph.tensor(node.inputs[0])
    kernel = node.attr("kernel_shape", ())
    given = node.attr("ceil_mode", 0) and node.attr("auto_pad", "NOTSET") == "NOTSET" and data.static
    if not given or node.attr("count_include_pad", 0):
        return
    rank = len(kernel)
    pads = list(node.attr("pads", (0,) * 2 * rank))
    for axis, size in enumerate(data.dims[2:]):
        stride, hole = (node.attr(key, (1,) * rank)[axis] for key in ("strides", "dilations"))
        span = (windows(node, axis, size) - 1) * stride + (kernel[axis] - 1) * hole + 1
        pads[rank + axis] = max(pads[rank + axis], span - size - pads[axis])
    attrs = {key: value for key, value in node.attrs.items() if key != "ceil_mode"}
    edit.replace(node, attrs={**attrs, "pads": tuple(pads)})


def _celu(graph: Graph, edit: Edit, node: Node) -> None:
    alpha = edit.param(f"{node.name}_alpha", np.array(node.attr("alpha", 1.0), graph.tensor(node.inputs[0]).dtype))
    small = edit.emit("Div", (node.inputs[0], alpha), name=f"{node.name}_small", like=node)
    bent = edit.emit("Elu", (small,), name=f"{node.name}_bent", like=node)
    edit.replace(node, op="Mul", inputs=(bent, alpha), attrs={})


def _pow(graph: Graph, edit: Edit, node: Node) -> None:
    exponent, dtype = graph.constant(node.inputs[1]), graph.tensor(node.inputs[0]).dtype
    if exponent is None or exponent.dtype.kind not in "iu" or dtype not in ("float32", "float64"):
        return
    written = exponent.astype(dtype)
    if np.array_equal(written.astype(exponent.dtype), exponent):
        edit.replace(node, inputs=(node.inputs[0], edit.param(f"{node.name}_exponent", written)))


def _one_hot(graph: Graph, edit: Edit, node: Node) -> None:
    """`Where(Equal(Unsqueeze(indices), places), on, off)`, of the element type that the values have: TVM makes it float64."""
    indices = graph.tensor(node.inputs[0])
    depth, values = (graph.constant(value) for value in node.inputs[1:3])
    if depth is None or values is None or indices.shape is None:
        return
    count, rank = int(depth.reshape(())), len(indices.shape) + 1
    axis = node.attr("axis", -1) % rank
    given = {
        "axis": np.array([axis], np.int64), "zero": np.array(0), "depth": np.array(count),
        "places": np.arange(count).reshape([-1, *[1] * (rank - 1 - axis)]),
        "off": values[0], "on": values[1],
    }  # fmt: skip
    named = {key: edit.param(f"{node.name}_{key}", np.asarray(array)) for key, array in given.items()}
    wide = edit.emit("Cast", (node.inputs[0],), attrs={"to": INT64}, name=f"{node.name}_wide", like=node)
    at = edit.emit("Unsqueeze", (wide, named["axis"]), name=f"{node.name}_column", like=node)
    negative = edit.emit("Less", (at, named["zero"]), name=f"{node.name}_negative", like=node)
    behind = edit.emit("Add", (at, named["depth"]), name=f"{node.name}_behind", like=node)
    place = edit.emit("Where", (negative, behind, at), name=f"{node.name}_place", like=node)
    hot = edit.emit("Equal", (place, named["places"]), name=f"{node.name}_hot", like=node)
    edit.replace(node, op="Where", inputs=(hot, named["on"], named["off"]), attrs={})


def _layer_norm(graph: Graph, edit: Edit, node: Node) -> None:
    """The mean and the reciprocal of the deviation, where somebody reads them, by reductions of their own."""
    if len(node.outputs) < 2:
        return
    data, rank = graph.tensor(node.inputs[0]), len(graph.tensor(node.inputs[0]).shape or ())
    axes = range(node.attr("axis", -1) % rank, rank)
    new = graph.opsets.get("", AXES_AS_INPUT) >= AXES_AS_INPUT
    more = (edit.param(f"{node.name}_axes", np.array(axes)),) if new else ()
    attrs = {} if new else {"axes": tuple(axes)}
    mean = edit.emit("ReduceMean", (node.inputs[0], *more), attrs=attrs, name=f"{node.name}_mean", like=node)
    centred = edit.emit("Sub", (node.inputs[0], mean), name=f"{node.name}_centred", like=node)
    square = edit.emit("Mul", (centred, centred), name=f"{node.name}_square", like=node)
    variance = edit.emit("ReduceMean", (square, *more), attrs=attrs, name=f"{node.name}_variance", like=node)
    epsilon = edit.param(f"{node.name}_epsilon", np.array(node.attr("epsilon", 1e-5), data.dtype))
    root = edit.emit("Sqrt", (edit.emit("Add", (variance, epsilon), like=node),), like=node)
    found = (mean, edit.emit("Reciprocal", (root,), name=f"{node.name}_deviation", like=node))
    edit.replace(node, outputs=node.outputs[:1])
    for value, other in zip(node.outputs[1:], found, strict=False):
        if value:
            edit.forward(value, other)


RULES: Mapping[str, Callable[[Graph, Edit, Node], None]] = {
    "RoiAlign": _roi_align, "ScatterElements": _scatter, "MaxPool": _pool, "AveragePool": _pool, "Celu": _celu, "Pow": _pow,
    "OneHot": _one_hot, "LayerNormalization": _layer_norm,
}  # fmt: skip
WRITTEN_OTHERWISE = ("Celu",)  # TVM has no such operator and needs none
