"""fuse-gelu: one node for GELU, however it was spelled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from hwopt.ir import Graph, of_op
from hwopt.ir.pattern import closed, find, op, product, scaled
from hwopt.pipeline import Context, Pass, Phase

ERF = product("x", 0.5, op("Add", op("Erf", scaled("x", 2**-0.5)), 1.0))
CUBE = (op("Pow", "x", 3.0), op("Mul", op("Mul", "x", "x"), "x"), op("Mul", op("Pow", "x", 2.0), "x"))
CUBIC = (
    op("Add", "x", (op("Mul", CUBE, 0.044715), *product("x", "x", op("Mul", "x", 0.044715)))),
    op("Mul", "x", op("Add", (op("Mul", op("Mul", "x", "x"), 0.044715), op("Mul", "x", op("Mul", "x", 0.044715))), 1.0)),
    op("Mul", "x", op("Add", op("Mul", op("Pow", "x", 2.0), 0.044715), 1.0)),
)
TANH = product("x", 0.5, op("Add", op("Tanh", op("Mul", CUBIC, (2 / math.pi) ** 0.5)), 1.0))


@dataclass(frozen=True)
class FuseGelu(Pass):
    """x * (1 + erf(x / sqrt(2))) / 2 -> Gelu(x);  x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2 -> Gelu(x, tanh).

    The factors may stand in any order and the intermediate values may have no other reader. Needs opset 20. The GELU of
    Hendrycks and Gimpel 2016, in both of their forms.
    """

    name: ClassVar[str] = "fuse-gelu"
    summary: ClassVar[str] = "one Gelu node for its erf and tanh spellings"
    phase: ClassVar[Phase] = Phase.CLEAN
    exact: ClassVar[bool] = True
    order: ClassVar[int] = 20

    def run(self, graph: Graph, ctx: Context) -> Graph:
        if graph.opsets.get("", 0) < 20:
            return graph
        self.check_site(graph)
        edit = graph.edit()
        for node in of_op(graph, "Mul"):
            for pattern, attrs in ((ERF, {}), (TANH, {"approximate": "tanh"})):
                match = find(graph, pattern, node.output) if self.covers(node) else None
                if match is None or graph.types.get(match["x"]) != graph.types.get(node.output):
                    continue
                if closed(graph, match):
                    edit.replace(node, op="Gelu", inputs=(match["x"],), attrs=attrs)
                else:
                    ctx.refuse(self, node, "an intermediate value of the GELU is read elsewhere")
        return edit.finish(str(self))
