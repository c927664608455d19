"""Products of quantized values: the very integers of ONNX Runtime, whatever the scales and zero points are."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import parser

from hwopt.backends import ort
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.run import run_program
from hwopt.io.proto import from_model
from hwopt.plugins import find_target


@pytest.mark.parametrize(("scale", "zero"), [("0.0131", 0), ("0.0131", 97), ("0.00391", 255), ("0.0005", 128)])
@pytest.mark.parametrize("shape", ["[1,40,6,80]", "[1,40,1,1]"])
def test_products_are_onnx_runtimes(scale: str, zero: int, shape: str) -> None:
    given = "float s = {0.0317}, uint8 z = {120}, float t = {0.00391}, uint8 v = {3}"
    body = "f = DequantizeLinear(x, s, z) g = DequantizeLinear(r, t, v) k = Mul(f, g) y = QuantizeLinear(k, q, p)"
    text = (
        f'<ir_version: 10, opset_import: ["" : 21]> agraph (uint8[1,40,6,80] x, uint8{shape} r) => (uint8[1,40,6,80] y) '
        f"<{given}, float q = {{{scale}}}, uint8 p = {{{zero}}}> {{ {body} }}"
    )
    graph = from_model(parser.parse_model(text))
    random = np.random.default_rng(0)
    feeds = {name: random.integers(0, 256, graph.tensor(name).dims).astype(np.uint8) for name in graph.inputs}
    found = run_program(compile_program(graph, find_target("host"), 1, "test"), feeds)["y"]
    assert np.array_equal(found, ort.run(graph, feeds)["y"])
