"""quantize-weights: weights in 4 or 8 bits, everything else stays float."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from hwopt.analysis.covariance import channel_moments, second_moments
from hwopt.errors import PassError
from hwopt.ir import Edit, Graph, Node, of_op
from hwopt.pipeline import Context, Pass, Phase, Refusal
from hwopt.target import Target
from passes._awq import scaled
from passes._channel_scales import taker
from passes._gptq import gptq_rows
from passes._packing import BIT_OPERATORS, decode
from passes._rounding import round_rows, scales_of

OPS = ("Conv", "Gemm", "MatMul")
BITS = {3: np.int8, 4: ml_dtypes.int4, 8: np.int8}
METHODS = ("nearest", "gptq", "awq")
FORMS = ((8, 0), (4, 32), (3, 32), (3, 0))  # (bits, group) worth considering: of as many bits the first that a layer can take
BLOCKED_OPSET = 21  # brought 4-bit integers and blocks


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """x @ W -> x @ DequantizeLinear(q, scales): integers of 3, 4 or 8 bits, symmetric, multiplied as float.

    One scale per output channel, or with `group` one for that many neighbours along the inputs (4 bits need it: 32 is usual).
    Scales clip the largest weights where that lowers the squared error; with calibration data a weight counts by the mean
    square of its input. Needs no data. Gains where a layer waits for its weights (few rows: language models, batch 1), and
    makes every model smaller: kernels decode in registers where the target gains by it, else the library holds floats.
    Applies to constant float32 weights that nobody outside of `site` reads; with `group`, which must divide the inputs, not to
    convolutions larger than 1 x 1. As llama.cpp's Q4_0 and ONNX Runtime's MatMulNBits, in standard operators; ONNX has no
    integers of 3 bits: these are packed as indices into the eight numbers.

    method=gptq rounds one input after the other and lets the later ones make up for it, by the inputs' second moments
    (Frantar et al. 2023): same size, smaller error of the outputs. `act_order` takes the strongest inputs first. Needs
    calibration data; convolutions larger than 1 x 1 and grouped ones are rounded to the nearest.

    method=awq multiplies the weights of strong inputs before it rounds them, and divides the inputs: in what computes them
    where that takes the factors, else by a Mul in front of the layer (Lin et al. 2024).
    """

    name: ClassVar[str] = "quantize-weights"
    summary: ClassVar[str] = "weights as 3, 4 or 8 bit integers, float activations"
    phase: ClassVar[Phase] = Phase.QUANTIZE
    knobs: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({"group": (32, 16, 64, 128), "method": METHODS})
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({"method": METHODS})

    bits: int = 8
    group: int = 0  # inputs that share a scale; 0: all of an output channel
    method: str = "nearest"  # or gptq, awq
    act_order: bool = False  # gptq: the strongest inputs first

    def run(self, graph: Graph, ctx: Context) -> Graph:
        self.check()
        self.check_site(graph)
        if self.method != "nearest" and ctx.calibration is None:
            raise PassError(f"{self.method} needs calibration data", place=str(self), hint="give some with --calibrate")
        chosen = []
        for node in graph.nodes if self.site else of_op(graph, *OPS):
            reason = self._reason(graph, node) if self.covers(node) else ""
            if reason and (node.op in OPS or node.name in self.site):
                ctx.refuse(self, node, reason)
            elif self.covers(node) and node.op in OPS:
                chosen.append(node)
        if self.method == "awq":
            graph = self._scaled(graph, chosen, ctx)
            chosen = [graph.node[node.name] for node in chosen]
        edit, moments = graph.edit(), _moments(graph, chosen, ctx)
        matrices = [node for node in chosen if self.method == "gptq" and _is_matrix(graph, node)]
        seconds = _seconds(graph, matrices, ctx)
        for weight, node in {node.inputs[1]: node for node in chosen}.items():
            rows, squares = _rows(graph, node), moments.get(node.name)
            if node.name in seconds:
                group = self.group or rows.shape[1]
                steps, scales = gptq_rows(rows, seconds[node.name], self.bits, group, act_order=self.act_order)
            else:
                steps, scales = self._nearest(rows, squares if _is_matrix(graph, node) else None)
            self._write(edit, graph, weight, node, steps, scales)
        return edit.finish(str(self))

    def check(self) -> None:
        super().check()
        if self.bits not in BITS or self.group < 0:
            hint = "bits is 3, 4 or 8, and group a number of inputs, or 0 for all of them"
            raise PassError(f"bits={self.bits},group={self.group} is no form of weights", place=str(self), hint=hint)
        if self.act_order and self.method != "gptq":
            raise PassError("act_order is an order of gptq", place=str(self), hint="add method=gptq")

    def finer(self) -> Iterator[Pass]:
        """Few bits, with inputs that make up for one another's rounding."""
        if self.bits < 8 and self.method == "nearest":
            yield replace(self, method="gptq", act_order=True)

    @property
    def prepared(self) -> bool:
        return False  # data stay as they are; awq scales for weights alone

    @classmethod
    def candidates(cls, graph: Graph, target: Target) -> Iterator[Pass | Refusal]:
        for node in of_op(graph, *OPS):
            if "float32" not in target.peak:
                yield Refusal(cls.name, node.name, "the target multiplies no floats")
                continue
            reasons = {one: one._reason(graph, node) for one in (cls((node.name,), bits, group) for bits, group in FORMS)}
            if all(reasons.values()):
                yield Refusal(cls.name, node.name, next(iter(reasons.values())))
            yield from {one.bits: one for one, reason in reversed(reasons.items()) if not reason}.values()

    def turned(self, **knobs: Any) -> Pass:
        """One scale per output channel has no group size to turn."""
        return super().turned(**{name: value for name, value in knobs.items() if name != "group" or self.group})

    def _reason(self, graph: Graph, node: Node) -> str:
        """Why this node's weights stay as they are; empty if they are quantized."""
        if node.op not in OPS or node.domain:
            return f"is a {node.op}; quantize-weights takes {', '.join(OPS)}"
        weight = graph.constant(node.inputs[1])
        if weight is None or weight.dtype != np.float32 or weight.ndim < 2 or not weight.size:
            return "its weights are no float32 constants"
        others = [one.name for one in graph.users[node.inputs[1]] if not self._same(graph, node, one)]
        if others or node.inputs[1] in graph.outputs:
            return f"weight is shared with {', '.join(others) or 'the outputs'}"
        if not np.isfinite(weight).all():
            return "its weights hold NaN or infinity"
        needed = BLOCKED_OPSET if self.bits == 4 or self.group else BIT_OPERATORS if self.bits < 8 else 13
        if graph.opsets.get("", 0) < needed:
            return f"weights of {self.bits} bits in groups of {self.group or 'a channel'} need opset {needed}"
        return self._ungroupable(node, weight)

    def _same(self, graph: Graph, node: Node, other: Node) -> bool:
        """True if another reader of the weight takes it in the same way, and is to be changed too."""
        alike = other.op == node.op and other.inputs[1] == node.inputs[1] and node.inputs[1] not in other.inputs[:1]
        return alike and self.covers(other) and _channel_axis(graph, other) == _channel_axis(graph, node)

    def _ungroupable(self, node: Node, weight: np.ndarray) -> str:
        if not self.group:
            return ""
        if weight.ndim > 2 and (node.op != "Conv" or math.prod(weight.shape[2:]) > 1):
            return f"weights of shape {list(weight.shape)} have no groups of inputs"
        inputs = weight.shape[1] if node.op == "Conv" or node.attr("transB", 0) else weight.shape[0]
        return f"group {self.group} does not divide {inputs} inputs" if inputs % self.group else ""

    def _scaled(self, graph: Graph, chosen: list[Node], ctx: Context) -> Graph:
        """With the factors of activation-aware scaling moved from inputs into weights."""
        matrices = [node for node in chosen if _is_matrix(graph, node) and not isinstance(taker(graph, node), str)]

        def rounded(weights: np.ndarray, squares: np.ndarray) -> np.ndarray:
            rows = np.ascontiguousarray(weights.T, np.float32)
            steps, scales = self._nearest(rows, np.stack([squares, squares]))
            return (steps * np.repeat(scales, self.group or rows.shape[1], axis=1)).T

        return scaled(graph, matrices, _seconds(graph, matrices, ctx), rounded, str(self))

    def _nearest(self, rows: np.ndarray, moment: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        group = self.group or rows.shape[1]
        scales = scales_of(rows, self.bits, group, None if moment is None else moment[1])
        return round_rows(rows, np.repeat(scales, group, axis=1), self.bits), scales

    def _write(self, edit: Edit, graph: Graph, name: str, node: Node, steps: np.ndarray, scales: np.ndarray) -> None:
        """Integers [n, k] and scales [n, k / group] in the shape of the weights, behind their dequantization."""
        weight, axis = graph.params[name], _channel_axis(graph, node)
        moved = np.moveaxis(weight, axis, 0).shape
        whole = np.moveaxis(steps.reshape(moved), 0, axis)
        attrs = {"axis": 1 - axis, "block_size": self.group} if self.group else {"axis": axis}
        scale = np.moveaxis(scales.reshape(len(scales), -1, *moved[2:]), 0, axis) if self.group else scales[:, 0]
        params = [self._integers(edit, node, name, np.ascontiguousarray(whole))]
        params.append(edit.param(f"{name}_scale", np.ascontiguousarray(scale)))
        outputs = [edit.fresh(f"{name}_dequantized")]
        value = edit.emit("DequantizeLinear", params, attrs=attrs, name=f"{name}_dequantize", outputs=outputs, like=node)
        edit.forward(name, value)

    def _integers(self, edit: Edit, node: Node, name: str, steps: np.ndarray) -> str:
        if self.bits != 3:
            return edit.param(f"{name}_int{self.bits}", steps.astype(BITS[self.bits]))
        levels = np.arange(-4, 4, dtype=np.int8)[None]
        return decode(edit, node, steps.shape, levels, (steps + 4).astype(np.uint8).reshape(1, -1), 3, channels_last=False)


def _channel_axis(graph: Graph, node: Node) -> int:
    """Where the output channels are among the weight's axes."""
    rank = len(graph.tensor(node.inputs[1]).shape or ())
    return 0 if node.op == "Conv" or node.attr("transB", 0) else rank - 1


def _moments(graph: Graph, nodes: list[Node], ctx: Context) -> Mapping[str, np.ndarray]:
    """Mean and mean square of every input channel, [2, channels] by node name; nothing without calibration data."""
    if ctx.calibration is None or ctx.rough or not nodes:
        return {}
    others = [node for node in of_op(graph, *OPS) if node.inputs[1] in graph.params]
    return channel_moments(graph, ctx.calibration, nodes, others)


def _seconds(graph: Graph, nodes: list[Node], ctx: Context) -> Mapping[str, np.ndarray]:
    """Second moment of the inputs, [channels, channels] by node name."""
    return second_moments(graph, ctx.calibration, nodes) if ctx.calibration is not None and nodes else {}


def _rows(graph: Graph, node: Node) -> np.ndarray:
    """The weights as [outputs, inputs x taps]."""
    weight, axis = graph.params[node.inputs[1]], _channel_axis(graph, node)
    return np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)


def _is_matrix(graph: Graph, node: Node) -> bool:
    """True if every weight belongs to one input channel, and every output channel reads all of these."""
    shape = graph.params[node.inputs[1]].shape
    return math.prod(shape[2:]) == 1 and node.attr("group", 1) == 1 if node.op == "Conv" else len(shape) == 2
