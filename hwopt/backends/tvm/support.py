"""What TVM cannot run: asked at the door, before anything is compiled."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from hwopt.backends.tvm.mended import WRITTEN_OTHERWISE
from hwopt.backends.tvm.resize_tables import tables_of
from hwopt.backends.tvm.suppression import wrong_suppression
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
DTYPES = (
    "float16", "float32", "float64", "bfloat16", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "undefined",
)  # fmt: skip
EXTREMES = (
    "ReduceMax",
    "ReduceMin",
    "ReduceMean",
    "ArgMax",
    "ArgMin",
    "GlobalMaxPool",
    "GlobalAveragePool",
)  # 0 elements: no result
INTEGERS = ("ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul")
NO_OPERATOR = "TVM has no such operator"
SHOWN = 8  # nodes in one message
RUNTIME = {
    "TopK": "sorts", "Unique": "sorts", "NonZero": "its result's size depends on the data",
    "NonMaxSuppression": "sorts and its result's size depends on the data", "AllClassNMS": "sorts",
    "Compress": "its result's size depends on the data",
}  # fmt: skip


def unsupported(graph: Graph) -> list[tuple[Node, str]]:
    """The nodes that TVM has no way to run, each with the reason. Cheap: nothing is compiled."""
    return [(node, reason) for node in graph.nodes if (reason := _reason(graph, node))]


def sorts_here(graph: Graph, node: Node) -> bool:
    """True for a TopK whose sizes are known: the processor's kernels have one."""
    if node.op != "TopK" or len(node.inputs) < 2:
        return False
    data, count = graph.tensor(node.inputs[0]), graph.constant(node.inputs[1])
    known = data.static and all(graph.tensor(value).static for value in node.outputs if value)
    return known and data.dtype == "float32" and count is not None and 0 not in (*data.dims, int(count[0]))


def needs_runtime(graph: Graph) -> list[tuple[Node, str]]:
    """The nodes that only TVM's runtime can execute: no plain C driver, the Relax VM instead."""
    chosen = (node for node in graph.nodes if node.op in RUNTIME and node.domain == "" and not sorts_here(graph, node))
    found = [(node, RUNTIME[node.op]) for node in chosen]
    for node in graph.nodes:
        loose = [value for value in (*node.inputs, *node.outputs) if value and not graph.tensor(value).static]
        if loose and all(node is not known for known, _ in found):
            found.append((node, f"the shape of {loose[0]} is not static: {graph.tensor(loose[0])}"))
    return found


def refuse_unsupported(graph: Graph) -> None:
    """Raise UnsupportedError that lists the nodes of `unsupported`."""
    refuse(graph, unsupported(graph))


def refuse(graph: Graph, found: Sequence[tuple[Node, str]], hint: str = "") -> None:
    """Raise UnsupportedError that lists these nodes, of many the first ones; nothing if there are none."""
    if found:
        listed = "; ".join(f"node {node.name} ({node.op}): {reason}" for node, reason in found[:SHOWN])
        listed += f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
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
    if node.op == "DequantizeLinear" and node.inputs[0] in graph.params:
        return ""  # constants of any width: they are decoded when the kernels are packed, or by the kernels
    for value in filter(None, (*node.inputs, *node.outputs)):
        if graph.tensor(value).dtype not in DTYPES:
            return f"it works on {graph.tensor(value).dtype}"
    if node.op not in _converters() and node.op not in WRITTEN_OTHERWISE:
        return "of a model in integers; give the float model, hwopt quantizes it itself" if node.op in INTEGERS else NO_OPERATOR
    return wrong_in_tvm(graph, node)


def wrong_in_tvm(graph: Graph, node: Node) -> str:
    """Why TVM 0.27 would compute something else than ONNX says (the ONNX node tests show it), or ""."""
    if node.op in ("BatchNormalization", "Dropout") and (
        len([v for v in node.outputs if v]) > 1 or node.attr("training_mode", 0)
    ):
        return "it is in training mode"
    if node.op == "Dropout" and len(node.inputs) > 2 and node.inputs[2] and np.any(graph.constant(node.inputs[2])):
        return "it is in training mode"
    if node.op == "MaxPool" and any(graph.users.get(value) or value in graph.outputs for value in node.outputs[1:]):
        return "TVM does not say where the largest elements lie"
    if node.op == "IsInf" and not (node.attr("detect_positive", 1) and node.attr("detect_negative", 1)):
        return "TVM finds infinities of both signs"
    if node.op == "BitShift" and graph.tensor(node.inputs[0]).dtype.startswith("int"):
        return "TVM shifts signed numbers otherwise"
    if node.op in EXTREMES and 0 in (graph.tensor(node.inputs[0]).shape or ()):
        return "it reduces no elements at all"
    if node.op == "RoiAlign" and node.attr("mode", "avg") != "avg":
        return "TVM takes another maximum"
    if node.op == "SpaceToDepth" and node.attr("mode", "DCR") != "DCR":
        return "TVM has another order of channels"
    if node.op == "NonMaxSuppression":
        return wrong_suppression(graph, node)
    return _resize(graph, node) if node.op in ("Resize", "Upsample") else ""


def _resize(graph: Graph, node: Node) -> str:
    if graph.tensor(node.inputs[0]).dtype == "float32" and tables_of(graph, node) is not None:
        return ""  # a template of our own
    if node.attr("antialias", 0):
        return "TVM does not filter against aliasing"
    index = 2 if node.op == "Resize" else 1
    scales = graph.constant(node.inputs[index]) if len(node.inputs) > index else None
    kind = graph.tensor(node.inputs[0])
    if scales is None or not kind.static or scales.size != len(kind.dims):
        return ""
    exact = np.asarray(kind.dims) * scales.astype(np.float64)
    return "" if np.allclose(exact, np.rint(exact), atol=1e-4) else f"TVM resizes to whole ratios only, not by {scales.tolist()}"


_ANY = TensorType("undefined", None)


@functools.cache
def _converters() -> frozenset[str]:
    from tvm.relax.frontend.onnx import onnx_frontend

    return frozenset(onnx_frontend._get_convert_map())
