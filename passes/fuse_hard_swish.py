"""fuse-hard-swish: one node for HardSwish and HardSigmoid, however they were spelled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from hwopt.ir import Graph, Node, of_op
from hwopt.ir.pattern import Match, closed, find, op, product, scaled
from hwopt.pipeline import Context, Pass, Phase

THREE_MORE = op("Add", "x", 3.0)
RELU6 = (
    op("Clip", THREE_MORE, 0.0, 6.0),
    op("Min", op("Relu", THREE_MORE), 6.0),
    op("Min", op("Max", THREE_MORE, 0.0), 6.0),
    op("Max", op("Min", THREE_MORE, 6.0), 0.0),
    op("Clip", op("Relu", THREE_MORE), 0.0, 6.0),
)
HARD_SIGMOID = (*scaled(RELU6, 1 / 6), op("Clip", op("Add", scaled("x", 1 / 6), 0.5), 0.0, 1.0))
HARD_SWISH = (
    *product("x", 1 / 6, RELU6),
    op("Div", op("Mul", "x", RELU6), 6.0),
    op("Mul", op("Div", "x", 6.0), RELU6),
    op("Mul", "x", (*HARD_SIGMOID, op("HardSigmoid", "x"))),
)
SIXTH = {"alpha": 1 / 6, "beta": 0.5}


@dataclass(frozen=True)
class FuseHardSwish(Pass):
    """x * clip(x + 3, 0, 6) / 6 -> HardSwish(x);  clip(x + 3, 0, 6) / 6 -> HardSigmoid(x, 1/6, 1/2).

    Factors in any order, the clip also as Relu6 or Min and Max; a HardSigmoid with slope 1/6 counts too. Intermediate
    values may have no other reader. Needs opset 14. Howard et al. 2019 (MobileNetV3).
    """

    name: ClassVar[str] = "fuse-hard-swish"
    summary: ClassVar[str] = "one HardSwish or HardSigmoid node for their spellings"
    phase: ClassVar[Phase] = Phase.CLEAN
    exact: ClassVar[bool] = True
    order: ClassVar[int] = 20

    def run(self, graph: Graph, ctx: Context) -> Graph:
        if graph.opsets.get("", 0) < 14:
            return graph
        self.check_site(graph)
        edit = graph.edit()
        inner: set[str] = set()  # nodes that have become part of a HardSwish
        for node in reversed(list(of_op(graph, "Mul", "Div", "Clip"))):
            if not self.covers(node) or node.name in inner:
                continue
            swish, sigmoid = (self._found(graph, node, pattern) for pattern in (HARD_SWISH, HARD_SIGMOID))
            if swish is not None:
                edit.replace(node, op="HardSwish", inputs=(swish["x"],), attrs={})
                inner.update(part.name for part in swish.nodes)
            elif sigmoid is not None:
                edit.replace(node, op="HardSigmoid", inputs=(sigmoid["x"],), attrs=SIXTH)
        return edit.finish(str(self))

    def _found(self, graph: Graph, node: Node, pattern: tuple) -> Match | None:
        match = find(graph, pattern, node.output)
        if match is None or graph.types.get(match["x"]) != graph.types.get(node.output) or not closed(graph, match):
            return None
        slopes = [(gate.attr("alpha", 0.2), gate.attr("beta", 0.5)) for gate in match.of_op("HardSigmoid")]
        fits = all(math.isclose(a, 1 / 6, rel_tol=1e-5) and math.isclose(b, 0.5, rel_tol=1e-5) for a, b in slopes)
        return match if fits else None
