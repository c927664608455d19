"""Row kernels (layer norm, softmax) against ONNX Runtime: any length, a sum in front, 8 bits behind, one kernel for all of it."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import parser

from hwopt.backends import ort
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.run import run_program
from hwopt.io.proto import from_model
from hwopt.plugins import find_target


def row(count: int, seed: int) -> str:
    return ", ".join(f"{value:.4f}" for value in np.random.default_rng(seed).normal(size=count))


def check(inputs: str, output: str, params: str, body: str, threads: int = 1) -> None:
    """One kernel in all, and ONNX Runtime's numbers: within one step in 8 bits."""
    text = f'<ir_version: 10, opset_import: ["" : 21]>\nagraph ({inputs}) => ({output} y) <{params}> {{ {body} }}'
    graph = from_model(parser.parse_model(text))
    random, feeds = np.random.default_rng(4), {}
    for name in graph.inputs:
        kind = graph.tensor(name)
        feeds[name] = (random.normal(size=kind.dims) * 2).astype(np.float32)
        if kind.dtype == "uint8":
            feeds[name] = random.integers(0, 256, kind.dims).astype(np.uint8)
    program = compile_program(graph, find_target("host"), threads, "test")
    assert len(program.calls) == 1
    found, expected = run_program(program, feeds)["y"], ort.run(graph, feeds)["y"]
    assert found.dtype == expected.dtype
    eight = found.dtype == np.uint8
    assert np.abs(found.astype(float) - expected).max() <= (1 if eight else 1e-5 * max(1.0, np.abs(expected).max()))


QUANTIZED = "float s = {0.03}, uint8 z = {110}"
BACK = "y = QuantizeLinear(n, s, z)"


@pytest.mark.parametrize("size", [1, 7, 16, 40, 384])
@pytest.mark.parametrize("eight", [False, True])
def test_layer_norm(size: int, eight: bool) -> None:
    params = f"float[{size}] g = {{{row(size, 1)}}}, float[{size}] b = {{{row(size, 2)}}}"
    result = "n" if eight else "y"
    body = f"{result} = LayerNormalization <axis = -1, epsilon = 0.001> (x, g, b)" + (BACK if eight else "")
    shape = f"[2,5,{size}]"
    check(f"float{shape} x", f"{'uint8' if eight else 'float'}{shape}", f"{params}, {QUANTIZED}" if eight else params, body)


def test_layer_norm_over_several_axes_without_beta() -> None:
    check("float[3,4,6] x", "float[3,4,6]", f"float[4,6] g = {{{row(24, 1)}}}", "y = LayerNormalization <axis = 1> (x, g)")


@pytest.mark.parametrize("threads", [1, 2])
def test_a_residual_in_8_bits_is_added_in_the_kernel(threads: int) -> None:
    params = f"float[96] g = {{{row(96, 1)}}}, float[96] b = {{{row(96, 2)}}}, float t = {{0.02}}, uint8 v = {{99}}, {QUANTIZED}"
    body = f"f = DequantizeLinear(r, t, v) a = Add(f, x) n = LayerNormalization(a, g, b) {BACK}"
    check("float[2,101,96] x, uint8[2,101,96] r", "uint8[2,101,96]", params, body, threads)


@pytest.mark.parametrize("mask", ["[2,1,1,37]", "[1,1,5,37]", "[2,3,1,37]", "[5,37]", "[37]", "[2,3,5,37]"])
def test_a_mask_is_added_in_the_softmax(mask: str) -> None:
    body = "a = Add(x, m) y = Softmax(a)"
    check(f"float[2,3,5,37] x, float{mask} m", "float[2,3,5,37]", "float q = {1}", body)


@pytest.mark.parametrize("size", [5, 48])
def test_softmax_in_8_bits(size: int) -> None:
    params = "float s = {0.00392157}, uint8 z = {0}"
    check(f"float[4,{size}] x", f"uint8[4,{size}]", params, f"n = Softmax(x) {BACK}")


@pytest.mark.parametrize("eight", [False, True])
def test_a_row_of_masked_scores_is_0_where_torch_says_so(eight: bool) -> None:
    """Where(IsNaN(p), 0, p) behind a softmax, as torch exports attention, is part of its kernel."""
    inf = ", ".join(["-inf"] * 20 + ["0"] * 40)
    result = "n" if eight else "y"
    body = f"""a = Add(x, m) p = Softmax <axis = -1> (a) t = IsNaN(p) {result} = Where(t, zero, p) {BACK if eight else ""}"""
    params = f"float[3,20] m = {{{inf}}}, float zero = {{0}}" + (", float s = {0.005}, uint8 z = {3}" if eight else "")
    check("float[2,3,20] x", f"{'uint8' if eight else 'float'}[2,3,20]", params, body)
