"""Where each value of a graph lies while it is lowered: in ONNX's order of axes, channels last, or both.

Convolutions and pools read and write channels last ([batch, height, width, channels]); what is elementwise between them
follows. A value gets its other order where somebody needs it, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hwopt.analysis import bfloat16
from hwopt.ir import Graph

Expr = Any  # a Relax expression


def to_last(rank: int) -> tuple[int, ...]:
    """The permutation from [batch, channels, ...] to [batch, ..., channels]."""
    return (0, *range(2, rank), 1)


def to_first(rank: int) -> tuple[int, ...]:
    """The inverse of `to_last`."""
    return (0, rank - 1, *range(1, rank - 1))


class Values:
    """The Relax expressions of a graph's values. `last` selects the order: False is ONNX's own, True is channels last."""

    def __init__(self, graph: Graph, builder: Any) -> None:
        self.graph, self.builder = graph, builder
        self.arrays: dict[str, np.ndarray] = dict(graph.params)
        self._exprs: dict[tuple[str, bool], Expr] = {}
        self._moved: dict[str, tuple[Expr, tuple[int, ...]]] = {}
        self._movers: dict[str, int] = {}  # the regions that these transpositions are

    def move(self, value: str, expr: Expr, order: Sequence[int]) -> None:
        """Says that the value is `expr` with its axes in this order; the transposition is emitted where somebody needs it."""
        if tuple(order) == tuple(range(len(order))):
            self.put(value, expr)
        else:
            self._moved[value], self._movers[value] = (expr, tuple(order)), self.builder.origin

    def moved(self, value: str) -> tuple[Expr, tuple[int, ...]] | None:
        """The expression and order of a value whose transposition has not been emitted."""
        return None if (value, False) in self._exprs else self._moved.get(value)

    def put(self, value: str, expr: Expr, last: bool = False) -> None:
        self._exprs[value, last] = expr

    def is_last(self, value: str) -> bool:
        """True if the value has been computed channels last."""
        value = self.origin(value)
        return (value, True) in self._exprs and (value, False) not in self._exprs

    def known(self, value: str) -> bool:
        """True if the value has been computed in either order."""
        value = self.origin(value)
        return (value, False) in self._exprs or (value, True) in self._exprs or value in self._moved

    def has_last(self, value: str) -> bool:
        value = self.origin(value)
        return (value, True) in self._exprs

    def origin(self, value: str) -> str:
        """The bfloat16 value behind a widened one, which every reader widens for itself; the value itself otherwise."""
        return (value not in self.arrays and bfloat16.widened(self.graph, value)) or value

    def constant(self, value: str) -> np.ndarray | None:
        return self.arrays.get(value)

    def get(self, value: str, last: bool = False) -> Expr:
        """The value in this order; a transposition is emitted where it exists only in the other."""
        known = self._exprs.get((value, last))
        if known is not None:
            return known
        array = self.arrays.get(value)
        if array is not None:
            expr = constant(np.ascontiguousarray(array.transpose(to_last(array.ndim))) if last else array)
        elif (source := self.origin(value)) != value:
            return convert_bfloat16(self.builder, self.get(source, last))
        elif (pending := self.moved(value)) is not None:
            expr = self._emitted(value, _permuted(*pending, last))
        elif (value, not last) in self._exprs:
            expr = self.builder.emit(reordered(self._exprs[value, not last], last))
        else:
            raise KeyError(f"{value} has not been computed")
        self._exprs[value, last] = expr
        return expr

    def once(self, value: str, last: bool) -> Expr:
        """Like `get`, but a transposition is made for this reader alone, such that its kernel can swallow it."""
        if (value, last) in self._exprs or value in self.arrays:
            return self.get(value, last)
        if (source := self.origin(value)) != value:
            return convert_bfloat16(self.builder, self.once(source, last))
        if (pending := self.moved(value)) is not None:
            return self._emitted(value, _permuted(*pending, last))
        return self.builder.emit(reordered(self._exprs[value, not last], last))

    def _emitted(self, value: str, expr: Expr) -> Expr:
        """A transposition that was put off, in the name of the region that it is (see origins.py)."""
        reader, self.builder.origin = self.builder.origin, self._movers[value]
        found = self.builder.emit(expr)
        self.builder.origin = reader
        return found


OPAQUE = {"op_pattern": 8}  # a PrimFunc that TVM must not fuse with anything


def convert_bfloat16(builder: Any, expr: Expr, alone: bool = False) -> Expr:
    """float32 rounded to bfloat16 (to nearest even, NaN stays NaN: TVM's cast would lose it), `alone` in a kernel of its own;
    or bfloat16 widened."""
    from tvm import te, tirx

    from hwopt.backends.tvm.kernels import bfloat16 as bits

    def narrow(tensor: Any) -> Any:
        return te.compute(tensor.shape, lambda *index: tirx.reinterpret("bfloat16", bits.narrow(tensor(*index), 1)), "narrowed")

    def widen(tensor: Any) -> Any:
        return te.compute(tensor.shape, lambda *index: bits.widen(tirx.reinterpret("uint16", tensor(*index)), 1), "widened")

    if str(expr.ty.dtype) == "bfloat16":
        return builder.emit_te(widen, expr, primfunc_name_hint="widen")
    return builder.emit_te(narrow, expr, primfunc_name_hint="narrow", primfunc_attrs=OPAQUE if alone else None)


def constant(array: np.ndarray) -> Expr:
    """A Relax constant with exactly this element type."""
    import tvm
    from tvm import relax

    return relax.const(tvm.runtime.tensor(np.ascontiguousarray(array)) if array.ndim else np.asarray(array), str(array.dtype))


def _permuted(expr: Expr, order: Sequence[int], last: bool) -> Expr:
    """The expression with its axes in this order and then, with `last`, channels last."""
    from tvm import relax

    return relax.op.permute_dims(expr, [order[axis] for axis in to_last(len(order))] if last else list(order))


def reordered(expr: Expr, last: bool) -> Expr:
    """The expression in the other order of axes; a reshape where no element moves."""
    from tvm import relax

    dims = dims_of(expr)
    order = to_last(len(dims)) if last else to_first(len(dims))
    moved = [axis for axis in order if dims[axis] != 1]
    if moved == sorted(moved):
        return relax.op.reshape(expr, [dims[axis] for axis in order])
    return relax.op.permute_dims(expr, list(order))


def dims_of(expr: Expr) -> list[int]:
    """The static shape of a normalized expression."""
    return [int(dim) for dim in expr.ty.shape]


def reshaped(builder: Any, expr: Expr, dims: Sequence[int]) -> Expr:
    """The expression with another shape; itself if it has it."""
    from tvm import relax

    return expr if dims_of(expr) == list(dims) else builder.emit(relax.op.reshape(expr, list(dims)))
