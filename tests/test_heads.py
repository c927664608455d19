"""Transpositions around the products of an attention: none is left, and the results are ONNX Runtime's."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import parser

from hwopt.backends import ort
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.run import run_program
from hwopt.emit.program import Program
from hwopt.io.proto import from_model
from hwopt.ir import Graph
from hwopt.plugins import find_target
from hwopt.target import Target

HEADS, TURNED = "<perm: ints = [0, 2, 1, 3]>", "<perm: ints = [0, 2, 3, 1]>"
INTEGERS = "float s = {0.02}, int8 z = {0}, float t = {0.05}, uint8 u = {7}"
FLOAT = (
    "float[2,9,3,20] q, float[2,11,3,20] k, float[2,11,3,20] v",
    f"a = Transpose {HEADS} (q) b = Transpose {TURNED} (k) c = Transpose {HEADS} (v)",
)
QUANTIZED = (
    "int8[2,9,3,20] q, int8[2,11,3,20] k, float[2,11,3,20] v",
    f"""qt = Transpose {HEADS} (q) a = DequantizeLinear(qt, s, z) kt = Transpose {TURNED} (k) b = DequantizeLinear(kt, s, z)
    c = Transpose {HEADS} (v)""",
)
ATTENTION = "m = MatMul(a, b) r = Relu(m) o = MatMul(r, c)"


def graph_of(inputs: str, body: str, output: str) -> Graph:
    text = f'<ir_version: 10, opset_import: ["" : 21]> agraph ({inputs}) => ({output}) <{INTEGERS}> {{ {body} }}'
    return from_model(parser.parse_model(text))


def compiled(graph: Graph, target: Target | None = None) -> tuple[Program, float]:
    """The program and its largest difference from ONNX Runtime, relative to the largest output."""
    random = np.random.default_rng(0)
    feeds = {
        name: random.integers(-128, 128, graph.tensor(name).dims).astype(np.int8)
        if graph.tensor(name).dtype == "int8"
        else random.standard_normal(graph.tensor(name).dims, np.float32)
        for name in graph.inputs
    }
    program = compile_program(graph, target or find_target("host"), 1, "test")
    found, wanted = run_program(program, feeds), ort.run(graph, feeds)
    worst = max(float(np.abs(found[name].astype(float) - wanted[name]).max() / np.abs(wanted[name]).max()) for name in wanted)
    return program, worst


@pytest.mark.parametrize(("inputs", "split"), [FLOAT, QUANTIZED], ids=["float", "int8"])
def test_an_attention_of_split_heads_is_its_two_products(inputs: str, split: str) -> None:
    merged = f"y = Transpose {HEADS} (o)"
    program, worst = compiled(graph_of(inputs, f"{split} {ATTENTION} {merged}", "float[2,9,3,20] y"))
    assert worst < 1e-5
    assert len(program.calls) == 2


def test_a_quantized_result_is_merged_as_it_is_stored() -> None:
    body = f"{FLOAT[1]} {ATTENTION} n = QuantizeLinear(o, t, u) y = Transpose {HEADS} (n)"
    program, worst = compiled(graph_of(FLOAT[0], body, "uint8[2,9,3,20] y"))
    assert worst <= 1 / 255
    assert len(program.calls) == 2


def test_a_residual_that_lies_head_by_head_keeps_the_result_so() -> None:
    body = f"{FLOAT[1]} m = MatMul(a, b) n = Add(m, x) r = Relu(n) y = Transpose {HEADS} (r)"
    program, worst = compiled(graph_of(f"{FLOAT[0]}, float[2,3,9,11] x", body, "float[2,9,3,11] y"))
    assert worst < 1e-5
    assert ["transpose" in call.label for call in program.calls] == [False, True]


def test_a_transposition_that_others_read_is_computed_for_them() -> None:
    body = f"{FLOAT[1]} m = MatMul(a, b) y = Transpose {HEADS} (m) w = Sigmoid(a)"
    program, worst = compiled(graph_of(FLOAT[0], body, "float[2,9,3,11] y, float[2,3,9,20] w"))
    assert worst < 1e-5
    assert len(program.calls) == 2


def test_transpositions_that_undo_each_other_move_nothing() -> None:
    body = f"a = Transpose {HEADS} (q) b = Transpose {HEADS} (a) y = Relu(b)"
    program, worst = compiled(graph_of("float[2,9,3,20] q", body, "float[2,9,3,20] y"))
    assert worst == 0
    assert len(program.calls) == 1


def test_a_turned_right_side_is_read_as_it_lies() -> None:
    body = "b = Transpose <perm: ints = [0, 2, 1]> (k) y = MatMul(q, b)"
    program, worst = compiled(graph_of("float[3,9,20] q, float[3,11,20] k", body, "float[3,9,11] y"))
    assert worst < 1e-5
    assert len(program.calls) == 1


def test_tiles_get_products_one_behind_the_other() -> None:
    """A matrix unit gains more than the transpositions cost."""
    from hwopt.backends.tvm.kernels.amx_schedule import is_tile
    from hwopt.backends.tvm.tune.task import tasks_of

    split = FLOAT[1].replace("q", "qn").replace("k", "kn")
    narrow = "qn = Cast <to: int = 16> (q) kn = Cast <to: int = 16> (k)"
    wide = "aw = Cast <to: int = 1> (a) bw = Cast <to: int = 1> (b)"
    sizes = "float[2,128,3,64] q, float[2,128,3,64] k, float[2,128,3,64] v"
    body = f"{narrow} {split} {wide} m = MatMul(aw, bw) y = Transpose {HEADS} (m) w = Relu(c)"
    graph = graph_of(sizes, body, "float[2,128,3,128] y, float[2,3,128,64] w")
    tiles, vectors = (next(iter(tasks_of(graph, find_target(name), 1))) for name in ("sapphire-rapids", "x86-64-v4"))
    assert is_tile(tiles.micro)
    assert not tiles.spec.beside
    assert vectors.spec.beside == ("data", "right", "out")
