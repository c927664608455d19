"""Regions anchored at a Conv, Gemm or MatMul -> one call of a kernel template with everything behind it fused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hwopt.analysis.bfloat16 import narrows, widened
from hwopt.analysis.gates import gate_slope, self_gated
from hwopt.analysis.qdq import Quantization, dequantized, quantization
from hwopt.analysis.regions import IntegerOperands, Region, integer_operands
from hwopt.backends.tvm import heads, transposed
from hwopt.backends.tvm.kernels import spec as step
from hwopt.backends.tvm.kernels.conv_transpose import tap_sums
from hwopt.backends.tvm.layout import Expr, Values, constant, to_last
from hwopt.ir import Graph, Node, numpy_dtype, scalar

Spec = step.ConvSpec | step.ConvTransposeSpec | step.MatmulSpec
Suits = Callable[[step.MatmulSpec, step.MatmulSpec], bool]


@dataclass
class Fused:
    """A region on its way to a kernel: steps behind the accumulators and the tensors that they read."""

    steps: list[step.Step] = field(default_factory=list)
    tensors: list[Expr] = field(default_factory=list)

    def add(self, one: step.Step, *tensors: Expr) -> None:
        self.steps.append(one)
        self.tensors.extend(tensors)


@dataclass(frozen=True)
class Kernel:
    """What a template is asked for, with its operands. `shape` is the result's as the kernel writes it."""

    spec: Spec
    data: Expr
    weights: Any  # a numpy array to pack, or the expression of a computed right side
    tensors: tuple[Expr, ...]
    shape: tuple[int, ...]
    dtype: str
    last: bool  # the result is channels last
    order: tuple[int, ...] = ()  # in which the axes of the result are the value's, where it lies otherwise


def weighted_kernel(graph: Graph, region: Region, values: Values, suits: Suits) -> Kernel | None:
    """The kernel of a region, or None where no template fits its anchor (three-dimensional convolutions ...).

    Products whose operands lie otherwise than `MatmulSpec` says by default are asked for where `suits(default, otherwise)`.
    """
    anchor = region.anchor
    if graph.tensor(anchor.output).dtype != "float32" or 0 in graph.tensor(anchor.output).dims:
        return None
    if len(anchor.inputs) > 2 and anchor.inputs[2] and values.constant(anchor.inputs[2]) is None:
        return None
    operands = integer_operands(graph, anchor) if region.integer else None
    if anchor.op == "Conv":
        return _conv(graph, region, values, operands)
    if anchor.op == "ConvTranspose":
        return _conv_transpose(graph, region, values, operands)
    if anchor.op == "Gemm":
        return _gemm(graph, region, values, operands)
    return _matmul(graph, region, values, operands, suits)


def _reads_data(spec: step.ConvSpec, axis: int) -> bool:
    """False if every window lies in the pads as a whole: a kernel that reads nothing is none to TVM."""
    size, count = ((spec.height, spec.out_height), (spec.width, spec.out_width))[axis]
    kernel, stride, hole = spec.kernel[axis], spec.strides[axis], spec.dilations[axis]
    starts = range(-spec.pads[axis], count * stride - spec.pads[axis], stride)
    return any(0 <= start + tap * hole < size for start in starts for tap in range(kernel))


def _conv(graph: Graph, region: Region, values: Values, operands: IntegerOperands | None) -> Kernel | None:
    anchor = region.anchor
    weight = operands.weight if operands else values.constant(anchor.inputs[1])
    if weight is None or weight.ndim not in (3, 4):
        return None
    data = operands.data if operands else _data(graph, region)
    one = weight.ndim == 3  # a convolution over a line is one over an image of height 1
    dims, out = graph.tensor(data).dims, graph.tensor(anchor.output).dims
    image = (dims[0], 1 if one else dims[2], dims[-1], dims[1])
    out_image = (out[0], 1 if one else out[2], out[-1], out[1])
    kernel, strides, dilations = (_pair(anchor.attr(key, ()), weight.ndim) for key in ("kernel_shape", "strides", "dilations"))
    kernel = (1, weight.shape[2]) if one else (weight.shape[2], weight.shape[3])
    pads = _pads(anchor, image[1:3], kernel, strides, dilations)
    fused = Fused()
    full = _rounded(region, weight.reshape(*weight.shape[:2], *kernel))
    zero_point = bias_and_scale(region, values, operands, full, 0, fused)
    fused_epilogue(graph, region, values, fused, channel=1, last=True)
    spec = step.ConvSpec(
        batch=image[0], height=image[1], width=image[2], in_channels=image[3], out_channels=out[1], kernel=kernel,
        strides=strides, dilations=dilations, pads=pads, groups=anchor.attr("group", 1),
        data_dtype=graph.tensor(data).dtype, weight_dtype=str(full.dtype), out_dtype=graph.tensor(region.output).dtype,
        pad_value=zero_point, epilogue=tuple(fused.steps),
    )  # fmt: skip
    if (spec.out_height, spec.out_width) != out_image[1:3] or not all(_reads_data(spec, axis) for axis in (0, 1)):
        return None
    shape = (out[0], *out[2:], out[1])
    return Kernel(spec, values.get(data, True), full, tuple(fused.tensors), shape, spec.out_dtype, True)


def _conv_transpose(graph: Graph, region: Region, values: Values, operands: IntegerOperands | None) -> Kernel | None:
    anchor = region.anchor
    weight = operands.weight if operands else values.constant(anchor.inputs[1])
    data = operands.data if operands else anchor.inputs[0]
    spec = None if weight is None else transposed.spec_of(graph, anchor, weight, data)
    if spec is None or weight is None:
        return None
    full = weight.reshape(*weight.shape[:2], *spec.kernel)
    grouped = full.reshape(spec.groups, -1, *full.shape[1:]).transpose(0, 2, 1, 3, 4).reshape(spec.out_channels, -1)
    operands = transposed.per_group(operands, spec.groups)
    fused = Fused()
    sums = tap_sums(spec, weight) if operands else None
    zero_point = bias_and_scale(region, values, operands, grouped, 0, fused, sums=sums)
    fused_epilogue(graph, region, values, fused, channel=1, last=True)
    out_dtype = graph.tensor(region.output).dtype
    spec = dataclasses.replace(spec, pad_value=zero_point, out_dtype=out_dtype, epilogue=tuple(fused.steps))
    tensors = transposed.by_phase(spec, fused.steps, fused.tensors)
    out = graph.tensor(anchor.output).dims
    return Kernel(spec, values.get(data, True), full, tuple(tensors), (out[0], *out[2:], out[1]), out_dtype, True)


def _data(graph: Graph, region: Region) -> str:
    """What the kernel reads: of a layer on bfloat16, the values before they are widened."""
    return widened(graph, region.anchor.inputs[0]) if region.bfloat16 else region.anchor.inputs[0]


def _rounded(region: Region, weight: np.ndarray) -> np.ndarray:
    """The weights as the kernel takes them, widened bfloat16 as bfloat16 again; but depthwise kernels compute in float32."""
    deep = region.anchor.attr("group", 1) == len(weight) > 1 and weight.shape[1] == 1
    return weight.astype(numpy_dtype("bfloat16")) if region.bfloat16 and not deep else weight


def _pair(values: Sequence[int], rank: int) -> tuple[int, int]:
    given = tuple(values) or (1,) * (rank - 2)
    return (1, given[0]) if rank == 3 else (given[0], given[1])


def _pads(node: Node, size: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Any:
    """top, left, bottom, right."""
    automatic = node.attr("auto_pad", "NOTSET")
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        need = [
            max(0, (math.ceil(size[i] / strides[i]) - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1 - size[i])
            for i in (0, 1)
        ]
        small, large = [n // 2 for n in need], [n - n // 2 for n in need]
        return (*small, *large) if automatic == "SAME_UPPER" else (*large, *small)
    given = tuple(node.attr("pads", ()))
    if automatic == "VALID" or not given:
        return (0, 0, 0, 0)
    return given if len(given) == 4 else (0, given[0], 0, given[1])


def _gemm(graph: Graph, region: Region, values: Values, operands: IntegerOperands | None) -> Kernel | None:
    anchor = region.anchor
    weight = operands.weight if operands else values.constant(anchor.inputs[1])
    if weight is None or anchor.attr("transA", 0):
        return None
    weight = weight.T if anchor.attr("transB", 0) else weight
    if not operands:
        weight = weight * np.float32(anchor.attr("alpha", 1.0))
    data = operands.data if operands else _data(graph, region)
    rows, depth = graph.tensor(data).dims
    beta = anchor.attr("beta", 1.0)
    if len(anchor.inputs) > 2 and anchor.inputs[2] and not is_row(values, anchor.inputs[2], weight.shape[1], beta):
        return None
    fused = Fused()
    bias_and_scale(region, values, operands, weight, 1, fused, beta)
    fused_epilogue(graph, region, values, fused, channel=1, last=False)
    return _product(graph, region, values.get(data), weight, (1, rows, weight.shape[1], depth), fused, data)


def is_row(values: Values, value: str, channels: int, beta: float) -> bool:
    """True if a Gemm's addend is one constant row."""
    array = values.constant(value)
    return array is not None and beta == 1.0 and array.size in (1, channels) and (array.ndim < 2 or array.shape[0] == 1)


def _matmul(graph: Graph, region: Region, values: Values, operands: IntegerOperands | None, suits: Suits) -> Kernel | None:
    anchor = region.anchor
    data = operands.data if operands else _data(graph, region)
    left, right = graph.tensor(data).dims, graph.tensor(anchor.inputs[1]).dims
    if len(left) < 2 or len(right) < 2 or 0 in (*left, *right):
        return None
    weight = operands.weight if operands else values.constant(anchor.inputs[1])
    fused = Fused()
    if weight is not None and math.prod(right[:-2]) == 1:
        weight = weight.reshape(right[-2:])
        bias_and_scale(region, values, operands, weight, 1, fused)
        fused_epilogue(graph, region, values, fused, channel=len(left) - 1, last=False)
        return _product(graph, region, values.get(data), weight, (1, math.prod(left[:-1]), right[-1], right[-2]), fused, data)
    if left[:-2] != right[:-2] or (operands and operands.right_quantization is None):
        return None
    if operands and operands.right_quantization is not None:
        scale = operands.data_quantization.scale * operands.right_quantization.scale
        fused.add(step.Scale(), constant(np.full(right[-1], scale, np.float32)))
    fused_epilogue(graph, region, values, fused, channel=len(left) - 1, last=False)
    right_side = anchor.inputs[1] if not region.bfloat16 else widened(graph, anchor.inputs[1])
    right_side = operands.right if operands else right_side
    shape = (math.prod(left[:-2]), left[-2], right[-1], left[-1])
    spec = _product_spec(graph, region, shape, fused, data, graph.tensor(right_side).dtype, False)
    sides = heads.in_place(graph, region, values, spec, data, right_side)
    if sides.spec != spec and not suits(spec, sides.spec):
        sides = heads.Sides(spec, values.get(data), values.get(right_side))
    out = graph.tensor(region.output).dims
    dims = tuple(out[axis] for axis in sides.order) if sides.order else out
    return Kernel(sides.spec, sides.data, sides.right, tuple(fused.tensors), dims, spec.out_dtype, False, sides.order)


def _product(graph: Graph, region: Region, data: Expr, weight: np.ndarray, shape: tuple, fused: Fused, value: str) -> Kernel:
    weight = _rounded(region, weight)
    spec = _product_spec(graph, region, shape, fused, value, str(weight.dtype), True)
    return Kernel(spec, data, weight, tuple(fused.tensors), graph.tensor(region.output).dims, spec.out_dtype, False)


def _product_spec(
    graph: Graph, region: Region, shape: tuple, fused: Fused, value: str, weight_dtype: str, constant: bool
) -> step.MatmulSpec:
    batch, rows, columns, depth = shape
    return step.MatmulSpec(
        batch=batch, m=rows, n=columns, k=depth, constant=constant, data_dtype=graph.tensor(value).dtype,
        weight_dtype=weight_dtype, out_dtype=graph.tensor(region.output).dtype, epilogue=tuple(fused.steps),
    )  # fmt: skip


def bias_and_scale(
    region: Region, values: Values, operands: IntegerOperands | None, weight: np.ndarray, axis: int, fused: Fused,
    beta: float = 1.0, sums: np.ndarray | None = None,
) -> int:  # fmt: skip
    """Adds the bias, and for integers the zero-point correction and the scale; returns the data's zero point.

    sum((q - z) * w) = sum(q * w) - z * sum(w), so z * sum(w) is taken off the bias once (Jacob et al. 2018, section 2.3).
    `sums` are the sums of the weights where they are not the same for all outputs, [..., channels]. The bias itself is rounded to
    steps of the accumulator where results are rounded to much larger ones anyway; float results get it in float.
    """
    channels = weight.shape[axis]
    node = region.anchor
    named = len(node.inputs) > 2 and node.inputs[2] != ""
    if operands is None:
        if named:
            fused.add(step.Bias(), constant(_row(values.arrays[node.inputs[2]] * np.float32(beta), channels)))
        return 0
    zero_point = int(operands.data_quantization.zero_point)
    scale = np.broadcast_to(operands.data_quantization.scale.astype(np.float64) * operands.weight_scale, (channels,))
    sums = weight.astype(np.int64).sum(tuple(i for i in range(weight.ndim) if i != axis)) if sums is None else sums
    first = region.epilogue[0] if region.epilogue else None
    row = _constant_row(values, first, node.output, channels) if first is not None else None
    given = [one for one in (_row(values.arrays[node.inputs[2]], channels) if named else None, row) if one is not None]
    bias = sum((one.astype(np.float64) for one in given), np.zeros(channels))
    rounded = region.epilogue and region.epilogue[-1].op == "QuantizeLinear"
    late = sums.ndim == 1 and not rounded and np.any(bias)
    whole = -zero_point * sums + (0 if late else np.rint(bias / scale).astype(np.int64))
    if np.any(whole):
        fused.add(step.Bias(), constant(np.clip(whole, -(2**31), 2**31 - 1).astype(np.int32)))
    fused.add(step.Scale(), constant(scale.astype(np.float32)))
    if late:
        fused.add(step.Bias(), constant(bias.astype(np.float32)))
    return zero_point


def _row(array: np.ndarray, channels: int) -> np.ndarray:
    return np.ascontiguousarray(np.broadcast_to(array.reshape(-1), (channels,)))


def _constant_row(values: Values, node: Node, value: str, channels: int) -> np.ndarray | None:
    """The constant that an Add or Sub adds to each channel."""
    if node.op not in ("Add", "Sub") or node.inputs[0] == node.inputs[1]:
        return None
    other = node.inputs[1] if node.inputs[0] == value else node.inputs[0]
    array = values.constant(other)
    if array is None:
        return None
    return _row(-array if node.op == "Sub" else array, channels)


def fused_epilogue(graph: Graph, region: Region, values: Values, fused: Fused, channel: int, last: bool) -> None:
    nodes, value, index = region.epilogue, region.anchor.output, 0
    channels = graph.tensor(value).dims[channel]
    absorbed = region.integer and len(fused.steps) > 0 and bool(nodes)
    if absorbed and _constant_row(values, nodes[0], value, channels) is not None:
        value, index = nodes[0].output, 1
    while index < len(nodes):
        gated = self_gated(graph, value)
        if gated and gated[0] is nodes[index]:
            fused.add(_gate(graph, gated))
            index += len(gated)
            value = nodes[index - 1].output
            continue
        node = nodes[index]
        _step(graph, node, value, region, values, fused, channel, last)
        value, index = node.output, index + 1


def _gate(graph: Graph, nodes: tuple[Node, ...]) -> step.Activation:
    if nodes[-2].op == "Sigmoid":
        slope = gate_slope(graph, nodes)
        return step.Activation("silu") if slope == 1.0 else step.Activation("scaled_silu", (slope,))
    if nodes[0].op == "HardSigmoid":
        return step.Activation("hard_swish")
    return step.Activation("gelu")


def _step(graph: Graph, node: Node, value: str, region: Region, values: Values, fused: Fused, channel: int, last: bool) -> None:
    if narrows(graph, node):
        return  # the kernel rounds to the dtype that it writes
    found = activation(graph, node)
    if found is not None:
        fused.add(found)
    elif node.op == "QuantizeLinear":
        scale = quantization(graph, node)
        fused.add(step.Quantize(float(scale.scale), int(scale.zero_point), scale.dtype) if scale else step.Bias())
    else:
        _binary(graph, node, value, region, values, fused, channel, last)


def activation(graph: Graph, node: Node) -> step.Activation | None:
    """The template's step for an activation node."""
    if node.op == "Clip":
        return step.Activation("clip", (_bound(graph, node, 1, "min", -3.4e38), _bound(graph, node, 2, "max", 3.4e38)))
    if node.op == "LeakyRelu":
        return step.Activation("leaky_relu", (node.attr("alpha", 0.01),))
    if node.op == "HardSigmoid":
        return step.Activation("hard_sigmoid", (node.attr("alpha", 0.2), node.attr("beta", 0.5)))
    if node.op == "Gelu":
        return step.Activation("gelu_tanh" if node.attr("approximate", "none") == "tanh" else "gelu")
    plain = {"Relu": "relu", "HardSwish": "hard_swish", "Sigmoid": "sigmoid", "Tanh": "tanh"}
    return step.Activation(plain[node.op]) if node.op in plain else None


def _bound(graph: Graph, node: Node, index: int, key: str, default: float) -> float:
    if key in node.attrs:
        return float(node.attrs[key])
    found = scalar(graph, node.inputs[index]) if len(node.inputs) > index and node.inputs[index] else None
    return default if found is None else found


def _binary(graph: Graph, node: Node, value: str, region: Region, values: Values, fused: Fused, channel: int, last: bool) -> None:
    other = node.inputs[1] if node.inputs[0] == value else node.inputs[0]
    dims = graph.tensor(value).dims
    array = values.constant(other)
    if array is not None:
        _constant_operand(node, array, dims, channel, region.integer, fused)
        return
    shape = graph.tensor(other).dims
    if shape != dims and len(shape) == len(dims) and math.prod(shape) != math.prod(dims):
        fused.add(step.Multiply("image"), values.get(other))
        return
    if node.op == "Add" and (narrow := widened(graph, other)):
        fused.add(step.Add("bfloat16"), values.get(narrow, last))
        return
    through = dequantized(graph, other) if node.op == "Add" else None
    source = through[0] if through else other
    expr = values.get(source, last)
    if node.op == "Add":
        fused.add(_addend(through[1] if through else None), expr)
    else:
        fused.add(step.Multiply("full"), expr)


def _addend(quantized: Quantization | None) -> step.Add:
    if quantized is None:
        return step.Add()
    return step.Add(quantized.dtype, float(quantized.scale), int(quantized.zero_point))


def _constant_operand(node: Node, array: np.ndarray, dims: tuple[int, ...], channel: int, integer: bool, fused: Fused) -> None:
    row = _row(array.astype(np.float32), dims[channel])
    if node.op in ("Mul", "Div"):
        fused.add(step.Multiply("channels"), constant(1 / row if node.op == "Div" else row))
        return
    row = -row if node.op == "Sub" else row
    if not integer:
        fused.add(step.Bias(), constant(row))
        return
    whole = np.ascontiguousarray(np.broadcast_to(row, (*(d for i, d in enumerate(dims) if i != channel), dims[channel])))
    fused.add(step.Add(), constant(whole))


__all__ = ["Kernel", "Spec", "activation", "to_last", "weighted_kernel"]
