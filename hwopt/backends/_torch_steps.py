"""What a graph does, step by step: a rule of the torch backend for each node; values are let go of once nobody reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hwopt.backends import _torch_elementwise, _torch_moves, _torch_products, _torch_quant, _torch_reduce, _torch_resize
from hwopt.backends._torch_call import Call, Round, Rule
from hwopt.backends._torch_quant import ROUND_TRIP, round_trip
from hwopt.ir import Graph, Node

_FAMILIES = (_torch_elementwise, _torch_reduce, _torch_products, _torch_moves, _torch_quant, _torch_resize)
RULES: Mapping[str, Rule] = {op: rule for family in _FAMILIES for op, rule in family.RULES.items()}
CARRIES = frozenset(op for family in _FAMILIES for op in family.CARRIES)


@dataclass(frozen=True)
class Step:
    """One node, or a quantizer with its dequantizer."""

    rule: Rule
    call: Call
    carries: bool
    last: tuple[str, ...]  # values that nobody reads afterwards


def merged(graph: Graph) -> Iterator[Node]:
    """The nodes, with one step for each QuantizeLinear that only its own DequantizeLinear reads."""
    readers = ((node, _readers(graph, node)) for node in graph.nodes)
    pairs = {node.output: users[0] for node, users in readers if len(users) == 1 and _undoes(users[0], node)}
    undoing = {node.name for node in pairs.values()}
    for node in graph.nodes:
        if node.output in pairs:
            grid = {"grid": graph.tensor(node.output).dtype}
            yield dataclasses.replace(node, op=ROUND_TRIP, outputs=pairs[node.output].outputs, attrs={**node.attrs, **grid})
        elif node.name not in undoing:
            yield node


def _readers(graph: Graph, node: Node) -> tuple[Node, ...]:
    return () if node.op != "QuantizeLinear" or node.output in graph.outputs else tuple(graph.users[node.output])


def _undoes(node: Node, quantizer: Node) -> bool:
    settings = [[one.attrs.get(key) for key in ("axis", "block_size")] for one in (node, quantizer)]
    return node.op == "DequantizeLinear" and node.inputs[1:] == quantizer.inputs[1:] and settings[0] == settings[1]


def steps(graph: Graph, nodes: Sequence[Node], precise: bool, rounding: Round) -> Iterator[Step]:
    """The steps of these nodes, which are the graph's own or its `merged` ones."""
    last = {name: index for index, node in enumerate(nodes) for name in node.reads}
    ends: dict[int, list[str]] = {}
    for name, index in last.items():
        ends.setdefault(index, []).append(name)
    for index, node in enumerate(nodes):
        reads = tuple(graph.tensor(name).dtype if name else "" for name in node.inputs)
        writes = tuple(graph.tensor(name).dtype if name else "" for name in node.outputs)
        unread = [name for name in node.outputs if name and name not in last]
        call = Call(node, reads, writes, precise, rounding, _leading(graph, node))
        rule = round_trip if node.op == ROUND_TRIP else RULES[node.op]
        yield Step(rule, call, node.op in CARRIES, (*ends.get(index, ()), *unread))


def _leading(graph: Graph, node: Node) -> int:
    shape = graph.tensor(node.inputs[0]).shape if node.inputs and node.inputs[0] else None
    return shape[0] if shape and isinstance(shape[0], int) else 0
