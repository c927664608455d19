"""Shared by the tests of clean-up passes: run one, compare with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hwopt.backends.ort import run
from hwopt.ir import Graph
from hwopt.pipeline import Context, Pass, run_pass
from tests.random_graphs import Builder, random_feeds

Spelling = Callable[[Builder, str], str]


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def apply(one: Pass, graph: Graph, ctx: Context | None = None, tolerance: float = 2e-6) -> Graph:
    """Run the pass, twice; outputs stay within `tolerance` of their largest value, and the second run finds nothing."""
    after = run_pass(one, graph, ctx or Context())
    feeds = random_feeds(graph)
    want, got = run(graph, feeds), run(after, feeds)
    for name in graph.outputs:
        assert got[name].dtype == want[name].dtype
        assert got[name].shape == want[name].shape
        scale = max(1.0, float(np.abs(want[name].astype(np.float64)).max(initial=0)))
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=tolerance * scale)
    assert run_pass(one, after, Context()) is after
    return after


def spelled(spelling: Spelling, shape: tuple[int, ...] = (2, 5, 8), opset: int = 21) -> Graph:
    build = Builder()
    build.outputs.append(spelling(build, build.input(shape)))
    return build.graph(opset=opset)
