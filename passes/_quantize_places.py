"""Where values turn into 8 bits: behind the last node of each kernel, never between its nodes, and nowhere twice.

Every quantized layer demands its input. A demand moves up through operators that only move values (they then work on the
integers themselves), stops behind the kernel that computes the value, and that kernel demands its other inputs in turn: the
second operand of a residual add, the input of a pool. What float operators compute (softmax, layer norm) is quantized where
it stands.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from hwopt.analysis.qdq import Quantization, quantization
from hwopt.analysis.regions import integer_operands
from hwopt.ir import Graph, Node

# The roles of a value: any kernel's data, or one side of a matmul of two computed values. There zero points are 0: correcting
# them would take row and column sums at run time. The right side stands where weights do, and is int8.
DATA, LEFT, RIGHT = "data", "left", "right"
Key = tuple[str, str]  # value, role

# Elementwise operators that amplify no error: 8 bits in, 8 bits out. Sqrt, Pow, Exp or a division by what is computed are not
# among them: inside an exploded LayerNorm or softmax they need their float inputs.
_STEADY = frozenset(
    {
        "Relu",
        "LeakyRelu",
        "PRelu",
        "ThresholdedRelu",
        "Clip",
        "Sigmoid",
        "HardSigmoid",
        "HardSwish",
        "Tanh",
        "Gelu",
        "Erf",
        "Mish",
    }
    | {"Elu", "Selu", "Celu", "Softplus", "Softsign", "Swish", "Abs", "Neg", "Add", "Sub", "Mul", "Div", "Min", "Max"}
)
_MOVES = frozenset(
    {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Transpose", "Split", "Slice", "Gather", "Expand", "Tile"}
    | {"DepthToSpace", "SpaceToDepth", "MaxPool"}
)
_POOLS = ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "Concat", "Resize")


@dataclass
class Places:
    """The result. `points`: values to quantize, each with its role; `moved`: nodes that work on the integers of a role.

    `reads` says which inputs of which nodes take the dequantized copy, `groups` which keys must share one grid, `known` the
    quantizations that the graph has already (node, grid).
    """

    graph: Graph
    anchors: Collection[str]
    points: dict[Key, None] = field(default_factory=dict)
    moved: dict[tuple[str, str], Node] = field(default_factory=dict)
    reads: dict[tuple[str, int], str] = field(default_factory=dict)
    known: dict[Key, tuple[Node, Quantization]] = field(default_factory=dict)
    integer: set[str] = field(default_factory=set)  # values that integer kernels compute
    settled: set[str] = field(default_factory=set)  # values on a grid that the graph fixes already
    _parent: dict[Key, Key] = field(default_factory=dict)

    def group(self, key: Key) -> Key:
        """The representative of the keys that share a grid with this one."""
        while (parent := self._parent.get(key, key)) != key:
            self._parent[key] = self._parent.get(parent, parent)
            key = parent
        return key

    def tie(self, one: Key, other: Key) -> None:
        self._parent[self.group(other)] = self.group(one)


def places_of(graph: Graph, wanted: Mapping[str, bool]) -> Places:
    """The places for these layers: node name -> whether its right side is computed as well."""
    anchors = (node for node in graph.nodes if node.op in ("Conv", "ConvTranspose", "Gemm", "MatMul"))
    existing = {node.name for node in anchors if _is_integer(graph, node)}
    places = Places(graph, {*wanted, *existing})
    order = {node.name: index for index, node in enumerate(graph.nodes)}
    _flow(places)
    todo: list[Key] = []
    for name, both in wanted.items():
        for index, role in enumerate((LEFT, RIGHT) if both else (DATA,)):
            places.reads[name, index] = role
            todo.append((graph.node[name].inputs[index], role))
    while todo:
        todo.extend(_demand(places, todo.pop(), order))
    _remaining_readers(places)
    return places


def _is_integer(graph: Graph, node: Node) -> bool:
    return node.domain == "" and integer_operands(graph, node) is not None


def _flow(places: Places) -> None:
    """Mark what integer kernels compute, and what has a fixed grid, from inputs to outputs."""
    graph = places.graph
    places.settled.update(node.inputs[0] for node in graph.nodes if node.op == "QuantizeLinear")
    for node in graph.nodes:
        computed = [value for value in node.inputs if value in graph.producer or value in graph.inputs]
        if node.op == "DequantizeLinear":
            places.integer.update(node.outputs)
            places.settled.update(node.outputs)
        elif node.name in places.anchors:
            places.integer.update(node.outputs)
        elif _passes_on(graph, node):
            if places.integer.intersection(computed):
                places.integer.update(node.outputs)
            if _is_move(places, node) and places.settled.intersection(computed):
                places.settled.update(node.outputs)


def _passes_on(graph: Graph, node: Node) -> bool:
    """True for operators that integer kernels compute if their input is quantized."""
    if node.op == "ReduceMean" and not over_image(graph, node):
        return False
    passes = _is_steady(graph, node) or any(node.op in ops for ops in (_MOVES, _POOLS, ("Pad", "Resize")))
    return passes and node.domain == "" and all(graph.tensor(value).dtype == "float32" for value in node.outputs if value)


def _is_steady(graph: Graph, node: Node) -> bool:
    divides = node.op == "Div" and graph.constant(node.inputs[1]) is None
    squares = node.op == "Mul" and node.inputs[0] == node.inputs[1]
    return node.domain == "" and node.op in _STEADY and not divides and not squares


def over_image(graph: Graph, node: Node) -> bool:
    """True for a mean over all axes behind batch and channels."""
    rank = len(graph.tensor(node.inputs[0]).shape or ())
    given = node.attr("axes")
    array = graph.constant(node.inputs[1]) if given is None and len(node.inputs) > 1 else None
    axes = given if array is None else array.ravel().tolist()
    return rank > 3 and axes is not None and sorted(int(axis) % rank for axis in axes) == list(range(2, rank))


def _is_move(places: Places, node: Node) -> bool:
    """True if the node gives the same result on integers, with the grid of its input."""
    graph = places.graph
    data = graph.tensor(node.inputs[0]) if node.inputs else None
    if node.domain or data is None or data.dtype != "float32" or node.inputs[0] in graph.params:
        return False
    if node.op == "MaxPool":
        return len(node.outputs) == 1
    if node.op == "Concat":
        return not any(value in graph.params or value in places.settled for value in node.inputs)
    if node.op == "Pad":
        value = node.inputs[2] if len(node.inputs) > 2 else ""
        constant = graph.constant(value)
        return not node.attr("value", 0.0) and (not value or (constant is not None and not constant.any()))
    return node.op in _MOVES or (node.op == "Resize" and node.attr("mode", "nearest") in ("nearest", b"nearest"))


def _demand(places: Places, key: Key, order: Mapping[str, int]) -> Iterator[Key]:
    """Give the key an 8-bit form; yields what that needs in turn."""
    value, role = key
    node = places.graph.producer.get(value)
    if key in places.points or key in places.known or (node is not None and (node.name, role) in places.moved):
        return
    found = _existing(places.graph, key)
    if found is not None:
        places.known[key] = found
    elif node is not None and _is_move(places, node):
        places.moved[node.name, role] = node
        sources = node.inputs if node.op == "Concat" else node.inputs[:1]
        for other in (*((source, role) for source in sources), *((output, role) for output in node.outputs)):
            places.tie(key, other)
        yield from ((source, role) for source in sources)
    else:
        places.points[key] = None
        for reader, index in _outer_reads(places, node, order) if node is not None and value in places.integer else ():
            places.reads.setdefault((reader.name, index), DATA)
            yield reader.inputs[index], DATA


def _existing(graph: Graph, key: Key) -> tuple[Node, Quantization] | None:
    """The node that quantizes the value in this role already, or that dequantizes it."""
    value, role = key
    for node in (graph.producer.get(value), *graph.users.get(value, ())):
        if node is None or (node.op == "QuantizeLinear" and node.inputs[0] != value):
            continue
        found = quantization(graph, node)
        if found is None or not found.whole or found.dtype not in ("uint8", "int8"):
            continue
        if role == DATA or (int(found.zero_point) == 0 and (role == LEFT or found.dtype == "int8")):
            return node, found
    return None


def _outer_reads(places: Places, last: Node, order: Mapping[str, int]) -> Iterator[tuple[Node, int]]:
    """What the kernel that ends in `last` reads of full size, or from other integer kernels, besides its layer's own input."""
    graph = places.graph
    if last.op in _POOLS:
        count = len(last.inputs) if last.op == "Concat" else 1
        yield from ((last, index) for index in range(count) if last.inputs[index] not in graph.params)
        return
    inside = kernel_before(places, last, order)
    made = {output for node in inside for output in node.outputs}
    full = graph.tensor(last.output).shape
    for node in inside:
        if node.name in places.anchors:
            continue
        for index, value in enumerate(node.inputs):
            computed = value in graph.producer or value in graph.inputs
            if value in made or not computed or graph.tensor(value).dtype != "float32":
                continue
            if value in places.integer or graph.tensor(value).shape == full:
                yield node, index


def kernel_before(places: Places, last: Node, order: Mapping[str, int]) -> list[Node]:
    """The nodes that one kernel computes up to `last`: elementwise ones whose results nobody else reads, and one layer."""
    graph = places.graph
    inside: dict[str, Node] = {}
    queue, queued, anchored = [-order[last.name]], {last.name}, False
    while queue:
        node = graph.nodes[-heapq.heappop(queue)]
        anchor = node.name in places.anchors
        users = {user.name for value in node.outputs for user in graph.users.get(value, ())}
        private = users <= inside.keys() and not any(value in graph.outputs for value in node.outputs)
        same = graph.tensor(node.output).shape == graph.tensor(last.output).shape
        fits = same and ((anchor and not anchored) or (not anchor and _is_steady(graph, node)))
        if not fits or (node is not last and not private):
            continue
        inside[node.name] = node
        anchored = anchored or anchor
        for value in () if anchor else node.inputs:
            source = graph.producer.get(value)
            if source is not None and source.name not in queued:
                queued.add(source.name)
                heapq.heappush(queue, -order[source.name])
    return list(inside.values())


def _remaining_readers(places: Places) -> None:
    """Whoever else reads what an integer kernel writes in 8 bits takes the dequantized copy: the kernel has one result."""
    keys = [*places.points, *((output, role) for (_, role), node in places.moved.items() for output in node.outputs)]
    for value, role in keys:
        if role != DATA or value not in places.integer:
            continue
        for user in places.graph.users.get(value, ()):
            for index, read in enumerate(user.inputs):
                if read == value and user.op != "QuantizeLinear" and (user.name, DATA) not in places.moved:
                    places.reads.setdefault((user.name, index), DATA)
