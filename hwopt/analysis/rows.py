"""A fixed number of rows of activations, and the range of every channel: what a search by output error needs, and no more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass

import numpy as np

from hwopt.analysis.memo import remembered
from hwopt.backends.ort import Session, observing
from hwopt.errors import DataError
from hwopt.ir import Graph
from hwopt.samples import Samples, batch_of

LIMIT = 512  # rows that are kept of each value


@dataclass(frozen=True, eq=False)
class Rows:
    """`data` float32 [at most LIMIT, channels], evenly spread over the samples; `low` and `high` [channels] over all of them."""

    data: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def largest(self) -> np.ndarray:
        """The largest magnitude of every channel."""
        return np.maximum(np.abs(self.low), np.abs(self.high))


def activation_rows(
    graph: Graph, samples: Samples, wanted: Iterable[tuple[str, int]], others: Iterable[tuple[str, int]] = ()
) -> Mapping[str, Rows]:
    """(value, axis of its channels) -> Rows, in one sweep of ONNX Runtime. Raises DataError where values are not finite.

    Remembered for the graph and the samples: asked a second time, it watches `others` in the same sweep.
    """
    known, axes = _known(graph, samples), dict(wanted)
    missing = {value: axis for value, axis in axes.items() if (value, axis) not in known}
    if missing and known:
        missing = {**{value: axis for value, axis in others if (value, axis) not in known}, **missing}
    if missing:
        known.update(_watched(graph, samples, missing))
    return {value: known[value, axis] for value, axis in axes.items()}


@remembered
def _known(_graph: Graph, _samples: Samples) -> MutableMapping[tuple[str, int], Rows]:
    return {}


def _watched(graph: Graph, samples: Samples, axes: Mapping[str, int]) -> Iterator[tuple[tuple[str, int], Rows]]:
    watched = observing(graph, axes)
    session = Session(watched) if watched.outputs else None
    share = -(-LIMIT // max(len(samples) // batch_of(graph), 1))
    kept: dict[str, list[np.ndarray]] = {value: [] for value in axes}
    ranges: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for feeds in samples.feeds(graph):
        found = {**feeds, **(session.run(feeds) if session else {})}
        for value, axis in axes.items():
            rows = np.moveaxis(found[value], axis, -1).reshape(-1, found[value].shape[axis])
            low, high = rows.min(0), rows.max(0)
            if not (np.isfinite(low).all() and np.isfinite(high).all()):
                raise DataError("holds NaN or infinity during calibration", place=f"value {value}")
            before = ranges.get(value, (low, high))
            ranges[value] = np.minimum(low, before[0]), np.maximum(high, before[1])
            picked = np.unique(np.linspace(0, len(rows) - 1, share).astype(int))
            kept[value].append(rows[picked].astype(np.float32))
    if len(ranges) < len(axes):
        raise DataError("the calibration data give no activations", place=samples.source)
    for value, axis in axes.items():
        yield (value, axis), Rows(np.concatenate(kept[value])[:LIMIT], *ranges[value])
