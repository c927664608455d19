"""Palettes in a graph: where weights are looked up in codebooks, and how their codes are stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from hwopt.analysis.constant import constant
from hwopt.ir import Graph, Node

LOOKUPS = ("Gather", "GatherElements")
PASSING = ("Cast", "Reshape", "Slice")


@dataclass(frozen=True)
class Plane:
    """A parameter that holds `width` bits of every code, those from `offset` on, 8 / width to the byte, first ones lowest."""

    param: str
    width: int
    offset: int


@dataclass(frozen=True, eq=False)
class Palette:
    """`lookup` gives codebook[codes]; `codes` are int64 [codebooks, elements] of the codebook [codebooks, entries]."""

    lookup: Node
    codebook: str
    codes: np.ndarray
    planes: tuple[Plane, ...]

    def stored(self, graph: Graph, codes: np.ndarray) -> Mapping[str, np.ndarray]:
        """The parameters that hold such codes."""
        flat = codes.reshape(-1)
        return {
            one.param: pack(flat >> one.offset & (2**one.width - 1), one.width).reshape(graph.params[one.param].shape)
            for one in self.planes
        }


def palettes_of(graph: Graph) -> Iterator[Palette]:
    """Lookups in codebooks that nobody else reads, whose codes are stored in a way that is understood."""
    for node in graph.nodes:
        if node.op not in LOOKUPS or node.domain or node.inputs[0] not in graph.params:
            continue
        book, codes = graph.params[node.inputs[0]], constant(graph, node.inputs[1])
        fits = codes is not None and (
            (node.op == "Gather" and book.ndim == 1 and node.attr("axis", 0) == 0)
            or (node.op == "GatherElements" and book.ndim == 2 == codes.ndim and node.attr("axis", 0) in (1, -1))
        )
        if codes is None or not fits or len(graph.users[node.inputs[0]]) > 1 or node.inputs[0] in graph.outputs:
            continue
        planes = _planes(graph, node.inputs[1], 0)
        if planes is None or len({one.param for one in planes}) < len(planes):
            continue
        wide = codes.astype(np.int64).reshape(len(book) if book.ndim == 2 else 1, -1)
        found = Palette(node, node.inputs[0], wide, planes)
        if all(np.array_equal(array, graph.params[name]) for name, array in found.stored(graph, wide).items()):
            yield found


def one_step(graph: Graph, palette: Palette) -> bool:
    """False for integers with step sizes of their own in each channel: numbers that are quantized, and only stored as codes."""
    value = palette.lookup.output
    while len(users := graph.users[value]) == 1 and users[0].op in ("Reshape", "Transpose"):
        value = users[0].output
    return all(user.op != "DequantizeLinear" or graph.params[user.inputs[1]].size == 1 for user in users)


def weights_before(palette: Palette, graph: Graph, teacher: Graph) -> np.ndarray | None:
    """What the teacher has in place of the palette, [codebooks, elements]; None where it has no such weights."""
    moves, value = [], palette.lookup.output
    while len(users := graph.users[value]) == 1 and users[0].op in ("Reshape", "Transpose", "DequantizeLinear"):
        moves += [users[0].attr("perm")] if users[0].op == "Transpose" else []
        value = users[0].output
    layer = teacher.node.get(users[0].name) if len(users) == 1 else None
    index = users[0].inputs.index(value) if layer else 0
    weight = teacher.params.get(layer.inputs[index]) if layer and index < len(layer.inputs) else None
    if weight is None or weight.dtype.kind != "f" or weight.shape != graph.tensor(value).shape or len(moves) > 1:
        return None
    for perm in moves:
        weight = weight.transpose(np.argsort(perm))
    return weight.reshape(palette.codes.shape)


def pack(codes: np.ndarray, width: int) -> np.ndarray:
    """Numbers below 2^width, 8 / width to the byte, the first in the lowest bits."""
    if width == 8:
        return codes.astype(np.uint8)
    per_byte = 8 // width
    padded = np.pad(codes, (0, -len(codes) % per_byte)).reshape(-1, per_byte).astype(np.uint8)
    return np.asarray(np.bitwise_or.reduce(padded << np.arange(0, 8, width, dtype=np.uint8), axis=1), np.uint8)


def _planes(graph: Graph, value: str, offset: int) -> tuple[Plane, ...] | None:
    """Where the bits of codes lie; None for other expressions."""
    while value in graph.producer and graph.producer[value].op in PASSING:
        value = graph.producer[value].inputs[0]
    node = graph.producer.get(value)
    if node is None:
        whole = value in graph.params and graph.params[value].dtype == np.uint8
        return (Plane(value, 8, offset),) if whole and len(graph.users[value]) == 1 else None
    if node.op == "BitwiseOr":
        parts = [_planes(graph, one, offset) for one in node.inputs]
        return None if any(part is None for part in parts) else tuple(one for part in parts if part for one in part)
    if node.op == "BitShift" and node.attr("direction") == "LEFT":
        shift = graph.constant(node.inputs[1])
        return None if shift is None or shift.size != 1 else _planes(graph, node.inputs[0], offset + int(shift.reshape(-1)[0]))
    return _bits(graph, node, offset) if node.op == "BitwiseAnd" else None


def _bits(graph: Graph, node: Node, offset: int) -> tuple[Plane, ...] | None:
    """BitwiseAnd(BitShift(param, shifts), mask)."""
    mask, shifted = graph.constant(node.inputs[1]), graph.producer.get(node.inputs[0])
    if mask is None or mask.size != 1 or shifted is None or shifted.op != "BitShift" or shifted.inputs[0] not in graph.params:
        return None
    width = int(mask.reshape(-1)[0]).bit_length()
    known = width in (1, 2, 4) and len(graph.users[shifted.inputs[0]]) == 1
    return (Plane(shifted.inputs[0], width, offset),) if known else None
