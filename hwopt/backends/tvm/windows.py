"""Pools -> the pool template, channels last; bfloat16 data, activations, quantization and rounding to bfloat16 are in it."""

from __future__ import annotations

import dataclasses
from typing import Any

from hwopt.analysis.bfloat16 import narrows, widened
from hwopt.analysis.qdq import Quantization, quantization
from hwopt.analysis.regions import Region, reduces_image
from hwopt.backends.tvm.kernels.spec import PoolSpec, Quantize, Step
from hwopt.backends.tvm.layout import Expr, dims_of, reshaped
from hwopt.backends.tvm.weighted import activation
from hwopt.ir import Graph, Node

BYTES = ("int8", "uint8")
LARGEST = ("MaxPool", "GlobalMaxPool")
POOLS = (*LARGEST, "AveragePool", "GlobalAveragePool")


def emit(lowering: Any, region: Region) -> bool:
    """Emit a region that is a pool of floats or bfloat16, or a maximum of bytes; False for all others."""
    graph, anchor = lowering.graph, region.anchor
    if region.integer or not _suits(graph, anchor):
        return False
    if anchor.op == "ReduceMean" and not lowering.values.is_last(anchor.inputs[0]):
        return False
    steps = _steps(graph, region)
    output = anchor.output if steps is None else region.output
    source = widened(graph, anchor.inputs[0]) or anchor.inputs[0]
    lowering.provide(anchor)
    data = lowering.values.get(source, True)
    _put(lowering, region, data, (output, graph.tensor(output).dtype), epilogue=steps or ())
    for node in region.epilogue if steps is None else ():
        lowering.node(node)
    return True


def _steps(graph: Graph, region: Region) -> tuple[Step, ...] | None:
    """What the kernel does with its results; None for what the template has no step for."""
    found: list[Step] = []
    for node in region.epilogue:
        scale = quantization(graph, node) if node.op == "QuantizeLinear" else None
        bounded = all(graph.constant(value) is not None for value in node.inputs[1:] if value)
        step: Step | None = activation(graph, node) if bounded else None
        if scale is not None and scale.whole:
            step = Quantize(float(scale.scale), int(scale.zero_point), scale.dtype)
        if step is None and not narrows(graph, node):
            return None
        found += [step] if step else []
    return tuple(found)


def emit_integer(lowering: Any, region: Region, source: str, before: Quantization) -> bool:
    """Emit a pool of quantized values whose result is quantized; False where the template has no form for it.

    A maximum that is quantized as what it is of stays as it is.
    """
    steps = _steps(lowering.graph, region)
    if not steps or not before.whole or not _suits(lowering.graph, region.anchor, before.dtype):
        return False
    scale, zero_point = float(before.scale), int(before.zero_point)
    same = region.anchor.op in LARGEST and steps == (Quantize(scale, zero_point, before.dtype),)
    quantized = {"scale": scale, "zero_point": zero_point, "epilogue": () if same else steps}
    data = lowering.values.get(source, True)
    _put(lowering, region, data, (region.output, lowering.graph.tensor(region.output).dtype), **quantized)
    return True


def _put(lowering: Any, region: Region, data: Expr, output: tuple[str, str], **more: Any) -> None:
    """The call of the kernel on data that lie channels last, its result as this value of this type."""
    node, dims = region.anchor, dims_of(data)
    spec = dataclasses.replace(_spec_of(node, dims, str(data.ty.dtype), output[1]), **more)
    place = [spec.out_height, spec.out_width] if len(dims) == 4 else [spec.out_width]
    found = lowering.templates.call_pool(spec, data, [spec.batch, *place, spec.channels], region.name)
    kept = bool(node.attr("keepdims", 1))
    lowering.values.put(output[0], found if kept else reshaped(lowering.builder, found, [dims[0], dims[-1]]), kept)


def _suits(graph: Graph, node: Node, quantized: str = "") -> bool:
    """True for a pool over images or lines whose windows all look at data, and of a kind that the template computes."""
    whole = node.op in ("GlobalAveragePool", "GlobalMaxPool") or (node.op == "ReduceMean" and reduces_image(graph, node))
    if not (whole or node.op in POOLS) or len(node.outputs) > 1:
        return False
    dims, out = graph.tensor(node.inputs[0]).dims, graph.tensor(node.output).dims
    dtype = quantized or graph.tensor(node.output).dtype
    if len(dims) not in (3, 4) or 0 in (*dims, *out) or node.attr("auto_pad", "NOTSET") != "NOTSET" or node.attr("ceil_mode", 0):
        return False
    if dtype == "float32" and node.op == "GlobalMaxPool":  # of which NaN is the largest
        return False
    if dtype != "float32" and not (dtype in BYTES and (quantized or node.op in LARGEST)):
        return False
    spec = _spec_of(node, [dims[0], *dims[2:], dims[1]], dtype, dtype)
    fits = (spec.out_height, spec.out_width) == ((1, out[2]) if len(out) == 3 else out[2:])
    return whole or (fits and 0 not in (*spec.taps(0), *spec.taps(1)))  # with holes they may step over a small image


def _spec_of(node: Node, dims: list[int], dtype: str, out_dtype: str) -> PoolSpec:
    """What the template is asked for; a pool over a line is one over an image of height 1."""
    line = len(dims) == 3
    height, width = 1 if line else dims[1], dims[-2]
    windowed = node.op in ("MaxPool", "AveragePool")
    kernel, strides, dilations = (_pair(node.attr(key, ()), line) for key in ("kernel_shape", "strides", "dilations"))
    pads = tuple(node.attr("pads", ())) or (0,) * (2 if line else 4)
    return PoolSpec(
        batch=dims[0], height=height, width=width, channels=dims[-1], kernel=kernel if windowed else (height, width),
        strides=strides, dilations=dilations, pads=(0, pads[0], 0, pads[1]) if line else (pads[0], pads[1], pads[2], pads[3]),
        function="max" if node.op in LARGEST else "average", include_pads=bool(node.attr("count_include_pad", 0)),
        data_dtype=dtype, out_dtype=out_dtype,
    )  # fmt: skip


def _pair(values: Any, line: bool) -> tuple[int, int]:
    given = tuple(values) or (1, 1)
    return (1, given[0]) if line else (given[0], given[1])
