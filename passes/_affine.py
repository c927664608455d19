"""Shared by fold-batch-norm: `y = x * scale + shift` per channel, and the linear layers that can absorb it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from hwopt.ir import Edit, Graph, Node, part

FLOATS = ("float16", "float32", "float64")


@dataclass(frozen=True, eq=False)
class Affine:
    """node computes source * scale + shift. `axis` is the channels' axis, None where scale and shift are single numbers."""

    node: Node
    source: str
    axis: int | None
    scale: np.ndarray  # float64, [channels] or [1]
    shift: np.ndarray

    @property
    def shifts(self) -> bool:
        return bool(self.shift.any())

    @property
    def scales(self) -> bool:
        return bool((self.scale != 1).any())


def affine_of(graph: Graph, node: Node) -> Affine | None:
    """The node as scale and shift per channel, or None."""
    if node.domain or graph.tensor(node.output).dtype not in FLOATS:
        return None
    if node.op == "BatchNormalization":
        return _batch_norm(graph, node)
    if node.op not in ("Mul", "Div", "Add", "Sub") or (graph.constant(node.inputs[0]) is None) == (
        graph.constant(node.inputs[1]) is None
    ):
        return None
    swapped = graph.constant(node.inputs[0]) is not None
    source, constant = node.inputs[::-1] if swapped else node.inputs
    array, kind = np.asarray(graph.params[constant]), graph.tensor(source)
    if kind.shape is None or kind != graph.tensor(node.output) or (swapped and node.op == "Div"):
        return None
    rank = len(kind.shape)
    long = [axis for axis, size in enumerate((1,) * (rank - array.ndim) + array.shape) if size != 1]
    if len(long) > 1:
        return None
    flat = array.astype(np.float64).ravel()
    if node.op in ("Mul", "Div"):
        with np.errstate(divide="ignore"):
            scale, shift = (1 / flat if node.op == "Div" else flat), np.zeros_like(flat)
    else:
        sign = -1.0 if node.op == "Sub" else 1.0
        scale, shift = np.full_like(flat, sign if swapped else 1.0), flat if swapped else sign * flat
    return Affine(node, source, long[0] if long else None, scale, shift)


def _batch_norm(graph: Graph, node: Node) -> Affine | None:
    arrays = [graph.constant(value) for value in node.inputs[1:5]]
    if node.attr("training_mode", 0) or len(tuple(filter(None, node.outputs))) != 1:
        return None
    if any(array is None for array in arrays) or graph.tensor(node.inputs[0]).shape is None:
        return None
    gamma, beta, mean, variance = (np.asarray(array, np.float64) for array in arrays)
    scale = gamma / np.sqrt(variance + node.attr("epsilon", 1e-5))
    return Affine(node, node.inputs[0], 1, scale, beta - mean * scale)


@dataclass(eq=False)
class Layer:
    """A linear layer and the affines it takes over: source -> before -> node -> behind -> result.

    `weight` is a view [groups, out, in, taps] of the node's weights in float64 once something is to be folded.
    """

    node: Node
    groups: int
    array: np.ndarray  # the weights as they are
    bias: np.ndarray | None
    in_axis: int
    out_axis: int
    source: str
    result: str
    before: list[Affine] = field(default_factory=list)
    behind: list[Affine] = field(default_factory=list)

    @property
    def taken(self) -> list[Affine]:
        return [*self.before, *self.behind] if self.worthwhile else []

    @property
    def worthwhile(self) -> bool:
        """A MatMul with one Add behind it is as short as it gets."""
        if self.node.op != "MatMul":
            return bool(self.before or self.behind)
        return bool(self.before) or len(self.behind) > 1 or any(affine.scales for affine in self.behind)

    def append(self, affine: Affine) -> None:
        self.behind.append(affine)
        self.result = affine.node.output

    def prepend(self, affine: Affine) -> None:
        self.before.insert(0, affine)
        self.source = affine.source

    def refuses_behind(self, graph: Graph, affine: Affine) -> str:
        if graph.sole_user(self.result) is not affine.node:
            return f"the output of {self.node.name} is read elsewhere"
        return self._refuses(graph, affine, self.out_axis, self.weight.shape[1])

    def refuses_ahead(self, graph: Graph, affine: Affine) -> str:
        if len(graph.users[self.source]) != 1 or self.source in graph.outputs:
            return "its output is read by several nodes"
        if affine.shifts and self.node.op == "ConvTranspose":
            return f"its shift does not pass through the ConvTranspose {self.node.name}"
        if affine.shifts and self.node.op == "Conv" and not _unpadded(self.node):
            return f"its shift does not reach the padding of {self.node.name}"
        return self._refuses(graph, affine, self.in_axis, self.weight.shape[2])

    def _refuses(self, graph: Graph, affine: Affine, axis: int, channels: int) -> str:
        if affine.axis not in (None, axis) or affine.scale.size not in (1, channels * self.groups):
            return f"its factors do not run along the channels of {self.node.name}"
        with np.errstate(over="ignore", invalid="ignore"):
            trial = (affine.scale.astype(self.array.dtype), affine.shift.astype(self.array.dtype))
        return "" if all(np.isfinite(part).all() for part in trial) else f"its factors are not finite in {self.array.dtype}"

    @property
    def weight(self) -> np.ndarray:
        """[groups, out, in, taps] as a view of the weights."""
        array, groups = self.array, self.groups
        if self.node.op == "Conv":
            return array.reshape(groups, array.shape[0] // groups, array.shape[1], -1)
        if self.node.op == "ConvTranspose":
            return array.reshape(groups, array.shape[0] // groups, array.shape[1], -1).transpose(0, 2, 1, 3)
        return (array if self.node.attr("transB", 0) else array.T)[None, :, :, None]

    def _unview(self, weight: np.ndarray) -> np.ndarray:
        """The inverse of `weight`."""
        if self.node.op == "ConvTranspose":
            weight = weight.transpose(0, 2, 1, 3)
        elif self.node.op != "Conv":
            weight = weight[0, :, :, 0] if self.node.attr("transB", 0) else weight[0, :, :, 0].T
        return np.ascontiguousarray(weight.reshape(self.array.shape), self.array.dtype)

    def folded(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The new weights in the node's layout, and the new bias (None if there is none)."""
        weight = self.weight.astype(np.float64)
        groups, out, depth, _ = weight.shape
        bias = np.zeros(groups * out) if self.bias is None else np.broadcast_to(self.bias.astype(np.float64), groups * out)
        gain = self.node.attr("alpha", 1.0) if self.node.op == "Gemm" else 1.0
        bias = bias * (self.node.attr("beta", 1.0) if self.node.op == "Gemm" else 1.0)
        for affine in reversed(self.before):
            shift = np.broadcast_to(affine.shift, groups * depth).reshape(groups, 1, depth, 1)
            bias = bias + gain * (weight * shift).sum((2, 3)).ravel()
            weight = weight * np.broadcast_to(affine.scale, groups * depth).reshape(groups, 1, depth, 1)
        for affine in self.behind:
            bias = bias * affine.scale + affine.shift
            weight = weight * np.broadcast_to(affine.scale, groups * out).reshape(groups, out, 1, 1)
        keep = self.bias is not None or bias.any()
        return self._unview(weight), bias.astype(self.array.dtype) if keep else None

    def write(self, edit: Edit) -> bool:
        """Put the folded layer in place of everything it took; False if its numbers are too large for their type."""
        if not self.worthwhile:
            return True
        with np.errstate(over="ignore"):
            weight, bias = self.folded()
        if not np.isfinite(weight).all() or (bias is not None and not np.isfinite(bias).all()):
            return False
        self._write(edit, weight, bias)
        return True

    def _write(self, edit: Edit, weight: np.ndarray, bias: np.ndarray | None) -> None:
        node, last = self.node, self.behind[-1].node if self.behind else self.node
        inputs = [self.source, edit.param(f"{node.name}_weight", weight)]
        if node.op != "MatMul" or bias is None:
            inputs += [] if bias is None else [edit.param(f"{node.name}_bias", bias)]
            attrs = {key: value for key, value in node.attrs.items() if key != "beta"}
            edit.replace(node, inputs=tuple(inputs), attrs=attrs)
            edit.forward(last, node.output)
            return
        shift = edit.param(f"{node.name}_bias", bias)
        if last is not node:
            edit.replace(node, inputs=tuple(inputs))
            edit.replace(last, op="Add", inputs=(node.output, shift), attrs={})
            return
        product = edit.fresh(f"{node.name}_product")
        edit.replace(node, inputs=tuple(inputs), outputs=(product,))
        edit.emit("Add", [product, shift], name=part(node, "bias"), outputs=[node.output], like=node)


def layer_of(graph: Graph, node: Node) -> Layer | str:
    """The node as a layer that can absorb affines; why not, or "" if it is none at all."""
    if node.domain or node.op not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return ""
    weight, bias = (graph.constant(value) if value else None for value in (*node.inputs[1:], "")[:2])
    if weight is None or (len(node.inputs) > 2 and node.inputs[2] and bias is None):
        return "its weights are computed" if node.op != "MatMul" else ""
    shape = graph.tensor(node.output).shape
    if str(weight.dtype) not in FLOATS or shape is None or (node.op in ("Gemm", "MatMul") and weight.ndim != 2):
        return ""
    if len(graph.users[node.inputs[1]]) > 1 or node.inputs[1] in graph.outputs:
        others = ", ".join(user.name for user in graph.users[node.inputs[1]] if user is not node)
        return f"its weights are shared with {others or 'an output'}"
    convolution = node.op.startswith("Conv")
    groups = node.attr("group", 1) if convolution else 1
    if bias is not None and not convolution:
        if bias.size != math.prod(bias.shape[-1:]):
            return "its bias differs from row to row"
        bias = bias.ravel()
    in_axis = (0 if node.attr("transA", 0) else 1) if node.op == "Gemm" else 1 if convolution else len(shape) - 1
    out_axis = 1 if convolution else len(shape) - 1
    return Layer(node, groups, np.asarray(weight), bias, in_axis, out_axis, node.inputs[0], node.output)


def _unpadded(node: Node) -> bool:
    return not any(node.attr("pads", ())) and node.attr("auto_pad", "NOTSET") in ("NOTSET", "VALID")
