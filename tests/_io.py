"""Small ONNX models, and the comparison with what ONNX itself computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper

from hwopt.backends import ort
from hwopt.io.opset import PINNED
from hwopt.ir import Graph
from tests.node_cases import run


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[Any]],
    weights: dict[str, Any] | None = None,
    opset: int = PINNED,
    outputs: tuple[str, ...] = ("y",),
    **extra: Any,
) -> onnx.ModelProto:
    infos = [helper.make_tensor_value_info(name, 1, dims) for name, dims in inputs.items()]
    results = [helper.make_tensor_value_info(name, 1, None) for name in outputs]
    held = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in (weights or {}).items()]
    body = helper.make_graph(nodes, "model", infos, results, held)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, **extra)


def relu(*dims: Any) -> onnx.ModelProto:
    return model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": list(dims)})


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def assert_same_outputs(model: onnx.ModelProto, graph: Graph, *values: np.ndarray) -> None:
    fed = dict(zip(graph.inputs, values, strict=False))
    for expected, found in zip(run(model, list(values)), ort.run(graph, fed).values(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
