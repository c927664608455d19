"""unflatten-gemm: a product of matrices between two reshapes becomes one over the whole tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwopt.ir import Edit, Graph, Node, of_op, part
from hwopt.pipeline import Context, Pass, Phase


@dataclass(frozen=True)
class UnflattenGemm(Pass):
    """Reshape(Gemm(Reshape(x), W, b)) -> Add(MatMul(x, W), b), where the reshapes only put the leading axes together and apart.

    Exporters write linear layers over tokens like that (torch's addmm, Keras' Dense). What follows (an activation, a residual)
    then follows the product, so that it becomes part of its kernel. Weights and bias must be constant, alpha and beta 1.
    """

    name: ClassVar[str] = "unflatten-gemm"
    summary: ClassVar[str] = "products between reshapes of the leading axes become one over the whole tensor"
    phase: ClassVar[Phase] = Phase.CLEAN
    exact: ClassVar[bool] = True
    order: ClassVar[int] = 15  # before the fusions, which look at what follows the product

    def run(self, graph: Graph, ctx: Context) -> Graph:
        self.check_site(graph)
        edit = graph.edit()
        for node in of_op(graph, "Gemm", "MatMul"):
            source = whole_source(graph, node) if self.covers(node) else ""
            behind = _reshape_behind(graph, node) if source else None
            if behind is None or graph.tensor(behind.output).dims[:-1] != graph.tensor(source).dims[:-1]:
                continue
            _unflatten(graph, edit, node, behind, source)
        return edit.finish(str(self))


def whole_source(graph: Graph, node: Node) -> str:
    """What a Reshape brought to the matrix [rows, depth] that the node multiplies, of the same depth; "" if there is none."""
    reshape = graph.producer.get(node.inputs[0])
    weight = graph.constant(node.inputs[1])
    if reshape is None or reshape.op not in ("Reshape", "Flatten") or weight is None or weight.ndim != 2:
        return ""
    if node.op == "Gemm" and (node.attr("transA", 0) or node.attr("alpha", 1.0) != 1.0 or node.attr("beta", 1.0) != 1.0):
        return ""
    bias = graph.constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else np.zeros(1)
    before, flat = graph.tensor(reshape.inputs[0]), graph.tensor(reshape.output)
    fits = before.static and flat.static and len(flat.dims) == 2 and before.dims[-1:] == flat.dims[-1:] and len(before.dims) > 2
    return reshape.inputs[0] if fits and bias is not None and (bias.ndim < 2 or bias.shape[0] == 1) else ""


def _reshape_behind(graph: Graph, node: Node) -> Node | None:
    """The Reshape that alone reads the product, and keeps its columns."""
    user = graph.sole_user(node.output)
    if user is None or user.op != "Reshape" or not (graph.tensor(user.output).static and graph.tensor(node.output).static):
        return None
    return user if graph.tensor(user.output).dims[-1:] == graph.tensor(node.output).dims[-1:] else None


def _unflatten(graph: Graph, edit: Edit, node: Node, behind: Node, source: str) -> None:
    weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else ""
    if node.attr("transB", 0):
        weight = edit.param(f"{weight}_transposed", np.ascontiguousarray(graph.params[weight].T))
    product = edit.fresh(f"{node.output}_whole")
    edit.replace(node, op="MatMul", inputs=(source, weight), outputs=(product,), attrs={})
    edit.forward(behind, edit.emit("Add", [product, bias], name=part(node, "bias"), like=node) if bias else product)
