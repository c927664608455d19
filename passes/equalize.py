"""equalize: the channels between two layers get the same range of weights on both sides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwopt.ir import Graph, Node, of_op
from hwopt.pipeline import Context, Pass, Phase, Refusal
from hwopt.target import Target
from passes._channel_scales import Rescaling, Slot, data_axis, givers, taker

OPS = ("Conv", "Gemm", "MatMul")
LAYERS = ("Conv", "Gemm", "MatMul")  # that end a chain: norms have no range to share
SWEEPS, SETTLED = 50, 1e-3


@dataclass(frozen=True)
class Equalize(Pass):
    """W2 relu(W1 x + b) -> (W2 diag(s)) relu(diag(1/s) W1 x + b / s), s_i = sqrt(max|W1_i| / max|W2_i|).

    Exact up to rounding, needs no data, and makes one scale per tensor enough for more channels. A chain is two layers with
    constant weights, nothing between them but what lets a positive factor pass (Relu, LeakyRelu, pools; not Clip, whose limits
    stay), and nobody else who reads in between. `site` names the second layer. Chains that touch are swept until they settle.
    Plans have it in front of quantize, where the measured error of the second layer gets smaller.
    Nagel et al., "Data-free quantization through weight equalization and bias correction", ICCV 2019, section 4.1.
    """

    name: ClassVar[str] = "equalize"
    summary: ClassVar[str] = "equal weight ranges on both sides of the channels between two layers (before quantize)"
    phase: ClassVar[Phase] = Phase.SHARE
    exact: ClassVar[bool] = True
    order: ClassVar[int] = 10
    prepares: ClassVar[Phase | None] = Phase.QUANTIZE

    def run(self, graph: Graph, ctx: Context) -> Graph:
        self.check_site(graph)
        chains = []
        for node in graph.nodes:
            if node.op in OPS and self.covers(node):
                found = _chain(graph, node)
                if isinstance(found, str):
                    ctx.refuse(self, node, found)
                else:
                    chains.append(found)
        scales = Rescaling(graph)
        for _ in range(SWEEPS):
            changes = [_balance(scales, before, after) for before, after in chains]
            if max(changes, default=0.0) < SETTLED:
                break
        edit = graph.edit()
        scales.write(edit)
        return edit.finish(str(self))

    @classmethod
    def candidates(cls, graph: Graph, target: Target) -> Iterator[Pass | Refusal]:  # noqa: ARG003
        for node in of_op(graph, *OPS):
            found = _chain(graph, node)
            yield Refusal(cls.name, node.name, found) if isinstance(found, str) else cls((node.name,))


def _chain(graph: Graph, node: Node) -> tuple[list[Slot], Slot] | str:
    """What is divided, the first layer's weights first, and what is multiplied; or why there is no chain."""
    if any(by.partition("{")[0] == Equalize.name for by in node.history):
        return "is equalized already"
    after = taker(graph, node)
    if isinstance(after, str):
        return after
    shape = graph.tensor(node.inputs[0]).shape or ()
    channels = shape[data_axis(node)] if shape else None
    if not isinstance(channels, int):
        return "the number of its input channels is not known"
    before = givers(graph, node.inputs[0], data_axis(node), channels, (node.name,))
    if isinstance(before, str):
        return before
    ends = graph.node[before[0][0]]
    return (before, after) if ends.op in LAYERS else f"{ends.name} is a {ends.op}, no layer"


def _balance(scales: Rescaling, before: list[Slot], after: Slot) -> float:
    """Give both sides the same ranges; returns the largest change, as |log s|."""
    channels = scales.graph.params[scales.graph.node[before[0][0]].inputs[before[0][1]]].shape[before[0][2]]
    first, second = (_ranges(scales, slot, channels) for slot in (before[0], after))
    used = (first > 0) & (second > 0)
    factors = np.ones(channels)
    factors[used] = np.sqrt(first[used] / second[used])
    change = float(np.abs(np.log(factors)).max(initial=0.0))
    if change >= SETTLED:
        scales.multiply(before, 1 / factors)
        scales.multiply([after], factors)
    return change


def _ranges(scales: Rescaling, slot: Slot, channels: int) -> np.ndarray:
    """The largest |weight| of each channel; depthwise layers may have several filters for one."""
    array = np.moveaxis(scales.array(scales.graph.node[slot[0]], slot[1]), slot[2], 0)
    largest: np.ndarray = np.abs(array.reshape(channels, -1)).max(1)
    return largest
