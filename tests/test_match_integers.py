"""Quantized activations become the integers that a target multiplies, and the outputs stay the same to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import parser

from hwopt.backends import ort
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.run import run_program
from hwopt.backends.tvm.tune.task import tasks_of
from hwopt.io.proto import from_model
from hwopt.ir import Graph, of_op
from hwopt.job import clean
from hwopt.pipeline import Context, run_pass
from hwopt.plugins import find_target
from passes.match_integers import MatchIntegers

CONV = """agraph (float[1,8,9,9] x) => (float[1,16,9,9] y) <float s = {{0.03}}, {kind} z = {{{zero}}}, float t = {{0.4}}> {{
  wide = ConstantOfShape<value = float[1] {{0.02}}>(size)
  w = QuantizeLinear(wide, s8, z8) dw = DequantizeLinear(w, s8, z8)
  q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
  c = Conv<pads = [1,1,1,1]>(d, dw) p = QuantizeLinear(c, t, z) y = DequantizeLinear(p, t, z) }}"""
ATTENTION = """agraph (float[1,2,9,16] a, float[1,2,9,16] b) => (float[1,2,9,9] y) <float s = {{0.03}}, {kind} z = {{{zero}}}> {{
  qa = QuantizeLinear(a, s, z) da = DequantizeLinear(qa, s, z)
  qb = QuantizeLinear(b, s, z) db = DequantizeLinear(qb, s, z) tb = Transpose<perm = [0,1,3,2]>(db)
  m = MatMul(da, tb) q = QuantizeLinear(m, s, z) y = DequantizeLinear(q, s, z) }}"""
MORE = "<int64[4] size = {16,8,3,3}, float s8 = {0.001}, int8 z8 = {0}, "


def graph_of(text: str, kind: str) -> Graph:
    filled = text.format(kind=kind, zero={"int8": 5, "uint8": 133}[kind])
    filled = filled.replace("<float", f"{MORE}float", 1) if "size" in filled else filled
    return from_model(parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {filled}'))


def feeds_of(graph: Graph) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: 3 * random.standard_normal(graph.tensor(name).dims, np.float32) for name in graph.inputs}


def integers(graph: Graph) -> set[str]:
    return {graph.tensor(node.output).dtype for node in of_op(graph, "QuantizeLinear") if node.inputs[0] not in graph.params}


@pytest.mark.parametrize("target", ["x86-64-v4", "cortex-a76"])
@pytest.mark.parametrize("kind", ["int8", "uint8"])
@pytest.mark.parametrize("text", [CONV, ATTENTION], ids=["conv", "attention"])
def test_nothing_changes_but_the_integers(text: str, kind: str, target: str) -> None:
    graph = graph_of(text, kind)
    after = run_pass(MatchIntegers(), graph, Context(find_target(target)))
    feeds = feeds_of(graph)
    np.testing.assert_array_equal(ort.run(after, feeds)["y"], ort.run(graph, feeds)["y"])


@pytest.mark.parametrize("target", ["x86-64-v4", "cortex-a76"])
@pytest.mark.parametrize("kind", ["int8", "uint8"])
@pytest.mark.parametrize("text", [CONV, ATTENTION], ids=["conv", "attention"])
def test_products_run_on_the_instruction_that_they_are_for(text: str, kind: str, target: str) -> None:
    hardware = find_target(target)
    graph = clean(graph_of(text, kind), Context(hardware))
    task = next(one for one in tasks_of(graph, hardware, 1) if one.name.startswith(("conv", "matmul")))
    assert task.micro.intrinsic


def test_right_sides_are_signed_and_both_sides_of_one_product_stay() -> None:
    graph = run_pass(MatchIntegers(), graph_of(ATTENTION, "uint8"), Context(find_target("x86-64-v4")))
    assert {node.inputs[0]: graph.tensor(node.output).dtype for node in of_op(graph, "QuantizeLinear")} == {
        "a": "uint8", "b": "int8", "m": "uint8",
    }  # fmt: skip
    square = graph_of(ATTENTION.replace("tb = Transpose<perm = [0,1,3,2]>(db)", "tb = Transpose<perm = [0,1,3,2]>(da)"), "uint8")
    assert "uint8" in integers(run_pass(MatchIntegers(), square, Context(find_target("cortex-a76"))))


@pytest.mark.parametrize("text", [CONV, ATTENTION], ids=["conv", "attention"])
def test_a_model_quantized_for_another_processor_computes_what_onnx_runtime_does(text: str) -> None:
    host = find_target("host")
    graph = graph_of(text, "int8")
    found = run_program(compile_program(clean(graph, Context(host)), host, 1, "m"), feeds_of(graph))["y"]
    step = 0.4 if text is CONV else 0.03
    assert np.abs(found - ort.run(graph, feeds_of(graph))["y"]).max() <= 1.01 * step
