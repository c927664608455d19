"""A normalised ONNX model as a torch module, so that torch.compile can compete on the very same graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.zoo import Missing

Attributes = Mapping[str, Any]


def _padded(x: Tensor, attributes: Attributes, value: float = 0.0) -> Tensor:
    """[top, left, bottom, right] beside each other, as torch's layers cannot take them."""
    pads = attributes.get("pads", [0, 0, 0, 0])
    top, left, bottom, right = pads
    return functional.pad(x, (left, right, top, bottom), value=value) if any(pads) else x


def _conv(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    pads = attributes.get("pads", [0, 0, 0, 0])
    even = list(pads[:2]) == list(pads[2:])
    data = x if even else _padded(x, attributes)
    where = pads[:2] if even else 0
    steps, spread = attributes.get("strides", [1, 1]), attributes.get("dilations", [1, 1])
    return functional.conv2d(data, weight, bias, steps, where, spread, attributes.get("group", 1))


def _max_pool(attributes: Attributes, x: Tensor) -> Tensor:
    return functional.max_pool2d(_padded(x, attributes, -torch.inf), attributes["kernel_shape"], attributes.get("strides", 1))


def _gemm(attributes: Attributes, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    product = (a.T if attributes.get("transA") else a) @ (b.T if attributes.get("transB") else b) * attributes.get("alpha", 1.0)
    return product if c is None else product + attributes.get("beta", 1.0) * c


def _mean(attributes: Attributes, x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.mean(axes, keepdim=bool(attributes.get("keepdims", 1)))


def _sum(attributes: Attributes, x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.sum(axes, keepdim=bool(attributes.get("keepdims", 1)))


def _gelu(attributes: Attributes, x: Tensor) -> Tensor:
    return functional.gelu(x, approximate=attributes.get("approximate", b"none").decode())


def _norm(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.layer_norm(x, x.shape[attributes.get("axis", -1) :], weight, bias, attributes.get("epsilon", 1e-5))


def _unsqueeze(_: Attributes, x: Tensor, axes: list[int]) -> Tensor:
    for axis in sorted(axes):
        x = x.unsqueeze(axis)
    return x


def _cast(attributes: Attributes, x: Tensor) -> Tensor:
    return x.to(getattr(torch, np.dtype(helper.tensor_dtype_to_np_dtype(attributes["to"])).name))


OPERATORS: Mapping[str, Callable[..., Tensor]] = {
    "Conv": _conv, "MaxPool": _max_pool, "Gemm": _gemm, "ReduceMean": _mean, "ReduceSum": _sum, "Gelu": _gelu,
    "LayerNormalization": _norm, "Unsqueeze": _unsqueeze, "Cast": _cast,
    "Relu": lambda _, x: torch.relu(x), "Sigmoid": lambda _, x: torch.sigmoid(x), "Tanh": lambda _, x: torch.tanh(x),
    "Clip": lambda _, x, low=None, high=None: torch.clamp(x, low, high),
    "Add": lambda _, a, b: a + b, "Sub": lambda _, a, b: a - b, "Mul": lambda _, a, b: a * b, "Div": lambda _, a, b: a / b,
    "MatMul": lambda _, a, b: a @ b, "GlobalAveragePool": lambda _, x: x.mean((2, 3), keepdim=True),
    "Flatten": lambda attributes, x: x.flatten(attributes.get("axis", 1)), "Identity": lambda _, x: x,
    "Transpose": lambda attributes, x: x.permute(attributes["perm"]), "Reshape": lambda _, x, shape: x.reshape(shape),
    "Softmax": lambda attributes, x: torch.softmax(x, attributes.get("axis", -1)),
    "Gather": lambda attributes, x, at: torch.index_select(x, attributes.get("axis", 0), at.reshape(-1)).reshape(
        *x.shape[: attributes.get("axis", 0)], *at.shape, *x.shape[attributes.get("axis", 0) + 1 :]
    ),
}  # fmt: skip
LISTS = {"Reshape": 1, "ReduceMean": 1, "ReduceSum": 1, "Unsqueeze": 1}  # which input torch wants as a list of numbers


class TorchGraph(nn.Module):
    """Runs the nodes in order. Raises Missing for an operator that is not in the table."""

    def __init__(self, model: bytes) -> None:
        super().__init__()
        graph = onnx.load_from_string(model).graph
        unknown = sorted({node.op_type for node in graph.node} - set(OPERATORS))
        if unknown:
            raise Missing(f"no torch form of {', '.join(unknown)}", place=graph.name)
        self.inputs, self.outputs = [value.name for value in graph.input], [value.name for value in graph.output]
        arrays = {weight.name: numpy_helper.to_array(weight) for weight in graph.initializer}
        lists = {node.input[LISTS[node.op_type]] for node in graph.node if len(node.input) > LISTS.get(node.op_type, 99)}
        self.numbers = {name: arrays[name].tolist() for name in lists}
        self.places = {name: f"weight_{index}" for index, name in enumerate(arrays) if name not in lists}
        for name, place in self.places.items():
            self.register_buffer(place, torch.from_numpy(np.array(arrays[name])))
        self.steps = [(node.op_type, list(node.input), node.output[0], _attributes(node)) for node in graph.node]

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        values: dict[str, Any] = dict(zip(self.inputs, inputs, strict=True)) | {"": None} | self.numbers
        values.update((name, getattr(self, place)) for name, place in self.places.items())
        for op, names, output, attributes in self.steps:
            values[output] = OPERATORS[op](attributes, *(values[name] for name in names))
        return [values[name] for name in self.outputs]


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
