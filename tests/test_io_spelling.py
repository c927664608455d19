"""One spelling of every model: exported idioms are normalised, opsets converted to the pinned one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from hwopt.backends import ort
from hwopt.errors import ModelError, UnsupportedError
from hwopt.io.onnx import load
from hwopt.io.opset import PINNED
from tests._io import assert_same_outputs, model_of, ops
from tests.mutations import convolutions, shapes
from tests.node_cases import run

RNG = np.random.default_rng(0)


def test_constants_identities_and_shape_chains_are_gone() -> None:
    model = shapes()
    graph = load(model)
    assert ops(graph) == ["Pad", "Slice", "Reshape"]
    assert_same_outputs(model, graph, RNG.standard_normal((2, 6)).astype(np.float32))


def test_an_output_that_is_an_input_keeps_its_identity() -> None:
    model = model_of([helper.make_node("Identity", ["x"], ["y"])], {"x": [2]})
    assert_same_outputs(model, load(model), np.float32([1, 2]))


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize(("size", "kernel", "stride"), [(8, 3, 1), (8, 3, 2), (9, 2, 3), (7, 4, 2), (8, 1, 2)])
def test_auto_pad_becomes_pads(mode: str, size: int, kernel: int, stride: int) -> None:
    x = RNG.standard_normal((1, 2, size, size + 1)).astype(np.float32)
    weight = RNG.standard_normal((2, 2, kernel, kernel)).astype(np.float32)
    window = {"auto_pad": mode, "kernel_shape": [kernel] * 2, "strides": [stride] * 2}
    made = [
        helper.make_node("MaxPool", ["x"], ["y"], **window),
        helper.make_node("MaxPool", ["x"], ["y"], ceil_mode=1, **window),
        helper.make_node("AveragePool", ["x"], ["y"], **window),
        helper.make_node("AveragePool", ["x"], ["y"], count_include_pad=1, **window),
        helper.make_node("ConvTranspose", ["x", "w"], ["y"], **window),
    ]
    if kernel < stride and mode != "VALID":  # ONNX Runtime refuses the negative pads of these
        made.clear()
    made.append(helper.make_node("Conv", ["x", "w"], ["y"], **window))
    for node in made:
        model = model_of([node], {"x": list(x.shape)}, {"w": weight})
        graph = load(model)
        assert "auto_pad" not in graph.nodes[0].attrs
        assert_same_outputs(model, graph, x)


def test_same_with_holes_gives_one_output_per_stride() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", dilations=[2], strides=[2])
    graph = load(model_of([node], {"x": [1, 1, 11]}, {"w": np.ones((1, 1, 3), np.float32)}))
    assert graph.nodes[0].attr("pads") == (2, 2)
    assert str(graph.types["y"]) == "float32[1,1,6]"  # ONNX Runtime itself cannot run the original


def test_the_output_shape_of_a_transposed_convolution_becomes_pads() -> None:
    x, weight = np.ones((1, 2, 5, 5), np.float32), np.ones((2, 2, 3, 3), np.float32)
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2], output_shape=[10, 10], auto_pad="SAME_UPPER")
    model = model_of([node], {"x": [1, 2, 5, 5]}, {"w": weight})
    graph = load(model)
    assert graph.nodes[0].attr("pads") == (0, 0, 1, 1)
    assert_same_outputs(model, graph, x)


@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 12, 13, 15, 17, 18, 20, 21, 22, 25])
def test_every_opset_arrives_at_the_pinned_one(opset: int) -> None:
    model = convolutions(opset)
    graph = load(model)
    assert graph.opsets[""] == PINNED
    assert_same_outputs(model, graph, RNG.standard_normal((1, 3, 8, 8)).astype(np.float32))


def test_old_spellings_are_converted() -> None:
    nodes = [
        helper.make_node("Squeeze", ["x"], ["a"], axes=[0]),
        helper.make_node("Clip", ["a"], ["b"], min=-1.0, max=1.0),
        helper.make_node("Softmax", ["b"], ["c"], axis=1),
        helper.make_node("Slice", ["c"], ["d"], starts=[0, 1], ends=[3, 4], axes=[0, 2]),
        helper.make_node("Pad", ["d"], ["e"], pads=[0, 1, 0, 0, 1, 0], value=0.5),
        helper.make_node("Upsample", ["e", "scales"], ["f"], mode="nearest"),
        helper.make_node("ReduceSum", ["f"], ["g"], axes=[1], keepdims=0),
        helper.make_node("Unsqueeze", ["g"], ["y"], axes=[0]),
    ]
    model = model_of(nodes, {"x": [1, 3, 4, 5]}, {"scales": np.float32([1, 2, 2])}, opset=9)
    graph = load(model)
    assert graph.opsets[""] == PINNED
    assert_same_outputs(model, graph, RNG.standard_normal((1, 3, 4, 5)).astype(np.float32))


def test_operators_newer_than_the_pin_keep_their_opset() -> None:
    model = model_of([helper.make_node("Swish", ["x"], ["y"])], {"x": [2]}, opset=24)
    graph = load(model)
    assert graph.opsets[""] == 24
    assert_same_outputs(model, graph, np.float32([1, 2]))


def test_opsets_out_of_range_are_refused() -> None:
    for opset, reason in ((5, "older than 7"), (99, "newer than")):
        with pytest.raises(ModelError, match=reason):
            load(model_of([helper.make_node("BatchNormalization", ["x"] * 5, ["y"])], {"x": [2]}, opset=opset))


def test_scan_of_opset_8_is_refused() -> None:
    body = helper.make_graph([helper.make_node("Relu", ["a"], ["b"])], "b", [helper.make_tensor_value_info("a", 1, [2])],
                             [helper.make_tensor_value_info("b", 1, [2])])  # fmt: skip
    node = helper.make_node("Scan", ["", "x"], ["y"], num_scan_inputs=1, body=body)
    with pytest.raises(UnsupportedError, match="batch dimension"):
        load(model_of([node], {"x": [1, 3, 2]}, opset=8))


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet", "inception_v2"])
def test_old_real_topologies_load(name: str) -> None:
    path = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"light_{name}.onnx"
    model = onnx.load(path)
    graph = load(path)
    assert graph.opsets[""] == PINNED
    x = RNG.standard_normal((1, 3, 224, 224)).astype(np.float32)
    expected = run(model, [x])
    found = ort.run(graph, {graph.inputs[0]: x})
    np.testing.assert_allclose(found[graph.outputs[0]], expected[0], rtol=1e-4, atol=1e-6)


def test_ten_thousand_nodes_load() -> None:
    nodes = [helper.make_node("Relu" if i % 2 else "Identity", [f"v{i}"], [f"v{i + 1}"]) for i in range(10_000)]
    graph = load(model_of(nodes, {"v0": ["n"]}, outputs=("v10000",)), shapes={"v0": (2,)})
    assert len(graph.nodes) == 5_000


# torch
