"""share-weights: store a layer's weights as small indices into a codebook."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from hwopt.analysis.covariance import channel_moments
from hwopt.analysis.memo import remembered
from hwopt.errors import PassError
from hwopt.ir import Edit, Graph, Node, frozen, of_op
from hwopt.pipeline import Context, Pass, Phase, Refusal
from hwopt.target import Target
from passes._bias import correct_bias, mean_shift
from passes._kmeans import CELLS, nearest, optimal_codebook
from passes._packing import BIT_OPERATORS, decode, planes_of

OPS = ("Conv", "Gemm", "MatMul", "Gather")
LAYERS = OPS[:3]  # what multiplies its input by the weights
AXES = ("tensor", "channel-group")
SENSITIVITIES = ("activation", "uniform")
BITS = (2, 3, 4, 6, 8)  # worth considering for one codebook
GROUPED_BITS = (2, 3, 4)  # with more entries, codebooks per group cost more than they gain
GROUPS = (32, 16, 8)  # output channels per codebook, on the target's granule; the first that divides them is considered
OVERHEAD_BYTES = 96  # shifts, masks and shapes of the decoding nodes


@dataclass(frozen=True)
class ShareWeights(Pass):
    """y = conv(x, W) -> y = conv(x, Gather(codebook, indices)), with 2^bits entries per tensor or per group of output channels.

    The codebook is the optimal one-dimensional k-means of the weights. With calibration data each weight counts by the mean
    square of its input channel, and the bias takes back the mean error of the outputs; without data, or with
    sensitivity=uniform, all count alike. Indices lie packed in uint8: a 6-bit one as a plane of 4 bits and
    a plane of 2 bits, each split by BitShift and BitwiseAnd. Applies to constant weights, embedding tables included, that nobody
    outside of `site` reads and that shrink. Han et al. 2016 ("Deep compression"); decoded, they compute as before.
    """

    name: ClassVar[str] = "share-weights"
    summary: ClassVar[str] = "store weights as 2 to 8 bit indices into k-means codebooks"
    saves: ClassVar[frozenset[str]] = frozenset({"bytes"})  # kernels read the weights looked up
    phase: ClassVar[Phase] = Phase.SHARE
    knobs: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({"sensitivity": SENSITIVITIES, "group": GROUPS})

    bits: int = 4
    axis: str = "tensor"
    group: int = 0  # output channels per codebook, for axis=channel-group
    sensitivity: str = "activation"

    def run(self, graph: Graph, ctx: Context) -> Graph:
        self._check(graph)
        chosen: dict[str, list[Node]] = {}  # weight -> the nodes that read it
        for node in graph.nodes if self.site else _takers(graph):
            if not self.covers(node) or (node.op not in OPS and node.name not in self.site):
                continue
            reason = self._reason(graph, node)
            if reason:
                ctx.refuse(self, node, reason)
            else:
                chosen.setdefault(_weight(node), []).append(node)
        edit, moments = graph.edit(), self._moments(graph, [node for nodes in chosen.values() for node in nodes], ctx)
        for weight, nodes in chosen.items():
            self._share(edit, graph, nodes, weight, moments)
        return edit.finish(str(self))

    @classmethod
    def candidates(cls, graph: Graph, target: Target) -> Iterator[Pass | Refusal]:
        for node in _takers(graph):
            reason = cls((node.name,), min(BITS))._reason(graph, node)
            if reason:
                yield Refusal(cls.name, node.name, reason)
                continue
            found = [cls((node.name,), bits) for bits in BITS]
            channels, granule = _channels(graph, node), target.granule_of("float32")
            sizes = (math.ceil(size / granule) * granule for size in GROUPS)
            group = next((size for size in sizes if channels % size == 0 and channels > size), 0)
            grouped = GROUPED_BITS if group and node.op in LAYERS else ()
            found += [cls((node.name,), bits, "channel-group", group) for bits in grouped]
            yield from (one for one in found if not one._reason(graph, node))

    def turned(self, **knobs: Any) -> Pass:
        """One codebook for the whole tensor has no group size to turn."""
        return super().turned(**{name: value for name, value in knobs.items() if name != "group" or self.group})

    def _check(self, graph: Graph) -> None:
        self.check_site(graph)
        if not 2 <= self.bits <= 8:
            raise PassError(f"bits={self.bits} is not between 2 and 8", place=str(self))
        for option, value, known in (("axis", self.axis, AXES), ("sensitivity", self.sensitivity, SENSITIVITIES)):
            if value not in known:
                raise PassError(f"unknown {option} {value}", place=str(self), hint="known: " + ", ".join(known))
        if (self.group > 0) != (self.axis == "channel-group"):
            raise PassError("group (output channels per codebook) and axis=channel-group go together", place=str(self))

    def _reason(self, graph: Graph, node: Node) -> str:
        """Why this node's weights are not shared; empty if they can be."""
        if node.op not in OPS or node.domain:
            return f"is a {node.op}; share-weights takes {', '.join(OPS)}"
        name = _weight(node)
        weight = graph.constant(name)
        if weight is None:
            return "weights are not constant"
        if node.op == "Gather" and (self.group or not _is_table(graph, node)):
            return "an embedding has no output channels" if self.group else "does not look up the rows of a table"
        others = [one.name for one in graph.users[name] if not self._takes(one, name)]
        if others or name in graph.outputs:
            return f"weight is shared with {', '.join(others) or 'the outputs'}"
        if weight.dtype.kind != "f":
            return f"weights are {weight.dtype}"
        if planes_of(self.bits) != (8,) and graph.opsets.get("", 0) < BIT_OPERATORS:
            return f"indices of {self.bits} bits need opset {BIT_OPERATORS}"
        if self.group and (weight.ndim < 2 or (node.op != "Conv" and weight.ndim != 2)):
            return f"weights with {weight.ndim} dimensions have no output channels to group"
        if self.group and _channels(graph, node) % self.group:
            return f"group {self.group} does not divide {_channels(graph, node)} output channels"
        return self._too_small(weight, _channels(graph, node) // self.group if self.group else 1)

    def _takes(self, node: Node, weight: str) -> bool:
        """True if this reader of the weight is one whose weights are to be shared."""
        return self.covers(node) and node.op in (LAYERS if self.group else OPS) and _weight(node) == weight

    def _too_small(self, weight: np.ndarray, codebooks: int) -> str:
        """Why it would not shrink, if so. Same formula as what `_decode` emits, with an upper bound for the constants."""
        indices = sum(math.ceil(weight.size * width / 8) for width in planes_of(self.bits))
        after = indices + codebooks * 2**self.bits * weight.dtype.itemsize + OVERHEAD_BYTES
        return f"indices and codebook need {after} bytes, the weights {weight.nbytes}" if after >= weight.nbytes else ""

    def _moments(self, graph: Graph, nodes: list[Node], ctx: Context) -> Mapping[str, np.ndarray]:
        if self.sensitivity == "uniform" or ctx.calibration is None or not nodes:
            return {}
        others = [node for node in of_op(graph, *LAYERS) if node.inputs[1] in graph.params]
        return channel_moments(graph, ctx.calibration, [node for node in nodes if node.op in LAYERS], others)

    def _share(self, edit: Edit, graph: Graph, nodes: list[Node], weight: str, moments: Mapping[str, np.ndarray]) -> None:
        node, array = nodes[0], graph.params[weight]
        last = _channels_last(node)
        channels = _channels(graph, node) if self.group else 0
        groups = int(node.attr("group", 1)) if node.op == "Conv" else 1
        codebooks = channels // self.group if self.group else 1
        books, indices = shared(array, moments.get(node.name), self.bits, codebooks, last, groups)
        edit.forward(weight, decode(edit, node, array.shape, books, indices, self.bits, last))
        for reader in (one for one in nodes if one.name in moments):
            change = unpacked(books, indices, array.shape, last) - array
            correct_bias(edit, graph, reader, mean_shift(reader, change, moments[reader.name][0]))


def _weight(node: Node) -> str:
    """The weights' name: a Gather looks up rows of its first input."""
    return node.inputs[0] if node.op == "Gather" else node.inputs[1]


def _is_table(graph: Graph, node: Node) -> bool:
    """An embedding: rows of a constant matrix."""
    table = graph.constant(node.inputs[0])
    return table is not None and table.ndim == 2 and table.dtype.kind == "f" and node.attr("axis", 0) == 0


def _takers(graph: Graph) -> Iterator[Node]:
    """The nodes that have weights to share; most Gathers of a model handle shapes."""
    return (node for node in of_op(graph, *OPS) if node.op != "Gather" or _is_table(graph, node))


def _channels_last(node: Node) -> bool:
    """Where the output channels are: the last axis of MatMul's weights, the first of Conv's and of Gemm's transposed ones."""
    return node.op != "Conv" and not node.attr("transB", 0)


def _channels(graph: Graph, node: Node) -> int:
    return graph.params[_weight(node)].shape[-1 if _channels_last(node) else 0]


@remembered
def shared(
    weight: np.ndarray, moments: np.ndarray | None, bits: int, codebooks: int, channels_last: bool, groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codebooks [codebooks, 2^bits] and indices uint8 [codebooks, elements / codebooks], output channels first.

    One codebook keeps the weights' own order. `moments` is [2, input channels], mean and mean square (which serves better
    than the variance, measured on two networks). `groups` is that of a convolution.
    """
    importance = None if moments is None else _importance(weight, moments[1], channels_last, groups)
    swap = channels_last and codebooks > 1
    rows = (weight.T if swap else weight).reshape(codebooks, -1)
    weights = None if importance is None else (importance.T if swap else importance).reshape(codebooks, -1)
    cells = CELLS if codebooks == 1 else CELLS // 4
    books = np.zeros((codebooks, 2**bits), weight.dtype)
    indices = np.zeros(rows.shape, np.uint8)
    for one in range(codebooks):
        best = optimal_codebook(rows[one], None if weights is None else weights[one], 2**bits, cells)
        books[one] = np.pad(best, (0, 2**bits - len(best)), mode="edge")
        indices[one] = nearest(rows[one], books[one])
    return frozen(books), frozen(indices)


def _importance(weight: np.ndarray, squares: np.ndarray, channels_last: bool, groups: int) -> np.ndarray:
    """Mean square of the input channel of every weight, in the weight's shape."""
    if channels_last:
        return np.broadcast_to(squares[:, None], weight.shape)
    rows = np.repeat(squares.reshape(groups, -1), len(weight) // groups, axis=0)
    return np.broadcast_to(rows.reshape(*rows.shape, *(1,) * (weight.ndim - 2)), weight.shape)


def unpacked(books: np.ndarray, indices: np.ndarray, shape: tuple[int, ...], channels_last: bool) -> np.ndarray:
    """The weights that `_decode` computes."""
    values = np.take_along_axis(books, indices.astype(np.int64), axis=1)
    return values.reshape(shape[::-1]).T if channels_last and len(books) > 1 else values.reshape(shape)
