"""Resize against ONNX Runtime: modes, coordinates, roundings, any ratio; in 8 bits without a float copy."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from hwopt.backends import ort
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.run import run_program
from hwopt.io.proto import from_model
from hwopt.ir import Graph
from hwopt.plugins import find_target

UINT8 = onnx.TensorProto.UINT8
GRID = {
    "s": np.array(0.05, np.float32),
    "z": np.array(120, np.uint8),
    "t": np.array(0.06, np.float32),
    "v": np.array(110, np.uint8),
}


def model(
    shape: tuple, attrs: dict, scales: list | None = None, sizes: list | None = None, integer: bool = False, channels: int = 0
) -> Graph:
    """[Conv ->] Resize, or DequantizeLinear -> Resize -> QuantizeLinear."""
    params = {"scales": np.array(scales, np.float32)} if scales else {"sizes": np.array(sizes, np.int64)}
    nodes, value = [], "x"
    if channels:
        params["w"] = np.random.default_rng(0).normal(size=(channels, shape[1], *[1] * (len(shape) - 2))).astype(np.float32)
        nodes, value = [helper.make_node("Conv", ["x", "w"], ["c"])], "c"
    if integer:
        params.update(GRID)
        nodes, value = [helper.make_node("DequantizeLinear", ["x", "s", "z"], ["f"])], "f"
    names = [value, "", "scales"] if scales else [value, "", "", "sizes"]
    nodes.append(helper.make_node("Resize", names, ["y"], **attrs))
    if integer:
        same = attrs["mode"] == "nearest"
        nodes.append(helper.make_node("QuantizeLinear", ["y", *(("s", "z") if same else ("t", "v"))], ["q"]))
    output = helper.make_tensor_value_info("q" if integer else "y", UINT8 if integer else 1, None)
    source = helper.make_tensor_value_info("x", UINT8 if integer else 1, shape)
    given = [numpy_helper.from_array(array, name) for name, array in params.items()]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", [source], [output], given), opset_imports=[helper.make_opsetid("", 19)], ir_version=10
    )
    return from_model(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def compare(graph: Graph, threads: int = 1, kernels: int | None = None) -> None:
    random, kind = np.random.default_rng(2), graph.tensor("x")
    x = random.normal(size=kind.dims).astype(np.float32)
    if kind.dtype == "uint8":
        x = random.integers(0, 256, kind.dims).astype(np.uint8)
    program = compile_program(graph, find_target("host"), threads, "test")
    (name,) = graph.outputs
    expected, found = ort.run(graph, {"x": x})[name].astype(float), run_program(program, {"x": x})[name].astype(float)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= (1 if kind.dtype == "uint8" else 2e-5 * max(1, np.abs(expected).max()))
    if kernels is not None:
        assert len([call for call in program.calls if "transpose" not in call.label]) == kernels


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize(
    "coordinates",
    ["half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric"],
)
@pytest.mark.parametrize("scales", [[1, 1, 2, 2], [1, 1, 0.6, 1.7]], ids=str)
def test_coordinates(mode: str, coordinates: str, scales: list) -> None:
    compare(model((2, 3, 5, 7), {"mode": mode, "coordinate_transformation_mode": coordinates}, scales), kernels=1)


@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
@pytest.mark.parametrize("sizes", [[1, 3, 10, 14], [1, 3, 3, 4], [1, 3, 7, 1]], ids=str)
def test_roundings(rounding: str, sizes: list) -> None:
    compare(model((1, 3, 5, 7), {"mode": "nearest", "nearest_mode": rounding}, sizes=sizes), kernels=1)


@pytest.mark.parametrize("attrs", [{"exclude_outside": 1}, {"cubic_coeff_a": -0.5}], ids=str)
def test_cubic(attrs: dict) -> None:
    compare(model((1, 2, 6, 6), {"mode": "cubic", **attrs}, [1, 1, 1.5, 0.7]), kernels=1)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_lines(mode: str) -> None:
    compare(model((2, 3, 9), {"mode": mode}, [1, 1, 2.5]), kernels=1)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("channels", [21, 64])
def test_behind_a_convolution_nothing_is_transposed_in_between(mode: str, channels: int) -> None:
    graph = model((1, 3, 6, 8), {"mode": mode}, [1, 1, 2, 2], channels=channels)
    compare(graph, kernels=2)
    compare(graph, threads=2)


@pytest.mark.parametrize("channels", [3, 70])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_eight_bits(mode: str, channels: int) -> None:
    compare(model((1, channels, 6, 8), {"mode": mode}, [1, 1, 2, 2], integer=True), kernels=1)
