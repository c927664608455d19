"""Convolutions over volumes become convolutions over pictures; ONNX Runtime is the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import parser

from hwopt.backends import ort
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.run import run_program
from hwopt.io.proto import from_model
from hwopt.ir import Graph
from hwopt.pipeline import Context, run_pass
from hwopt.plugins import find_target
from passes.flatten_volumes import FlattenVolumes
from tests._clean import apply, ops


def graph_of(attributes: str, kernel: str = "3,3,3", weights: str = "4,3", out: str = "o1,o2,o3") -> Graph:
    size = int(np.prod([int(one) for one in f"{weights},{kernel}".split(",")]))
    numbers = ", ".join(f"{value:.3f}" for value in np.random.default_rng(0).normal(size=size))
    text = f"""<ir_version: 10, opset_import: ["" : 21]> agraph (float[2,3,6,7,8] x) => (float[2,4,{out}] y)
    <float[{weights},{kernel}] w = {{{numbers}}}, float[4] b = {{1,2,3,4}}> {{ h = Conv <{attributes}> (x, w, b) y = Relu(h) }}"""
    return from_model(parser.parse_model(text))


@pytest.mark.parametrize(
    ("attributes", "kernel"),
    [
        ("pads = [1,1,1,1,1,1]", "3,3,3"),
        ("pads = [2,0,1,0,1,0], strides = [2,1,2]", "3,2,3"),
        ("dilations = [2,1,2]", "2,3,2"),
        ("strides = [3,2,1]", "1,1,1"),
    ],
)
def test_a_volume_becomes_pictures(attributes: str, kernel: str) -> None:
    graph = graph_of(attributes, kernel)
    after = apply(FlattenVolumes(), graph, tolerance=1e-5)
    conv = next(node for node in after.nodes if node.op == "Conv")
    assert len(after.tensor(conv.output).dims) == 4
    feeds = {"x": np.random.default_rng(1).normal(size=(2, 3, 6, 7, 8)).astype(np.float32)}
    found = run_program(compile_program(after, find_target("host")), feeds)["y"]
    np.testing.assert_allclose(found, ort.run(graph, feeds)["y"], rtol=0, atol=1e-4)


def test_a_volume_in_groups_stays() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> agraph (float[1,2,3,3,3] x) => (float[1,2,3,3,3] y)
    <float[2,1,1,1,1] w = {1, 2}> { y = Conv <group = 2> (x, w) }"""
    graph, ctx = from_model(parser.parse_model(text)), Context()
    assert run_pass(FlattenVolumes(), graph, ctx) is graph
    assert ops(graph) == ["Conv"]
