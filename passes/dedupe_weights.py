"""dedupe-weights: store equal weights once."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwopt.ir import Graph
from hwopt.ir.graph import param_digest
from hwopt.pipeline import Context, Pass, Phase


@dataclass(frozen=True)
class DedupeWeights(Pass):
    """f(x, W), g(y, W') -> f(x, W), g(y, W) where W and W' are equal to the bit.

    Parameters below min_bytes, and those filled with one number (zero biases), are equal by accident rather than by tied
    weights: sharing them would save nothing and couple layers that have nothing to do with each other. A site names the
    parameters to look at.
    """

    name: ClassVar[str] = "dedupe-weights"
    summary: ClassVar[str] = "store equal weights once"
    phase: ClassVar[Phase] = Phase.CLEAN
    exact: ClassVar[bool] = True
    order: ClassVar[int] = 10

    min_bytes: int = 256

    def run(self, graph: Graph, ctx: Context) -> Graph:
        alike: dict[tuple, list[str]] = defaultdict(list)
        for name, array in graph.params.items():
            if array.nbytes >= self.min_bytes and name not in graph.outputs and (not self.site or name in self.site):
                alike[str(array.dtype), array.shape].append(name)
        edit = graph.edit()
        for names in alike.values():
            first: dict[str, str] = {}
            for name in names if len(names) > 1 else ():
                array = graph.params[name]
                if np.all(array == array.flat[0]):
                    continue
                kept = first.setdefault(param_digest(array), name)
                edit.forward(name, kept)
        return edit.finish(str(self))
