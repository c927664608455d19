"""Functions of one 8-bit value: a table with the very results of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import parser

from hwopt.backends import ort
from hwopt.backends.tvm.build import compile_program, object_code
from hwopt.backends.tvm.kernels import lookup
from hwopt.backends.tvm.run import run_program
from hwopt.emit.build import build_library
from hwopt.emit.program import Buffer, Call, Program
from hwopt.io.proto import from_model
from hwopt.plugins import find_target
from tests._machines import Machine, execute

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
    assert len(program.calls) == 1
    assert np.array_equal(run_program(program, feeds)["y"], ort.run(graph, feeds)["y"])


MACHINES = {
    "vbmi": (["avx512bw", "avx512vbmi"], Machine("x86_64"), "x86-64-v4"),
    "avx512": (["avx512bw"], Machine("x86_64"), "x86-64-v4"),
    "avx2": (["avx2"], Machine("x86_64", "Haswell"), "x86-64-v3"),
    "neon": (["neon"], Machine("aarch64", "cortex-a72"), "cortex-a72"),
}


@pytest.mark.parametrize("name", MACHINES)
def test_bytes_are_looked_up_in_vectors(name: str, tmp_path: Path) -> None:
    features, machine, processor = MACHINES[name]
    known = tuple(name for name in features if name.startswith("avx"))
    if reason := machine.missing(known):
        pytest.skip(reason)
    form = lookup.form_of(frozenset(features), 64)
    assert form is not None
    size, random = 1000, np.random.default_rng(0)
    table, data = random.permutation(np.arange(256)).astype(np.uint8), random.integers(-128, 128, size).astype(np.int8)
    function = lookup.build(size, ("int8", "uint8"), form, 1, "k")
    triple = f"{machine.family}-linux-gnu"
    described = {"kind": "llvm", "mtriple": triple, "mcpu": processor, "mattr": [f"+{one}" for one in features]}
    objects = (object_code({"k": function}, described, "test"),)
    buffers = {
        "x": Buffer("x", "int8", (size,), "input"), "t": Buffer("t", "uint8", (256,), "constant", table),
        "y": Buffer("y", "uint8", (size,), "output"),
    }  # fmt: skip
    program = Program("model", buffers, (Call("k", ("x", "t", "y")),), (("x", "x"),), (("y", "y"),), objects)
    library = build_library(program, tmp_path)
    assert np.array_equal(execute(library, machine, {"x": data})["y"], table[data.view(np.uint8)])
