"""Shared by the tests of recovery: a tiny net, its data, and how far a changed one is from it."""

from __future__ import annotations

from typing import Any

import numpy as np

from hwopt.backends.ort import observing, run
from hwopt.ir import Graph
from hwopt.pipeline import Context, run_pass
from hwopt.samples import Samples
from passes.quantize import Quantize
from tests.random_graphs import Builder

CLASSES = 4


def net(seed: int = 0, width: int = 8, pool: int = 6) -> Graph:
    """Two convolutions, a pool over so many pixels, and a head; one sample at a time. With pool=3 its answers differ."""
    build = Builder(np.random.default_rng(seed))
    x, depth = build.input((1, 3, 6, 6)), 3
    for channels in (width, width):
        operands = [x, build.weight(channels, depth, 3, 3, fan_in=9 * depth), build.vector(channels)]
        depth, shape = channels, (1, channels, 6, 6)
        x = build.op("Relu", [build.op("Conv", operands, shape, pads=(1, 1, 1, 1))], shape)
    size, kind = 6 // pool, "AveragePool" if pool == 6 else "MaxPool"
    x = build.op(kind, [x], (1, depth, size, size), kernel_shape=(pool, pool), strides=(pool, pool))
    x = build.op("Flatten", [x], (1, size * size * depth))
    head = [x, build.weight(CLASSES, size * size * depth, fan_in=1 if pool == 6 else depth), build.vector(CLASSES)]
    build.outputs.append(build.op("Gemm", head, (1, CLASSES), transB=1))
    return build.graph()


def blobs(count: int, seed: int) -> Samples:
    """Noise around one picture per class, with the classes as labels."""
    random = np.random.default_rng(seed)
    middles = np.random.default_rng(42).standard_normal((CLASSES, 3, 6, 6))
    labels = random.integers(0, CLASSES, count)
    return Samples({"x0": (middles[labels] + 1.6 * random.standard_normal((count, 3, 6, 6))).astype(np.float32)}, labels)


def trained_net(width: int = 24) -> Graph:
    """The net with the best linear head for the blobs (least squares)."""
    graph, data = net(width=width, pool=3), blobs(600, 0)
    head = graph.nodes[-1]
    probe = observing(graph, [head.inputs[0]])
    features = np.concatenate([run(probe, feeds)[head.inputs[0]] for feeds in data.feeds(graph)])
    wide = np.concatenate([features, np.ones((len(features), 1), np.float32)], 1)
    targets = 6 * np.eye(CLASSES)[data.labels]
    solved = np.linalg.solve(wide.T @ wide + 10 * np.eye(wide.shape[1]), wide.T @ targets).astype(np.float32)
    edit = graph.edit()
    edit.set_param(head.inputs[1], np.ascontiguousarray(solved[:-1].T))
    edit.set_param(head.inputs[2], solved[-1])
    return edit.finish("")


def samples(graph: Graph, count: int = 96, seed: int = 0, labels: bool = False) -> Samples:
    """Data, with the answers of the graph itself as labels."""
    name = graph.inputs[0]
    data = np.random.default_rng(seed).standard_normal((count, 3, 6, 6)).astype(np.float32)
    answers = np.array([run(graph, {name: one[None]})[graph.outputs[0]].argmax() for one in data]) if labels else None
    return Samples({name: data}, answers)


def quantized(graph: Graph, **options: Any) -> Graph:
    return run_pass(Quantize(**options), graph, Context(calibration=samples(graph, 16)))


def divergence(graph: Graph, teacher: Graph, data: Samples) -> float:
    """Mean square of the logits' differences, without what all classes have in common: no probability shows that."""
    found = [run(graph, feeds)[graph.outputs[0]] - run(teacher, feeds)[graph.outputs[0]] for feeds in data.feeds(teacher)]
    return float(np.mean([np.square(one - one.mean(1, keepdims=True)) for one in found]))


def shape_of(graph: Graph) -> tuple:
    return graph.inputs, graph.outputs, dict(graph.types), [(n.op, n.name, n.inputs, n.outputs) for n in graph.nodes]
