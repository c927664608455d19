"""How a Graph prints, and how two Graphs differ."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

import numpy as np
import onnx

from hwopt.ir.graph import Attr, Graph, Node, param_digest

SHOWN_ELEMENTS = 8


def to_text(graph: Graph, *, history: bool = False) -> str:
    """One line for every input, parameter, node and output; weights by type and the head of their sha256."""
    return "\n".join(_lines(graph, history)) + "\n"


def diff(before: Graph, after: Graph) -> str:
    """A unified diff of the printed forms; empty if the graphs print the same."""
    old, new = (to_text(graph).splitlines() for graph in (before, after))
    return "\n".join(difflib.unified_diff(old, new, "before", "after", lineterm="", n=1))


def _lines(graph: Graph, history: bool) -> Iterator[str]:
    opsets = ", ".join(f"{domain or 'onnx'} {version}" for domain, version in sorted(graph.opsets.items()))
    yield f"graph {graph.name} [{opsets}]"
    for value in graph.inputs:
        yield f"input {value}: {graph.types[value]}"
    for name in sorted(graph.params):
        yield f"param {name}: {_param(graph.params[name], str(graph.types[name]))}"
    for node in graph.nodes:
        yield _node(node, graph, history)
    for value in graph.outputs:
        yield f"output {value}: {graph.types.get(value, '?')}"


def _param(array: np.ndarray, kind: str) -> str:
    if array.size <= SHOWN_ELEMENTS:
        return f"{kind} = {np.array2string(array, separator=', ', precision=8, floatmode='unique')}".replace("\n", "")
    return f"{kind} #{param_digest(array)[:12]}"


def _node(node: Node, graph: Graph, history: bool) -> str:
    op = f"{node.domain}::{node.op}" if node.domain else node.op
    results = ", ".join(f"{value}: {graph.types.get(value, '?')}" for value in node.outputs if value)
    attrs = ", ".join(f"{key}={_attr(node.attrs[key])}" for key in sorted(node.attrs))
    line = f"  {results} = {op}({', '.join(value or '_' for value in node.inputs)})"
    line += (f" {{{attrs}}}" if attrs else "") + f" @{node.name}"
    return line + (f"  ; {', '.join(node.history)}" if history and node.history else "")


def _attr(value: Attr) -> str:
    if isinstance(value, tuple):
        return "[" + ",".join(_attr(item) for item in value) + "]"
    if isinstance(value, np.ndarray):
        return _param(value, f"{value.dtype}{list(value.shape)}")
    if isinstance(value, onnx.GraphProto):
        return f"<graph {value.name}, {len(value.node)} nodes>"
    return f"{value:.9g}" if isinstance(value, float) else str(value)
