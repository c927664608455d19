"""The IR: edits, verification, printing and digests."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import pytest

from hwopt.errors import VerifyError
from hwopt.ir import Graph, Node, TensorType, diff, frozen, infer_types, to_text, verify


def tiny() -> Graph:
    """relu(x @ w + b) -> y"""
    params = {"w": frozen(np.eye(4, 3, dtype=np.float32)), "b": frozen(np.ones(3, np.float32))}
    nodes = (
        Node("Gemm", ("x", "w", "b"), ("h",), "fc"),
        Node("Identity", ("h",), ("i",), "same"),
        Node("Relu", ("i",), ("y",), "relu"),
    )
    types = {"x": TensorType("float32", (2, 4))}
    graph = Graph("tiny", ("x",), ("y",), nodes, MappingProxyType(types), MappingProxyType(params), {"": 21})
    return infer_types(graph)


def test_inference_types_every_value() -> None:
    graph = tiny()
    assert str(graph.types["y"]) == "float32[2,3]"
    assert str(graph.types["w"]) == "float32[4,3]"
    verify(graph)


def test_edit_without_change_returns_the_same_graph() -> None:
    graph = tiny()
    assert graph.edit().finish("nothing") is graph


def test_forward_drops_the_dead_node_and_stamps_nothing_else() -> None:
    graph = tiny()
    edit = graph.edit()
    edit.forward(graph.node["same"], "h")
    after = edit.finish("drop-identity")
    assert [node.name for node in after.nodes] == ["fc", "relu"]
    assert after.node["relu"].inputs == ("h",)
    assert graph.node["relu"].inputs == ("i",)


def test_forwarded_graph_output_keeps_its_name() -> None:
    graph = tiny()
    edit = graph.edit()
    edit.forward(graph.node["relu"], "h")
    after = edit.finish("drop-relu")
    assert after.outputs == ("y",)
    assert after.node["fc"].outputs == ("y",)
    verify(after)


def test_output_forwarded_to_an_input_gets_an_identity() -> None:
    graph = tiny()
    edit = graph.edit()
    edit.forward(graph.node["relu"], "x")
    after = edit.finish("all-gone")
    assert [node.op for node in after.nodes] == ["Identity"]
    assert not after.params


def test_emitted_nodes_are_placed_before_their_readers_and_stamped() -> None:
    graph = tiny()
    edit = graph.edit()
    fc = graph.node["fc"]
    product = edit.emit("MatMul", ["x", "w"], like=fc)
    edit.forward(fc, edit.emit("Add", [product, "b"], like=fc))
    after = edit.finish("split{site=fc}")
    assert [node.op for node in after.nodes] == ["MatMul", "Add", "Identity", "Relu"]
    assert after.nodes[0].history == ("split{site=fc}",)
    assert after.node["relu"].history == ()


def test_digest_depends_on_weights_but_not_on_history() -> None:
    graph = tiny()
    edit = graph.edit()
    edit.set_param("b", np.full(3, 2, np.float32))
    assert edit.finish("change").digest != graph.digest
    assert tiny().digest == graph.digest


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ((Node("Relu", ("ghost",), ("y",), "r"),), "node r (Relu): reads ghost, which is never defined"),
        ((Node("Relu", ("x",), ("y",), "r"), Node("Relu", ("x",), ("z",), "r")), "two nodes have this name"),
        ((Node("Relu", ("x",), ("y",), "a"), Node("Relu", ("x",), ("y",), "b")), "defines y a second time"),
        ((Node("Relu", ("x", "x"), ("y",), "r"),), "breaks its ONNX schema"),
    ],
)
def test_verifier_names_the_place(nodes: tuple[Node, ...], message: str) -> None:
    types = {"x": TensorType("float32", (1,))}
    with pytest.raises(VerifyError, match=message.replace("(", r"\(").replace(")", r"\)")):
        verify(Graph("bad", ("x",), ("y",), nodes, types, {}, {"": 21}))


def test_printed_form_and_diff() -> None:
    graph = tiny()
    assert "  h: float32[2,3] = Gemm(x, w, b) @fc" in to_text(graph).splitlines()
    edit = graph.edit()
    edit.forward(graph.node["same"], "h")
    lines = diff(graph, edit.finish("drop")).splitlines()
    assert "-  i: float32[2,3] = Identity(h) @same" in lines
    assert diff(graph, graph) == ""


def test_ten_thousand_nodes_are_edited_in_seconds() -> None:
    nodes = tuple(Node("Relu", (f"v{i}" if i else "x",), (f"v{i + 1}",), f"n{i}") for i in range(10_000))
    types = {"x": TensorType("float32", (1,))}
    graph = infer_types(Graph("long", ("x",), ("v10000",), nodes, types, {}, {"": 21}))
    edit = graph.edit()
    for node in graph.nodes[1:-1:2]:
        edit.forward(node, node.inputs[0])
    after = edit.finish("thin")
    verify(after)
    assert len(after.nodes) == 5001
