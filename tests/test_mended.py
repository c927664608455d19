"""Operators that TVM refuses or computes otherwise than ONNX says, against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import parser

from hwopt.backends import ort
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.run import run_program
from hwopt.backends.tvm.support import needs_runtime, unsupported
from hwopt.io.proto import from_model
from hwopt.plugins import find_target


def check(text: str, tolerance: float = 0.0) -> list[str]:
    """The labels of the program's kernels. Whole numbers come in, so that sums are exact."""
    graph = from_model(parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\nagraph {text}'))
    assert not needs_runtime(graph)
    assert not unsupported(graph)
    random = np.random.default_rng(0)
    feeds = {name: random.integers(-9, 10, graph.tensor(name).dims).astype(graph.tensor(name).dtype) for name in graph.inputs}
    program = compile_program(graph, find_target("host"), 1, "test")
    found = run_program(program, feeds)
    for name, wanted in ort.run(graph, feeds).items():
        assert (found[name].dtype, found[name].shape) == (wanted.dtype, wanted.shape)
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=tolerance)
    return [call.label for call in program.calls]


@pytest.mark.parametrize("reduction", ["none", "add"])
@pytest.mark.parametrize(
    ("shape", "axis", "count", "indices"),
    [
        ((2, 4), 1, "1,2", "1,2"),
        ((3, 5), 0, "2,3", "1,0,2,2,-2,0"),
        ((3, 5), -1, "1,5", "1,0,2,4,3"),
        ((3, 5, 8), 2, "2,1,2", "0,2,1,3"),
        ((3, 5, 8), 1, "2,1,2", "0,2,1,3"),
    ],
)
def test_updates_of_fewer_rows_than_the_data(reduction: str, shape: tuple, axis: int, count: str, indices: str) -> None:
    dims = ",".join(map(str, shape))
    text = f"(float[{dims}] x, float[{count}] u) => (float[{dims}] y) <int64[{count}] i = {{{indices}}}>"
    check(f'{text} {{ y = ScatterElements <axis = {axis}, reduction = "{reduction}"> (x, i, u) }}')


def test_sums_of_updates_to_one_element() -> None:
    text = "(float[3,5] x, float[1,5] u) => (float[3,5] y) <int64[1,5] i = {1,1,2,0,1}>"
    check(f'{text} {{ y = ScatterElements <axis = 1, reduction = "add"> (x, i, u) }}')


@pytest.mark.parametrize("mode", ["half_pixel", "output_half_pixel"])
@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("ratio", [0, 2])
def test_regions_of_a_scaled_image(mode: str, scale: float, ratio: int) -> None:
    text = "(float[2,3,8,8] x) => (float[3,3,3,2] y) <float[3,4] r = {0,0,5,5,1,2,7,6,10,20,90,100}, int64[3] b = {0,1,0}>"
    attrs = f'coordinate_transformation_mode = "{mode}", spatial_scale = {scale}, sampling_ratio = {ratio}'
    check(f"{text} {{ y = RoiAlign <{attrs}, output_height = 3, output_width = 2> (x, r, b) }}", 1e-5)


WINDOWS = [(5, 2, 2, "1,1"), (6, 3, 2, "1,1"), (7, 2, 3, "0,1"), (6, 2, 3, "0,0")]


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pads"), [(5, 2, 2, "1,1"), (6, 3, 2, "1,1"), (7, 2, 3, "0,1"), (6, 2, 3, "0,0")]
)
def test_last_windows_of_pools_that_round_up(op: str, size: int, kernel: int, stride: int, pads: str) -> None:
    begin, end = pads.split(",")
    attrs = f"kernel_shape = [{kernel}, 2], strides = [{stride}, 1], pads = [{begin}, 0, {end}, 1], ceil_mode = 1"
    check(f"(float[1,3,{size},4] x) => (float[1,3,n,4] y) {{ y = {op} <{attrs}> (x) }}", 1e-6)


def test_a_pool_that_rounds_up_lies_between_convolutions_without_transpositions() -> None:
    weight = ",".join(["1"] * 256)
    body = "a = Conv (x, w) b = MaxPool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1> (a) y = Conv (b, w)"
    labels = check(f"(float[1,16,6,6] x) => (float[1,16,n,m] y) <float[16,16,1,1] w = {{{weight}}}> {{ {body} }}", 1e-3)
    assert [label for label in labels if "transpose" not in label] == labels[1:-1]


def test_means_that_count_pads_but_not_what_rounding_up_adds() -> None:
    attrs = "kernel_shape = [2, 3], strides = [3, 2], pads = [0, 1, 0, 1], ceil_mode = 1, count_include_pad = 1"
    check(f"(float[1,3,6,6] x) => (float[1,3,n,m] y) {{ y = AveragePool <{attrs}> (x) }}", 1e-6)


@pytest.mark.parametrize("groups", [1, 4])
def test_convolutions_whose_every_window_lies_in_the_pads(groups: int) -> None:
    weight = ",".join(["1"] * (4 * 4 // groups * 8))
    text = f"(float[2,4,4,1] x) => (float[2,4,3,1] y) <float[4,{4 // groups},2,4] w = {{{weight}}}, float[4] b = {{1,2,3,4}}>"
    attrs = f"dilations = [1, 3], group = {groups}, pads = [2, 1, 3, 8], strides = [3, 2]"
    check(f"{text} {{ c = Conv <{attrs}> (x, w, b) y = Relu (c) }}")


@pytest.mark.parametrize("attrs", ["", "exclusive = 1", "reverse = 1", "exclusive = 1, reverse = 1"])
@pytest.mark.parametrize(("dtype", "axis"), [("float", 1), ("int64", 1), ("int32", -3)])
def test_sums_of_all_before(attrs: str, dtype: str, axis: int) -> None:
    text = f"({dtype}[2,17,3] x) => ({dtype}[2,17,3] y) <int64 a = {{{axis}}}>"
    check(f"{text} {{ y = CumSum {f'<{attrs}>' if attrs else ''} (x, a) }}")


def test_positions_of_tokens_as_roberta_counts_them() -> None:
    body = "m = Cast <to = 7> (k) c = CumSum (m, a) p = Mul (c, m) y = Add (p, one)"
    check(f"(int64[1,12] x) => (int64[1,12] y) <int64 a = {{1}}, int64 one = {{1}}> {{ k = Greater (x, one) {body} }}")


def test_a_slice_of_nothing_in_front_of_something() -> None:
    bounds = "<int64[1] s = {3}, int64[1] e = {2}, int64[1] a = {1}>"
    check(f"(float[5,8] x) => (float[5,8] y) {bounds} {{ z = Slice (x, s, e, a) r = Relu (z) y = Concat <axis = 1> (r, x) }}")


def test_a_bent_line_that_is_scaled() -> None:
    check("(float[3,37] x) => (float[3,37] y) { y = Celu <alpha = 1.7> (x) }", 2e-6)


@pytest.mark.parametrize("kind", ["int64", "int32"])
def test_powers_by_whole_numbers(kind: str) -> None:
    check(f"(float[3,3] x) => (float[3,3] y) <{kind}[3] e = {{2,0,3}}> {{ y = Pow (x, e) }}", 1e-4)


@pytest.mark.parametrize(("axis", "shape"), [(0, "5,3,2"), (1, "3,5,2"), (-1, "3,2,5")])
@pytest.mark.parametrize(("kind", "depth"), [("float", "int64[1]"), ("int64", "int64")])
def test_classes_as_rows_of_one(axis: int, shape: str, kind: str, depth: str) -> None:
    text = f"(int64[3,2] x) => ({kind}[{shape}] y) <{depth} d = {{5}}, {kind}[2] v = {{-1,2}}>"
    check(f"{text} {{ y = OneHot <axis = {axis}> (x, d, v) }}")


@pytest.mark.parametrize("axis", [-1, 1])
def test_what_layer_normalization_subtracts_and_divides_by(axis: int) -> None:
    shape = "2,3,1" if axis == -1 else "2,1,1"
    weights = "7" if axis == -1 else "3,7"
    values = ",".join(str(one % 5 - 2) for one in range(21 if axis == 1 else 7))
    text = f"(float[2,3,7] x) => (float[2,3,7] y, float[{shape}] m, float[{shape}] d) <float[{weights}] g = {{{values}}}>"
    check(f"{text} {{ y, m, d = LayerNormalization <axis = {axis}> (x, g) }}", 1e-5)


def test_places_of_maxima_are_refused_at_the_door_where_somebody_reads_them() -> None:
    text = "(float[1,1,4,4] x) => ({}) {{ y, i = MaxPool <kernel_shape = [2, 2]> (x) }}"
    header = '<ir_version: 10, opset_import: ["" : 21]>\nagraph '
    graph = from_model(parser.parse_model(header + text.format("float[1,1,3,3] y, int64[1,1,3,3] i")))
    assert [reason for _, reason in unsupported(graph)] == ["TVM does not say where the largest elements lie"]
    check(text.format("float[1,1,3,3] y"))
