"""join-affine: batch norms and factors in a row that no layer takes become one product and one sum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwopt.ir import Edit, Graph, part
from hwopt.pipeline import Context, Pass, Phase
from passes._affine import Affine, affine_of


@dataclass(frozen=True)
class JoinAffine(Pass):
    """BatchNorm(x) [* w + b] -> x * scale + shift, with numbers per channel; a chain of several Mul and Add becomes one of each.

    What is left when fold-batch-norm is done: norms behind a Concat or a sum (DenseNet, ResNet v2). As a product and a sum they
    are part of the same kernel as the activation behind them, and steps that 8-bit kernels know. Computed in float64.
    """

    name: ClassVar[str] = "join-affine"
    summary: ClassVar[str] = "batch norms that no layer takes, and chains of factors and shifts, become one product and one sum"
    phase: ClassVar[Phase] = Phase.CLEAN
    exact: ClassVar[bool] = True
    order: ClassVar[int] = 35  # what fold-batch-norm leaves

    def run(self, graph: Graph, ctx: Context) -> Graph:
        self.check_site(graph)
        edit = graph.edit()
        taken: set[str] = set()
        for node in reversed(graph.nodes):
            chain = _chain(graph, affine_of(graph, node)) if node.name not in taken and self.covers(node) else []
            if not chain:
                continue
            taken.update(affine.node.name for affine in chain)
            if any(affine.node.op == "BatchNormalization" for affine in chain) or len(chain) > _needed(*_joined(chain)):
                _write(graph, edit, chain)
        return edit.finish(str(self))


def _chain(graph: Graph, last: Affine | None) -> list[Affine]:
    """The affines that end in `last`, in order, along one axis and each read by the next one alone."""
    chain = [] if last is None or graph.tensor(last.node.output).dtype != "float32" else [last]
    axes = {affine.axis for affine in chain} - {None}
    while chain:
        before = graph.producer.get(chain[0].source)
        found = affine_of(graph, before) if before is not None and graph.sole_user(chain[0].source) is not None else None
        axes |= {found.axis} - {None} if found is not None else set()
        if found is None or len(axes) > 1:
            break
        chain.insert(0, found)
    return chain


def _joined(chain: list[Affine]) -> tuple[np.ndarray, np.ndarray]:
    """scale and shift of all of them, in float64."""
    scale, shift = np.ones(1), np.zeros(1)
    for affine in chain:
        scale, shift = scale * affine.scale, shift * affine.scale + affine.shift
    return scale, shift


def _needed(scale: np.ndarray, shift: np.ndarray) -> int:
    return int((scale != 1).any()) + int(shift.any())


def _write(graph: Graph, edit: Edit, chain: list[Affine]) -> None:
    last, value = chain[-1].node, chain[0].source
    scale, shift = _joined(chain)
    rank = len(graph.tensor(last.output).shape or ())
    axis = next((affine.axis for affine in chain if affine.axis is not None), rank - 1)
    if not all(np.isfinite(one.astype(np.float32)).all() for one in (scale, shift)):
        return
    for op, numbers, suffix in (("Mul", scale, "scale"), ("Add", shift, "shift")):
        if (numbers != (1 if op == "Mul" else 0)).any():
            shape = (math.prod(numbers.shape), *(1,) * (rank - 1 - axis)) if numbers.size > 1 else ()
            given = edit.param(f"{last.name}_{suffix}", numbers.astype(np.float32).reshape(shape))
            value = edit.emit(op, [value, given], name=part(last, suffix), like=last)
    edit.forward(last, value)
