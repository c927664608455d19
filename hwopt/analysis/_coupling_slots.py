"""The ground under coupling: every index of every axis is an element, and rules say which elements live and die together.

An axis of a value is an array of element ids, one per index. An operator that hands an axis on hands on the ids themselves;
only where two existing axes meet is a pair recorded, so that the whole analysis is a few numpy arrays. Ids may repeat within
an axis (a flattened [C, H, W] holds each channel's id H*W times): this is the index map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hwopt.ir import Graph, Node

Ids = np.ndarray  # int64[dimension]
Axes = tuple[Ids | None, ...]  # None where the dimension is not static


class Unclear(Exception):
    """A rule cannot relate the axes of this node: the node becomes a barrier, for this reason."""


@dataclass(frozen=True, eq=False)
class Use:
    """One axis of a weight in a product. Axes that make new channels are `writes`; `data` is what an axis is multiplied with."""

    node: str
    weight: str
    axis: int
    ids: Ids
    writes: bool = False
    data: str = ""
    data_axis: int = 0


@dataclass(frozen=True, eq=False)
class Choice:
    """A place where one of several axes can carry the cut (the factors of a reshape): the rest is frozen."""

    ids: Ids
    options: int


class Slots:
    """Elements, pairs and frozen elements, collected in one walk over the graph."""

    def __init__(self, graph: Graph, choices: Mapping[tuple[str, int], int]) -> None:
        self.graph = graph
        self.values: dict[str, Axes] = {}
        self.params: dict[tuple[str, int], Ids] = {}
        self.copies: dict[tuple[str, str, int], Ids] = {}  # (param, reader, axis) of vectors that readers share by chance
        self.reader: Node | None = None  # the node whose rule runs
        self.uses: list[Use] = []
        self.choices: dict[tuple[str, int], Choice] = {}
        self.reasons: dict[str, int] = {}
        self.pairs: list[tuple[Ids, Ids]] = []
        self.count = 0
        self._wanted = choices
        self._frozen = np.full(1024, -1, np.int32)  # element -> index into reasons, -1: free
        self._constant = set(graph.params)

    @property
    def frozen(self) -> np.ndarray:
        """For each element the index of the first reason why it may not go, or -1."""
        return self._frozen[: self.count]

    def fresh(self, size: int, frozen: str = "") -> Ids:
        """New elements for an axis."""
        ids = np.arange(self.count, self.count + size)
        self.count += size
        if self.count > len(self._frozen):
            grown = np.full(max(self.count, 2 * len(self._frozen)), -1, np.int32)
            grown[: len(self._frozen)] = self._frozen
            self._frozen = grown
        if frozen:
            self.freeze(ids, frozen)
        return ids

    def like(self, value: str, frozen: str = "") -> Axes:
        """New elements for all axes of a value, by its type."""
        shape = self.graph.tensor(value).shape
        if shape is None:
            raise Unclear(f"the rank of {value} is unknown")
        return tuple(self.fresh(dim, frozen) if isinstance(dim, int) else None for dim in shape)

    def axes(self, value: str) -> Axes:
        """The axes of a value that has been reached, or of a parameter.

        A vector of zeros or ones that several nodes read (equal parameters are stored once) must not tie their channels:
        each reader has elements of its own, and after a cut a vector of its own.
        """
        if self.reader is not None and self._is_chance(value, self.reader):
            return self._copy(value, self.reader.name)
        if value not in self.values:
            self.put(value, self.like(value))
            if value in self.graph.params:
                self.params.update(((value, axis), ids) for axis, ids in enumerate(self.values[value]) if ids is not None)
        return self.values[value]

    def _is_chance(self, value: str, reader: Node) -> bool:
        array = self.graph.params.get(value)
        if array is None or array.size != max(array.shape, default=0) or array.size == 1 or value in self.graph.outputs:
            return False
        moved = value in reader.inputs[:1] and reader.op not in ("Add", "Div", "Mul", "Sub")
        return value in reader.inputs and not moved and len(self.graph.users[value]) > 1

    def _copy(self, value: str, reader: str) -> Axes:
        if (value, reader, 0) not in self.copies:
            axes = self.like(value)
            self.copies.update(((value, reader, axis), ids) for axis, ids in enumerate(axes) if ids is not None)
        return tuple(self.copies[value, reader, axis] for axis in range(self.graph.params[value].ndim))

    def axis(self, value: str, axis: int) -> Ids:
        """One axis that must be static."""
        axes = self.axes(value)
        if not -len(axes) <= axis < len(axes):
            raise Unclear(f"{value} has no axis {axis}")
        ids = axes[axis]
        if ids is None:
            raise Unclear(f"axis {axis} of {value} is not static")
        return ids

    def put(self, value: str, axes: Axes) -> None:
        """State the axes of a value; an axis with a single index can never lose it."""
        self.values[value] = axes
        for ids in axes:
            if ids is not None and len(ids) == 1:
                self.freeze(ids, "it has a single index")

    def unite(self, one: Ids, other: Ids) -> None:
        """These elements go together, index by index (the shapes broadcast)."""
        if one is not other:
            one, other = np.broadcast_arrays(one, other)
            self.pairs.append((one.ravel(), other.ravel()))

    def freeze(self, ids: Ids | None, reason: str) -> None:
        """These elements stay."""
        if ids is None or not len(ids):
            return
        index = self.reasons.setdefault(reason, len(self.reasons))
        self._frozen[ids[self._frozen[ids] < 0]] = index

    def is_frozen(self, ids: Ids) -> bool:
        """True if an element is known to be frozen by now (what is united with it counts only at the end)."""
        return bool((self._frozen[ids] >= 0).any())

    def barrier(self, node: Node, reason: str) -> None:
        """Nothing is cut through this node."""
        for value in node.reads:
            if value in self.values or value in self.graph.params:
                for ids in self.axes(value):
                    self.freeze(ids, reason)
        for value in filter(None, node.outputs):
            self.start(value, reason)

    def start(self, value: str, frozen: str) -> None:
        """Frozen axes for a value that comes from outside the rules; none if its rank is unknown: whoever reads it is unclear."""
        if self.graph.tensor(value).shape is not None:
            self.values[value] = self.like(value, frozen)

    def choose(self, node: Node, place: int, options: Sequence[int], ids: Sequence[Ids]) -> int:
        """Which of several axes carries the cut: the first of `options`, or a later one where the first leads nowhere."""
        key = (node.name, place)
        chosen = options[self._wanted.get(key, 0) % len(options)]
        self.choices[key] = Choice(ids[chosen], len(options))
        return chosen

    def is_constant(self, value: str) -> bool:
        """True for parameters and for what is computed from parameters alone (a dequantized weight)."""
        return value in self._constant

    def note_constant(self, node: Node) -> None:
        if node.inputs and all(not value or value in self._constant for value in node.inputs):
            self._constant.update(node.outputs)
