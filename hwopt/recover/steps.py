"""What quantizers of a graph may learn: which step sizes belong together, which follow from others, which stay.

Esser et al., "Learned step size quantization", 2020 (arXiv:1902.08153). Integers that are moved from one quantizer to its
reader have one step size, an int32 bias has that of its products, s_x * s_w: integer kernels rely on both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import networkx
import numpy as np

from hwopt.analysis.narrow import NARROW, pairs_of_layer
from hwopt.ir import Graph, Node, of_op, type_of
from hwopt.samples import batch_of

RANGES = {
    "int2": (-2, 1), "uint2": (0, 3), "int4": (-8, 7), "uint4": (0, 15), "int8": (-128, 127), "uint8": (0, 255),
    "int16": (-(2**15), 2**15 - 1), "uint16": (0, 2**16 - 1), "int32": (-(2**30), 2**30),
}  # fmt: skip
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
MOVES = frozenset({
    "Identity", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Concat", "Pad", "MaxPool", "Gather",
    "GatherElements", "Expand", "Tile", "DepthToSpace", "SpaceToDepth", "Max", "Min", "Relu", "Clip", "Resize", "Where",
})  # fmt: skip


@dataclass(frozen=True)
class Master:
    """An integer parameter that is trained as a float behind its quantizer.

    `scale` and `zero_point` are the names that its DequantizeLinear reads; `unit` is the fixed step of a codebook, which has no
    step size of its own (0 elsewhere).
    """

    name: str
    reader: Node
    low: int
    high: int
    unit: float = 0.0

    @property
    def scale(self) -> str:
        return self.reader.inputs[1]

    @property
    def zero_point(self) -> str:
        return self.reader.inputs[2] if len(self.reader.inputs) > 2 else ""


@dataclass(frozen=True)
class Steps:
    """`tied`: scale -> the one it is equal to. `products`: scale of a bias -> the two it is made of. `learned`: scale -> g."""

    masters: Mapping[str, Master]
    tied: Mapping[str, str]
    products: Mapping[str, tuple[str, str]]
    learned: Mapping[str, float]


def steps_of(graph: Graph, *, learn: bool = True, limits: Mapping[str, tuple[int, int]] | None = None) -> Steps:
    """What there is to learn; without `learn` every step size stays as it is. `limits` are ranges narrower than the type's."""
    masters = {one.name: one for one in _masters(graph, limits or {})}
    tied = dict(_tied(graph))
    products, stuck = _products(graph, masters)
    if not learn:
        return Steps(masters, {}, {}, {})
    fixed = {tied.get(name, name) for name in (*stuck, *_read_elsewhere(graph))}
    free = {tied.get(name, name) for name in _scales(graph)} - fixed - {tied.get(name, name) for name in products}
    return Steps(masters, tied, products, {name: factor for name, factor in _factors(graph, masters, tied) if name in free})


def _scales(graph: Graph) -> list[str]:
    return list(dict.fromkeys(node.inputs[1] for node in of_op(graph, *QUANTIZERS) if node.inputs[1] in graph.params))


def _read_elsewhere(graph: Graph) -> set[str]:
    """Scales that are used as something else, too, or are no float32."""
    others = {name for node in graph.nodes for index, name in enumerate(node.inputs) if node.op not in QUANTIZERS or index != 1}
    return {name for name in _scales(graph) if name in others or graph.params[name].dtype != np.float32}


def _source(graph: Graph, value: str) -> str:
    """The value that was moved here: the first input, step by step."""
    while value in graph.producer and graph.producer[value].op in MOVES:
        value = graph.producer[value].inputs[0]
    return value


def _masters(graph: Graph, limits: Mapping[str, tuple[int, int]]) -> Iterator[Master]:
    """Integer parameters that reach a DequantizeLinear as they are, or looked up in as codebooks."""
    readers: dict[str, list[Node]] = {}
    for node in of_op(graph, "DequantizeLinear"):
        source = _source(graph, node.inputs[0])
        if source in graph.params and graph.tensor(source).dtype in RANGES and node.inputs[1] in graph.params:
            readers.setdefault(source, []).append(node)
    for name, nodes in readers.items():
        direct = all(node.inputs[0] == name and node.inputs[1:3] == nodes[0].inputs[1:3] for node in nodes)
        alone = all(user in nodes or user.op in MOVES for user in graph.users[name])
        if alone:
            unit = 0.0 if direct else float(np.mean(graph.params[nodes[0].inputs[1]]))
            yield Master(name, nodes[0], *(limits.get(name) or _limits(graph.params[name])), unit)


def _limits(array: np.ndarray) -> tuple[int, int]:
    """The range that the integers keep to: symmetric ones without the lowest number, a reduced one as it is."""
    low, high = RANGES[type_of(array).dtype]
    wide = array.astype(np.int64)
    if low < 0 and wide.min(initial=0) >= -high:
        low = -high
    reduced = (low, high) == (-127, 127) and np.abs(wide).max(initial=0) <= NARROW
    return (-NARROW, NARROW) if reduced else (low, high)


def paired(graph: Graph, masters: Mapping[str, Master]) -> Iterator[tuple[str, Node]]:
    """Weights whose products add up in 16 bits over two words, as some kernels need them, and their layers."""
    for name, master in masters.items():
        users = graph.users[master.reader.output]
        if (master.low, master.high) != (-NARROW, NARROW) or len(users) != 1 or master.reader.inputs[0] != name:
            continue
        layer = users[0]
        product = layer.op in ("Conv", "MatMul", "Gemm") and layer.inputs[1] == master.reader.output
        if product and pairs_of_layer(graph.params[name], layer) == 2:
            yield name, layer


def _tied(graph: Graph) -> Iterator[tuple[str, str]]:
    """Scales on both sides of the same integers, when they are two parameters of one value."""
    same = networkx.Graph()
    for node in of_op(graph, "DequantizeLinear"):
        for source in _sources(graph, node.inputs[0]):
            maker = graph.producer.get(source)
            if maker is not None and maker.op == "QuantizeLinear":
                same.add_edge(maker.inputs[1], node.inputs[1])
    for names in networkx.connected_components(same):
        ordered = sorted(name for name in names if name in graph.params)
        yield from ((name, ordered[0]) for name in ordered[1:])


def _sources(graph: Graph, value: str) -> Iterator[str]:
    """All values whose integers are moved here."""
    node = graph.producer.get(value)
    if node is None or node.op not in MOVES:
        yield value
        return
    several = node.op in ("Concat", "Max", "Min", "Where")
    for one in node.inputs[node.op == "Where" :] if several else node.inputs[:1]:
        yield from _sources(graph, one)


def _products(graph: Graph, masters: Mapping[str, Master]) -> tuple[dict[str, tuple[str, str]], set[str]]:
    """Scales of biases that are s_x * s_w, and scales that must stay because some bias does not fit into that form."""
    found: dict[str, set[tuple[str, str]]] = {}
    stuck: set[str] = set()
    for bias in (one for one in masters.values() if graph.tensor(one.name).dtype == "int32"):
        for user in graph.users[bias.reader.output]:
            sides = [graph.producer.get(value) for value in user.inputs[:2]]
            scales = [side.inputs[1] for side in sides if side is not None and side.op == "DequantizeLinear"]
            if user.op in ("Conv", "Gemm", "ConvTranspose") and len(scales) == 2 and _is_product(graph, bias.scale, scales):
                found.setdefault(bias.scale, set()).add((scales[0], scales[1]))
            else:
                stuck |= {bias.scale, *scales}
    for name, pairs in found.items():
        readers = {one.name for one in masters.values() if one.scale == name and graph.tensor(one.name).dtype != "int32"}
        if len(pairs) > 1 or readers:
            stuck |= {name, *(scale for pair in pairs for scale in pair)}
    return {name: next(iter(pairs)) for name, pairs in found.items() if name not in stuck}, stuck


def _is_product(graph: Graph, name: str, scales: list[str]) -> bool:
    if any(scale not in graph.params for scale in scales):
        return False
    product = graph.params[scales[0]].astype(np.float32).ravel() * graph.params[scales[1]].astype(np.float32).ravel()
    own = graph.params[name].ravel()
    return product.size == own.size and bool(np.allclose(product, own, rtol=1e-5, atol=0))


def _factors(graph: Graph, masters: Mapping[str, Master], tied: Mapping[str, str]) -> Iterator[tuple[str, float]]:
    """g = 1 / sqrt(N * Qp) by scale: N weights, or features of one sample, per step size; Qp is the largest positive level."""
    seen = set()
    for node in of_op(graph, *QUANTIZERS):
        name = tied.get(node.inputs[1], node.inputs[1])
        weight = next((one for one in masters.values() if one.reader is node), None)
        if name in seen or name not in graph.params or (node.op == "DequantizeLinear" and weight is None):
            continue
        seen.add(name)
        value = node.inputs[0] if weight is None else node.output
        shape = [dim for dim in graph.tensor(value).shape or () if isinstance(dim, int)]
        count = math.prod(shape) / (max(batch_of(graph), 1) if weight is None else 1) / graph.params[name].size
        yield name, 1.0 / math.sqrt(max(count, 1.0) * _positive(graph, node, weight))


def _positive(graph: Graph, node: Node, weight: Master | None) -> int:
    if weight is not None:
        return max(weight.high, 1)
    low, high = RANGES[graph.tensor(node.output).dtype]
    zero = graph.constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
    middle = int(np.asarray(zero).astype(np.int64).mean()) if zero is not None else 0
    return max(high - middle, middle - low if high == middle else 1)
