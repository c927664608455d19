"""Moving a factor per channel from an activation into the weights around it: x W = (x / s) (diag(s) W), exact up to rounding.

What computes x takes 1 / s where it can: linear layers, norms, and constants that are multiplied or added, also through
operators that are the same for every positive factor (Relu, pools).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from hwopt.ir import Edit, Graph, Node

THROUGH = ("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Identity", "Dropout")  # f(s x) = s f(x), s > 0
Slot = tuple[str, int, int]  # node name, input, axis of the channels in that constant


@dataclass
class Rescaling:
    """Constants as changed so far, by node and input, and inserted factors; written at the end."""

    graph: Graph
    arrays: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)  # float64
    inserted: dict[str, tuple[int, np.ndarray, list[str]]] = field(default_factory=dict)  # value -> axis, 1 / s, its readers

    def array(self, node: Node, index: int) -> np.ndarray:
        """The constant at an input, as it is by now."""
        found = self.arrays.get((node.name, index))
        return self.graph.params[node.inputs[index]].astype(np.float64) if found is None else found

    def multiply(self, slots: Iterable[Slot], factors: np.ndarray) -> None:
        for name, index, axis in slots:
            array = self.array(self.graph.node[name], index)
            repeated = np.repeat(factors, array.shape[axis] // len(factors))
            shape = [-1 if one == axis % array.ndim else 1 for one in range(array.ndim)]
            self.arrays[name, index] = array * repeated.reshape(shape)

    def insert(self, value: str, axis: int, factors: np.ndarray, readers: Iterable[Node]) -> None:
        """Multiply the value for these readers (as their first input)."""
        self.inserted[value] = axis, factors, [node.name for node in readers]

    def write(self, edit: Edit) -> None:
        inputs: dict[str, list[str]] = {}
        for (name, index), array in self.arrays.items():
            node = self.graph.node[name]
            old = node.inputs[index]
            new = edit.param(f"{old}_scaled", array.astype(self.graph.params[old].dtype))
            inputs.setdefault(name, list(node.inputs))[index] = new
        for value, (axis, factors, readers) in self.inserted.items():
            rank = len(self.graph.tensor(value).shape or ())
            shape = [-1 if one == axis % rank else 1 for one in range(rank)]
            factor = edit.param(f"{value}_factor", factors.astype(np.float32).reshape(shape))
            scaled = edit.emit("Mul", [value, factor], name=f"{value}_smooth")
            for name in readers:
                inputs.setdefault(name, list(self.graph.node[name].inputs))[0] = scaled
        for name, changed in inputs.items():
            edit.replace(self.graph.node[name], inputs=tuple(changed))


def taker(graph: Graph, node: Node) -> Slot | str:
    """Where a layer's weights take factors of its input's channels, or why they do not."""
    if node.domain or node.op not in ("Conv", "Gemm", "MatMul"):
        return f"{node.name} is a {node.op}"
    weight = graph.constant(node.inputs[1])
    if weight is None or weight.dtype != np.float32 or weight.ndim < 2:
        return f"the weights of {node.name} are no float32 constants"
    if node.inputs[0] in graph.params:
        return f"the data of {node.name} are constant"
    if len(graph.users[node.inputs[1]]) > 1 or node.inputs[1] in graph.outputs:
        return f"the weights of {node.name} are read elsewhere"
    if node.op == "Conv":
        groups = node.attr("group", 1)
        channels = (graph.tensor(node.inputs[0]).shape or (None, None))[1]
        if groups == 1:
            return node.name, 1, 1
        return (node.name, 1, 0) if groups == channels else f"{node.name} has groups"
    if node.attr("transA", 0) or (node.op == "MatMul" and weight.ndim != 2):
        return f"the weights of {node.name} are no matrix behind its data"
    return node.name, 1, 1 if node.attr("transB", 0) else 0


def data_axis(node: Node) -> int:
    """Where a layer's input has its channels."""
    return 1 if node.op == "Conv" else -1


def givers(graph: Graph, value: str, axis: int, channels: int, readers: Iterable[str]) -> list[Slot] | str:
    """The constants that scale `value` along `axis` with them, or why there are none; nobody but `readers` may read it."""
    if value in graph.outputs or {node.name for node in graph.users[value]} - set(readers):
        return f"{value} is read elsewhere"
    node = graph.producer.get(value)
    if node is None or node.domain:
        return f"{value} is an input"
    rank = len(graph.tensor(value).shape or ())
    if node.op in THROUGH and len(graph.tensor(node.inputs[0]).shape or ()) == rank:
        return givers(graph, node.inputs[0], axis, channels, (node.name,))
    if node.op in ("Mul", "Add"):
        return _behind_constant(graph, node, axis % rank - rank, channels)
    return _own(graph, node, axis % rank, rank, channels)


def _behind_constant(graph: Graph, node: Node, axis: int, channels: int) -> list[Slot] | str:
    """x * c ends at c, if that differs by channels; x + c asks both. `axis` counts from the end."""
    constants = [index for index, value in enumerate(node.inputs) if value in graph.params]
    if len(constants) != 1:
        return f"{node.name} combines computed values"
    index, array = constants[0], graph.params[node.inputs[constants[0]]]
    fits = _private(graph, node, index) and array.ndim >= -axis and array.shape[axis] == channels
    slot = (node.name, index, array.ndim + axis)
    if fits and node.op == "Mul":
        return [slot]
    if not fits and (node.op == "Add" or (array.ndim >= -axis and array.shape[axis] != 1)):
        return f"the constant of {node.name} does not differ by channels"
    rest = givers(graph, node.inputs[1 - index], axis, channels, (node.name,))
    return rest if isinstance(rest, str) or node.op == "Mul" else [*rest, slot]


def _own(graph: Graph, node: Node, axis: int, rank: int, channels: int) -> list[Slot] | str:
    """The constants of a node that ends the search."""
    if node.op == "LayerNormalization" and axis == rank - 1 and node.attr("axis", -1) in (-1, rank - 1):
        slots = [(node.name, index, 0) for index in range(1, len(node.inputs)) if node.inputs[index]]
    elif node.op == "BatchNormalization" and axis == 1:
        slots = [(node.name, 1, 0), (node.name, 2, 0)]
    elif node.op == "Conv" and axis == 1:
        slots = [(node.name, 1, 0)] + [(node.name, 2, 0)] * (len(node.inputs) > 2 and node.inputs[2] != "")
    elif node.op == "Gemm" and axis == 1:
        bias = [(node.name, 2, -1)] if len(node.inputs) > 2 and node.inputs[2] else []
        slots = [(node.name, 1, 0 if node.attr("transB", 0) else 1), *bias]
    elif node.op == "MatMul" and axis == rank - 1:
        slots = [(node.name, 1, -1)]
    else:
        return f"{node.name} is a {node.op}"
    for name, index, place in slots:
        array = graph.constant(graph.node[name].inputs[index])
        if array is None or array.ndim == 0 or array.shape[place] != channels or not _private(graph, node, index):
            return f"the constants of {node.name} are computed, shared or of another size"
    return slots


def _private(graph: Graph, node: Node, index: int) -> bool:
    value = node.inputs[index]
    return graph.params[value].dtype == np.float32 and len(graph.users[value]) == 1 and value not in graph.outputs


def readers_of(nodes: Iterable[Node]) -> dict[str, list[Node]]:
    """Layers by the value that they read as data: these share their factors. All of one value agree where its channels are."""
    found: dict[str, list[Node]] = {}
    for node in nodes:
        group = found.setdefault(node.inputs[0], [])
        if not group or data_axis(group[0]) == data_axis(node):
            group.append(node)
    return found


def matrix(graph: Graph, node: Node) -> np.ndarray:
    """A layer's weights as float64 [input channels, outputs x taps]."""
    slot = taker(graph, node)
    axis = 0 if isinstance(slot, str) else slot[2]
    weight = np.moveaxis(graph.params[node.inputs[1]].astype(np.float64), axis, 0)
    return weight.reshape(len(weight), -1)


def move(scales: Rescaling, value: str, nodes: list[Node], factors: np.ndarray) -> None:
    """value / factors for these layers, whose weights make up for it: in what computes the value, else by a Mul."""
    graph, axis = scales.graph, data_axis(nodes[0])
    slots = [slot for slot in (taker(graph, node) for node in nodes) if not isinstance(slot, str)]
    scales.multiply(slots, factors)
    before = givers(graph, value, axis, len(factors), [node.name for node in nodes])
    if isinstance(before, str):
        scales.insert(value, axis, 1 / factors, nodes)
    else:
        scales.multiply(before, 1 / factors)
