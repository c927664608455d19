"""calibrator=auto takes the grid that disturbs the outputs of a value's readers least; dynamic=true finds one for every row."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import pytest

from hwopt.analysis.ranges import CALIBRATORS
from hwopt.analysis.regions import regions
from hwopt.backends.ort import run
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.run import run_program
from hwopt.errors import PassError
from hwopt.ir import Graph, Node, TensorType, frozen, infer_types
from hwopt.pipeline import Context, parse
from hwopt.plugins import find_passes, find_target
from hwopt.samples import Samples

HOST = find_target("host")


def graph_of(nodes: tuple[Node, ...], shape: tuple[int, ...], opset: int = 21, **params: np.ndarray) -> Graph:
    held = MappingProxyType({name: frozen(np.asarray(array)) for name, array in params.items()})
    return infer_types(
        Graph("g", ("x",), ("y",), nodes, MappingProxyType({"x": TensorType("float32", shape)}), held, {"": opset})
    )


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def product(large: float = 1.0) -> Graph:
    """x @ w, the rows of w `large` for the half of the channels with the tails."""
    weight = normal(16, 8)
    weight[:8] *= large
    return graph_of((Node("MatMul", ("x", "w"), ("y",), "fc"),), (1, 12, 16), w=weight)


def data(quiet: float) -> np.ndarray:
    """Tails in the first half of the channels, `quiet` normal numbers in the second."""
    tails = np.random.default_rng(3).standard_t(2, (64, 12, 8))  # few very large values: where to clip them matters
    return np.concatenate([tails, quiet * normal(64, 12, 8)], axis=-1).astype(np.float32)


def quantized(graph: Graph, options: str, array: np.ndarray | None = None, opset: int = 21) -> Graph:
    calibration = None if array is None else Samples({"x": array})
    return parse(f"quantize{{{options}}}", find_passes()).run(graph, Context(target=HOST, calibration=calibration))


def grid(after: Graph) -> tuple[float, int]:
    node = next(node for node in after.nodes if node.op == "QuantizeLinear")
    return float(after.params[node.inputs[1]]), int(after.params[node.inputs[2]])


def disturbed(graph: Graph, array: np.ndarray, found: tuple[float, int]) -> float:
    """What quantizing x with this grid does to x @ w."""
    scale, zero_point = found
    steps = np.clip(np.rint(array / np.float32(scale)) + zero_point, 0, 255)
    error = array - (steps - zero_point) * np.float32(scale)
    return float(np.square(error @ graph.params["w"]).sum())


@pytest.mark.parametrize("large", [0.05, 1.0, 20.0])
def test_auto_takes_the_calibrator_with_the_least_error_of_the_output(large: float) -> None:
    graph, array = product(large), data(0.3)
    errors = {name: disturbed(graph, array[:16], grid(quantized(graph, f"calibrator={name}", array))) for name in CALIBRATORS}
    found = disturbed(graph, array[:16], grid(quantized(graph, "calibrator=auto", array)))
    assert found == pytest.approx(min(errors.values()), rel=1e-4)


def test_which_calibrator_that_is_depends_on_who_reads_the_value() -> None:
    array = data(0.3)
    quiet, loud = (grid(quantized(product(large), "calibrator=auto", array))[0] for large in (0.01, 20.0))
    assert quiet < 0.5 * loud  # clips the tails where they hardly count


def test_values_that_only_sums_read_and_both_sides_of_attention_get_a_grid_too() -> None:
    nodes = (
        Node("MatMul", ("x", "w"), ("a",), "one"), Node("Add", ("a", "x"), ("b",), "add"), Node("Relu", ("b",), ("c",), "relu"),
        Node("Transpose", ("c",), ("t",), "turn", MappingProxyType({"perm": (0, 2, 1)})),
        Node("MatMul", ("b", "t"), ("y",), "att"),
    )  # fmt: skip
    graph = graph_of(nodes, (1, 12, 16), w=normal(16, 16))
    array = data(1.0)
    after = quantized(graph, "calibrator=auto,site=one+att", array)
    want, got = (run(one, {"x": array[:1]})["y"] for one in (graph, after))
    assert np.square(got - want).sum() < 0.02 * np.square(want).sum()


def network(opset: int = 21) -> Graph:
    """MatMul + bias -> Relu -> Gemm with alpha, transposed: everything that a product may have."""
    random = np.random.default_rng(1)
    params = {
        "w1": random.standard_normal((64, 96)) / 8, "b1": random.standard_normal(96), "w2": random.standard_normal((40, 96)) / 9,
        "b2": random.standard_normal(40),
    }  # fmt: skip
    nodes = (
        Node("MatMul", ("x", "w1"), ("a",), "one"), Node("Add", ("a", "b1"), ("b",), "add"), Node("Relu", ("b",), ("c",), "act"),
        Node("Reshape", ("c", "flat"), ("d",), "flatten"),
        Node("Gemm", ("d", "w2", "b2"), ("y",), "two", MappingProxyType({"transB": 1, "alpha": 2.0})),
    )  # fmt: skip
    held = {name: array.astype(np.float32) for name, array in params.items()}
    return graph_of(nodes, (2, 10, 64), opset, flat=np.array([20, 96]), **held)


def rows(seed: int) -> dict[str, np.ndarray]:
    """Rows of very different sizes, and one of nothing but zeros."""
    random = np.random.default_rng(seed)
    found = random.standard_normal((2, 10, 64)) * np.exp(3 * random.standard_normal((2, 10, 1)))
    found[0, 3] = 0
    return {"x": found.astype(np.float32)}


@pytest.mark.parametrize("opset", [13, 21])
def test_every_row_has_its_own_step_and_kernels_multiply_integers(opset: int) -> None:
    graph, feeds = network(opset), rows(2)
    after = quantized(graph, "dynamic=true")
    want, got = (run(one, feeds)["y"] for one in (graph, after))
    assert (np.abs(got - want).max(-1) < 0.03 * np.abs(want).max(-1)).all()  # row by row: small rows are as precise as large ones
    assert [one.integer for one in regions(after) if one.kind == "matmul"] == [True, True]
    found = run_program(compile_program(after, HOST), feeds)["y"]
    np.testing.assert_allclose(found, got, atol=2e-5 * float(np.abs(want).max()))


def test_rows_read_by_several_layers_are_quantized_once() -> None:
    nodes = (
        Node("MatMul", ("x", "w"), ("a",), "one"), Node("MatMul", ("x", "w2"), ("b",), "two"),
        Node("Add", ("a", "b"), ("y",), "sum"),
    )  # fmt: skip
    weights = {name: normal(16, 16) for name in ("w", "w2")}
    after = quantized(graph_of(nodes, (1, 12, 16), **weights), "dynamic=true")
    assert [node.op for node in after.nodes].count("QuantizeLinear") == 1


def test_what_has_no_dynamic_form_is_refused() -> None:
    weight = normal(8, 16, 3)
    graph, ctx = graph_of((Node("Conv", ("x", "w"), ("y",), "c"),), (1, 16, 12), w=weight), Context(target=HOST)
    assert parse("quantize{dynamic=true}", find_passes()).run(graph, ctx) is graph
    assert [(one.site, "products" in one.reason) for one in ctx.refused] == [("c", True)]
    with pytest.raises(PassError, match="int8 weights"):
        quantized(network(), "dynamic=true,weights=int4")
