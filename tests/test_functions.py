"""Functions at the ends of their range, and reductions over infinities, as ONNX Runtime computes them."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import parser

from hwopt.backends import ort
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.run import run_program
from hwopt.errors import UnsupportedError
from hwopt.io.proto import from_model
from hwopt.ir import Graph
from hwopt.plugins import find_target

SIZES = (0, 1e-40, 1e-30, 0.3, 1, 5, 20, 86, 87.2, 88, 88.3, 88.5, 88.7, 88.8, 95, 103, 105, 1e3, 1e10, 1e30, 3e38)
FINITE = np.array([sign * size for size in SIZES for sign in (1, -1)], np.float32)[None]
EDGES = np.concatenate([FINITE, np.array([[np.inf, -np.inf, np.nan]], np.float32)], 1)


def graph_of(text: str) -> Graph:
    return from_model(parser.parse_model('<ir_version: 10, opset_import: ["" : 21]>\n' + text))


def agree(text: str, feeds: dict[str, np.ndarray]) -> None:
    graph = graph_of(text)
    with np.errstate(all="ignore"):
        expected = ort.run(graph, feeds)
        found = run_program(compile_program(graph, find_target("host"), 1, "test"), feeds)
    for name in graph.outputs:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-6, atol=5e-7)


FUNCTIONS = (
    "y = Exp(x)", "y = Sigmoid(x)", "y = Tanh(x)", "y = Erf(x)", "y = Gelu(x)", 'y = Gelu <approximate = "tanh"> (x)',
    "y = Softplus(x)", "y = Elu(x)", "y = Selu(x)", "y = Mish(x)", "y = Relu(x)", "y = Sign(x)", "y = HardSigmoid(x)",
    "y = HardSwish(x)", "y = ThresholdedRelu(x)", "y = LeakyRelu(x)", "y = Sinh(x)", "y = Cosh(x)", "y = Softmax(x)",
    "s = Sigmoid(x) y = Mul(x, s)",
)  # fmt: skip


@pytest.mark.parametrize("body", FUNCTIONS)
def test_functions_of_large_values_infinities_and_nan(body: str) -> None:
    agree(f"agraph (float[1,45] x) => (float[1,45] y) {{ {body} }}", {"x": EDGES})


@pytest.mark.parametrize("body", [body for body in FUNCTIONS if any(op in body for op in "Sigmoid Tanh Gelu Swish Relu".split())])  # noqa: SIM905
def test_functions_behind_a_product(body: str) -> None:
    text = f"agraph (float[1,42] a, float[42,42] w) => (float[1,42] y) {{ x = MatMul(a, w) {body} }}"
    agree(text, {"a": FINITE, "w": np.eye(42, dtype=np.float32)})


def test_masked_scores_have_no_weight_at_all() -> None:
    """Nor one that is nearly 0: processors take many times as long for numbers below the normal ones."""
    data = np.array([[0, 0, 0, *([-100, -1e4, -1e30, -3e38] * 10)]], np.float32)
    graph = graph_of("agraph (float[1,43] x) => (float[1,43] y) { y = Softmax(x) }")
    found = run_program(compile_program(graph, find_target("host"), 1, "test"), {"x": data})["y"]
    assert not found[0, 3:].any()
    np.testing.assert_allclose(found[0, :3], 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin", "ArgMax", "ArgMin", "Softmax", "LogSoftmax", "ReduceLogSumExp"])
def test_rows_of_infinities(op: str, axis: int) -> None:
    data = np.full((2, 4, 32), -np.inf, np.float32)
    data[0, 0], data[1, 0, 3], data[1, 2] = 0, 1, np.inf if "Min" in op else 2
    out = "[2,4,32]" if op.endswith("Softmax") else "[2,32]" if axis == 1 else "[2,4]"
    dtype = "int64" if op.startswith("Arg") else "float"
    call = f"{op} <keepdims = 0> (x, a)" if op.startswith("Reduce") else f"{op} <axis = {axis}, keepdims = 0> (x)"
    call = f"{op} <axis = {axis}> (x)" if op.endswith("Softmax") else call
    agree(f"agraph (float[2,4,32] x) => ({dtype}{out} y) <int64[1] a = {{{axis}}}> {{ y = {call} }}", {"x": data})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("agraph (float[2,0] x) => (float[2] y) <int64[1] a = {1}> { y = ReduceMax <keepdims = 0> (x, a) }", "no elements"),
        ("agraph (float[2,0] x) => (int64[2] y) { y = ArgMin <axis = 1, keepdims = 0> (x) }", "no elements"),
    ],
)
def test_what_would_be_wrong_is_refused(text: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        compile_program(graph_of(text), find_target("host"))


@pytest.mark.parametrize("fmod", [0, 1])
def test_remainders_of_infinities_and_nan(fmod: int) -> None:
    """ONNX Runtime takes floats with fmod=1 only; NumPy is what ONNX refers to for both."""
    x = np.array([5.5, -5.5, 5.5, -5.5, np.inf, -np.inf, np.nan, 3, -3, 3, 3, 0, 3, -4], np.float32)
    z = np.array([3, 3, -3, -3, 3, 3, 3, np.inf, np.inf, -np.inf, np.nan, 5, 0, 2], np.float32)
    graph = graph_of(f"agraph (float[14] x, float[14] z) => (float[14] y) {{ y = Mod <fmod = {fmod}> (x, z) }}")
    found = run_program(compile_program(graph, find_target("host"), 1, "test"), {"x": x, "z": z})["y"]
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(found, (np.fmod if fmod else np.mod)(x, z))


@pytest.mark.parametrize("shape", ["3,128", "2,5,131", "7,1", "1,4,3,6"])
@pytest.mark.parametrize("axis", [-1, 1])
def test_softmax_of_any_length(shape: str, axis: int) -> None:
    data = np.random.default_rng(0).normal(0, 9, [int(dim) for dim in shape.split(",")]).astype(np.float32)
    agree(f"agraph (float[{shape}] x) => (float[{shape}] y) {{ y = Softmax <axis = {axis}> (x) }}", {"x": data})


def test_long_functions_in_a_row_do_not_grow_into_one_endless_expression() -> None:
    random = np.random.default_rng(0).standard_normal((2, 8, 5)).astype(np.float32)
    agree("""deep (float[2, 8, 5] x) => (float[2, 8, 5] y) {
        a = Sigmoid(x) b = Gelu(a) c = Mul(b, b) d = Gelu(c) e = Add(d, a) y = Erf(e) }""", {"x": random})  # fmt: skip


def test_rounding_to_bfloat16_several_times_in_a_row_compiles() -> None:
    random = np.random.default_rng(0).standard_normal((2, 8, 5)).astype(np.float32)
    text = """deep (float[2, 8, 5] x) => (float[2, 8, 5] y) {
        a = Sigmoid(x) b = Cast <to = 16> (a) c = Cast <to = 1> (b) e = Tanh(c) f = Cast <to = 16> (e) g = Cast <to = 1> (f)
        h = Mul(g, c) i = Cast <to = 16> (h) y = Cast <to = 1> (i) }"""
    graph = graph_of(text)
    found = run_program(compile_program(graph, find_target("host"), 1, "test"), {"x": random})["y"]
    np.testing.assert_allclose(found, ort.run(graph, {"x": random})["y"], rtol=1e-2)
