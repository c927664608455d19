"""Second moments of layer inputs, E[x x^T] over channels, streamed through ONNX Runtime in constant memory.

They weigh errors by what a layer really sees: E||x D||^2 = trace(D^T S D) for a weight error D and the moment S.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import NamedTuple

import numpy as np

from hwopt.analysis.memo import remembered
from hwopt.backends.ort import Session, observing
from hwopt.errors import DataError
from hwopt.ir import Graph, Node, frozen
from hwopt.samples import Samples, batch_of

# A [k, k] moment needs a few times k rows, and the pixels of one image say nearly the same: 250 images lost a third less than
# 128 where it decided (channels of EfficientNet-Lite0).
SAMPLES = 256
FEW = 10.0  # so many rows for each channel double the damping


class View(NamedTuple):
    """How a layer reads a value: its strides, where its channels are (second axis or last), and whether each counts alone."""

    value: str
    strides: tuple[int, ...]
    channels_second: bool
    single: bool


def second_moments(
    graph: Graph, samples: Samples, nodes: Iterable[Node], others: Iterable[Node] = ()
) -> Mapping[str, np.ndarray]:
    """Node name -> float64 [channels, channels], the second moment of the data input of each Conv, Gemm or MatMul.

    Remembered for the graph and the samples: asked a second time, it computes those of `others` in the same sweep.
    Raises DataError where activations are not finite.
    """
    return _asked(graph, samples, nodes, others, single=False)


def channel_moments(
    graph: Graph, samples: Samples, nodes: Iterable[Node], others: Iterable[Node] = ()
) -> Mapping[str, np.ndarray]:
    """Node name -> float64 [2, channels], mean and mean square of each; cheaper, and for grouped convolutions too."""
    return _asked(graph, samples, nodes, others, single=True)


def moments_and_means(
    graph: Graph, samples: Samples, nodes: Iterable[Node], others: Iterable[Node] = ()
) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
    """Node name -> (second moment, mean of every channel) of the data input of each, from one sweep."""
    nodes, others = tuple(nodes), tuple(others)
    second = _asked(graph, samples, nodes, others, single=False, means=True)
    singles = _asked(graph, samples, nodes, others, single=True)
    return {node.name: (second[node.name], singles[node.name][0]) for node in nodes}


def _asked(
    graph: Graph, samples: Samples, nodes: Iterable[Node], others: Iterable[Node], *, single: bool, means: bool = False
) -> Mapping[str, np.ndarray]:
    known = _known(graph, samples)
    views = {node.name: _view(graph, node, single) for node in nodes}
    missing = dict.fromkeys(view for view in views.values() if view not in known)
    if missing and any(view.single == single for view in known):
        missing.update((view, None) for view in (_view(graph, node, single) for node in others) if view not in known)
    if means:
        missing.update((view._replace(single=True), None) for view in list(missing))
    if missing:
        known.update(_measured(graph, samples.head(max(SAMPLES, batch_of(graph))), tuple(missing)))
    return {name: known[view] for name, view in views.items()}


@remembered
def _known(_graph: Graph, _samples: Samples) -> MutableMapping[View, np.ndarray]:
    return {}


def _view(graph: Graph, node: Node, single: bool) -> View:
    """A 1x1 convolution skips the pixels between its strides; larger ones see every pixel, at the borders less often."""
    if node.op != "Conv":
        return View(node.inputs[0], (), bool(node.attr("transA", 0)), single)
    shape = graph.tensor(node.inputs[1]).shape or ()
    padded = any(node.attr("pads", ()))  # strides then start outside of the data
    strides = () if padded or any(size != 1 for size in shape[2:]) else tuple(node.attr("strides", ()))
    return View(node.inputs[0], strides if any(stride != 1 for stride in strides) else (), True, single)


def _measured(graph: Graph, samples: Samples, views: tuple[View, ...]) -> Iterator[tuple[View, np.ndarray]]:
    watched = observing(graph, [view.value for view in views])
    session = Session(watched, optimize=True) if watched.outputs else None  # means do not depend on the last bit
    sums: dict[View, np.ndarray] = {}
    rows: dict[View, int] = dict.fromkeys(views, 0)
    for feeds in samples.feeds(graph):
        found = {**graph.params, **feeds, **(session.run(feeds) if session else {})}
        for view in views:
            with np.errstate(over="ignore", invalid="ignore"):  # found out below, where the layer can be named
                second, count = _product(found[view.value], view)
            sums[view] = sums[view] + second if view in sums else second
            rows[view] += count
    for view in views:
        if view not in sums or not np.isfinite(sums[view]).all():
            raise DataError(f"the calibration data give no finite activations at {view.value}", place=samples.source)
        yield view, frozen(sums[view] / max(rows[view], 1))


def _product(data: np.ndarray, view: View) -> tuple[np.ndarray, int]:
    """Sum of x x^T, or of x and x^2, over all rows x of one batch, and the number of rows."""
    data = data.astype(np.float32, copy=False)
    if not view.channels_second:
        data = data.reshape(-1, data.shape[-1]).T[None]
    elif data.ndim == 2:  # Gemm with transA: [channels, rows]
        data = data[None]
    seen = data[(slice(None), slice(None), *(slice(None, None, stride) for stride in view.strides))]
    rows = seen.reshape(seen.shape[0], seen.shape[1], -1)  # [batch, channels, rows]
    count = len(rows) * rows.shape[-1]
    if view.single:
        sums = np.stack([rows.sum(axis=2), np.einsum("bcr,bcr->bc", rows, rows)])
        return sums.sum(axis=1, dtype=np.float64), count
    return np.matmul(rows, rows.transpose(0, 2, 1)).sum(0, dtype=np.float64), count


def fewness(graph: Graph, node: Node, samples: Samples) -> float:
    """How many times the usual damping the moment of a layer's input needs, for what fits to noise grows as channels over rows.

    1 where rows are many; behind a global pool, say, each sample is one row, and 250 of them tell little of 1280 channels.
    """
    data = graph.tensor(node.inputs[0])
    if not data.static:
        return 1.0
    channels = data.dims[1 if node.op == "Conv" else 0 if node.attr("transA", 0) else -1]
    runs = min(len(samples), max(SAMPLES, batch_of(graph))) // batch_of(graph)
    return 1.0 + FEW * channels * channels / max(data.elements * runs, 1)


def damped(moment: np.ndarray, share: float) -> np.ndarray:
    """The moment plus `share` of its mean diagonal: full rank, and milder on directions that few samples have shown."""
    mean = float(np.trace(moment)) / len(moment)
    return moment + (share * mean if mean > 0 else 1.0) * np.eye(len(moment))


def output_error(weight: np.ndarray, changed: np.ndarray, moment: np.ndarray) -> float:
    """E||x (W - W')||^2 / E||x W||^2 for [channels, outputs] weights: the relative output error of a layer."""
    difference = weight.astype(np.float64) - changed
    signal = np.sum(weight * (moment @ weight))
    return float(np.sum(difference * (moment @ difference)) / signal) if signal > 0 else 0.0
