"""Models of every opset from 7 on: what is loaded gives on ONNX Runtime what the file itself gives there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from hwopt.errors import UnsupportedError
from hwopt.io.onnx import load
from hwopt.io.opset import PINNED
from hwopt.io.proto import to_model
from tests.node_cases import run

OLDEST = 7  # the oldest that ONNX Runtime vouches for
IMAGE = (1, 2, 5, 6)
I64 = np.int64


@dataclass(frozen=True)
class Case:
    """One operator in the opsets `since`..`until`: data inputs by shape, the rest as constants."""

    op: str
    shapes: tuple[tuple[int, ...], ...]
    constants: tuple[Any, ...] = ()
    attrs: dict[str, Any] = field(default_factory=dict)
    since: int = OLDEST
    until: int = PINNED - 1
    outputs: int = 1
    dtype: type = np.float32

    def __str__(self) -> str:
        return f"{self.op}-{self.since}-{self.attrs}-{[np.shape(one) for one in self.constants]}-{self.shapes}"


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def whole(*values: int) -> np.ndarray:
    return np.array(values, I64)


def _softmaxes() -> Iterator[Case]:
    for op in ("Softmax", "LogSoftmax", "Hardmax"):
        yield Case(op, ((2, 3, 4),))
        for axis in (0, 1, 2):
            yield Case(op, ((2, 3, 4),), attrs={"axis": axis})
        yield Case(op, ((2, 3, 4),), attrs={"axis": -2}, since=11)
        yield Case(op, ((3, 4),), attrs={"axis": 0})


def _resizes() -> Iterator[Case]:
    ratios = ([1, 1, 2, 2], [1, 1, 1.25, 1.7], [1, 1, 3, 1.5], [1, 1, 0.5, 0.75], [1, 1, 0.25, 2], [1, 1, 1.3, 0.7])
    for mode in ("nearest", "linear"):
        for ratio in ratios:
            if min(ratio) >= 1:
                yield Case("Upsample", (IMAGE,), attrs={"mode": mode, "scales": [float(one) for one in ratio]}, until=8)
                yield Case("Upsample", (IMAGE,), (floats(*ratio),), {"mode": mode}, since=9, until=9)
            yield Case("Resize", (IMAGE,), (floats(*ratio),), {"mode": mode}, since=10, until=10)
            roi = np.zeros(0, np.float32)
            yield Case("Resize", (IMAGE,), (roi, floats(*ratio)), {"mode": mode}, since=11)
            for how in ("align_corners", "asymmetric", "pytorch_half_pixel"):
                attrs = {"mode": mode, "coordinate_transformation_mode": how}
                yield Case("Resize", (IMAGE,), (roi, floats(*ratio)), attrs, since=11, until=18)
        sizes = whole(1, 2, 7, 3)
        yield Case("Resize", (IMAGE,), (roi, roi, sizes), {"mode": mode}, since=11)
    for size, ratio in ((10, 1.3), (10, 0.7), (20, 0.35), (15, 1.4)):  # whole in float32 only
        yield Case("Resize", ((1, 1, size, 2),), (floats(1, 1, ratio, 1),), {"mode": "nearest"}, since=10, until=10)
        yield Case("Resize", ((1, 1, size, 2),), (roi, floats(1, 1, ratio, 1)), {"mode": "linear"}, since=11)
        yield Case("Resize", ((1, 1, size, 2),), (roi, floats(ratio)), {"mode": "linear", "axes": [-2]}, since=18)
    yield Case("Upsample", ((1, 1, 10, 2),), attrs={"scales": [1.0, 1.0, 1.3, 1.0]}, until=8)
    yield Case("Upsample", ((1, 1, 10, 2),), (floats(1, 1, 1.3, 1),), since=9, until=9)
    attrs = {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 0.5}
    yield Case("Resize", (IMAGE,), (floats(0, 0, 0.1, 0.2, 1, 1, 0.8, 1.2), floats(1, 1, 1.5, 2)), attrs, since=11)


def _reductions() -> Iterator[Case]:
    kinds = ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"]
    for op in (f"Reduce{kind}" for kind in kinds):
        last = 12 if op == "ReduceSum" else 17
        yield Case(op, ((2, 3, 4),))
        yield Case(op, ((2, 3, 4),), attrs={"axes": [0, 2]}, until=last)
        yield Case(op, ((2, 3, 4),), attrs={"axes": [1], "keepdims": 0}, until=last)
        yield Case(op, ((2, 3, 4),), attrs={"axes": [-1], "keepdims": 0}, since=11, until=last)
    yield Case("ReduceSum", ((2, 3, 4),), (whole(-1),), since=13)
    for op in ("ArgMax", "ArgMin"):
        yield Case(op, ((2, 3, 4),), attrs={"axis": 1, "keepdims": 0})
        yield Case(op, ((2, 3, 4),), attrs={"axis": -1}, since=11)
        yield Case(op, ((2, 3, 4),), attrs={"axis": 1, "select_last_index": 1}, since=12)


def _shapes() -> Iterator[Case]:
    yield Case("Squeeze", ((2, 1, 3, 1),))
    yield Case("Squeeze", ((2, 1, 3, 1),), attrs={"axes": [1]}, until=12)
    yield Case("Squeeze", ((2, 1, 3, 1),), attrs={"axes": [-1]}, since=11, until=12)
    yield Case("Unsqueeze", ((2, 3),), attrs={"axes": [0, 2]}, until=12)
    yield Case("Unsqueeze", ((2, 3),), attrs={"axes": [0, -1]}, since=11, until=12)
    yield Case("Split", ((7, 4),), attrs={"split": [2, 5]}, until=12, outputs=2)
    yield Case("Split", ((6, 4),), attrs={"axis": 1}, until=17, outputs=2)
    yield Case("Split", ((6, 4),), (whole(1, 3),), {"axis": -1}, since=13, outputs=2)
    yield Case("Split", ((7, 4),), attrs={"num_outputs": 3}, since=18, outputs=3)
    yield Case("Slice", ((5, 6),), attrs={"starts": [1, -4], "ends": [4, 100], "axes": [0, 1]}, until=9)
    yield Case("Slice", ((5, 6),), attrs={"starts": [1], "ends": [-1]}, until=9)
    yield Case("Slice", ((5, 6),), (whole(4), whole(-6), whole(1), whole(-2)), since=10)
    for axis in (0, 1, 2, 3):
        yield Case("Flatten", ((2, 3, 4),), attrs={"axis": axis})
    yield Case("Flatten", ((2, 3, 4),), attrs={"axis": -1}, since=11)
    yield Case("Reshape", ((2, 3, 4),), (whole(0, -1),))
    yield Case("Concat", ((2, 3), (2, 4)), attrs={"axis": 1})
    yield Case("Concat", ((2, 3), (2, 4)), attrs={"axis": -1}, since=11)
    yield Case("Transpose", ((2, 3, 4),), attrs={"perm": [2, 0, 1]})
    yield Case("Tile", ((2, 3),), (whole(2, 3),))
    yield Case("Expand", ((3, 1),), (whole(2, 1, 6),), since=8)
    yield Case("Shape", ((2, 3, 4),))
    yield Case("Shape", ((2, 3, 4),), attrs={"start": 1, "end": -1}, since=15)
    yield Case("DepthToSpace", ((1, 8, 2, 3),), attrs={"blocksize": 2})
    yield Case("DepthToSpace", ((1, 8, 2, 3),), attrs={"blocksize": 2, "mode": "CRD"}, since=11)
    yield Case("SpaceToDepth", ((1, 2, 4, 6),), attrs={"blocksize": 2})


def _pads() -> Iterator[Case]:
    for mode in ("constant", "reflect", "edge"):
        yield Case("Pad", (IMAGE,), attrs={"pads": [0, 0, 1, 2, 0, 0, 0, 3], "mode": mode}, until=10)
        yield Case("Pad", (IMAGE,), (whole(0, 0, 1, 2, 0, 0, 0, 3),), {"mode": mode}, since=11)
    yield Case("Pad", (IMAGE,), attrs={"pads": [0, 0, 1, 2, 0, 0, 0, 3], "value": 1.5}, until=10)
    yield Case("Pad", (IMAGE,), attrs={"pads": [0, 0, -1, 2, 0, 0, 0, -3], "value": -1.5}, until=10)
    yield Case("Pad", (IMAGE,), (whole(0, 0, 1, 2, 0, 0, 0, 3), np.float32(1.5)), since=11)


def _elementwise() -> Iterator[Case]:
    for limits in ({"min": -0.2}, {"max": 0.6}, {"min": -0.2, "max": 0.6}, {}):
        yield Case("Clip", ((3, 4),), attrs=limits, until=10)
    yield Case("Clip", ((3, 4),), (np.float32(-0.2), np.float32(0.3)), since=11)
    for op in ("Add", "Sub", "Mul", "Div", "PRelu"):
        yield Case(op, ((2, 3, 4), (3, 1)))
    for op in ("Greater", "Less", "Equal"):
        yield Case(op, ((2, 3, 4), (3, 1)), since=11 if op == "Equal" else 7)
    for op in ("Max", "Min", "Sum", "Mean"):
        yield Case(op, ((3, 4), (3, 4), (3, 4)))
        yield Case(op, ((2, 3, 4), (3, 1)), since=8)
    for op in ("Abs", "Ceil", "Exp", "Floor", "LeakyRelu", "Neg", "Relu", "Sigmoid", "Tanh", "Elu", "Selu", "Softplus"):
        yield Case(op, ((3, 4),))
    for op in ("Erf", "IsNaN", "Sign", "Sinh", "NonZero"):
        yield Case(op, ((3, 4),), since=9)
    yield Case("Pow", ((3, 4),), (np.float32(2),))
    yield Case("Mod", ((3, 4),), (np.float32(0.7),), {"fmod": 1}, since=10)
    yield Case("Mod", ((3, 4),), (I64(-3),), since=10, dtype=I64)
    yield Case("IsInf", ((3, 4),), attrs={"detect_negative": 0}, since=10)
    yield Case("Identity", ((3, 4),))
    yield Case("Cast", ((3, 4),), attrs={"to": onnx.TensorProto.INT64})
    yield Case("Cast", ((3, 4),), attrs={"to": onnx.TensorProto.FLOAT}, dtype=I64)
    yield Case("Dropout", ((3, 4),), attrs={"ratio": 0.5}, until=11)
    yield Case("Dropout", ((3, 4),), (np.float32(0.5),), since=12)
    yield Case("CumSum", ((3, 4),), (np.int32(1),), {"exclusive": 1, "reverse": 1}, since=11)


def _layers() -> Iterator[Case]:
    w, b = np.linspace(-1, 1, 36, dtype=np.float32).reshape(2, 2, 3, 3), floats(0.1, -0.2)
    for attrs in ({}, {"pads": [1, 0, 2, 1]}, {"auto_pad": "SAME_LOWER", "strides": [2, 2]}):
        yield Case("Conv", (IMAGE,), (w, b), {"kernel_shape": [3, 3], **attrs})
        yield Case("ConvTranspose", (IMAGE,), (w, b), {"kernel_shape": [3, 3], **attrs})
    for attrs in ({}, {"pads": [1, 0, 0, 1]}, {"strides": [2, 2], "auto_pad": "SAME_UPPER"}):
        yield Case("MaxPool", (IMAGE,), attrs={"kernel_shape": [2, 2], **attrs})
        yield Case("AveragePool", (IMAGE,), attrs={"kernel_shape": [2, 2], **attrs})
        yield Case("LpPool", (IMAGE,), attrs={"kernel_shape": [2, 2], "p": 1, **attrs})
    yield Case("AveragePool", (IMAGE,), attrs={"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1})
    ceil = {"kernel_shape": [2, 3], "strides": [3, 2], "ceil_mode": 1}
    yield Case("MaxPool", (IMAGE,), attrs=ceil, since=10)
    yield Case("AveragePool", (IMAGE,), attrs={**ceil, "pads": [0, 1, 0, 1], "count_include_pad": 1}, since=10)
    yield Case("AveragePool", (IMAGE,), attrs={**ceil, "pads": [0, 1, 0, 1]}, since=10)
    yield Case("MaxPool", (IMAGE,), attrs={"kernel_shape": [2, 2], "strides": [2, 2]}, since=8, outputs=2)
    late = {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1, 1, 1, 0], "ceil_mode": 1}  # a window that starts in pads
    yield Case("MaxPool", (IMAGE,), attrs=late, since=10, outputs=2)
    yield Case("AveragePool", (IMAGE,), attrs=late, since=10)
    yield Case("LpPool", (IMAGE,), attrs=late, since=18)
    norm = (floats(1, 2), floats(0.5, -1), floats(0.1, 0.2), floats(0.3, 2))
    yield Case("BatchNormalization", (IMAGE,), norm, {"epsilon": 1e-3})
    yield Case("BatchNormalization", (IMAGE,), norm, {"momentum": 0.5}, until=8)
    yield Case("InstanceNormalization", (IMAGE,), norm[:2])
    yield Case("LRN", (IMAGE,), attrs={"size": 3})
    yield Case("MeanVarianceNormalization", (IMAGE,), since=9)
    square = np.linspace(-1, 1, 20, dtype=np.float32).reshape(5, 4)
    yield Case("Gemm", ((2, 4),), (square, floats(1, 2, 3, 4, 5)), {"transB": 1, "alpha": 0.7, "beta": 0.3})
    yield Case("Gemm", ((2, 4),), (square, np.ones((2, 1), np.float32)), {"transB": 1})
    yield Case("Gemm", ((2, 4),), (square,), {"transB": 1}, since=11)
    yield Case("MatMul", ((2, 3, 4), (4, 5)))
    for op, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1)):
        random = np.random.default_rng(3)
        weights = tuple(random.normal(size=(1, gates * 3, width)).astype(np.float32) for width in (4, 3))
        yield Case(op, ((5, 2, 4),), weights, {"hidden_size": 3}, outputs=2)
    yield Case("RoiAlign", ((1, 2, 8, 8),), (np.array([[0, 1, 5, 7]], np.float32), whole(0)), {"spatial_scale": 0.7}, since=10)
    for axis, attrs in ((1, {}), (2, {"onesided": 1})):
        yield Case("DFT", ((2, 8, 6, 1),), attrs={"axis": axis, **attrs}, since=17, until=19)
    grid = np.linspace(-1.1, 1.1, 18, dtype=np.float32).reshape(1, 3, 3, 2)
    for mode in ("bilinear", "nearest", "bicubic"):
        yield Case("GridSample", (IMAGE,), (grid,), {"mode": mode}, since=16, until=19)
    yield Case("GlobalAveragePool", (IMAGE,))
    yield Case("LpNormalization", ((3, 4),), attrs={"axis": 1, "p": 1})


def _picking() -> Iterator[Case]:
    yield Case("TopK", ((5, 6),), attrs={"k": 3, "axis": 0}, until=9, outputs=2)
    yield Case("TopK", ((5, 6),), (whole(2),), {"axis": 1}, since=10, outputs=2)
    yield Case("TopK", ((5, 6),), (whole(2),), {"axis": 0, "largest": 0}, since=11, outputs=2)
    yield Case("Gather", ((5, 4),), (np.array([[1, 2], [0, 4]]),), {"axis": 0})
    yield Case("Gather", ((5, 4),), (np.array([[-1, 2], [0, -4]]),), {"axis": 1}, since=11)
    yield Case("GatherElements", ((5, 4),), (np.array([[1, 2], [0, 3]]),), {"axis": 1}, since=11)
    yield Case("GatherND", ((5, 4, 2),), (np.array([[1, 2], [0, 3]]),), since=11)
    scattered = (np.array([[1, 0], [2, 1]]), np.array([[9, 8], [7, 6]], np.float32))
    yield Case("Scatter", ((5, 4),), scattered, {"axis": 1}, since=9, until=10)
    yield Case("ScatterElements", ((5, 4),), scattered, {"axis": -1}, since=11)
    yield Case("ScatterND", ((5, 4),), (np.array([[1, 0], [2, 1]]), floats(9, 8)), since=11)
    yield Case("OneHot", (), (whole(1, 0, -1), whole(4), floats(0.5, 2)), {"axis": 0}, since=11)
    yield Case("Compress", ((5, 4),), (np.array([True, False, True]),), {"axis": 0}, since=9)
    yield Case("QuantizeLinear", ((3, 4),), (np.float32(0.1), np.uint8(128)), since=10)
    yield Case("QuantizeLinear", ((3, 4),), (floats(0.1, 0.2, 0.3, 0.4), np.zeros(4, np.int8)), {"axis": 1}, since=13)
    yield Case("Upsample", (IMAGE,), (floats(1, 1, 2, 2),), since=9, until=9)


CASES = [*_softmaxes(), *_resizes(), *_reductions(), *_shapes(), *_pads(), *_elementwise(), *_layers(), *_picking()]


def versions(case: Case) -> list[int]:
    """Of each definition that the operator had, the oldest opset."""
    since = {onnx.defs.get_schema(case.op, version).since_version for version in range(case.since, case.until + 1)}
    return sorted({max(case.since, version) for version in since})


def model(case: Case, version: int) -> tuple[onnx.ModelProto, list[np.ndarray]]:
    random = np.random.default_rng(0)
    values = [np.asarray(random.normal(size=shape) * 2, case.dtype) for shape in case.shapes]
    values = [np.abs(one) for one in values] if case.op.startswith("ReduceLog") else values
    given = [tensor(f"x{place}", value) for place, value in enumerate(values)]
    constants = [numpy_helper.from_array(np.asarray(one), f"c{place}") for place, one in enumerate(case.constants)]
    names = [value.name for value in (*given, *constants)]
    outputs = [f"y{place}" for place in range(case.outputs)]
    node = helper.make_node(case.op, names, outputs, name="node", **case.attrs)
    return proto([node], given, outputs, constants, version), values


def tensor(name: str, value: np.ndarray) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)


def proto(nodes: list, given: list, outputs: list[str], constants: list, version: int) -> onnx.ModelProto:
    body = helper.make_graph(nodes, "g", given, [onnx.ValueInfoProto(name=one) for one in outputs], constants)
    whole = helper.make_model(body, opset_imports=[helper.make_opsetid("", version)], ir_version=8)
    return onnx.shape_inference.infer_shapes(whole)


def differs(source: onnx.ModelProto, values: list[np.ndarray]) -> str:
    """Where what is loaded gives, or states, something else than the file gives; "" if it does not."""
    graph = load(source)
    assert graph.opsets[""] == PINNED
    for name, found, wanted in zip(graph.outputs, run(to_model(graph), values), run(source, values), strict=True):
        if found.dtype != wanted.dtype or found.shape != wanted.shape:
            return f"{found.dtype}{found.shape}, not {wanted.dtype}{wanted.shape}"
        if graph.tensor(name).static and graph.tensor(name).dims != wanted.shape:
            return f"states {graph.tensor(name)}, not {wanted.shape}"
        if not np.allclose(found, wanted, rtol=1e-5, atol=1e-6, equal_nan=True):
            return f"{np.abs(found - wanted).max()} apart"
    return ""


@pytest.mark.parametrize("op", sorted({case.op for case in CASES}))
def test_every_definition_of_an_operator_keeps_its_meaning(op: str) -> None:
    tried = [(case, version) for case in CASES if case.op == op for version in versions(case)]
    found = {f"{case} of opset {version}": differs(*model(case, version)) for case, version in tried}
    assert not {case: why for case, why in found.items() if why}


@pytest.mark.parametrize(
    "case", [Case("Hardmax", ((2, 3, 4),)), Case("Upsample", (IMAGE,), (floats(1, 1, 2, 1.5),), since=9)], ids=str
)
def test_so_does_one_in_a_branch(case: Case) -> None:
    (value,), constants = model(case, 9)[1], [numpy_helper.from_array(one, "c") for one in case.constants]
    names = ["x", *(one.name for one in constants)]
    branches = {}
    for branch, last in (("then_branch", "Identity"), ("else_branch", "Neg")):
        nodes = [helper.make_node(case.op, names, [f"{branch}_t"]), helper.make_node(last, [f"{branch}_t"], [branch])]
        branches[branch] = helper.make_graph(nodes, branch, [], [helper.make_tensor_value_info(branch, 1, None)], constants)
    condition = np.array(False)
    given = [tensor("x", value), tensor("condition", condition)]
    source = proto([helper.make_node("If", ["condition"], ["y"], **branches)], given, ["y"], [], 9)
    assert differs(source, [value, condition]) == ""


def test_nearest_by_computed_scales_is_refused_rather_than_guessed() -> None:
    given = [tensor("x", np.zeros(IMAGE, np.float32)), tensor("scales", floats(1, 1, 2, 2))]
    with pytest.raises(UnsupportedError, match="computed scales"):
        load(proto([helper.make_node("Resize", ["x", "scales"], ["y"])], given, ["y"], [], 10))


def test_what_reads_such_a_size_reads_that_of_onnx_runtime() -> None:
    nodes = [
        helper.make_node("Resize", ["x", "", "scales"], ["large"]),
        helper.make_node("Resize", ["large", "", "scales"], ["larger"]),
        helper.make_node("Shape", ["larger"], ["y"]),
    ]
    value, scales = np.ones((1, 1, 10, 10), np.float32), numpy_helper.from_array(floats(1, 1, 1.3, 0.7), "scales")
    assert differs(proto(nodes, [tensor("x", value)], ["larger", "y"], [scales], 17), [value]) == ""
