"""What TVM cannot run: asked at the door, before anything is compiled."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from hwopt.errors import UnsupportedError
from hwopt.ir import Graph, Node, TensorType

CONTROL = {
    "If": "control flow; bind the inputs that its condition depends on",
    "Loop": "control flow", "Scan": "control flow", "SequenceMap": "control flow",
    "LSTM": "a recurrent network", "GRU": "a recurrent network", "RNN": "a recurrent network",
}  # fmt: skip
SEQUENCES = (
    "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceAt", "SplitToSequence",
    "ConcatFromSequence", "Optional", "OptionalHasElement", "OptionalGetElement",
)  # fmt: skip
RUNTIME = {
    "TopK": "sorts", "Unique": "sorts", "NonZero": "its result's size depends on the data",
    "NonMaxSuppression": "sorts and its result's size depends on the data", "AllClassNMS": "sorts",
    "Compress": "its result's size depends on the data",
}  # fmt: skip


def unsupported(graph: Graph) -> list[tuple[Node, str]]:
    """The nodes that TVM has no way to run, each with the reason. Cheap: nothing is compiled."""
    return [(node, reason) for node in graph.nodes if (reason := _reason(graph, node))]


def needs_runtime(graph: Graph) -> list[tuple[Node, str]]:
    """The nodes that only TVM's runtime can execute: no plain C driver, the Relax VM instead."""
    found = [(node, RUNTIME[node.op]) for node in graph.nodes if node.op in RUNTIME and node.domain == ""]
    for node in graph.nodes:
        loose = [value for value in (*node.inputs, *node.outputs) if value and not graph.tensor(value).static]
        if loose and all(node is not known for known, _ in found):
            found.append((node, f"the shape of {loose[0]} is not static: {graph.tensor(loose[0])}"))
    return found


def refuse_unsupported(graph: Graph) -> None:
    """Raise UnsupportedError that lists every node of `unsupported`."""
    refuse(graph, unsupported(graph))


def refuse(graph: Graph, found: Sequence[tuple[Node, str]], hint: str = "") -> None:
    """Raise UnsupportedError that lists these nodes; nothing if there are none."""
    if found:
        listed = "; ".join(f"node {node.name} ({node.op}): {reason}" for node, reason in found)
        raise UnsupportedError(f"TVM cannot run {listed}", place=graph.name, hint=hint)


def _reason(graph: Graph, node: Node) -> str:
    if node.domain not in ("", "ai.onnx"):
        return f"operator of the foreign domain {node.domain}"
    if node.op in CONTROL:
        return CONTROL[node.op]
    if node.op in SEQUENCES or any(
        not isinstance(graph.types.get(v, _ANY), TensorType) for v in (*node.inputs, *node.outputs) if v
    ):
        return "it works on a sequence or an optional"
    if any(graph.tensor(value).dtype == "string" for value in (*node.inputs, *node.outputs) if value):
        return "it works on strings"
    if node.op not in _converters():
        return "TVM has no such operator"
    return ""


_ANY = TensorType("undefined", None)


@functools.cache
def _converters() -> frozenset[str]:
    from tvm.relax.frontend.onnx import onnx_frontend

    return frozenset(onnx_frontend._get_convert_map())
