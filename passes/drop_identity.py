"""drop-identity: operators that do nothing, pairs that undo each other, and code that nobody needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hwopt.ir import Edit, Graph, Node, numpy_dtype, part
from hwopt.pipeline import Context, Pass, Phase

PAIRS = ("Transpose", "Cast", "Reshape")


@dataclass(frozen=True)
class DropIdentity(Pass):
    """Identity(x), Dropout(x), Cast(x) to its own type, Reshape(x) to its own shape, Pad by 0, x * 1, x + 0 ... -> x.

    Transpose(Transpose(x)) -> Transpose(x) or x;  Cast(Cast(x)) -> x where the way there loses nothing;
    Reshape(Reshape(x)) -> Reshape(x). Nodes that no output needs disappear, and parameters that no node reads. Shapes must
    be static where they decide. An Identity between two outputs, or an input and an output, has to stay.
    """

    name: ClassVar[str] = "drop-identity"
    summary: ClassVar[str] = "drop operators that do nothing, and dead code"
    phase: ClassVar[Phase] = Phase.CLEAN
    exact: ClassVar[bool] = True
    order: ClassVar[int] = 5

    def run(self, graph: Graph, ctx: Context) -> Graph:
        self.check_site(graph)
        edit = graph.edit()
        latest: dict[str, str] = {}  # value -> what stands for it after the changes so far
        nodes: dict[str, Node] = {}  # value -> the node that computes it after the changes so far
        for node in graph.nodes:
            node = _renamed(node, latest)
            if node.domain in ("", "ai.onnx") and self.covers(node):
                inner = nodes.get(node.inputs[0]) if node.inputs else None
                source = RULES.get(node.op, _keep)(graph, node) or _undone(graph, node, inner)
                if source and not _must_stay(graph, node, source):
                    latest[node.output] = source
                    edit.forward(node, source)
                    continue
                changes = _shortcut(graph, edit, node, inner)
                node = edit.replace(node, **changes) if changes else node
            nodes.update({value: node for value in node.outputs if value})
        edit.sweep()
        return edit.finish(str(self))


def _renamed(node: Node, latest: Mapping[str, str]) -> Node:
    if not any(value in latest for value in node.inputs):
        return node
    inputs = tuple(latest.get(value, value) for value in node.inputs)
    return Node(node.op, inputs, node.outputs, node.name, node.attrs, node.domain, node.history)


def _must_stay(graph: Graph, node: Node, source: str) -> bool:
    """An output keeps its name, so something must carry it if the source has a name of its own to keep."""
    return node.output in graph.outputs and (source not in graph.producer or source in graph.outputs)


Rule = Callable[[Graph, Node], str]  # what stands for the node's output, "" if the node does something


def _keep(_graph: Graph, _node: Node) -> str:
    return ""


def _always(_graph: Graph, node: Node) -> str:
    return node.inputs[0] if len(node.inputs) == 1 else ""


def _dropout(graph: Graph, node: Node) -> str:
    """In inference Dropout passes its input on; its mask must not be read."""
    training = graph.constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else np.array(False)
    mask = node.outputs[1] if len(node.outputs) > 1 else ""
    read = bool(mask) and (mask in graph.outputs or bool(graph.users[mask]))
    return "" if training is None or training.any() or read else node.inputs[0]


def _same_type(graph: Graph, node: Node) -> str:
    """Cast to the type that the input has; Reshape, Flatten, Squeeze, Expand ... to its static shape."""
    before, after = graph.tensor(node.inputs[0]), graph.tensor(node.output)
    return node.inputs[0] if before == after and (after.static or node.op == "Cast") else ""


def _cast(graph: Graph, node: Node) -> str:
    before, after = graph.tensor(node.inputs[0]), graph.tensor(node.output)
    return node.inputs[0] if before.dtype == after.dtype != "undefined" else ""


def _transpose(_graph: Graph, node: Node) -> str:
    perm = node.attr("perm")
    return node.inputs[0] if perm is not None and tuple(perm) == tuple(range(len(perm))) else ""


def _slice(graph: Graph, node: Node) -> str:
    steps = graph.constant(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] else np.array(1)
    return _same_type(graph, node) if steps is not None and (steps > 0).all() else ""


def _pad(graph: Graph, node: Node) -> str:
    pads = graph.constant(node.inputs[1]) if len(node.inputs) > 1 else np.array(node.attr("pads", (1,)))
    return node.inputs[0] if pads is not None and not pads.any() else ""


def _neutral(number: float, *, either: bool) -> Rule:
    """x * 1, x + 0, x - 0, x / 1, x ** 1, also with a tensor full of them, as long as type and shape stay."""

    def rule(graph: Graph, node: Node) -> str:
        for here, other in ((0, 1), (1, 0)) if either else ((0, 1),):
            array, kept = graph.constant(node.inputs[other]), node.inputs[here]
            before, after = graph.tensor(kept), graph.tensor(node.output)
            unbroadcast = array is not None and (array.ndim == 0 or (before == after and after.static))
            if array is not None and unbroadcast and array.size and np.all(array == number) and before.dtype == after.dtype:
                return kept
        return ""

    return rule


RULES: Mapping[str, Rule] = {
    "Identity": _always,
    "Dropout": _dropout,
    "Cast": _cast,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Tile"), _same_type),
    **dict.fromkeys(("Concat", "Sum", "Max", "Min", "Mean"), _always),
    "Transpose": _transpose,
    "Slice": _slice,
    "Pad": _pad,
    "Mul": _neutral(1.0, either=True),
    "Add": _neutral(0.0, either=True),
    "Sub": _neutral(0.0, either=False),
    "Div": _neutral(1.0, either=False),
    "Pow": _neutral(1.0, either=False),
}


def _undone(graph: Graph, node: Node, inner: Node | None) -> str:
    """What went into `inner` if the node turns it back, else ""."""
    if inner is None or not inner.inputs or node.op not in PAIRS or inner.op != node.op or inner.domain:
        return ""
    source = inner.inputs[0]
    before, after = graph.tensor(source), graph.tensor(node.output)
    if node.op == "Transpose":
        perm = _composed(graph, node, inner)
        return source if perm and perm == tuple(range(len(perm))) else ""
    if node.op == "Cast":
        return source if before.dtype == after.dtype and _lossless(before.dtype, graph.tensor(inner.output).dtype) else ""
    return source if before == after and after.static else ""


def _shortcut(graph: Graph, edit: Edit, node: Node, inner: Node | None) -> Mapping[str, Any]:
    """The changes that let a node do its own work and that of `inner` before it; none if that cannot be."""
    if inner is None or not inner.inputs or node.op not in PAIRS or inner.op != node.op or inner.domain:
        return {}
    source, after = inner.inputs[0], graph.tensor(node.output)
    if node.op == "Transpose":
        perm = _composed(graph, node, inner)
        return {"inputs": (source,), "attrs": {"perm": perm}} if perm else {}
    if node.op == "Cast":
        return {"inputs": (source,)} if _lossless(graph.tensor(source).dtype, graph.tensor(inner.output).dtype) else {}
    if not after.static or not math.prod(after.dims):
        return {}
    return {"inputs": (source, edit.param(part(node, "shape"), np.array(after.dims, np.int64))), "attrs": {}}


def _composed(graph: Graph, node: Node, inner: Node) -> tuple[int, ...]:
    """The one permutation that does what inner and node do in turn; () if their rank is unknown."""
    rank = len(graph.tensor(node.output).shape or ())
    first, second = (n.attr("perm") or tuple(reversed(range(rank))) for n in (inner, node))
    return tuple(first[axis] for axis in second) if len(first) == len(second) else ()


def _lossless(start: str, middle: str) -> bool:
    """True if every number of the one type is a number of the other."""
    if "string" in (start, middle) or "undefined" in (start, middle):
        return False
    if start in ("int64", "uint64") and not middle.endswith("int64"):  # numpy calls int64 -> float64 safe
        return False
    return np.can_cast(numpy_dtype(start), numpy_dtype(middle), "safe")
