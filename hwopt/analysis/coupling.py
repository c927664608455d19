"""Which channels of a model go together: groups of units that can be removed in all weights at once.

A channel that one convolution writes is read by others, scaled by a batch norm, added to a residual, kept as a head of an
attention block. Union-find over the indices of all axes finds what must go together (the idea of a closed group as the
thing to prune: Fang et al., "DepGraph", CVPR 2023, arXiv:2301.12900; here on the IR with explicit shapes).

A *unit* is the least that can go: one channel, one attention head, one group of a grouped convolution. A *group* is the
units that one layer writes, together with everybody who writes the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from hwopt.analysis._coupling_rules import RULES
from hwopt.analysis._coupling_slots import Axes, Choice, Ids, Slots, Unclear, Use
from hwopt.analysis.memo import remembered
from hwopt.ir import Graph, Node

ROUNDS = 4  # walks over the graph until every reshape has tried its factors


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of a parameter that a group cuts: `unit[i]` is the unit that index i belongs to, -1 if to none of the group."""

    param: str
    axis: int
    unit: np.ndarray


@dataclass(frozen=True, eq=False)
class Weight:
    """One axis of a product's weight, as in Member; `writes` if it makes the units, else it reads them from `data`'s axis."""

    node: str
    value: str
    axis: int
    unit: np.ndarray
    writes: bool
    data: str
    data_axis: int


@dataclass(frozen=True, eq=False)
class Elements:
    """What one analysis found about all elements; groups look their parts up in it when asked."""

    params: tuple[tuple[str, int, Ids], ...]  # name, axis, elements
    uses: tuple[Use, ...]
    labels: np.ndarray  # element -> class: what goes together
    unit: np.ndarray  # class -> unit of its group
    owner: np.ndarray  # class -> group, -1: none

    def units(self, ids: Ids, group: int) -> np.ndarray | None:
        """index -> unit of the group, -1 for others; None if the group has nothing on this axis."""
        classes = self.labels[ids]
        mine = self.owner[classes] == group
        return np.where(mine, self.unit[classes], -1) if mine.any() else None


@dataclass(frozen=True, eq=False)
class Group:
    """`size` units that can go one by one (`frozen` says why not, where that is so), of `granularity` channels each.

    It is called after the first node that writes it. `blocks` are sets of units of which at least one must stay, because
    some value (a part of a Split) has no others.
    """

    name: str
    size: int
    granularity: int
    producers: tuple[str, ...]
    frozen: str
    labels: np.ndarray  # unit -> class of elements, for Coupling.kept
    blocks: tuple[np.ndarray, ...]
    number: int
    elements: Elements

    @property
    def channels(self) -> int:
        """Channels of the first producer that belong to the group."""
        return self.size * self.granularity

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """Every axis of a parameter that is cut when units go."""
        found = ((param, axis, self.elements.units(ids, self.number)) for param, axis, ids in self.elements.params)
        return tuple(Member(param, axis, unit) for param, axis, unit in found if unit is not None)

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """The weights of products among them, for scores."""
        found = ((use, self.elements.units(use.ids, self.number)) for use in self.elements.uses)
        return tuple(
            Weight(use.node, use.weight, use.axis, unit, use.writes, use.data, use.data_axis)
            for use, unit in found
            if unit is not None
        )


@dataclass(frozen=True, eq=False)
class Coupling:
    """All groups, and the elements behind them: what a cut needs to give every value its new shape."""

    groups: tuple[Group, ...]
    values: Mapping[str, Axes]
    params: Mapping[tuple[str, int], Ids]
    copies: Mapping[tuple[str, str, int], Ids]  # (param, reader, axis): vectors that each reader has for itself after a cut
    labels: np.ndarray  # element -> class

    def kept(self, removed: Iterable[tuple[Group, np.ndarray]]) -> np.ndarray:
        """element -> whether it stays, when these units of these groups go."""
        gone = np.zeros(int(self.labels.max(initial=-1)) + 1, bool)
        for group, units in removed:
            gone[group.labels[units]] = True
        return ~gone[self.labels]


def coupling(graph: Graph) -> tuple[Group, ...]:
    """The groups of a graph in the order of their first producers; computed once per Graph object."""
    return analyse(graph).groups


@remembered
def analyse(graph: Graph) -> Coupling:
    """The groups and the elements behind them; computed once per Graph object."""
    choices: dict[tuple[str, int], int] = {}
    for _ in range(ROUNDS):
        slots = _walk(graph, choices)
        labels, reason = _classes(slots)
        stuck = {key for key, choice in slots.choices.items() if _is_stuck(choice, labels, reason, choices.get(key, 0))}
        if not stuck:
            break
        choices.update({key: choices.get(key, 0) + 1 for key in stuck})
    values = MappingProxyType(slots.values)
    params, copies = MappingProxyType(slots.params), MappingProxyType(slots.copies)
    return Coupling(_groups(slots, labels, reason), values, params, copies, labels)


def _is_stuck(choice: Choice, labels: np.ndarray, reason: np.ndarray, tried: int) -> bool:
    return tried + 1 < choice.options and bool((reason[labels[choice.ids]] >= 0).all())


def _walk(graph: Graph, choices: Mapping[tuple[str, int], int]) -> Slots:
    slots = Slots(graph, choices)
    for value in graph.inputs:
        slots.start(value, f"is the graph's input {value}")
    for node in graph.nodes:
        _visit(slots, node)
        slots.note_constant(node)
    slots.reader = None
    for value in graph.outputs:
        for ids in slots.axes(value) if value in slots.values or value in graph.params else ():
            slots.freeze(ids, f"is the graph's output {value}")
    return slots


def _visit(slots: Slots, node: Node) -> None:
    slots.reader = node
    rule = RULES.get(node.op) if node.domain in ("", "ai.onnx") else None
    if rule is None:
        slots.barrier(node, f"{node} has no rule")
        return
    try:
        results = rule(slots, node)
        _check(slots.graph, node, results)
    except Unclear as error:
        slots.barrier(node, f"{node}: {error}")
        return
    for value, axes in zip(node.outputs, results, strict=False):
        if value:
            slots.put(value, axes)


def _check(graph: Graph, node: Node, results: list[Axes]) -> None:
    """A rule must agree with shape inference, or nothing is cut there."""
    for value, axes in zip(node.outputs, results, strict=True):
        shape = graph.tensor(value).shape if value else None
        if not value:
            continue
        if shape is None or len(shape) != len(axes):
            raise Unclear(f"the shape of {value} is unknown")
        for dim, ids in zip(shape, axes, strict=True):
            if ids is not None and dim != len(ids):
                raise Unclear(f"the shape of {value} is not the expected one")


def _classes(slots: Slots) -> tuple[np.ndarray, np.ndarray]:
    """element -> class, and class -> index of the first reason why it is frozen (-1: it is not)."""
    labels = _components(slots.count, slots.pairs)
    reason = np.full(int(labels.max(initial=-1)) + 1, len(slots.reasons))
    frozen = np.flatnonzero(slots.frozen >= 0)
    np.minimum.at(reason, labels[frozen], slots.frozen[frozen])
    reason[reason == len(slots.reasons)] = -1
    return labels, reason


def _components(count: int, pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    one, other = (np.concatenate([pair[side] for pair in pairs] or [np.empty(0, np.int64)]) for side in (0, 1))
    edges = coo_array((np.ones(len(one), bool), (one, other)), shape=(count, count))
    labels: np.ndarray = connected_components(edges, directed=False)[1] if count else np.empty(0, np.int64)
    return labels


def _groups(slots: Slots, labels: np.ndarray, reason: np.ndarray) -> tuple[Group, ...]:
    """Classes that one layer writes form a group; of a layer that is frozen in part the free classes do."""
    writers = [(use, np.unique(labels[use.ids])) for use in slots.uses if use.writes]
    writers = [(use, classes[reason[classes] < 0] if (reason[classes] < 0).any() else classes) for use, classes in writers]
    pairs = [(classes[:-1], classes[1:]) for _, classes in writers]
    family = _components(len(reason), pairs)
    makers: dict[int, list[Use]] = {}
    for use, classes in writers:
        makers.setdefault(int(family[classes[0]]), []).append(use)
    number, unit = {}, np.full(len(reason), -1)
    owner = np.full(len(reason), -1)
    for found, uses in makers.items():
        ordered = _in_order(labels[np.concatenate([use.ids for use in uses])], family, found)
        number[found], unit[ordered], owner[ordered] = ordered, np.arange(len(ordered)), found
    params = [(param, axis, ids) for (param, axis), ids in slots.params.items()]
    params += [(param, axis, ids) for (param, _, axis), ids in slots.copies.items()]
    elements = Elements(tuple(params), tuple(slots.uses), labels, unit, owner)
    return tuple(_named(slots, elements, reason, makers, number))


def _in_order(classes: np.ndarray, family: np.ndarray, found: int) -> np.ndarray:
    """The classes of one family in the order in which their writers have them."""
    mine = classes[family[classes] == found]
    _, first = np.unique(mine, return_index=True)
    return mine[np.sort(first)]


def _named(
    slots: Slots, elements: Elements, reason: np.ndarray, makers: Mapping[int, list[Use]], number: Mapping[int, np.ndarray]
) -> Iterator[Group]:
    blocks = _blocks(slots, elements, reason)
    taken: set[str] = set()
    for found, uses in makers.items():
        name = uses[0].node if uses[0].node not in taken else f"{uses[0].node}.{uses[0].axis}"
        taken.add(name)
        classes = number[found]
        own = int((elements.owner[elements.labels[uses[0].ids]] == found).sum())
        yield Group(
            name=name,
            size=len(classes),
            granularity=max(1, own // len(classes)),
            producers=tuple(dict.fromkeys(use.node for use in uses)),
            frozen=_why(slots, int(reason[classes].min()), len(classes)),
            labels=classes,
            blocks=tuple(blocks.get(found, ())),
            number=found,
            elements=elements,
        )


def _why(slots: Slots, reason: int, size: int) -> str:
    if reason >= 0:
        return next(text for text, index in slots.reasons.items() if index == reason)
    return "it has a single unit" if size == 1 else ""


def _blocks(slots: Slots, elements: Elements, reason: np.ndarray) -> dict[int, list[np.ndarray]]:
    """Axes that hold some but not all units of a group, and nothing that surely stays."""
    blocks: dict[int, dict[bytes, np.ndarray]] = {}
    size = np.bincount(elements.owner[elements.owner >= 0])
    computed = (axes for value, axes in slots.values.items() if value not in slots.graph.params)
    seen = {id(ids): ids for axes in computed for ids in axes if ids is not None and len(ids) > 1}
    for ids in seen.values():
        classes = elements.labels[ids]
        if reason[classes].max() >= 0 or elements.owner[classes].min() < 0:
            continue
        classes = np.unique(classes)
        owners = elements.owner[classes]
        present = np.bincount(owners, minlength=len(size))
        for found in np.flatnonzero((present > 0) & (present < size)).tolist():
            units = np.sort(elements.unit[classes[owners == found]])
            blocks.setdefault(found, {})[units.tobytes()] = units
    return {found: list(sets.values()) for found, sets in blocks.items()}
