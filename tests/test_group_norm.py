"""Instance and group norms: one node for torch's spelling, channels last with what follows; ONNX Runtime is the oracle."""

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
from passes.fuse_group_norm import FuseGroupNorm
from tests._clean import apply, ops

PARAMS = """int64[3] flat = {2,GROUPS,-1}, int64[4] shape = {2,8,6,5}, float[1,8,1,1] w = {1,2,3,4,5,6,7,8},
    float[8,1,1] b = {8,7,6,5,4,3,2,1}"""


def graph_of(body: str, groups: int = 4) -> Graph:
    numbers = ", ".join(str(1 + 0.5 * index) for index in range(groups))
    params = f"{PARAMS.replace('GROUPS', str(groups))}, float[{groups}] s = {{{numbers}}}, float[{groups}] z = {{{numbers}}}"
    text = f'<ir_version: 10, opset_import: ["" : 21]> agraph (float[2,8,6,5] x) => (float[2,8,6,5] y) <{params}> {{ {body} }}'
    return from_model(parser.parse_model(text))


GROUPED = "f = Reshape(x, flat) n = InstanceNormalization <epsilon = 0.001> (f, s, z) r = Reshape(n, shape)"


@pytest.mark.parametrize(
    ("body", "groups", "left"),
    [
        (f"{GROUPED} y = Relu(r)", 4, ["GroupNormalization", "Relu"]),
        (f"{GROUPED} m = Mul(r, w) a = Add(m, b) y = Relu(a)", 2, ["GroupNormalization", "Relu"]),
        (f"{GROUPED} m = Mul(w, r) y = Relu(m)", 8, ["InstanceNormalization", "Relu"]),
        (f"{GROUPED} m = Mul(r, w) y = Mul(m, r)", 4, ["GroupNormalization", "Mul", "Mul"]),
    ],
)
def test_torchs_spelling_becomes_one_node(body: str, groups: int, left: list[str]) -> None:
    assert ops(apply(FuseGroupNorm(), graph_of(body, groups), tolerance=1e-5)) == left


def test_a_normalised_value_that_others_read_stays() -> None:
    graph = graph_of(f"{GROUPED} q = Reshape(n, shape) y = Mul(q, r)")
    assert run_pass(FuseGroupNorm(), graph, Context()) is graph


NORMS = ["GroupNormalization <num_groups = 2>", "GroupNormalization <num_groups = 1>", "InstanceNormalization"]


@pytest.mark.parametrize("norm", NORMS)
def test_norms_are_computed_channels_last(norm: str) -> None:
    shape, row = "float[2,16,9,7]", ", ".join(str(0.25 * index - 1) for index in range(16))
    weight = ", ".join(f"{value:.3f}" for value in np.random.default_rng(0).normal(size=16 * 16))
    text = f"""<ir_version: 10, opset_import: ["" : 21]> agraph ({shape} x) => ({shape} y)
    <float[16] g = {{{row}}}, float[16] b = {{{row}}}, float[16,16,1,1] w = {{{weight}}}>
    {{ h = Conv(x, w) n = {norm} (h, g, b) s = Sigmoid(n) m = Mul(s, n) y = Conv(m, w) }}"""
    graph = from_model(parser.parse_model(text))
    feeds = {"x": np.random.default_rng(1).normal(3, 2, (2, 16, 9, 7)).astype(np.float32)}
    program = compile_program(graph, find_target("host"), 1)
    found, wanted = run_program(program, feeds)["y"], ort.run(graph, feeds)["y"]
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert sum("transpose" in call.label for call in program.calls) == 2  # of the input and of the output
