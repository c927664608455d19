"""Reading bfloat16 in a float32 graph: Cast(bfloat16) -> Cast(float32) rounds a value, Cast(bfloat16 constant) is a weight."""

from __future__ import annotations

from dataclasses import dataclass

from hwopt.ir import Graph, Node


def narrows(graph: Graph, node: Node | None) -> bool:
    """True for the Cast that rounds float32 to bfloat16."""
    return _casts(graph, node, "float32", "bfloat16")


def widens(graph: Graph, node: Node | None) -> bool:
    """True for the Cast from bfloat16 to float32, which is exact."""
    return _casts(graph, node, "bfloat16", "float32")


def _casts(graph: Graph, node: Node | None, source: str, result: str) -> bool:
    if node is None or node.op != "Cast" or node.domain not in ("", "ai.onnx"):
        return False
    return graph.tensor(node.inputs[0]).dtype == source and graph.tensor(node.output).dtype == result


def widened(graph: Graph, value: str) -> str:
    """The bfloat16 value behind a float32 one, or ""."""
    node = graph.producer.get(value)
    return node.inputs[0] if node is not None and widens(graph, node) else ""


@dataclass(frozen=True)
class Operands:
    """The bfloat16 values that a layer multiplies. `constant` says that the right side is known at compile time."""

    data: str
    weight: str
    constant: bool


def bfloat16_operands(graph: Graph, node: Node) -> Operands | None:
    """The operands of a Conv, Gemm or MatMul on bfloat16 values; None where it must be computed in float32."""
    if node.op not in ("Conv", "Gemm", "MatMul") or node.domain not in ("", "ai.onnx"):
        return None
    data, weight = (widened(graph, value) for value in node.inputs[:2])
    if not data or not weight or (node.op == "Gemm" and (node.attr("transA", 0) or node.attr("alpha", 1.0) != 1.0)):
        return None
    constant = _constant(graph, weight)
    return Operands(data, weight, constant) if constant or node.op == "MatMul" else None


def _constant(graph: Graph, value: str) -> bool:
    """True if the value depends on parameters only."""
    waiting = [value]
    while waiting:
        name = waiting.pop()
        if name in graph.params:
            continue
        node = graph.producer.get(name)
        if node is None:
            return False
        waiting.extend(node.reads)
    return True
