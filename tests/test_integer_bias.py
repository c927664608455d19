"""Biases of integer kernels: float results get them in float, quantized ones as steps of the accumulator, a part of one step."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper, parser

from hwopt.backends import ort
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.run import run_program
from hwopt.io.proto import from_model
from hwopt.ir import Graph
from hwopt.plugins import find_target

LAYERS = {
    "matmul": ("uint8[24,48] x", "float[24,40] y", "p = MatMul(d, e) y = Add(p, b)", (48, 40)),
    "gemm": ("uint8[24,48] x", "float[24,40] y", "y = Gemm<transB=1>(d, e, b)", (40, 48)),
    "conv": ("uint8[1,16,9,9] x", "float[1,40,9,9] y", "y = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(d, e, b)", (40, 16, 3, 3)),
    "matmul and tanh": ("uint8[24,48] x", "float[24,40] y", "p = MatMul(d, e) q = Add(p, b) y = Tanh(q)", (48, 40)),
}
SCALES = (0.05, 0.04)  # of data and weights, small numbers, so that float32 itself is exact enough
HALF = 1e-3  # half a step of the accumulator: what rounding the bias to whole ones would cost


def layer(kind: str, zero_point: int, quantized: bool = False) -> Graph:
    data, result, body, shape = LAYERS[kind]
    generator = np.random.default_rng(3)
    end, output = (
        (" z = QuantizeLinear(y, o, n)", result.replace("float", "uint8").replace(" y", " z")) if quantized else ("", result)
    )
    text = f"""<ir_version: 10, opset_import: ["" : 21]> agraph ({data}) => ({output})
        <float s = {{{SCALES[0]}}}, uint8 n = {{{zero_point}}}, float t = {{{SCALES[1]}}}, float o = {{0.2}},
         int8[{",".join(map(str, shape))}] w, float[40] b>
        {{ d = DequantizeLinear(x, s, n) e = DequantizeLinear(w, t) {body}{end} }}"""
    model = parser.parse_model(text)
    values = {"w": generator.integers(-20, 21, shape).astype(np.int8), "b": generator.standard_normal(40).astype(np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in values.items())
    return from_model(model)


def results(graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    shape = graph.tensor("x").dims
    feeds = {"x": np.random.default_rng(0).integers(0, 20, shape).astype(np.uint8)}
    name = graph.outputs[0]
    return run_program(compile_program(graph, find_target("host"), 1, "m"), feeds)[name], ort.run(graph, feeds)[name]


@pytest.mark.parametrize("zero_point", [0, 7])
@pytest.mark.parametrize("kind", LAYERS)
def test_float_results_have_their_bias_in_float(kind: str, zero_point: int) -> None:
    found, wanted = results(layer(kind, zero_point))
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() < HALF / 10


@pytest.mark.parametrize("kind", ["matmul", "conv"])
def test_quantized_results_differ_by_one_step_at_most(kind: str) -> None:
    found, wanted = results(layer(kind, 7, quantized=True))
    difference = np.abs(found.astype(int) - wanted.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.02
