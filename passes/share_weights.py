"""share-weights: store a layer's weights as small indices into a codebook."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from hwopt.analysis.covariance import channel_moments
from hwopt.errors import PassError
from hwopt.ir import Edit, Graph, Node, of_op, part
from hwopt.pipeline import Context, Pass, Phase, Refusal
from hwopt.target import Target
from passes._bias import correct_bias, mean_shift
from passes._packing import BIT_OPERATORS, decode, planes_of
from passes._palettes import Form, palette_of, rough_palette

OPS = ("Conv", "Gemm", "MatMul", "Gather")
LAYERS = OPS[:3]  # what multiplies its input by the weights
AXES = ("tensor", "channel-group")
SENSITIVITIES = ("activation", "uniform")
SCALES = ("none", "channel")
BITS = (2, 3, 4, 6, 8)  # worth considering for one codebook
GROUPED_BITS = (2, 3, 4)  # with more entries, codebooks per group cost more than they gain
VECTORS = 4  # weights in an entry of 8 bits worth considering: 2 bits each
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

    dim=4: an entry holds four neighbouring weights, so that bits=8 is 2 bits a weight; found by k-means of vectors, and held
    unpacked by libraries. scales=channel: every output channel's weights are divided by a scale of their own first.
    """

    name: ClassVar[str] = "share-weights"
    summary: ClassVar[str] = "store weights as 2 to 8 bit indices into k-means codebooks"
    saves: ClassVar[frozenset[str]] = frozenset({"bytes"})  # kernels read the weights looked up
    phase: ClassVar[Phase] = Phase.SHARE
    knobs: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {"sensitivity": SENSITIVITIES, "group": GROUPS, "scales": SCALES}
    )
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"axis": AXES, "sensitivity": SENSITIVITIES, "scales": SCALES}
    )

    bits: int = 4
    axis: str = "tensor"
    group: int = 0  # output channels per codebook, for axis=channel-group
    sensitivity: str = "activation"
    dim: int = 1  # weights in an entry
    scales: str = "none"  # or channel

    def run(self, graph: Graph, ctx: Context) -> Graph:
        self.check()
        self.check_site(graph)
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
            self._share(edit, graph, nodes, weight, moments, ctx.rough)
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
            found += [cls((node.name,), 8, dim=VECTORS)] if node.op in LAYERS else []
            yield from (one for one in found if not one._reason(graph, node))

    def turned(self, **knobs: Any) -> Pass:
        """One codebook for the whole tensor has no group size to turn, and groups have no scales."""
        moot = "scales" if self.group else "group"
        return super().turned(**{name: value for name, value in knobs.items() if name != moot})

    def check(self) -> None:
        super().check()
        if not 2 <= self.bits <= 8:
            raise PassError(f"bits={self.bits} is not between 2 and 8", place=str(self))
        if self.group < 0 or self.dim < 1:
            hint = "write group=8, dim=4, or leave them out"
            raise PassError(f"group={self.group},dim={self.dim} is no size", place=str(self), hint=hint)
        if (self.group > 0) != (self.axis == "channel-group"):
            raise PassError("group (output channels per codebook) and axis=channel-group go together", place=str(self))
        if self.group and (self.dim > 1 or self.scales != "none"):
            raise PassError("dim and scales belong to one codebook for the tensor", place=str(self), hint="leave group out")

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
        if node.op == "Gather" and self.scales != "none":
            return "an embedding has no output channels"
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
        if weight.size % self.dim:
            return f"vectors of {self.dim} do not divide {weight.size} weights"
        if self.scales != "none" and weight.ndim != 2 and node.op != "Conv":
            return f"weights with {weight.ndim} dimensions have no output channels to scale"
        return self._too_small(weight, _channels(graph, node))

    def _takes(self, node: Node, weight: str) -> bool:
        """True if this reader of the weight is one whose weights are to be shared."""
        takes = LAYERS if self.group or self.scales != "none" else OPS
        return self.covers(node) and node.op in takes and _weight(node) == weight

    def _too_small(self, weight: np.ndarray, channels: int) -> str:
        """Why it would not shrink, if so. Same formula as what `decode` emits, with an upper bound for the constants."""
        indices = sum(math.ceil(weight.size // self.dim * width / 8) for width in planes_of(self.bits))
        entries = (channels // self.group if self.group else 1) * 2**self.bits * self.dim
        numbers = entries + (channels if self.scales != "none" else 0)
        after = indices + numbers * weight.dtype.itemsize + OVERHEAD_BYTES
        return f"indices and codebook need {after} bytes, the weights {weight.nbytes}" if after >= weight.nbytes else ""

    def _moments(self, graph: Graph, nodes: list[Node], ctx: Context) -> Mapping[str, np.ndarray]:
        if self.sensitivity == "uniform" or ctx.calibration is None or not nodes:
            return {}
        if ctx.rough:
            return {node.name: np.ones((2, _inputs(graph, node))) for node in nodes if node.op in LAYERS}
        others = [node for node in of_op(graph, *LAYERS) if node.inputs[1] in graph.params]
        return channel_moments(graph, ctx.calibration, [node for node in nodes if node.op in LAYERS], others)

    def _share(
        self, edit: Edit, graph: Graph, nodes: list[Node], weight: str, moments: Mapping[str, np.ndarray], rough: bool
    ) -> None:
        node, array = nodes[0], graph.params[weight]
        last = _channels_last(node)
        channels = _channels(graph, node) if self.group else 0
        groups = int(node.attr("group", 1)) if node.op == "Conv" else 1
        form = Form(self.bits, channels // self.group if self.group else 1, self.dim, self.scales != "none")
        moment = moments.get(node.name)
        found = rough_palette(array, form, last) if rough else palette_of(array, moment, form, last, groups)
        value = decode(edit, node, array.shape, found.books, found.indices, self.bits, last)
        if found.scales is not None:
            scales = edit.param(part(node, "scales"), found.scales)
            value = edit.emit("Mul", [value, scales], name=part(node, "decode"), like=node)
        edit.forward(weight, value)
        for reader in (one for one in nodes if one.name in moments):
            change = found.weights(array.shape, last) - array
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


def _inputs(graph: Graph, node: Node) -> int:
    """Input channels of a layer."""
    shape = graph.params[_weight(node)].shape
    return shape[1] * int(node.attr("group", 1)) if node.op == "Conv" else shape[-1 if node.attr("transB", 0) else -2]


def _channels(graph: Graph, node: Node) -> int:
    return graph.params[_weight(node)].shape[-1 if _channels_last(node) else 0]
