"""Remove elements from a graph: every parameter loses the indices, and the operators that state sizes state the new ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from hwopt.analysis._coupling_products import whole_groups
from hwopt.analysis._coupling_rules import pad_widths, slice_ranges
from hwopt.analysis.coupling import Coupling
from hwopt.ir import Edit, Graph, Node


class Cut:
    """One cut under way: what stays of every axis."""

    def __init__(self, graph: Graph, coupling: Coupling, kept: np.ndarray) -> None:
        self.graph, self.coupling, self.kept = graph, coupling, kept
        self.edit: Edit = graph.edit()
        self._now: dict[str, Node] = {}

    def stays(self, value: str, axis: int) -> np.ndarray | None:
        """bool[dimension], or None where the dimension is not static."""
        ids = self.coupling.values[value][axis]
        return None if ids is None else self.kept[ids]

    def size(self, value: str, axis: int) -> int:
        stays = self.stays(value, axis)
        return 0 if stays is None else int(stays.sum())

    def is_cut(self, value: str, axis: int) -> bool:
        stays = self.stays(value, axis)
        return stays is not None and not stays.all()

    def cut_axes(self, value: str) -> list[int]:
        """The axes of a value that lose something; none for a value that no rule has reached."""
        return [axis for axis in range(len(self.coupling.values.get(value, ()))) if self.is_cut(value, axis)]

    def number(self, node: Node, index: int, numbers: list[int] | np.ndarray) -> None:
        """Give a node another integer operand, of its own: sizes and bounds may be shared with nodes that are not cut."""
        self.reads(node, index, self.edit.param(f"{node.name}_{node.op.lower()}", np.asarray(numbers, np.int64)))

    def reads(self, node: Node, index: int, name: str) -> None:
        """Give a node another operand, or one that it did not have."""
        inputs = self.now(node).inputs
        padded = (*inputs, *[""] * (index + 1 - len(inputs)))
        self.change(node, inputs=(*padded[:index], name, *padded[index + 1 :]))

    def attributes(self, node: Node, **attrs: object) -> None:
        self.change(node, attrs=MappingProxyType({**node.attrs, **attrs}))

    def reads_instead(self, node: Node, old: str, new: str) -> None:
        inputs = self.now(node).inputs
        self.change(node, inputs=tuple(new if value == old else value for value in inputs))

    def now(self, node: Node) -> Node:
        """The node as the cut has changed it so far."""
        return self._now.get(node.name, node)

    def change(self, node: Node, **changes: Any) -> None:
        self._now[node.name] = self.edit.replace(node, **changes)


def cut(graph: Graph, coupling: Coupling, kept: np.ndarray, by: str, repair: Callable[[Cut], None] | None = None) -> Graph:
    """The graph without the elements that are not kept; `kept` comes from Coupling.kept. `repair` may change what is left."""
    work = Cut(graph, coupling, kept)
    if kept.all():
        return graph
    touched = _cut_params(work)
    _cut_copies(work, touched)
    for node in graph.nodes:
        if any(value in touched for value in node.reads):
            work.change(node)
        fix = FIXES.get(node.op)
        if fix and any(work.cut_axes(value) for value in (*node.outputs, *node.inputs[:1]) if value):
            fix(work, node)
    if repair:
        repair(work)
    return work.edit.finish(by)


def _cut_params(work: Cut) -> set[str]:
    cuts: dict[str, dict[int, np.ndarray]] = {}
    for (param, axis), ids in work.coupling.params.items():
        stays = work.kept[ids]
        if not stays.all():
            cuts.setdefault(param, {})[axis] = stays
    for param, axes in cuts.items():
        array = work.graph.params[param]
        for axis, stays in axes.items():
            array = np.compress(stays, array, axis)
        array.flags.writeable = False
        work.edit.set_param(param, array)
    return set(cuts)


def _cut_copies(work: Cut, touched: set[str]) -> None:
    """Vectors that nodes share by chance: one for each reader that loses something, or that the vector is cut for another."""
    for (param, reader, axis), ids in work.coupling.copies.items():
        stays = work.kept[ids]
        if len(stays) > 1 and (param in touched or not stays.all()):
            own = work.edit.param(param, np.compress(stays, work.graph.params[param], axis))
            work.reads_instead(work.graph.node[reader], param, own)


def _shape(work: Cut, node: Node) -> None:
    """Reshape and Expand: the sizes they state, where those change (Expand's are aligned at the right)."""
    stated = work.graph.params[node.inputs[1]].tolist()
    shift = len(work.coupling.values[node.output]) - len(stated)
    changed = {axis - shift: work.size(node.output, axis) for axis in work.cut_axes(node.output) if axis >= shift}
    changed = {axis: size for axis, size in changed.items() if node.op == "Reshape" or stated[axis] != 1}
    if changed:
        work.number(node, 1, [changed.get(axis, size) for axis, size in enumerate(stated)])


def _split(work: Cut, node: Node) -> None:
    axis = node.attr("axis", 0)
    if not work.is_cut(node.inputs[0], axis):
        return
    sizes = [work.size(value, axis) for value in node.outputs]
    if work.graph.opsets.get("", 13) < 13:
        work.attributes(node, split=tuple(sizes))
        return
    attrs = {key: value for key, value in node.attrs.items() if key != "num_outputs"}
    work.change(node, attrs=MappingProxyType(attrs))
    work.number(node, 1, sizes)


def _slice(work: Cut, node: Node) -> None:
    data = node.inputs[0]
    ranges = slice_ranges(work.graph, node, len(work.coupling.values[data]))
    bounds = {axis: (start, end) for axis, start, end, _ in ranges}
    for axis in set(work.cut_axes(data)) & set(bounds):
        stays = np.asarray(work.stays(data, axis))
        first, last, _ = slice(*bounds[axis]).indices(len(stays))
        start = int(stays[:first].sum())
        bounds[axis] = (start, start + int(stays[first:last].sum()))
    for index in (0, 1):
        work.number(node, index + 1, [bounds[axis][index] for axis, *_ in ranges])


def _pad(work: Cut, node: Node) -> None:
    rank = len(work.coupling.values[node.output])
    widths = pad_widths(work.graph, node, rank)
    axes = _named_axes(work, node, rank)
    for axis in set(work.cut_axes(node.output)) & set(widths):
        stays, (before, after) = np.asarray(work.stays(node.output, axis)), widths[axis]
        widths[axis] = (int(stays[:before].sum()), int(stays[len(stays) - after :].sum()))
    both = [widths.get(axis, (0, 0)) for axis in axes]
    work.number(node, 1, [before for before, _ in both] + [after for _, after in both])


def _named_axes(work: Cut, node: Node, rank: int) -> list[int]:
    named = work.graph.params[node.inputs[3]].tolist() if len(node.inputs) > 3 and node.inputs[3] else range(rank)
    return [axis % rank for axis in named]


def _gather(work: Cut, node: Node) -> None:
    """Indices that choose channels: those that stay, counted among those that stay."""
    data, indices = node.inputs
    axis = node.attr("axis", 0) % len(work.coupling.values[data])
    if not work.is_cut(data, axis) or indices not in work.graph.params:
        return
    stays, picked = np.asarray(work.stays(data, axis)), work.graph.params[indices]
    picked = picked[stays[picked]] % len(stays)
    work.number(node, 1, (np.cumsum(stays) - 1)[picked])


def _resize(work: Cut, node: Node) -> None:
    sizes = work.graph.constant(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] else None
    if sizes is None:
        return
    axes = node.attr("axes", range(len(sizes)))
    rank = len(work.coupling.values[node.output])
    new = [work.size(node.output, axis % rank) or int(size) for axis, size in zip(axes, sizes, strict=True)]
    work.number(node, 3, new)


def _conv(work: Cut, node: Node) -> None:
    groups = node.attr("group", 1)
    channels, made = (len(np.asarray(work.stays(value, 1))) for value in (node.inputs[0], node.output))
    if groups > 1 and whole_groups(groups, channels, made):
        work.attributes(node, group=groups * work.size(node.inputs[0], 1) // channels)


def _group_norm(work: Cut, node: Node) -> None:
    channels = len(np.asarray(work.stays(node.inputs[0], 1)))
    work.attributes(node, num_groups=node.attr("num_groups") * work.size(node.inputs[0], 1) // channels)


FIXES: Mapping[str, Callable[[Cut, Node], None]] = MappingProxyType(
    {
        "Conv": _conv,
        "ConvTranspose": _conv,
        "Expand": _shape,
        "Gather": _gather,
        "GroupNormalization": _group_norm,
        "Pad": _pad,
        "Reshape": _shape,
        "Resize": _resize,
        "Slice": _slice,
        "Split": _split,
    }
)
