"""fuse-silu: one spelling for the sigmoid, and so for SiLU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hwopt.ir import Graph, of_op
from hwopt.ir.pattern import closed, find, op
from hwopt.pipeline import Context, Pass, Phase

DENOMINATOR = op("Add", op("Exp", op("Neg", "x")), 1.0)
SIGMOID = (op("Reciprocal", DENOMINATOR), op("Div", 1.0, DENOMINATOR))
TANH = op("Mul", op("Add", op("Tanh", op("Mul", "x", 0.5)), 1.0), 0.5)
GATE = op("Div", "y", DENOMINATOR)


@dataclass(frozen=True)
class FuseSilu(Pass):
    """1 / (1 + exp(-x)) -> Sigmoid(x);  y / (1 + exp(-x)) -> y * Sigmoid(x);  Swish(x) -> x * Sigmoid(x).

    SiLU's canonical form is the pair x * Sigmoid(x) at every opset: ONNX has a Swish only from opset 24, and the pair is
    what kernels fuse. (1 + tanh(x / 2)) / 2 is a sigmoid too. Intermediate values may have no other reader.
    """

    name: ClassVar[str] = "fuse-silu"
    summary: ClassVar[str] = "x * Sigmoid(x) for every spelling of SiLU and of the sigmoid"
    phase: ClassVar[Phase] = Phase.CLEAN
    exact: ClassVar[bool] = True
    order: ClassVar[int] = 20

    def run(self, graph: Graph, ctx: Context) -> Graph:
        self.check_site(graph)
        edit = graph.edit()
        for node in of_op(graph, "Reciprocal", "Div", "Mul", "Swish"):
            if not self.covers(node):
                continue
            if node.op == "Swish":
                inner = node.inputs[0]
                if node.attr("alpha", 1.0) != 1.0:
                    continue
                edit.replace(node, op="Mul", inputs=(inner, edit.emit("Sigmoid", [inner], like=node)), attrs={})
                continue
            match = find(graph, (*SIGMOID, TANH, GATE), node.output)
            if match is None or graph.types.get(match["x"]) != graph.types.get(node.output) or not closed(graph, match):
                continue
            if "y" in match.values:
                edit.replace(node, op="Mul", inputs=(match["y"], edit.emit("Sigmoid", [match["x"]], like=node)))
            else:
                edit.replace(node, op="Sigmoid", inputs=(match["x"],))
        return edit.finish(str(self))
