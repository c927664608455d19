"""Constant folding keeps the outputs and knows what not to store."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import onnx
from pytest import MonkeyPatch

from hwopt.analysis.fold import fold_constants
from hwopt.backends import ort
from hwopt.ir import Graph, Node, TensorType, frozen, infer_types, verify


def graph_of(nodes: list[Node], params: dict[str, np.ndarray], outputs: tuple[str, ...] = ("y",)) -> Graph:
    held = MappingProxyType({name: frozen(np.asarray(array)) for name, array in params.items()})
    types = MappingProxyType({"x": TensorType("float32", (2, 6))})
    return infer_types(Graph("g", ("x",), outputs, tuple(nodes), types, held, {"": 21}))


def linked(links: int) -> Graph:
    """Reshapes to [2, -1] whose sizes are computed from the value before, which inference cannot follow further than one."""
    nodes, value = [], "x"
    for index in range(links):
        nodes += [
            node("Shape", value, f"s{index}"),
            node("ReduceProd", f"s{index}", f"p{index}", keepdims=1),
            node("Div", f"p{index} six", f"d{index}"),
            node("Concat", f"d{index} minus", f"t{index}", axis=0),
            node("Reshape", f"{value} t{index}", f"r{index}"),
        ]
        value = f"r{index}"
    return graph_of([*nodes, node("Relu", value, "y")], {"six": np.array([6]), "minus": np.array([-1])})


def node(op: str, inputs: str, output: str, **attrs: object) -> Node:
    return Node(op, tuple(inputs.split()), (output,), f"{op}_{output}", attrs)


def ops(graph: Graph) -> list[str]:
    return [one.op for one in graph.nodes]


def test_a_shape_chain_becomes_a_parameter() -> None:
    chain = [
        node("Shape", "x", "s"),
        node("Gather", "s zero", "rows"),
        node("Concat", "rows minus", "target", axis=0),
        node("Reshape", "x target", "y"),
    ]
    graph = graph_of(chain, {"zero": np.array([0]), "minus": np.array([-1])})
    after = fold_constants(graph)
    assert ops(after) == ["Reshape"]
    assert after.constant(after.nodes[0].inputs[1]).tolist() == [2, -1]
    verify(after)


def test_a_long_chain_of_shapes_folds_without_inferring_the_whole_graph_for_every_link(monkeypatch: MonkeyPatch) -> None:
    graph, inferred = linked(50), []
    infer = onnx.shape_inference.infer_shapes

    def counted(model: onnx.ModelProto, **options: bool) -> onnx.ModelProto:
        inferred.append(len(model.graph.node))
        return infer(model, **options)

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", counted)
    after = fold_constants(graph)
    assert ops(after) == ["Reshape"] * 50 + ["Relu"]
    assert after.tensor("r49").dims == (2, 6)
    assert sum(inferred) < 8 * len(graph.nodes)


def test_shape_respects_start_and_end() -> None:
    graph = graph_of([node("Shape", "x", "y", start=-1, end=9)], {})
    after = fold_constants(graph)
    assert ort.run(after, {"x": np.zeros((2, 6), np.float32)})["y"].tolist() == [6]


def test_nothing_to_fold_returns_the_same_graph() -> None:
    graph = graph_of([node("Relu", "x", "y")], {})
    assert fold_constants(graph) is graph


def test_a_large_constant_from_a_small_one_is_not_stored_but_what_it_reads_is() -> None:
    chain = [node("Add", "n n", "size"), node("ConstantOfShape", "size", "big"), node("Add", "x big", "y")]
    graph = graph_of(chain, {"n": np.array([300_000, 1, 3])})
    after = fold_constants(graph)
    assert ops(after) == ["ConstantOfShape", "Add"]
    assert after.constant(after.nodes[0].inputs[0]).tolist() == [600_000, 2, 6]


def test_a_large_intermediate_is_computed_where_its_result_is_small() -> None:
    chain = [node("ConstantOfShape", "n", "big"), node("ReduceSum", "big", "sum", keepdims=0), node("Add", "x sum", "y")]
    assert ops(fold_constants(graph_of(chain, {"n": np.array([600_000])}))) == ["Add"]


def test_a_large_weight_is_stored_however_it_is_made() -> None:
    chain = [node("ConstantOfShape", "n", "big"), node("MatMul", "x big", "y")]
    assert ops(fold_constants(graph_of(chain, {"n": np.array([6, 100_000])}))) == ["MatMul"]


def test_an_absurd_constant_is_not_even_computed() -> None:
    chain = [node("ConstantOfShape", "n", "big"), node("ReduceSum", "big", "sum", keepdims=0), node("Add", "x sum", "y")]
    after = fold_constants(graph_of(chain, {"n": np.array([1 << 40])}))
    assert ops(after) == ["ConstantOfShape", "ReduceSum", "Add"]


def test_a_large_weight_may_change_its_form() -> None:
    chain = [node("Transpose", "w", "t"), node("MatMul", "x t", "y")]
    weight = np.ones((200_000, 6), np.float32)
    assert ops(fold_constants(graph_of(chain, {"w": weight}))) == ["MatMul"]


def test_compressed_weights_stay_compressed() -> None:
    rng = np.random.default_rng(0)
    chain = [
        node("DequantizeLinear", "q scale", "w1"),
        node("Cast", "narrow", "wide", to=7),
        node("Gather", "book wide", "w2"),
        node("Gather", "book index", "w3"),
        node("Sum", "w1 w2 w3", "w"),
        node("MatMul", "x w", "y"),
    ]
    params = {
        "q": rng.integers(-9, 9, (6, 100)).astype(np.int8),
        "scale": np.float32(0.5),
        "book": np.arange(16, dtype=np.float32),
        "narrow": rng.integers(0, 16, (6, 100)).astype(np.uint8),
        "index": rng.integers(0, 16, (6, 100)),
    }
    graph = graph_of(chain, params)
    assert fold_constants(graph) is graph


def test_random_numbers_are_not_constants() -> None:
    chain = [node("RandomNormal", "", "r", shape=(2, 6)), node("Add", "x r", "y")]
    graph = graph_of(chain, {})
    assert fold_constants(graph) is graph


def test_a_node_that_cannot_be_computed_stays_and_the_others_fold() -> None:
    chain = [node("Reshape", "w bad", "r"), node("Add", "one one", "two"), node("Add", "x two", "z"), node("MatMul", "z r", "y")]
    graph = graph_of(chain, {"w": np.ones(12, np.float32), "bad": np.array([5, 7]), "one": np.float32(1)})
    assert ops(fold_constants(graph)) == ["Reshape", "Add", "MatMul"]


def test_strings_fold_too() -> None:
    chain = [node("Concat", "a a", "two", axis=0), node("Identity", "two", "y"), node("Relu", "x", "z")]
    after = fold_constants(graph_of(chain, {"a": np.array(["b"], object)}, ("y", "z")))
    assert ort.run(after, {"x": np.zeros((2, 6), np.float32)})["y"].tolist() == ["b", "b"]
    assert "Concat" not in ops(after)


def test_bfloat16_is_left_alone() -> None:
    chain = [node("Cast", "w", "half", to=16), node("Cast", "half", "back", to=1), node("Add", "x back", "y")]
    graph = graph_of(chain, {"w": np.float32([1.001])})
    assert fold_constants(graph) is graph
