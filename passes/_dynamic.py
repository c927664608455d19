"""Dynamic 8 bits: every row of a product's data is brought to a fixed grid by its own largest magnitude, at run time.

    x @ W + b  ->  s = max|x| / 127 per row;  (DQ(Q(x / s)) @ DQ(w8)) * s + b

Q has the step 1 for all data, so what multiplies is the static integer kernel; ONNX's DynamicQuantizeLinear has one step for the
whole tensor and a zero point that kernels would have to correct with sums of weights at run time.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import numpy as np

from hwopt.ir import Edit, Graph, Node, part
from passes._quantize_layers import Layer, integers_of

TINY = 1e-30  # of a row of zeros
AXES_OPSET = 18  # made the axes of ReduceMax an input
OPS = ("MatMul", "Gemm")


def undynamic(graph: Graph, node: Node, layer: Layer) -> str:
    """Why a layer that integer kernels can compute has no dynamic form; empty if it has."""
    if node.op not in OPS:
        return f"is a {node.op}: dynamic quantization is for products of matrices"
    if layer.weight is None or layer.lookup:
        return "its weights are looked up or computed"
    return "" if graph.tensor(node.inputs[0]).shape else "the shape of its data is not known"


def dynamic(graph: Graph, layers: Iterable[Layer], activation: str, *, reduced: Container[str]) -> Edit:
    """All layers with data quantized by rows, as `activation`, which the target's kernels take; `reduced` get 7-bit weights."""
    edit = graph.edit()
    rows: dict[str, tuple[str, str]] = {}
    for layer in layers:
        node, value = layer.node, layer.node.inputs[0]
        if value not in rows:
            rows[value] = _rows(edit, graph, value, activation)
        data, step = rows[value]
        numbers = integers_of(layer, 1.0, None, reduce_range=node.name in reduced)
        given = edit.param(f"{node.inputs[1]}_int8", numbers.weight)
        names = [edit.param(f"{node.inputs[1]}_scale", numbers.scale)]
        names.append(edit.param(f"{node.inputs[1]}_zero_point", np.zeros(numbers.scale.shape, np.int8)))
        attrs = {"axis": layer.axis} if numbers.scale.ndim else {}
        weight = edit.emit("DequantizeLinear", [given, *names], attrs=attrs, name=f"{node.inputs[1]}_dequantize")
        plain = {key: one for key, one in node.attrs.items() if key not in ("alpha", "beta")}
        product = edit.fresh(f"{node.output}_product")
        edit.replace(node, inputs=(data, weight), outputs=(product,), attrs=plain)
        result = edit.emit("Mul", [product, step], name=part(node, "step"))
        if layer.bias is not None:
            bias = edit.param(f"{node.name}_bias", layer.bias.astype(np.float32))
            result = edit.emit("Add", [result, bias], name=part(node, "bias"))
        edit.forward(node.output, result)
    return edit


def _rows(edit: Edit, graph: Graph, value: str, activation: str) -> tuple[str, str]:
    """The value on the grid with the step 1, back as floats, and the step of each row."""

    def emit(op: str, *inputs: str, **attrs: object) -> str:
        return edit.emit(op, inputs, attrs=attrs, name=f"{value}_{op.lower()}")

    size = emit("Abs", value)
    if graph.opsets.get("", 0) >= AXES_OPSET:
        largest = emit("ReduceMax", size, edit.param(f"{value}_axes", np.array([-1])), keepdims=1)
    else:
        largest = emit("ReduceMax", size, axes=(-1,), keepdims=1)
    step = emit("Mul", largest, edit.param(f"{value}_share", np.array(1 / 127, np.float32)))
    step = emit("Max", step, edit.param(f"{value}_tiny", np.array(TINY, np.float32)))
    middle = np.array(128, np.uint8) if activation == "uint8" else np.array(0, np.int8)
    grid = edit.param(f"{value}_unit", np.array(1.0, np.float32)), edit.param(f"{value}_middle", middle)
    eight = emit("QuantizeLinear", emit("Div", value, step), *grid)
    return emit("DequantizeLinear", eight, *grid), step
