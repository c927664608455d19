"""How strongly each channel of an activation responds: mean |x| over calibration data, streamed."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from hwopt.backends.ort import Session, observing
from hwopt.ir import Graph
from hwopt.samples import Samples


def mean_magnitudes(graph: Graph, samples: Samples, wanted: Iterable[tuple[str, int]]) -> dict[tuple[str, int], np.ndarray]:
    """(value, axis) -> mean |x| for every index of the axis, float64. Memory does not grow with the number of samples.

    Values may be graph inputs. Raises ModelError where ONNX Runtime cannot run the graph.
    """
    pairs = list(dict.fromkeys(wanted))
    if not pairs:
        return {}
    observed = observing(graph, (value for value, _ in pairs))
    session = Session(observed) if observed.outputs else None
    sums: dict[tuple[str, int], np.ndarray] = {}
    counts: dict[tuple[str, int], int] = {}
    for feeds in samples.feeds(graph):
        found = {**feeds, **(session.run(feeds) if session else {})}
        for value, axis in pairs:
            array = np.moveaxis(found[value], axis, 0)
            flat = np.abs(array.reshape(len(array), -1), dtype=np.float64)
            sums[value, axis] = sums.get((value, axis), 0.0) + flat.sum(1)
            counts[value, axis] = counts.get((value, axis), 0) + flat.shape[1]
    return {pair: sums[pair] / counts[pair] for pair in pairs}
