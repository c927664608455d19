"""Transposed convolutions as phases: every geometry against ONNX Runtime, in float and in 8 bits, with what is fused behind."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from hwopt.backends import ort
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.kernels.spec import ConvTransposeSpec
from hwopt.backends.tvm.run import run_program
from hwopt.backends.tvm.tune.space import space_of
from hwopt.backends.tvm.tune.task import tasks_of
from hwopt.io.proto import from_model
from hwopt.ir import Graph
from hwopt.plugins import find_target

GEOMETRIES = [
    {"size": (5, 6), "channels": (7, 9), "kernel": (2, 2), "strides": (2, 2)},
    {"size": (5, 6), "channels": (17, 33), "kernel": (4, 4), "strides": (2, 2), "pads": (1, 1, 1, 1)},
    {"size": (5, 6), "channels": (8, 5), "kernel": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1), "output_padding": (1, 1)},
    {"size": (5, 6), "channels": (8, 6), "kernel": (3, 2), "strides": (1, 3), "pads": (1, 0, 0, 1), "group": 2},
    {"size": (5, 6), "channels": (8, 6), "kernel": (1, 2), "strides": (3, 3), "output_padding": (2, 1)},
    {"size": (5, 6), "channels": (8, 6), "kernel": (3, 3), "strides": (2, 3), "dilations": (2, 2), "pads": (2, 1, 1, 3)},
    {"size": (5, 6), "channels": (8, 6), "kernel": (3, 3), "strides": (3, 2), "dilations": (1, 3), "pads": (5, 6, 1, 3)},
    {"size": (9,), "channels": (8, 6), "kernel": (5,), "strides": (2,), "pads": (1, 2)},
    {"size": (4, 4), "channels": (6, 6), "kernel": (4, 4), "strides": (2, 2), "pads": (1, 1, 1, 1), "group": 6},
    {"size": (4, 5), "channels": (4, 3), "kernel": (3, 3), "strides": (2, 2), "auto_pad": "SAME_UPPER"},
    {"size": (4, 5), "channels": (4, 3), "kernel": (4, 3), "strides": (2, 1), "auto_pad": "SAME_LOWER"},
    {"size": (4, 5), "channels": (4, 3), "kernel": (3, 3), "strides": (3, 2), "output_shape": (10, 8)},
    {"size": (40, 33), "channels": (16, 16), "kernel": (3, 3), "strides": (2, 2), "pads": (1, 1, 0, 0)},
]


def quantized(name: str, scale: object, zero: object, dtype: str, axis: int = 1) -> tuple[list, list]:
    """The nodes and parameters that read an 8-bit value."""
    arrays = {f"{name}_s": np.array(scale, np.float32), f"{name}_z": np.array(zero, dtype)}
    node = helper.make_node("DequantizeLinear", [name, *arrays], [f"{name}_f"], axis=axis)
    return [node], [numpy_helper.from_array(array, key) for key, array in arrays.items()]


def model(case: dict, integer: bool = False, tail: str = "") -> Graph:
    """ConvTranspose [-> relu or silu or add] [-> 8 bits]."""
    attrs = {key: value for key, value in case.items() if key not in ("size", "channels", "kernel")}
    random, (inputs, outputs) = np.random.default_rng(1), case["channels"]
    shape = (inputs, outputs // case.get("group", 1), *case["kernel"])
    weight = random.normal(size=shape).astype(np.float32)
    bias = random.normal(size=outputs).astype(np.float32)
    nodes, params, names = [], [], ["x", "w", "b"]
    if integer:
        weight, scales = random.integers(-127, 128, shape).astype(np.int8), random.uniform(0.005, 0.02, shape[1])
        whole = np.tile(scales, case.get("group", 1)) * 0.05
        bias = np.rint(bias / whole).astype(np.int32)
        forms = [
            ("x", 0.05, 120, "uint8", 1),
            ("w", scales, np.zeros(shape[1]), "int8", 1),
            ("b", whole, np.zeros(outputs), "int32", 0),
        ]
        for form in forms:
            more = quantized(*form)
            nodes, params = nodes + more[0], params + more[1]
        names = ["x_f", "w_f", "b_f"]
    params += [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")]
    nodes.append(helper.make_node("ConvTranspose", names, ["t0"], **attrs))
    graph_inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.UINT8 if integer else 1, (2, inputs, *case["size"]))]
    last = "t0"
    if tail == "relu":
        nodes.append(helper.make_node("Relu", ["t0"], ["t1"]))
        last = "t1"
    if tail == "silu":
        nodes += [helper.make_node("Sigmoid", ["t0"], ["t1"]), helper.make_node("Mul", ["t0", "t1"], ["t2"])]
        last = "t2"
    if tail == "row":
        params.append(numpy_helper.from_array(random.normal(size=(outputs, 1, 1)).astype(np.float32), "row"))
        nodes += [helper.make_node("Relu", ["t0"], ["t1"]), helper.make_node("Add", ["t1", "row"], ["t2"])]
        last = "t2"
    if integer:
        params += [
            numpy_helper.from_array(np.array(0.25, np.float32), "qs"),
            numpy_helper.from_array(np.array(100, np.uint8), "qz"),
        ]
        nodes.append(helper.make_node("QuantizeLinear", [last, "qs", "qz"], ["q"]))
        last = "q"
    out = helper.make_tensor_value_info(last, onnx.TensorProto.UINT8 if integer else 1, None)
    proto = helper.make_model(
        helper.make_graph(nodes, "g", graph_inputs, [out], params), opset_imports=[helper.make_opsetid("", 17)], ir_version=10
    )
    return from_model(onnx.shape_inference.infer_shapes(proto))


def compare(graph: Graph, threads: int = 1) -> None:
    """One kernel in the compiled program, and ONNX Runtime's numbers: within a step in 8 bits."""
    random, kind = np.random.default_rng(2), graph.tensor("x")
    x = (
        random.integers(0, 256, kind.dims).astype(np.uint8)
        if kind.dtype == "uint8"
        else random.normal(size=kind.dims).astype("f4")
    )
    program = compile_program(graph, find_target("host"), threads, "test")
    (name,) = graph.outputs
    expected, found = ort.run(graph, {"x": x})[name].astype(float), run_program(program, {"x": x})[name].astype(float)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= (1 if kind.dtype == "uint8" else 2e-5 * max(1, np.abs(expected).max()))
    if kind.dtype == "uint8":
        assert np.unique(expected).size > 50
    assert [call.label for call in program.calls if "transpose" not in call.label] == [
        next(node.name for node in graph.nodes if node.op == "ConvTranspose")
    ]


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
def test_geometries(case: dict, integer: bool) -> None:
    compare(model(case, integer))


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("tail", ["relu", "silu", "row"])
def test_epilogues(tail: str, integer: bool) -> None:
    compare(model(GEOMETRIES[2], integer, tail))


@pytest.mark.parametrize("integer", [False, True])
def test_several_threads_share_the_rows(integer: bool) -> None:
    compare(model(GEOMETRIES[-1], integer), threads=2)


def test_each_tuned_schedule_computes_the_same() -> None:
    graph = model(GEOMETRIES[-1])
    (task,) = (one for one in tasks_of(graph, find_target("host"), 1) if isinstance(one.spec, ConvTransposeSpec))
    space = space_of(task)
    x = np.random.default_rng(3).normal(size=graph.tensor("x").dims).astype(np.float32)
    expected = ort.run(graph, {"x": x})["t0"]
    for point in itertools.islice(space.neighbours(space.point(task.default)), 0, None, 4):
        program = compile_program(graph, find_target("host"), 1, "test", lambda *_, at=point: space.schedule(at))
        assert np.abs(run_program(program, {"x": x})["t0"] - expected).max() < 1e-4
