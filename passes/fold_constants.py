"""fold-constants: compute at compile time what does not depend on the inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hwopt.analysis import fold
from hwopt.ir import Graph
from hwopt.pipeline import Context, Pass, Phase


@dataclass(frozen=True)
class FoldConstants(Pass):
    """f(constants) -> constant;  Shape(x) -> constant where x has a static type.

    A constant above limit_bytes is stored only if it is no larger than the parameters it comes from; weights held in fewer
    bits stay packed. See hwopt.analysis.fold. It works on the whole graph: a site makes no difference.
    """

    name: ClassVar[str] = "fold-constants"
    summary: ClassVar[str] = "compute what does not depend on the inputs"
    phase: ClassVar[Phase] = Phase.CLEAN
    exact: ClassVar[bool] = True
    order: ClassVar[int] = 0

    limit_bytes: int = fold.LIMIT_BYTES

    def run(self, graph: Graph, ctx: Context) -> Graph:
        return fold.fold_constants(graph, self.limit_bytes, str(self))
