"""The 8-bit grid of every value, from the histograms of what calibration saw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

import numpy as np

from hwopt.analysis.constant import constant
from hwopt.analysis.ranges import CALIBRATORS, RANGE, Extremes, Grid, Histogram, Observations, Probe, Range, grid_of, min_max
from hwopt.backends.ort import Session, observing
from hwopt.ir import Graph, Node
from hwopt.samples import Samples, batch_of
from passes._quantize_layers import OPS
from passes._quantize_places import LEFT, RIGHT, Key, Places

Seen = TypeVar("Seen", Histogram, Extremes)
MINMAX = "minmax"
AUTO = "auto"  # of the calibrators the best one for each value
SAMPLES = 16  # that its choice looks at
Edge = tuple[Node, int]


def grids_of(
    places: Places, seen: Observations, samples: Samples, activation: str, calibrator: str, percent: float
) -> dict[Key, Grid]:
    """One grid for each group of values that must share it, from the histogram of all of them.

    `activation` is the dtype that the target's kernels take as data; `auto` takes of all calibrators' grids the one whose
    rounding disturbs the outputs of the layers that read the values least.
    """
    if calibrator == MINMAX:
        extremes = _by_group(places, seen.extremes)
        return {group: _grid(min_max(one), group, activation) for group, one in extremes.items()}
    names = tuple(CALIBRATORS) if calibrator == AUTO else (calibrator,)
    found: dict[Key, list[Grid]] = {}
    for group, histogram in _by_group(places, seen.histogram).items():
        ranges = [_range(name, histogram, percent) for name in names]
        found[group] = list(dict.fromkeys(_grid(one, group, activation) for one in ranges))
    return _least_disturbing(places, samples, found)


def probe_of(value: str, calibrator: str) -> Probe:
    """What a calibrator looks at."""
    return value, RANGE if calibrator == MINMAX else None


def _by_group(places: Places, of: Callable[[str], Seen]) -> dict[Key, Seen]:
    """What was seen of all values of each group together."""
    merged: dict[Key, Seen] = {}
    for key in places.points:
        group, one = places.group(key), of(key[0])
        merged[group] = merged[group].merge(one) if group in merged else one
    return merged


def _range(calibrator: str, histogram: Histogram, percent: float) -> Range:
    options = {"percent": percent} if calibrator == "percentile" else {}
    return CALIBRATORS[calibrator](histogram, **options)


def _grid(found: Range, group: Key, activation: str) -> Grid:
    low, high = found
    if group[1] == RIGHT or (group[1] == LEFT and (low < 0 or activation == "int8")):
        return grid_of(low, high, "int8", symmetric=True)
    return grid_of(low, high, activation)


def _least_disturbing(places: Places, samples: Samples, grids: Mapping[Key, Sequence[Grid]]) -> dict[Key, Grid]:
    """Of each group's grids the one with the least squared error of outputs; the first one where all are equal."""
    open_groups = {group for group, choices in grids.items() if len(choices) > 1}
    errors = {group: np.zeros(len(grids[group])) for group in open_groups}
    if open_groups:
        graph = places.graph
        judges = [(group, edge, _outputs(graph, *edge)) for group, edge in _readers(places, open_groups)]
        read = {group for group, _, _ in judges}
        alone = [(places.group(key), key[0]) for key in places.points if places.group(key) in open_groups - read]
        for values in _values(graph, samples, judges, alone):
            for group, (node, index), outputs in judges:
                data = values[node.inputs[index]]
                errors[group] += [_squares(outputs(_error(one, data), values)) for one in grids[group]]
            for group, value in alone:  # only sums and pools read it: its own error counts
                errors[group] += [_squares(_error(one, values[value])) for one in grids[group]]
    return {group: choices[int(np.argmin(errors[group])) if group in errors else 0] for group, choices in grids.items()}


def _readers(places: Places, groups: set[Key]) -> Iterator[tuple[Key, Edge]]:
    """The inputs of layers that the groups' values are read at."""
    for (name, index), role in places.reads.items():
        node = places.graph.node[name]
        group = places.group((node.inputs[index], role))
        if group in groups and node.op in OPS and index < 2:
            yield group, (node, index)


def _outputs(graph: Graph, node: Node, index: int) -> Callable[[np.ndarray, Mapping[str, np.ndarray]], np.ndarray]:
    """What an error of one input does to a layer's outputs: a layer is linear in each, so its bias plays no part."""
    other = node.inputs[1 - index]
    array = constant(graph, other)
    names = ("error", other) if index == 0 else (other, "error")
    alone = replace(node, inputs=names)
    types = MappingProxyType({**graph.types, "error": graph.types[node.inputs[index]]})
    params = {} if array is None else {other: array}
    inputs = ("error",) if array is not None else ("error", other)
    session = Session(
        replace(graph, nodes=(alone,), inputs=inputs, outputs=node.outputs[:1], params=MappingProxyType(params), types=types)
    )

    def run(error: np.ndarray, values: Mapping[str, np.ndarray]) -> np.ndarray:
        feeds = {"error": error} if array is not None else {"error": error, other: values[other]}
        return session.run(feeds)[node.output]

    return run


def _values(
    graph: Graph, samples: Samples, judges: Sequence[tuple[Key, Edge, object]], alone: Sequence[tuple[Key, str]]
) -> Iterator[Mapping[str, np.ndarray]]:
    """Everything that the judges look at, run by run."""
    wanted = [value for _, (node, _), _ in judges for value in node.inputs[:2]] + [value for _, value in alone]
    watched = observing(graph, wanted)
    session = Session(watched) if watched.outputs else None
    for feeds in samples.head(max(SAMPLES, batch_of(graph))).feeds(graph):
        yield {**feeds, **(session.run(feeds) if session else {})}


def _error(grid: Grid, data: np.ndarray) -> np.ndarray:
    return np.asarray(data - grid.dequantize(grid.quantize(data)), np.float32)


def _squares(array: np.ndarray) -> float:
    return float(np.square(array, dtype=np.float64).sum())
