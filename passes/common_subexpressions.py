"""common-subexpressions: compute equal expressions once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx

from hwopt.ir import Attr, Graph, Node
from hwopt.ir.graph import param_digest
from hwopt.pipeline import Context, Pass, Phase

RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
SYMMETRIC = {"Add", "Mul", "And", "Or", "Xor", "Equal"}
SMALL_BYTES = 1024  # parameters up to here count as equal by their contents, larger ones by name (see dedupe-weights)


@dataclass(frozen=True)
class CommonSubexpressions(Pass):
    """f(x, 2), f(x, 2) -> one f(x, 2), read twice.

    Two nodes are equal if operator, attributes and inputs are, small constants by their contents; Add, Mul and logic in
    either order of inputs. Random operators, other domains and control flow are left alone.
    """

    name: ClassVar[str] = "common-subexpressions"
    summary: ClassVar[str] = "compute equal expressions once"
    phase: ClassVar[Phase] = Phase.CLEAN
    exact: ClassVar[bool] = True
    order: ClassVar[int] = 10

    def run(self, graph: Graph, ctx: Context) -> Graph:
        self.check_site(graph)
        edit = graph.edit()
        first: dict[Hashable, Node] = {}
        same = _equal_constants(graph)
        for node in graph.nodes:
            if node.domain or node.op in RANDOM or any(isinstance(a, onnx.GraphProto) for a in node.attrs.values()):
                continue
            kept = first.setdefault(_key(node, same), node)
            if kept is node or not self.covers(node):
                continue
            for value, twin in zip(node.outputs, kept.outputs, strict=True):
                same[value] = twin
                if value and not (value in graph.outputs and twin in graph.outputs):
                    edit.forward(value, twin)
        return edit.finish(str(self))


def _equal_constants(graph: Graph) -> dict[str, str]:
    """Every small parameter -> the first one with the same contents."""
    first: dict[str, str] = {}
    small = (name for name, array in graph.params.items() if array.nbytes <= SMALL_BYTES)
    return {name: first.setdefault(param_digest(graph.params[name]), name) for name in small}


def _key(node: Node, same: Mapping[str, str]) -> Hashable:
    inputs = tuple(same.get(value, value) for value in node.inputs)
    attrs = tuple((key, _attr_key(node.attrs[key])) for key in sorted(node.attrs))
    outputs = tuple(bool(value) for value in node.outputs)
    return node.op, tuple(sorted(inputs)) if node.op in SYMMETRIC else inputs, attrs, outputs


def _attr_key(value: Attr) -> Hashable:
    if isinstance(value, np.ndarray):
        return param_digest(value)
    if isinstance(value, onnx.AttributeProto):
        return value.SerializeToString(deterministic=True)
    return type(value).__name__, value
