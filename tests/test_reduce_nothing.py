"""Reductions over no axes: what they do to each element remains, as in ONNX Runtime; convolutions over volumes are right too."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import parser

from hwopt.backends import ort
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.run import run_program
from hwopt.io.proto import from_model
from hwopt.plugins import find_target


def compare(text: str, low: float = -2) -> None:
    graph = from_model(parser.parse_model('<ir_version: 10, opset_import: ["" : 18]>\n' + text))
    random = np.random.default_rng(0)
    feeds = {name: random.uniform(low, 2, graph.tensor(name).dims).astype(np.float32) for name in graph.inputs}
    found, expected = run_program(compile_program(graph, find_target("host"), 1, "test"), feeds)["y"], ort.run(graph, feeds)["y"]
    assert found.shape == expected.shape
    assert np.abs(expected).max() > 0.1
    assert np.allclose(found, expected, atol=1e-4)


KINDS = ("L1", "L2", "SumSquare", "LogSum", "LogSumExp", "Sum", "Mean", "Max", "Min", "Prod")


@pytest.mark.parametrize("axes", ["(x, a)", "(x)"])
@pytest.mark.parametrize("kind", KINDS)
def test_reductions_over_no_axes(kind: str, axes: str) -> None:
    body = f"y = Reduce{kind} <noop_with_empty_axes = 1> {axes}"
    low = 0.1 if kind == "LogSum" else -2
    compare(f"agraph (float[2,3] x) => (float[2,3] y) <int64[0] a = {{}}> {{ {body} }}", low)


@pytest.mark.parametrize("attrs", ["", "strides = [2,1,2], pads = [1,0,1,1,2,1]", "dilations = [1,2,1], pads = [1,1,1,1,1,1]"])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_volumes(op: str, attrs: str) -> None:
    weights = ", ".join(f"{value:.3f}" for value in np.random.default_rng(1).normal(size=4 * 4 * 18))
    kernel = f"<{attrs}>" if attrs else ""
    body = f"h = {op} {kernel} (x, w) y = Relu(h)"
    compare(f"agraph (float[1,4,7,8,9] x) => (float y) <float[4,4,3,3,2] w = {{{weights}}}> {{ {body} }}")
