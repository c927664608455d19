"""TopK in plain C, and pads that repeat the border, against ONNX Runtime: equal numbers, equal places."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import parser

from hwopt.backends import ort
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.run import run_program
from hwopt.backends.tvm.support import needs_runtime
from hwopt.io.proto import from_model
from hwopt.plugins import find_target


def check(text: str, tolerance: float = 0.0) -> list[str]:
    """The labels of the program's kernels. Inputs are whole numbers, so that some are equal."""
    graph = from_model(parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\nagraph {text}'))
    assert not needs_runtime(graph)
    random = np.random.default_rng(0)
    feeds = {name: random.integers(-20, 20, graph.tensor(name).dims).astype(np.float32) for name in graph.inputs}
    program = compile_program(graph, find_target("host"), 1, "test")
    found = run_program(program, feeds)
    for name, wanted in ort.run(graph, feeds).items():
        assert found[name].dtype == wanted.dtype
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=tolerance)
    return [call.label for call in program.calls]


@pytest.mark.parametrize(("size", "k"), [(1, 1), (2, 1), (7, 7), (100, 1), (100, 9), (1000, 300), (64, 64)])
@pytest.mark.parametrize("largest", [0, 1])
def test_the_first_of_rows(size: int, k: int, largest: int) -> None:
    text = f"(float[3,{size}] x) => (float[3,{k}] y, int64[3,{k}] i) <int64[1] k = {{{k}}}>"
    assert check(f"{text} {{ y, i = TopK <largest = {largest}> (x, k) }}") == ["TopK_0"]


def test_the_first_along_another_axis_of_which_only_the_places_are_read() -> None:
    text = "(float[2,30,4] x) => (int64[2,5,4] i) <int64[1] k = {5}>"
    check(f"{text} {{ y, i = TopK <axis = 1> (x, k) }}")


@pytest.mark.parametrize("mode", ["reflect", "edge", "wrap"])
def test_pads_that_repeat_the_border(mode: str) -> None:
    text = "(float[1,3,6,5] x) => (float[1,3,9,8] y) <int64[8] p = {0,0,1,2,0,0,2,1}>"
    check(f'{text} {{ y = Pad <mode = "{mode}"> (x, p) }}')


@pytest.mark.parametrize("mode", ["reflect", "edge", "wrap"])
def test_what_negative_pads_take_away_is_not_repeated(mode: str) -> None:
    text = "(float[6,5] x) => (float[7,5] y) <int64[4] p = {-1,2,2,-2}>"
    assert check(f'{text} {{ y = Pad <mode = "{mode}"> (x, p) }}') == [f"pad_{mode}"]


def test_what_is_left_is_repeated_as_often_as_pads_are_long() -> None:
    check('(float[5] x) => (float[14] y) <int64[2] p = {-2,11}> { y = Pad <mode = "wrap"> (x, p) }')


def test_pads_of_some_axes_between_convolutions_move_nothing_else() -> None:
    row = ", ".join(str(value) for value in np.random.default_rng(1).integers(-2, 3, 16 * 16 * 9))
    params = f"float[16,16,3,3] w = {{{row}}}, int64[4] p = {{1,1,1,1}}, int64[2] a = {{2,-1}}"
    text = f"(float[1,16,6,5] x) => (float[1,16,6,5] y) <{params}>"
    body = 'h = Conv <pads = [1,1,1,1]> (x, w) q = Pad <mode = "reflect"> (h, p, , a) y = Conv(q, w)'
    labels = check(f"{text} {{ {body} }}", 1e-2)
    assert labels == ["transpose", "Conv_0", "pad_reflect", "Conv_2", "transpose1"]
