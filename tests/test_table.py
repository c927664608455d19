"""Functions of one 8-bit value: a table with the very results of ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import parser

from hwopt.backends import ort
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.run import run_program
from hwopt.io.proto import from_model
from hwopt.plugins import find_target

BODIES = [
    "n = Sigmoid(f)", "n = Tanh(f)", "n = Gelu(f)", "n = Erf(f)", "g = Sigmoid(f) n = Mul(f, g)",
    "g = Softplus(f) t = Tanh(g) n = Mul(t, f)", "a = Exp(f) n = Mul(a, c)", "n = Elu(f)",
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("body", BODIES)
def test_every_byte_is_onnx_runtimes(body: str, dtype: str) -> None:
    zero = 128 if dtype == "uint8" else 0
    given = f"float s = {{0.04}}, {dtype} z = {{{zero}}}, float q = {{0.02}}, uint8 p = {{20}}, float c = {{0.3}}"
    text = (
        f'<ir_version: 10, opset_import: ["" : 21]> agraph ({dtype}[1,3,16,32] x) => (uint8[1,3,16,32] y) <{given}> '
        f"{{ f = DequantizeLinear(x, s, z) {body} y = QuantizeLinear(n, q, p) }}"
    )
    graph = from_model(parser.parse_model(text))
    feeds = {"x": np.random.default_rng(0).permutation(np.arange(1536) % 256).astype(np.uint8).view(dtype).reshape(1, 3, 16, 32)}
    program = compile_program(graph, find_target("host"), 1, "test")
    assert ["table" in call.label for call in program.calls] == [True]
    assert np.array_equal(run_program(program, feeds)["y"], ort.run(graph, feeds)["y"])
