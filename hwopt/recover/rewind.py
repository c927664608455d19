"""Earlier states of weights: read from a checkpoint, followed through pruning, put back into what is left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hwopt.analysis.coupling import Group, coupling
from hwopt.errors import DataError
from hwopt.ir import Graph
from hwopt.pipeline import Context, PassManager, Phase
from hwopt.plugins import find_passes

Arrays = Mapping[str, np.ndarray]


def earlier_weights(graph: Graph, teacher: Graph, path: str, ctx: Context) -> Arrays:
    """float parameters by name as the ONNX file has them, cleaned as every model is; without a file those of the teacher.

    Raises DataError where a weight of the graph is not in it, or in another shape.
    """
    source = _loaded(graph, path, ctx) if path else teacher
    found = {name: array for name, array in source.params.items() if array.dtype.kind == "f" and array.ndim}
    for name, array in graph.params.items():
        if array.dtype.kind == "f" and array.ndim > 1 and (name not in found or found[name].shape != array.shape):
            what = f"has {name} in the shape {list(found[name].shape)}" if name in found else f"lacks the weight {name}"
            raise DataError(what, place=path or teacher.name, hint="name a checkpoint of the same network")
    return {name: array for name, array in found.items() if name in graph.params and graph.params[name].shape == array.shape}


def _loaded(graph: Graph, path: str, ctx: Context) -> Graph:
    from hwopt.io.onnx import load

    found = load(path, shapes={name: graph.tensor(name).dims for name in graph.inputs if graph.tensor(name).static})
    exact = tuple(kind() for kind in find_passes().values() if kind.phase == Phase.CLEAN and kind.exact)
    for _ in range(2):
        found = PassManager(exact).run(found, ctx).graph
    return found


def rewound(graph: Graph, earlier: Arrays, by: str) -> Graph:
    """The graph with the earlier weights; those that are zero stay zero."""
    from hwopt.recover.torch.student import written

    return written(graph, {name: np.where(_kept(graph.params[name]), earlier[name], 0) for name in earlier}, by)


def _kept(array: np.ndarray) -> np.ndarray:
    return array != 0 if array.ndim > 1 else np.ones(array.shape, bool)


def follow(before: Graph, after: Graph, earlier: Arrays) -> dict[str, np.ndarray]:
    """The earlier weights cut as `before` was cut into `after`; those whose cut cannot be told apart are left out."""
    if not earlier or before is after:
        return dict(earlier)
    kept, found = _Kept(before, after), {}
    for name, array in earlier.items():
        places = kept.places.get(name)
        if name in after.params and places is not None:
            found[name] = np.ascontiguousarray(array[np.ix_(*places)])
    return found


@dataclass
class _Kept:
    """Which indices of each axis of each parameter are left, found by comparing the numbers before and behind a cut.

    Where all axes but one are known, rows are told by their numbers; that makes the groups on this axis known.
    """

    before: Graph
    after: Graph
    places: dict[str, list[np.ndarray]] = field(default_factory=dict)
    units: dict[str, np.ndarray] = field(default_factory=dict)  # group -> which of its units stay

    def __post_init__(self) -> None:
        self.members: dict[tuple[str, int], list[tuple[Group, np.ndarray]]] = {}
        for group in coupling(self.before):
            for member in group.members:
                self.members.setdefault((member.param, member.axis), []).append((group, member.unit))
        names = [name for name in self.before.params if name in self.after.params]
        names.sort(key=lambda name: -self.before.params[name].size)  # rows of large ones differ
        while any([self._settle(name) for name in names if name not in self.places]):  # noqa: C419  (all of them, each round)
            continue

    def _settle(self, name: str) -> bool:
        """True if the indices of a parameter, or of one more group, became known."""
        old, new = self.before.params[name], self.after.params[name]
        if old.ndim != new.ndim:
            return False
        places = [self._axis(name, axis, old.shape[axis], new.shape[axis]) for axis in range(old.ndim)]
        unknown = [axis for axis, one in enumerate(places) if one is None]
        if len(unknown) > 1:
            return False
        if unknown:
            axis = unknown[0]
            matched = _matched(old, new, axis, places)
            if matched is None:
                return False
            places[axis] = matched
            for group, unit in self.members.get((name, axis), ()):
                stays = np.zeros(group.size, bool)
                stays[[one for one in unit[matched] if one >= 0]] = True
                self.units[group.name] = stays
        self.places[name] = [one for one in places if one is not None]
        return True

    def _axis(self, name: str, axis: int, old: int, new: int) -> np.ndarray | None:
        """The indices that stay, None if unknown."""
        if old == new:
            return np.arange(old)
        stays = np.ones(old, bool)
        for group, unit in self.members.get((name, axis), ()):
            if group.name not in self.units:
                return None
            stays &= (unit < 0) | self.units[group.name][unit]
        return np.flatnonzero(stays) if stays.sum() == new else None


def _matched(old: np.ndarray, new: np.ndarray, axis: int, places: list[Any]) -> np.ndarray | None:
    """Indices along the axis whose rows are those that are left, in order; None where one is missing."""
    known = [np.arange(old.shape[axis]) if one is None else one for one in places]
    rows = _rows(np.moveaxis(old[np.ix_(*known)], axis, 0))
    indices, position = [], 0
    source = list(rows)
    for wanted in _rows(np.moveaxis(new, axis, 0)):
        while position < len(source) and source[position] != wanted:
            position += 1
        if position == len(source):
            return None
        indices.append(position)
        position += 1
    return np.array(indices, np.int64)


def _rows(array: np.ndarray) -> Iterator[bytes]:
    return (np.ascontiguousarray(row).tobytes() for row in array)
