"""Convolutions with few outputs compute several neighbours at once, in float and in 8 bits; ONNX Runtime is the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import parser

from hwopt.backends import ort
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.kernels.spec import ConvSpec
from hwopt.backends.tvm.narrow import _results
from hwopt.backends.tvm.run import run_program
from hwopt.io.proto import from_model
from hwopt.plugins import find_target


def row(count: int, seed: int) -> str:
    return ", ".join(f"{value:.3f}" for value in np.random.default_rng(seed).normal(size=count))


@pytest.mark.parametrize(
    ("outputs", "kernel", "stride", "size", "together"),
    [
        (3, 9, 1, 128, 4),
        (1, 3, 1, 128, 16),
        (4, 3, 1, 12, 4),
        (8, 3, 1, 12, 2),
        (3, 3, 2, 64, 4),
        (3, 1, 1, 64, 1),
        (3, 3, 1, 13, 1),
    ],
)
def test_as_many_neighbours_as_save_most(outputs: int, kernel: int, stride: int, size: int, together: int) -> None:
    pads = (kernel // 2,) * 4
    assert _results(ConvSpec(1, size, size, 8, outputs, (kernel, kernel), (stride, stride), pads=pads), 16) == together


TAILS = {
    "relu": "y = Relu(h)",
    "factors and a residual": "m = Mul(h, f) a = Add(m, r) y = Relu(a)",
    "factors of an image": "s = Sigmoid(g) m = Mul(h, s) y = Relu(m)",
}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS.keys())
@pytest.mark.parametrize(("size", "stride"), [(12, 1), (13, 1), (24, 2)])
def test_float_results(tail: str, size: int, stride: int) -> None:
    out = f"[2,3,{(size - 1) // stride + 1},{(size - 1) // stride + 1}]"
    params = f"float[3,5,3,3] w = {{{row(135, 0)}}}, float[3] b = {{{row(3, 1)}}}, float[3,1,1] f = {{2, 3, -1}}"
    conv = f"h = Conv <pads = [1,1,1,1], strides = [{stride},{stride}]> (x, w, b)"
    inputs = f"float[2,5,{size},{size}] x, float{out} r, float[2,3,1,1] g"
    text = f'<ir_version: 10, opset_import: ["" : 21]> agraph ({inputs}) => (float{out} y) <{params}> {{ {conv} {tail} }}'
    graph = from_model(parser.parse_model(text))
    feeds = {name: np.random.default_rng(2).normal(size=graph.tensor(name).dims).astype(np.float32) for name in graph.inputs}
    found = run_program(compile_program(graph, find_target("host")), feeds)["y"]
    np.testing.assert_allclose(found, ort.run(graph, feeds)["y"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("zero_point", [0, 7])
def test_results_in_8_bits(zero_point: int) -> None:
    weight = ", ".join(map(str, np.random.default_rng(0).integers(-127, 128, 3 * 8 * 9)))
    text = f"""<ir_version: 10, opset_import: ["" : 21]> agraph (uint8[1,8,6,12] x) => (uint8[1,3,6,12] y)
    <int8[3,8,3,3] q = {{{weight}}}, float[3] t = {{0.01, 0.02, 0.03}}, int8[3] o = {{0,0,0}}, float[3] b = {{1,-2,0.5}},
     float s = {{0.02}}, uint8 z = {{{zero_point}}}, float u = {{0.5}}>
    {{ d = DequantizeLinear(x, s, z) w = DequantizeLinear <axis = 0> (q, t, o) h = Conv <pads = [1,1,1,1]> (d, w, b)
       a = Relu(h) y = QuantizeLinear(a, u, z) }}"""
    graph = from_model(parser.parse_model(text))
    feeds = {"x": np.random.default_rng(2).integers(0, 256, (1, 8, 6, 12)).astype(np.uint8)}
    found = run_program(compile_program(graph, find_target("host")), feeds)["y"]
    assert np.abs(found.astype(int) - ort.run(graph, feeds)["y"]).max() <= 1
