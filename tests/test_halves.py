"""Models for the virtual machine: kernels of templates compute what needs no runtime; ONNX Runtime is the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import parser

from hwopt.backends import ort
from hwopt.backends.tvm.halves import halves
from hwopt.backends.tvm.support import unsupported
from hwopt.backends.tvm.vm import Machine, compile_vm
from hwopt.io.proto import from_model
from hwopt.ir import Graph
from hwopt.plugins import find_target

ROW = ", ".join(f"{value:.3f}" for value in np.random.default_rng(0).normal(size=4 * 3 * 9))


def detector(inputs: str = "k, t, limit", limit: float = 0.6, k: int = 5, t: float = 0.3) -> Graph:
    """Boxes from a convolution, suppressed where they overlap, and those that are left; their numbers are another result."""
    return from_model(
        parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 21]>
    agraph (float[1,3,8,8] x) => (int64[n,3] kept, float[1,4,8,8] h, float[1,n,4] boxes)
    <float[4,3,3,3] w = {{{ROW}}}, int64[3] s = {{1,4,64}}, int64 k = {{{k}}}, float t = {{{t}}},
     float limit = {{{limit}}}, int64[1] two = {{2}},
     int64[1] three = {{3}}, int64[1] one = {{1}}>
    {{ h = Conv <pads = [1,1,1,1]> (x, w) q = Reshape(h, s) b = Transpose <perm = [0,2,1]> (q)
       g = Sigmoid(q)
       kept = NonMaxSuppression(b, g, {inputs}) i = Slice(kept, two, three, one) place = Squeeze(i, one)
       boxes = Gather <axis = 1> (b, place) }}""")
    )


def test_all_that_is_before_the_suppression_comes_first() -> None:
    parts = halves(detector())
    assert parts.ahead is not None
    assert [node.op for node in parts.ahead.nodes] == ["Conv", "Reshape", "Transpose", "Sigmoid"]
    assert (parts.ahead.outputs, parts.behind.inputs, parts.behind.outputs) == (
        ("h", "b", "g"), ("b", "g"), ("kept", "boxes"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "graph",
    [
        detector(), detector(limit=100.0), detector(limit=-10.0), detector(t=0.0),
        detector("k, t", k=2**63 - 1),  # as torchvision exports it
        detector("k"),
    ],
)  # fmt: skip
def test_both_halves_give_onnxs_results(graph: Graph) -> None:
    machine = Machine(compile_vm(graph, find_target("host")), graph.inputs, graph.outputs)
    feeds = {"x": np.random.default_rng(1).normal(size=(1, 3, 8, 8)).astype(np.float32)}
    found = machine.run(feeds)
    for name, wanted in ort.run(graph, feeds).items():
        assert found[name].shape == wanted.shape
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=1e-5)


def test_an_input_that_only_the_second_half_reads_may_have_any_size() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> agraph (float[2,3] x, float[n,3] r) => (float[n,3] y, float[2,3] h)
    <int64[1] a = {0}> { h = Relu(x) m = ReduceMax <keepdims = 1> (h, a) y = Add(m, r) }"""
    graph = from_model(parser.parse_model(text))
    machine = Machine(compile_vm(graph, find_target("host")), graph.inputs, graph.outputs)
    random = np.random.default_rng(0)
    for count in (1, 5):
        feeds = {"x": random.normal(size=(2, 3)).astype(np.float32), "r": random.normal(size=(count, 3)).astype(np.float32)}
        found = machine.run(feeds)
        for name, wanted in ort.run(graph, feeds).items():
            np.testing.assert_allclose(found[name], wanted, rtol=0, atol=1e-6)


def test_a_suppression_that_tvm_gets_wrong_is_refused() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
    agraph (float[1,9,4] b, float[1,2,9] s, float[1] t) => (int64[n,3] y, int64[m,3] z)
    <int64 k = {5}, float h = {0.5}> { y = NonMaxSuppression(b, s, k, h) e = Exp(s) z = NonMaxSuppression(b, e, k, t) }"""
    reasons = [reason for _, reason in unsupported(from_model(parser.parse_model(text)))]
    assert [reason.split(":")[0] for reason in reasons] == [
        "TVM drops boxes with negative scores",
        "TVM reads thresholds of a suppression when it compiles",
    ]
