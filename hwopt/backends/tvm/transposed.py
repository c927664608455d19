"""ConvTranspose regions -> one call of the phase-by-phase template, with everything behind them fused."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from hwopt.analysis.regions import IntegerOperands
from hwopt.backends.tvm.kernels import spec as step
from hwopt.backends.tvm.kernels.phases import phases
from hwopt.backends.tvm.layout import Expr, constant
from hwopt.ir import Graph, Node

WITH_TENSOR = step.Bias | step.Scale | step.Add | step.Multiply


def spec_of(graph: Graph, node: Node, weight: np.ndarray, data: str) -> step.ConvTransposeSpec | None:
    """The geometry of a ConvTranspose over an image or a line; None for more dimensions or computed weights."""
    if weight is None or weight.ndim not in (3, 4):
        return None
    dims, out = (_image(graph.tensor(value).dims) for value in (data, node.output))
    kernel = _image(weight.shape)[2:]
    strides, dilations = (_pair(node.attr(key, ()), 1) for key in ("strides", "dilations"))
    extra = _pair(node.attr("output_padding", ()), 0)
    pads = _cut(node, [
        strides[i] * (dims[2 + i] - 1) + extra[i] + (kernel[i] - 1) * dilations[i] + 1 - out[2 + i] for i in (0, 1)
    ])  # fmt: skip
    return step.ConvTransposeSpec(
        dims[0], dims[2], dims[3], dims[1], out[1], kernel, out[2], out[3], strides, dilations, pads,
        node.attr("group", 1), graph.tensor(data).dtype, str(weight.dtype),
    )  # fmt: skip


def _image(dims: Sequence[int]) -> Any:
    """A line as an image of height 1."""
    return (*dims[:2], 1, dims[2]) if len(dims) == 3 else tuple(dims)


def _pair(values: Sequence[int], default: int) -> tuple[int, int]:
    given = tuple(values)
    return (given[0], given[1]) if len(given) == 2 else (1 if default else 0, given[0] if given else default)


def _cut(node: Node, total: Sequence[int]) -> tuple[int, int]:
    """What is cut off at the top and left, of `total` at both ends."""
    automatic = node.attr("auto_pad", "NOTSET")
    if automatic == "NOTSET" and node.attr("output_shape") is None:
        given = tuple(node.attr("pads", ()))
        return _pair(given[: len(given) // 2], 0)
    halves = [max(0, one) // 2 for one in total]
    rest = [max(0, one) - half for one, half in zip(total, halves, strict=True)]
    return (halves[0], halves[1]) if automatic == "SAME_UPPER" else (rest[0], rest[1])


def per_group(operands: IntegerOperands | None, groups: int) -> IntegerOperands | None:
    """ONNX counts a scale per output channel of one group: the same scales for every group."""
    if operands is None or operands.weight_scale.ndim == 0 or groups == 1:
        return operands
    return dataclasses.replace(operands, weight_scale=np.tile(operands.weight_scale, groups))


def by_phase(spec: step.ConvTransposeSpec, steps: Sequence[step.Step], tensors: Sequence[Expr]) -> list[Expr]:
    """The steps' tensors, with one row of every bias for each phase."""
    count, rest, found = len(phases(spec)), iter(tensors), []
    for one in steps:
        if not isinstance(one, WITH_TENSOR):
            continue
        tensor = next(rest)
        if isinstance(one, step.Bias) and (array := tensor.value.numpy()).size == spec.out_channels:
            tensor = constant(np.tile(array.reshape(-1), count))
        found.append(tensor)
    return found


__all__ = ["by_phase", "per_group", "spec_of"]
