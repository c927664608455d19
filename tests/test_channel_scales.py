"""Factors per channel moved between activations and weights: the model computes the same, quantized it computes better."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import pytest

from hwopt.analysis.rows import LIMIT, activation_rows
from hwopt.backends.ort import observing, run
from hwopt.errors import PassError
from hwopt.ir import Graph, Node, TensorType, frozen, infer_types
from hwopt.pipeline import Context, parse
from hwopt.plugins import find_passes
from hwopt.samples import Samples
from passes._channel_scales import data_axis, givers

ROWS = 64


def make(nodes: list[Node], shape: tuple[int, ...], outputs: tuple[str, ...] = ("y",), **params: np.ndarray) -> Graph:
    held = {name: frozen(np.ascontiguousarray(array, np.float32)) for name, array in params.items()}
    types = MappingProxyType({"x": TensorType("float32", shape)})
    return infer_types(Graph("g", ("x",), outputs, tuple(nodes), types, MappingProxyType(held), {"": 21}))


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    """Channels of very different size, on both axes."""
    generator = np.random.default_rng((seed, *shape))
    array = generator.standard_normal(shape)
    for axis in (0, 1):
        factors = np.exp(generator.uniform(-2, 2, shape[axis]))
        array = array * factors.reshape([-1 if one == axis else 1 for one in range(len(shape))])
    return (array / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def convolutions(activation: str, depthwise: bool = False) -> Graph:
    middle = {"w2": weights(16, 1, 3, 3)} if depthwise else {"w2": weights(12, 16, 3, 3)}
    attrs = MappingProxyType({"group": 16 if depthwise else 1, "pads": (1, 1, 1, 1)})
    clip = ("", "six") if activation == "Clip" else ()
    nodes = [
        Node("Conv", ("x", "w1", "b1"), ("a",), "one"), Node(activation, ("a", *clip), ("r",), "act"),
        Node("Conv", ("r", "w2"), ("c",), "two", attrs), Node("Relu", ("c",), ("s",), "act2"),
        Node("GlobalAveragePool", ("s",), ("p",), "pool"), Node("Conv", ("p", "w3"), ("y",), "three"),
    ]  # fmt: skip
    constants = {"w1": weights(16, 3, 3, 3), "b1": weights(1, 16)[0], "w3": weights(5, len(middle["w2"]), 1, 1), **middle}
    return make(nodes, (1, 3, 8, 8), **constants, **({"six": np.array(6.0)} if clip else {}))


def norm_and_products(read_elsewhere: bool = False) -> Graph:
    """LayerNormalization -> q and k -> sum; its scale makes some channels large, as in transformers."""
    scale = np.where(np.arange(32) % 11 == 3, 40.0, 0.5)
    nodes = [
        Node("LayerNormalization", ("x", "g", "b"), ("n",), "norm"),
        Node("MatMul", ("n", "q"), ("nq",), "q"), Node("MatMul", ("n", "k"), ("nk",), "k"),
        Node("Add", ("nq", "nk"), ("y",), "sum"),
    ]  # fmt: skip
    generator = np.random.default_rng(3)
    q, k = generator.standard_normal((2, 32, 24)) / scale[:, None] ** 0.8
    return make(nodes, (ROWS, 32), ("y", "n") if read_elsewhere else ("y",), g=scale, b=generator.standard_normal(32), q=q, k=k)


def feeds(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal(graph.tensor("x").dims, np.float32)}


def applied(text: str, graph: Graph, ctx: Context | None = None) -> Graph:
    data = np.concatenate([feeds(graph, seed)["x"] for seed in range(1, 9)])
    return parse(text, find_passes()).run(graph, ctx or Context(calibration=Samples({"x": data})))


def error(graph: Graph, after: Graph) -> float:
    want, found = (run(one, feeds(graph, 99))["y"] for one in (graph, after))
    return float(np.square(want - found).sum() / np.square(want).sum())


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu", "Identity"])
def test_equalized_chains_compute_the_same_with_equal_ranges(activation: str, depthwise: bool) -> None:
    graph = convolutions(activation, depthwise)
    after = applied("equalize", graph)
    np.testing.assert_allclose(run(after, feeds(graph))["y"], run(graph, feeds(graph))["y"], rtol=2e-4, atol=2e-5)
    first = np.abs(after.params[after.node["one"].inputs[1]].reshape(16, -1)).max(1)
    second = after.params[after.node["two"].inputs[1]]
    second = np.abs(np.moveaxis(second, 0 if depthwise else 1, 0).reshape(16, -1)).max(1)
    np.testing.assert_allclose(first, second, rtol=5e-3)


def test_one_scale_for_each_activation_is_enough_for_equalized_channels() -> None:
    sizes = np.geomspace(1, 300, 16)
    nodes = [
        Node("Conv", ("x", "a"), ("h",), "one"),
        Node("Relu", ("h",), ("r",), "act"),
        Node("Conv", ("r", "b"), ("y",), "two"),
    ]
    first, second = np.random.default_rng(1).standard_normal((2, 16, 16))
    constants = {"a": (first * sizes[:, None]).reshape(16, 16, 1, 1), "b": (second / sizes).reshape(16, 16, 1, 1)}
    graph = make(nodes, (1, 16, 8, 8), **constants)
    assert error(graph, applied("quantize", applied("equalize", graph))) < 0.1 * error(graph, applied("quantize", graph))


def test_limits_other_readers_and_inputs_end_a_chain_with_the_reason() -> None:
    ctx = Context()
    assert applied("equalize{site=two}", convolutions("Clip"), ctx) is not None
    assert [one.reason for one in ctx.refused] == ["act is a Clip"]
    ctx = Context()
    graph = norm_and_products()
    assert applied("equalize", graph, ctx) is graph
    assert {one.reason for one in ctx.refused} == {"n is read elsewhere"}


@pytest.mark.parametrize("text", ["smooth", "smooth{strength=0.5}", "smooth{site=q}"])
@pytest.mark.parametrize("read_elsewhere", [False, True])
def test_smoothed_models_compute_the_same_and_better_in_eight_bits(text: str, read_elsewhere: bool) -> None:
    graph = norm_and_products(read_elsewhere)
    after = applied(text, graph)
    np.testing.assert_allclose(run(after, feeds(graph))["y"], run(graph, feeds(graph))["y"], rtol=1e-4, atol=1e-4)
    inserted = [node for node in after.nodes if node.op == "Mul"]
    assert len(inserted) == (read_elsewhere or "site" in text)  # else the norm takes the factors
    if "site" not in text:
        assert error(graph, applied("quantize", after)) < 0.5 * error(graph, applied("quantize", graph))


def test_nothing_is_inserted_where_that_is_not_wanted() -> None:
    graph = norm_and_products(read_elsewhere=True)
    assert applied("smooth{insert=false}", graph) is graph


def test_activations_of_one_size_stay_as_they_are() -> None:
    generator = np.random.default_rng(5)
    nodes = [Node("Tanh", ("x",), ("t",), "tanh"), Node("MatMul", ("t", "w"), ("y",), "fc")]
    graph = make(nodes, (ROWS, 32), w=generator.standard_normal((32, 24)))
    assert applied("smooth", graph) is graph


@pytest.mark.parametrize("text", ["smooth", "equalize"])
def test_what_is_done_is_not_done_again(text: str) -> None:
    graph = norm_and_products() if text == "smooth" else convolutions("Relu")
    once, ctx = applied(text, graph), Context(calibration=Samples({"x": feeds(graph)["x"]}))
    assert once is not graph
    assert applied(text, once, ctx) is once
    assert any("already" in one.reason for one in ctx.refused)


@pytest.mark.parametrize("group", ["", ",group=16"])
@pytest.mark.parametrize("read_elsewhere", [False, True])
def test_activation_aware_scales_lower_the_error_of_four_bits(read_elsewhere: bool, group: str) -> None:
    graph = norm_and_products(read_elsewhere)
    edit = graph.edit()
    for name in ("q", "k"):  # weights of one size: the strong inputs are what matters
        edit.set_param(name, np.random.default_rng(len(name)).standard_normal((32, 24)).astype(np.float32))
    graph = edit.finish("test")
    nearest, aware = (applied(f"quantize-weights{{bits=4{group}{more}}}", graph) for more in ("", ",method=awq"))
    assert error(graph, aware) < 0.8 * error(graph, nearest)
    assert sum(node.op == "Mul" for node in aware.nodes) == read_elsewhere


def test_constants_that_are_added_are_scaled_with_what_they_are_added_to() -> None:
    nodes = [
        Node("MatMul", ("x", "w"), ("a",), "fc"), Node("Add", ("a", "b"), ("c",), "bias"),
        Node("Mul", ("c", "two"), ("d",), "double"), Node("MatMul", ("d", "v"), ("y",), "out"),
    ]  # fmt: skip
    graph = make(nodes, (4, 8), w=weights(8, 6), b=weights(1, 6), v=weights(6, 3), two=np.array(2.0))
    assert givers(graph, "d", data_axis(graph.node["out"]), 6, ("out",)) == [("fc", 1, -1), ("bias", 1, 1)]
    after = applied("equalize", graph)
    np.testing.assert_allclose(run(after, feeds(graph))["y"], run(graph, feeds(graph))["y"], rtol=1e-4, atol=1e-5)
    assert after is not graph


def test_rows_are_few_and_ranges_are_of_everything() -> None:
    graph = norm_and_products()
    data = np.random.default_rng(8).standard_normal((ROWS * 20, 32)).astype(np.float32)
    found = activation_rows(graph, Samples({"x": data}), [("n", -1), ("x", -1)])
    values = np.concatenate([run(observing(graph, ["n"]), {"x": data[i : i + ROWS]})["n"] for i in range(0, len(data), ROWS)])
    assert found["n"].data.shape == (LIMIT, 32)
    np.testing.assert_array_equal(found["n"].high, values.max(0))
    np.testing.assert_array_equal(found["x"].low, data.min(0))
    assert set(map(bytes, found["n"].data)) <= set(map(bytes, values))


def test_ranges_need_calibration_data() -> None:
    with pytest.raises(PassError, match="--calibrate"):
        parse("smooth", find_passes()).run(norm_and_products(), Context())
