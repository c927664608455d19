"""quantize{weights=int4}: half the bytes, scales with the least error, computed by the integer kernels of 8 bits."""

from __future__ import annotations

from types import MappingProxyType

import ml_dtypes
import numpy as np
import pytest

from hwopt.analysis.regions import integer_operands
from hwopt.analysis.size import weight_bytes
from hwopt.backends.ort import run
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.run import run_program
from hwopt.errors import PassError
from hwopt.ir import Graph, Node, TensorType, frozen, infer_types
from hwopt.pipeline import Context, parse
from hwopt.plugins import find_passes, find_target
from hwopt.samples import Samples

HOST = find_target("host")


def network(opset: int = 21) -> Graph:
    """Conv -> Relu -> depthwise Conv -> Relu -> mean -> Gemm."""
    random = np.random.default_rng(0)
    params = {
        "w1": random.standard_normal((32, 3, 3, 3)) / 5, "b1": random.standard_normal(32),
        "w2": random.standard_normal((32, 1, 3, 3)) / 3,
        "w3": random.standard_normal((64, 32)) / 6, "b3": random.standard_normal(64),
    }  # fmt: skip
    depthwise = MappingProxyType({"group": 32, "pads": (1, 1, 1, 1)})
    nodes = (
        Node("Conv", ("x", "w1", "b1"), ("a",), "one"), Node("Relu", ("a",), ("r",), "act"),
        Node("Conv", ("r", "w2"), ("c",), "two", depthwise), Node("Relu", ("c",), ("s",), "act2"),
        Node("GlobalAveragePool", ("s",), ("p",), "pool"), Node("Flatten", ("p",), ("f",), "flat"),
        Node("Gemm", ("f", "w3", "b3"), ("y",), "three", MappingProxyType({"transB": 1})),
    )  # fmt: skip
    held = MappingProxyType({name: frozen(array.astype(np.float32)) for name, array in params.items()})
    types = MappingProxyType({"x": TensorType("float32", (1, 3, 12, 12))})
    return infer_types(Graph("net", ("x",), ("y",), nodes, types, held, {"": opset}))


def data(seed: int, count: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 12, 12)).astype(np.float32)


def quantized(graph: Graph, options: str) -> Graph:
    ctx = Context(target=HOST, calibration=Samples({"x": data(1, 16)}))
    return parse(f"quantize{{{options}}}", find_passes()).run(graph, ctx)


def test_weights_take_half_of_the_bytes() -> None:
    eight, four = (quantized(network(), options) for options in ("weights=int8", "weights=int4"))
    kinds = {array.dtype for array in four.params.values()}
    assert np.dtype(ml_dtypes.int4) in kinds
    saved = sum(array.size for array in eight.params.values() if array.dtype == np.int8 and array.ndim > 1) // 2
    zero_points = 32 + 32 + 64
    assert weight_bytes(eight) - weight_bytes(four) == saved + zero_points // 2


def test_integer_kernels_compute_what_onnx_runtime_does() -> None:
    graph = quantized(network(), "weights=int4")
    assert all(integer_operands(graph, graph.node[name]) is not None for name in ("one", "two", "three"))
    for seed in range(3, 8):
        want = run(graph, {"x": data(seed)})["y"]
        found = run_program(compile_program(graph, HOST), {"x": data(seed)})["y"]
        step = float(np.diff(np.unique(want)).min())
        assert np.abs(found - want).max() <= 1.01 * step


def test_scales_are_those_with_the_least_squared_error() -> None:
    graph, after = network(), quantized(network(), "weights=int4")
    for name in ("w1", "w2", "w3"):
        stored = after.params[f"{name}_int4"].astype(np.float32)
        shape = (-1, *(1,) * (stored.ndim - 1))
        decoded = stored * after.params[f"{name}_scale"].reshape(shape)
        weight = graph.params[name]
        plain = np.abs(weight.reshape(len(weight), -1)).max(1).reshape(shape) / 7
        largest = np.rint(weight / plain) * plain
        axes = tuple(range(1, weight.ndim))
        assert (np.square(decoded - weight).sum(axes) <= np.square(largest - weight).sum(axes) * 1.0001).all()
        assert np.square(decoded - weight).sum() < 0.97 * np.square(largest - weight).sum()
        assert stored.min() >= -7


def test_bias_correction_takes_back_the_mean_error_of_coarse_weights() -> None:
    graph = network()
    feeds = [{"x": data(seed)} for seed in range(20, 60)]
    want = np.concatenate([run(graph, one)["y"] for one in feeds])
    means = [
        np.square(np.mean(np.concatenate([run(after, one)["y"] for one in feeds]) - want, axis=0)).sum()
        for after in (quantized(graph, "weights=int4"), quantized(graph, "weights=int4,correct_bias=false"))
    ]
    assert means[0] < 0.3 * means[1]


def test_a_channel_of_zeros_and_old_opsets() -> None:
    edit = network().edit()
    weight = network().params["w1"].copy()
    weight[3] = 0
    edit.set_param("w1", weight)
    graph = edit.finish("test")
    after = quantized(graph, "weights=int4")
    assert not after.params["w1_int4"][3].astype(np.int8).any()
    assert np.isfinite(run(after, {"x": data(2)})["y"]).all()
    with pytest.raises(PassError, match="opset 21"):
        quantized(network(20), "weights=int4")
    with pytest.raises(PassError, match="no weights"):
        quantized(network(), "weights=int5")
