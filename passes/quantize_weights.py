"""quantize-weights: weights in 4 or 8 bits, everything else stays float."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from hwopt.analysis.covariance import channel_moments
from hwopt.errors import PassError
from hwopt.ir import Edit, Graph, Node, of_op
from hwopt.pipeline import Context, Pass, Phase, Refusal
from hwopt.target import Target
from passes._rounding import round_rows, scales_of

OPS = ("Conv", "Gemm", "MatMul")
BITS = {4: ml_dtypes.int4, 8: np.int8}
FORMS = ((8, 0), (4, 32))  # (bits, group) worth considering
BLOCKED_OPSET = 21  # brought 4-bit integers and blocks


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """x @ W -> x @ DequantizeLinear(q, scales): integers of 4 or 8 bits, symmetric, multiplied as float.

    One scale per output channel, or with `group` one for that many neighbours along the inputs (4 bits need it: 32 is usual).
    Scales clip the largest weights where that lowers the squared error; with calibration data a weight counts by the mean
    square of its input. Needs no data. Gains where a layer waits for its weights (few rows: language models, batch 1), and
    makes every model smaller: kernels decode in registers where the target gains by it, else the library holds floats.
    Applies to constant float32 weights that nobody outside of `site` reads; with `group`, which must divide the inputs, not to
    convolutions larger than 1 x 1. As llama.cpp's Q4_0 and ONNX Runtime's MatMulNBits, in standard operators.
    """

    name: ClassVar[str] = "quantize-weights"
    summary: ClassVar[str] = "weights as 4 or 8 bit integers, float activations"
    phase: ClassVar[Phase] = Phase.QUANTIZE
    knobs: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({"group": (32, 16, 64, 128)})

    bits: int = 8
    group: int = 0  # inputs that share a scale; 0: all of an output channel

    def run(self, graph: Graph, ctx: Context) -> Graph:
        self.check_site(graph)
        if self.bits not in BITS or self.group < 0:
            raise PassError(f"bits={self.bits},group={self.group} is no form of weights", place=str(self), hint="bits is 4 or 8")
        chosen = []
        for node in graph.nodes if self.site else of_op(graph, *OPS):
            reason = self._reason(graph, node) if self.covers(node) else ""
            if reason and (node.op in OPS or node.name in self.site):
                ctx.refuse(self, node, reason)
            elif self.covers(node) and node.op in OPS:
                chosen.append(node)
        edit, moments = graph.edit(), _moments(graph, chosen, ctx)
        for weight, node in {node.inputs[1]: node for node in chosen}.items():
            self._quantize(edit, graph, weight, node, moments.get(node.name))
        return edit.finish(str(self))

    @classmethod
    def candidates(cls, graph: Graph, target: Target) -> Iterator[Pass | Refusal]:
        for node in of_op(graph, *OPS):
            if "float32" not in target.peak:
                yield Refusal(cls.name, node.name, "the target multiplies no floats")
                continue
            found = [cls((node.name,), bits, group) for bits, group in FORMS]
            reasons = [one._reason(graph, node) for one in found]
            if all(reasons):
                yield Refusal(cls.name, node.name, reasons[0])
            yield from (one for one, reason in zip(found, reasons, strict=True) if not reason)

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
        needed = BLOCKED_OPSET if self.bits < 8 or self.group else 13
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

    def _quantize(self, edit: Edit, graph: Graph, name: str, node: Node, moment: np.ndarray | None) -> None:
        weight, axis = graph.params[name], _channel_axis(graph, node)
        rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)  # [n, k]
        squares = None if moment is None or moment.shape[1] != rows.shape[1] or math.prod(weight.shape[2:]) != 1 else moment[1]
        group = self.group or rows.shape[1]
        scales = scales_of(rows, self.bits, group, squares)
        steps = round_rows(rows, np.repeat(scales, group, axis=1), self.bits)
        moved = np.moveaxis(weight, axis, 0).shape
        whole = np.moveaxis(steps.reshape(moved), 0, axis).astype(BITS[self.bits])
        attrs = {"axis": 1 - axis, "block_size": self.group} if self.group else {"axis": axis}
        scale = np.moveaxis(scales.reshape(len(scales), -1, *moved[2:]), 0, axis) if self.group else scales[:, 0]
        params = [edit.param(f"{name}_int{self.bits}", np.ascontiguousarray(whole))]
        params.append(edit.param(f"{name}_scale", np.ascontiguousarray(scale)))
        outputs = [edit.fresh(f"{name}_dequantized")]
        value = edit.emit("DequantizeLinear", params, attrs=attrs, name=f"{name}_dequantize", outputs=outputs, like=node)
        edit.forward(name, value)


def _channel_axis(graph: Graph, node: Node) -> int:
    """Where the output channels are among the weight's axes."""
    rank = len(graph.tensor(node.inputs[1]).shape or ())
    return 0 if node.op == "Conv" or node.attr("transB", 0) else rank - 1


def _moments(graph: Graph, nodes: list[Node], ctx: Context) -> Mapping[str, np.ndarray]:
    """Mean and mean square of every input channel, [2, channels] by node name; nothing without calibration data."""
    if ctx.calibration is None or not nodes:
        return {}
    others = [node for node in of_op(graph, *OPS) if node.inputs[1] in graph.params]
    return channel_moments(graph, ctx.calibration, nodes, others)
