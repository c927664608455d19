"""Expressions to look for in a Graph: `op("Mul", "x", op("Sigmoid", "x"))` finds x * sigmoid(x) in both orders.

A pattern is a string (any value; the same string means the same value), a number (a one-element parameter equal to it),
an `op`, or a tuple of alternatives. Each match holds the values by name and the nodes that computed them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hwopt.ir.graph import Graph, Node
from hwopt.ir.match import scalar

COMMUTATIVE = ("Add", "Mul", "Min", "Max")
TOLERANCE = 1e-5  # exporters round sqrt(2) and 1/6 as they like: 1.41421 is 2.5e-6 off

Pattern = Any  # str | float | Op | tuple of these


@dataclass(frozen=True)
class Op:
    """A node of this operator whose first inputs match; inputs beyond those named are for the pass to look at."""

    op: str
    inputs: tuple[Pattern, ...]
    attrs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Match:
    """Where a pattern was found: values by their names in the pattern, and the matched nodes, the root first."""

    values: Mapping[str, str]
    nodes: tuple[Node, ...]

    def __getitem__(self, name: str) -> str:
        return self.values[name]

    def of_op(self, name: str) -> list[Node]:
        return [node for node in self.nodes if node.op == name]


def op(name: str, *inputs: Pattern, **attrs: Any) -> Op:
    """A node of operator `name`, the attributes equal to these."""
    return Op(name, inputs, tuple(attrs.items()))


def product(*factors: Pattern) -> Pattern:
    """The product of two or three factors, multiplied in any order."""
    if len(factors) == 2:
        return op("Mul", *factors)
    first, second, third = factors
    groups = ((first, second, third), (first, third, second), (second, third, first))
    return tuple(op("Mul", op("Mul", a, b), c) for a, b, c in groups)


def scaled(pattern: Pattern, factor: float) -> Pattern:
    """The pattern times a constant, or divided by its reciprocal."""
    return (op("Mul", pattern, factor), op("Div", pattern, 1 / factor))


def find(graph: Graph, pattern: Pattern, root: str) -> Match | None:
    """How the value `root` is computed as the pattern says, or None."""
    return next(find_all(graph, pattern, root), None)


def find_all(graph: Graph, pattern: Pattern, root: str) -> Iterator[Match]:
    """Every way in which the pattern computes the value `root`."""
    for values, nodes in _match(graph, pattern, root, {}, ()):
        yield Match(values, tuple(dict.fromkeys(nodes)))


def closed(graph: Graph, match: Match) -> bool:
    """True if nobody outside reads what the matched nodes compute, the root's output excepted."""
    inside = {node.name for node in match.nodes}
    values = [value for node in match.nodes[1:] for value in node.outputs if value]
    return all(value not in graph.outputs and all(user.name in inside for user in graph.users[value]) for value in values)


State = tuple[dict[str, str], tuple[Node, ...]]


def _match(graph: Graph, pattern: Pattern, value: str, values: dict[str, str], nodes: tuple[Node, ...]) -> Iterator[State]:
    if isinstance(pattern, tuple):
        for option in pattern:
            yield from _match(graph, option, value, values, nodes)
    elif isinstance(pattern, str):
        if values.get(pattern, value) == value:
            yield {**values, pattern: value}, nodes
    elif isinstance(pattern, Op):
        node = graph.producer.get(value)
        if node is not None and _fits(node, pattern) and node.outputs[0] == value:
            for inputs in _orders(node, len(pattern.inputs)):
                yield from _match_inputs(graph, pattern.inputs, inputs, values, (*nodes, node))
    else:
        number = scalar(graph, value)
        if number is not None and math.isclose(number, pattern, rel_tol=TOLERANCE, abs_tol=1e-12):
            yield values, nodes


def _match_inputs(
    graph: Graph, patterns: tuple[Pattern, ...], inputs: tuple[str, ...], values: dict[str, str], nodes: tuple[Node, ...]
) -> Iterator[State]:
    if not patterns:
        yield values, nodes
        return
    for found, seen in _match(graph, patterns[0], inputs[0], values, nodes):
        yield from _match_inputs(graph, patterns[1:], inputs[1:], found, seen)


def _fits(node: Node, pattern: Op) -> bool:
    if node.op != pattern.op or node.domain not in ("", "ai.onnx") or len(node.inputs) < len(pattern.inputs):
        return False
    return all(node.attr(key) == wanted for key, wanted in pattern.attrs)


def _orders(node: Node, count: int) -> Iterator[tuple[str, ...]]:
    """The inputs as they stand; of a commutative operator in every order."""
    if node.op in COMMUTATIVE and count == 2 and len(node.inputs) == 2:
        return iter(dict.fromkeys(itertools.permutations(node.inputs)))
    return iter((node.inputs[:count],))


__all__ = ["Match", "Op", "Pattern", "closed", "find", "find_all", "op", "product", "scaled"]
