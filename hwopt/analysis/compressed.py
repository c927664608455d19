"""Weights that a graph stores as small numbers or as indices into codebooks, in the form that kernels decode.

Two forms are recognized behind a Conv, Gemm or MatMul, in any mixture of Reshape and Transpose:

    DequantizeLinear(q, scale, zero point)    2, 4 and 8 bits; per tensor, per output channel, or in blocks along k
    Gather(codebook, indices)                 one codebook; GatherElements: one for each group of output channels
    Mul(Gather(codebook, indices), scale)     one codebook, and a scale for each output channel
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hwopt.analysis.constant import constant
from hwopt.analysis.memo import remembered
from hwopt.ir import Graph, Node, bits_of

MOVES = ("Reshape", "Transpose")
LOOKUPS = ("Gather", "GatherElements")
INTEGERS = ("int8", "uint8", "int4", "uint4", "int2", "uint2")


@dataclass(frozen=True, eq=False)
class Compressed:
    """W[n, k] = (value of codes[n, k] - zeros[n, k / block]) * scales[n, k / block].

    `codes` are uint8 [n, k] of `bits` bits, k being input channels x taps in ONNX's order. Values stand in `books`
    [groups of output channels, 2^bits]; without books a code is a signed number (two's complement). `scales` are [n, blocks]
    or None, `zeros` the same or None; `block` neighbours along k share them. `nodes` are what decodes them in the graph.
    """

    codes: np.ndarray
    bits: int
    books: np.ndarray | None
    scales: np.ndarray | None
    zeros: np.ndarray | None
    block: int
    nodes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """As a kernel reads them."""
        rest = [one.size * 4 for one in (self.scales, self.zeros) if one is not None]
        return -(-self.codes.size * self.bits // 8) + sum(rest) + (0 if self.books is None else self.books.size * 4)

    @property
    def per_channel(self) -> bool:
        """True if every output channel has one scale and no zero point: the scale can follow the sum."""
        return self.scales is not None and self.scales.shape[1] == 1 and self.zeros is None


@remembered
def compressed(graph: Graph, node: Node) -> Compressed | str:
    """The coded weights of a Conv, Gemm or MatMul, or why there is nothing to decode in its kernel."""
    value = node.inputs[1]
    source = graph.producer.get(value)
    if value in graph.params or source is None:
        return "its weights are stored as they are"
    swap = _swapped(graph, source)
    if swap:
        source = graph.producer.get(source.inputs[0])
    nodes = (swap.name,) if swap else ()
    rows = node.op == "Conv" or bool(node.attr("transB", 0))  # output channels first
    rows = rows != bool(swap)
    if source is not None and source.op == "DequantizeLinear":
        return _dequantized(graph, source, rows, nodes)
    scales, value = (None, source.output) if source is not None else (None, "")
    if source is not None and source.op == "Mul" and not nodes:
        scales, value = _channel_scales(graph, source, rows)
        nodes = (source.name,)
    found = _looked_up(graph, value, rows) if value else None
    if found is None:
        return "its weights are computed in another way"
    codes, books, names = found
    block = 0 if scales is None else codes.shape[1]
    return Compressed(codes, _bits(books), books.astype(np.float32), scales, None, block, (*nodes, *names))


def _channel_scales(graph: Graph, node: Node, rows: bool) -> tuple[np.ndarray | None, str]:
    """Scales [n, 1] that a product has for its output channels, and what it multiplies; nothing for other products."""
    dims = graph.tensor(node.output).dims
    channel = 0 if rows else len(dims) - 1
    for index, value in enumerate(node.inputs):
        array = graph.constant(value)
        if array is not None and array.shape == tuple(dim if axis == channel else 1 for axis, dim in enumerate(dims)):
            return array.reshape(-1, 1).astype(np.float32), node.inputs[1 - index]
    return None, ""


def _swapped(graph: Graph, source: Node) -> Node | None:
    """A transposition of a matrix behind its dequantization."""
    before = graph.producer.get(source.inputs[0]) if source.op == "Transpose" else None
    two = len(graph.tensor(source.output).shape or ()) == 2
    return source if before is not None and before.op == "DequantizeLinear" and two else None


def _bits(books: np.ndarray) -> int:
    return max(1, math.ceil(math.log2(books.shape[1])))


def _matrix(array: np.ndarray, rows: bool) -> np.ndarray | None:
    """[n, k] of weights with the output channels first or last; None where they have no such form."""
    if rows:
        return array.reshape(len(array), -1)
    squeezed = array.reshape(array.shape[-2:]) if array.ndim >= 2 and math.prod(array.shape[:-2]) == 1 else None
    return None if squeezed is None else squeezed.T


def _dequantized(graph: Graph, node: Node, rows: bool, nodes: tuple[str, ...]) -> Compressed | str:
    kind = graph.tensor(node.inputs[0])
    if kind.dtype not in INTEGERS or graph.tensor(node.output).dtype != "float32" or not kind.static:
        return f"its weights are {kind.dtype}"
    scale = graph.constant(node.inputs[1])
    named = len(node.inputs) > 2 and node.inputs[2] != ""
    zero = graph.constant(node.inputs[2]) if named else None
    if scale is None or (named and zero is None):
        return "its scales are computed"
    places = _scale_places(kind.dims, scale, node, rows)
    if isinstance(places, str):
        return places
    scales, block = places
    array = graph.constant(node.inputs[0])
    if array is None:
        found = _looked_up(graph, node.inputs[0], rows)
        if found is None or (zero is not None and np.any(zero.astype(np.int64))):
            return "its weights are computed in another way"
        codes, books, names = found
        return Compressed(codes, _bits(books), books.astype(np.float32), scales, None, block, (*nodes, node.name, *names))
    matrix = _matrix(array, rows)
    if matrix is None:
        return "its weights are no matrix"
    bits = bits_of(kind.dtype)
    middle = 2 ** (bits - 1) if kind.dtype.startswith("u") else 0  # unsigned numbers as signed ones
    zeros = np.full_like(scales, -middle)
    if zero is not None:
        given = _scale_places(kind.dims, zero.astype(np.float32) - middle, node, rows)
        zeros = zeros if isinstance(given, str) else given[0]
    codes = (matrix.astype(np.int16) - middle).astype(np.uint8) & np.uint8(2**bits - 1)
    return Compressed(codes, bits, None, scales, zeros if np.any(zeros) else None, block, (*nodes, node.name))


def _scale_places(dims: tuple[int, ...], scale: np.ndarray, node: Node, rows: bool) -> tuple[np.ndarray, int] | str:
    """Scales (or zero points) as [n, blocks] and the block along k."""
    channel = 0 if rows else len(dims) - 1
    count, depth = dims[channel], math.prod(dims) // max(dims[channel], 1)
    axis = node.attr("axis", 1) % len(dims)
    if scale.size == 1:
        return np.broadcast_to(scale.reshape(1, 1), (count, 1)).astype(np.float32), depth
    if not node.attr("block_size", 0):
        return (scale.reshape(-1, 1).astype(np.float32), depth) if axis == channel else "its scales differ along k"
    if axis == channel or math.prod(dims[2:]) != 1:
        return "its blocks do not lie along k"
    matrix = scale.reshape(scale.shape[:2])
    return np.ascontiguousarray(matrix if rows else matrix.T).astype(np.float32), int(node.attr("block_size"))


def _looked_up(graph: Graph, value: str, rows: bool) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]] | None:
    """Codes [n, k], codebooks [groups, entries] and the nodes from the lookup on; None for other expressions."""
    moves: list[Node] = []
    node = graph.producer.get(value)
    while node is not None and node.op in MOVES:
        moves.insert(0, node)
        node = graph.producer.get(node.inputs[0])
    books = graph.constant(node.inputs[0]) if node is not None and node.op in LOOKUPS else None
    if node is None or books is None or books.shape[-1] > 256:
        return None
    shared = books.ndim == 1 and node.op == "Gather" and node.attr("axis", 0) == 0
    grouped = books.ndim == 2 and node.op == "GatherElements" and node.attr("axis", 0) in (1, -1)
    indices = constant(graph, node.inputs[1]) if shared or grouped else None
    if indices is None or (indices.size and indices.min() < 0):
        return None
    codes = _matrix(_moved(graph, indices.astype(np.uint8), moves), rows)
    groups = np.broadcast_to(np.arange(len(indices)).reshape(-1, *(1,) * (indices.ndim - 1)), indices.shape)
    if codes is None or (grouped and not _by_channels(_matrix(_moved(graph, groups, moves), rows), len(books))):
        return None
    entries = 2 ** _bits(books.reshape(-1, books.shape[-1]))
    full = np.pad(books.reshape(-1, books.shape[-1]), ((0, 0), (0, entries - books.shape[-1])), mode="edge")
    return np.ascontiguousarray(codes), full, (node.name, *(one.name for one in moves))


def _by_channels(groups: np.ndarray | None, count: int) -> bool:
    """True if equal shares of the output channels, in order, have a codebook each."""
    if groups is None or len(groups) % count:
        return False
    return bool((groups == np.repeat(np.arange(count), len(groups) // count)[:, None]).all())


def _moved(graph: Graph, array: np.ndarray, moves: list[Node]) -> np.ndarray:
    for node in moves:
        if node.op == "Reshape":
            array = array.reshape(graph.tensor(node.output).dims)
        else:
            array = array.transpose(node.attr("perm", tuple(reversed(range(array.ndim)))))
    return array
