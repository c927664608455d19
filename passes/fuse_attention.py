"""fuse-attention: softmax attention in one canonical form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwopt.ir import Edit, Graph, Node, of_op, part, scalar
from hwopt.ir.pattern import Match, closed, find, op
from hwopt.pipeline import Context, Pass, Phase

EXPONENTS = (op("Exp", op("Sub", "x", op("ReduceMax", "x"))), op("Exp", "x"))
SOFTMAX = tuple(
    form
    for exponent in EXPONENTS
    for total in (op("ReduceSum", exponent),)
    for form in (op("Div", exponent, total), op("Mul", exponent, op("Reciprocal", total)))
)
MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class FuseAttention(Pass):
    """exp(x - max x) / sum(exp(x - max x)) -> Softmax(x);  softmax((q / a) @ (k / b) + mask) @ v ->

        scores = MatMul(q, k^T);  scaled = Mul(scores, 1 / ab);  masked = Add(scaled, mask);  MatMul(Softmax(masked, -1), v)

    The scale stands in one place, behind the product, as a Mul by one number; the mask is the Add's second input. This is
    the form at every opset: ONNX has an Attention operator only from opset 23, and no shape of it is lost in these five
    nodes. Scales are collected from q and k through Transpose and Reshape, where nothing else reads them.
    Vaswani et al. 2017, section 3.2.1.
    """

    name: ClassVar[str] = "fuse-attention"
    summary: ClassVar[str] = "one Softmax for its exploded forms, one scale and mask in softmax attention"
    phase: ClassVar[Phase] = Phase.CLEAN
    exact: ClassVar[bool] = True
    order: ClassVar[int] = 20

    def run(self, graph: Graph, ctx: Context) -> Graph:
        self.check_site(graph)
        edit = graph.edit()
        for node in of_op(graph, "Div", "Mul"):
            match = find(graph, SOFTMAX, node.output) if self.covers(node) else None
            if match is not None and closed(graph, match) and (axis := _reduced(graph, match)) is not None:
                edit.replace(node, op="Softmax", inputs=(match["x"],), attrs={"axis": axis})
        fused = edit.finish(str(self))
        edit = fused.edit()
        for node in of_op(fused, "Softmax"):
            if self.covers(node):
                _canonical(fused, edit, node)
        return edit.finish(str(self))


def _reduced(graph: Graph, match: Match) -> int | None:
    """The one axis that all reductions of an exploded softmax run over, -1 for the last; None if there is no such axis."""
    kind = graph.tensor(match["x"])
    reductions = [*match.of_op("ReduceSum"), *match.of_op("ReduceMax")]
    found = {_axis(graph, node) for node in reductions}
    axis = found.pop() if len(found) == 1 else None
    if axis is None or kind.shape is None or kind != graph.tensor(match.nodes[0].output):
        return None
    return -1 if axis % len(kind.shape) == len(kind.shape) - 1 else axis


def _axis(graph: Graph, node: Node) -> int | None:
    array = graph.constant(node.inputs[1]) if len(node.inputs) > 1 else np.array(node.attr("axes", ()))
    return int(array.reshape(())) if array is not None and array.size == 1 and node.attr("keepdims", 1) == 1 else None


def _canonical(graph: Graph, edit: Edit, softmax: Node) -> None:
    """Rewrite what leads to a Softmax over the last axis if it is attention."""
    rank = len(graph.tensor(softmax.inputs[0]).shape or ())
    if not rank or softmax.attr("axis", -1) % rank != rank - 1:
        return
    if softmax.attr("axis", -1) != -1:
        edit.replace(softmax, attrs={"axis": -1})
    value = softmax.inputs[0]
    mask = graph.producer.get(value)
    if mask is not None and mask.op == "Add":
        scores = next((v for v in mask.inputs if _product(graph, v) is not None), "")
        other = mask.inputs[1] if scores == mask.inputs[0] else mask.inputs[0]
        if not scores:
            return
        if mask.inputs != (scores, other):
            edit.replace(mask, inputs=(scores, other))
        value = scores
    product = _product(graph, value)
    if product is not None:
        _one_scale(graph, edit, value, product)


def _product(graph: Graph, value: str) -> Node | None:
    """The MatMul of two computed values behind at most one scale, read by nobody else."""
    node = graph.producer.get(value)
    scale = _factor(graph, node) if node is not None else None
    if node is not None and scale is not None:
        node = graph.producer.get(scale[0])
    if node is None or node.op != "MatMul" or graph.sole_user(node.output) is None:
        return None
    return node if all(graph.constant(v) is None for v in node.inputs) else None


def _one_scale(graph: Graph, edit: Edit, value: str, product: Node) -> None:
    """All factors around q @ k become one Mul behind it; nothing to do if they are that already."""
    behind = graph.producer[value] if value != product.output else None
    ahead = [node for v in product.inputs for node in _scales(graph, v)]
    if ahead and graph.tensor(value).dtype == "float16":  # the unscaled product may be too large for it
        return
    if not ahead and (behind is None or (behind.op == "Mul" and scalar(graph, behind.inputs[1]) is not None)):
        return
    found = [factor for node in (*ahead, behind) if node is not None and (factor := _factor(graph, node)) is not None]
    dtype = graph.params[found[0][2]].dtype
    number = edit.param(f"{product.name}_scale", np.array(math.prod(factor for _, factor, _ in found), dtype))
    for node in ahead:
        factor = _factor(graph, node)
        if factor is not None:
            edit.forward(node, factor[0])
    if behind is not None:
        edit.replace(behind, op="Mul", inputs=(product.output, number))
        return
    raw = edit.fresh(f"{product.name}_product")
    edit.replace(product, outputs=(raw,))
    edit.emit("Mul", [raw, number], name=part(product, "scale"), outputs=[product.output], like=product)


def _scales(graph: Graph, value: str) -> list[Node]:
    """The factors that a value was multiplied by on its way here, through moves, each read by nobody else."""
    found = []
    while (node := graph.producer.get(value)) is not None and graph.sole_user(value) is not None:
        factor = _factor(graph, node)
        if factor is not None:
            found.append(node)
        elif node.op not in MOVES:
            break
        value = node.inputs[0] if factor is None else factor[0]
    return found


def _factor(graph: Graph, node: Node) -> tuple[str, float, str] | None:
    """(x, 0.5, "c") for x * c, c * x with c = 0.5, and for x / c with c = 2; None for any other node."""
    if node.domain or node.op not in ("Mul", "Div") or graph.tensor(node.output).shape is None:
        return None
    for here, other in ((0, 1), (1, 0)) if node.op == "Mul" else ((0, 1),):
        number = scalar(graph, node.inputs[other])
        if number and graph.tensor(node.inputs[here]) == graph.tensor(node.output):
            return node.inputs[here], number if node.op == "Mul" else 1 / number, node.inputs[other]
    return None
