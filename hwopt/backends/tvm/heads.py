"""Transpositions around batched products: the heads of an attention are read and written where they lie.

    [batch, m, heads, k] -> Transpose -> MatMul -> Transpose -> [batch, m, heads, n]

The kernel goes from one position of a head to the next by strides, so that the transpositions move nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from hwopt.analysis.regions import Region
from hwopt.backends.tvm.kernels.spec import Add, MatmulSpec, Multiply
from hwopt.backends.tvm.layout import Expr, Values
from hwopt.ir import Graph

SPLIT = (0, 2, 1, 3)  # [batch, m, heads, k] <-> [batch, heads, m, k]
SPLIT_TURNED = (0, 2, 3, 1)  # [batch, n, heads, k] -> [batch, heads, k, n]


@dataclass(frozen=True)
class Sides:
    """A product as its operands lie in memory. `order` is what is left to do with the result, () for nothing."""

    spec: MatmulSpec
    data: Expr
    right: Expr
    order: tuple[int, ...] = ()


def in_place(graph: Graph, region: Region, values: Values, spec: MatmulSpec, data: str, right: str) -> Sides:
    """The product `spec` of two computed values, with the transpositions in front of it and behind it taken in."""
    beside = []
    left, turned = values.moved(data), values.moved(right)
    heads = graph.tensor(data).dims[1] if len(graph.tensor(data).dims) == 4 else 1
    if left and left[1] == SPLIT:
        beside.append("data")
    if turned and turned[1] in (SPLIT, SPLIT_TURNED):
        beside.append("right")
    transposed = turned is not None and turned[1] in (SPLIT_TURNED, (0, 1, 3, 2), (0, 2, 1))
    merged = heads > 1 and not _reads_full(spec) and _merges(graph, region)
    order = SPLIT if merged else ()
    sides = (*beside, *(["out"] if merged else []))
    found = dataclasses.replace(spec, transposed=transposed, heads=heads if sides else 1, beside=sides)
    return Sides(
        found,
        left[0] if left and "data" in sides else values.get(data),
        turned[0] if turned and ("right" in sides or transposed) else values.get(right),
        order,
    )


def _reads_full(spec: MatmulSpec) -> bool:
    """True if the epilogue reads a tensor that lies as the result would without its transposition."""
    return any(isinstance(step, Add) or (isinstance(step, Multiply) and step.over == "full") for step in spec.epilogue)


def _merges(graph: Graph, region: Region) -> bool:
    """True if all that reads the result is a transposition that puts heads beside one another."""
    if len(region.outputs) > 1 or region.output in graph.outputs:
        return False
    user = graph.sole_user(region.output)
    return user is not None and user.op == "Transpose" and tuple(user.attr("perm", ())) == SPLIT


def composed(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    """The permutation that is `first`, then `second`."""
    return tuple(first[axis] for axis in second)
