"""Batch norms that no layer takes become one product and one sum, in the kernel of what follows; ONNX Runtime is the oracle."""

from __future__ import annotations

import pytest
from onnx import parser

from hwopt.analysis.regions import regions
from hwopt.io.proto import from_model
from hwopt.ir import Graph
from hwopt.pipeline import Context, run_pass
from passes.join_affine import JoinAffine
from tests._clean import apply, ops

NORM = "BatchNormalization (x, g, b, m, v)"
PARAMS = """float[3] g = {1.5, 0.5, 2}, float[3] b = {0, 1, -2}, float[3] m = {0.5, 0.25, 0}, float[3] v = {1, 2, 0.5},
    float[3,1,1] w = {2, 3, 4}, float[1,3,1,1] c = {-1, 0.5, 2}, float s = {0.25}, float one = {1},
    float[1,1,5] line = {1,2,3,4,5}"""


def graph_of(body: str) -> Graph:
    text = f'<ir_version: 10, opset_import: ["" : 21]> agraph (float[2,3,4,5] x) => (float[2,3,4,5] y) <{PARAMS}> {{ {body} }}'
    return from_model(parser.parse_model(text))


@pytest.mark.parametrize(
    ("body", "left"),
    [
        (f"n = {NORM} y = Relu(n)", ["Mul", "Add", "Relu"]),
        (f"n = {NORM} f = Mul(n, w) a = Add(f, c) y = Relu(a)", ["Mul", "Add", "Relu"]),  # Caffe's norm, and its Scale
        (f"n = {NORM} f = Mul(s, n) y = Relu(f)", ["Mul", "Add", "Relu"]),
        ("f = Mul(x, w) h = Div(f, s) y = Relu(h)", ["Mul", "Relu"]),
        ("f = Sub(one, x) h = Sub(one, f) a = Add(h, c) y = Relu(a)", ["Add", "Relu"]),
        ("f = Mul(x, s) n = Add(f, one) h = Mul(n, line) y = Relu(h)", ["Mul", "Add", "Relu"]),
    ],
)
def test_a_chain_becomes_a_product_and_a_sum(body: str, left: list[str]) -> None:
    after = apply(JoinAffine(), graph_of(body))
    assert ops(after) == left
    assert len(regions(after)) == 1


@pytest.mark.parametrize("body", ["f = Mul(x, w) y = Add(f, c)", "f = Mul(x, w) y = Mul(f, line)"])
def test_one_of_each_and_different_axes_stay(body: str) -> None:
    graph = graph_of(body)
    assert run_pass(JoinAffine(), graph, Context()) is graph


def test_a_value_that_others_read_ends_the_chain() -> None:
    after = apply(JoinAffine(), graph_of(f"n = {NORM} f = Mul(n, w) y = Add(f, n)"))
    assert ops(after) == ["Mul", "Add", "Mul", "Add"]
