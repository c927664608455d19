"""smooth: large channels of activations are made smaller and their weights larger, so that 8 bits serve both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwopt.analysis.memo import remembered
from hwopt.analysis.rows import Rows, activation_rows
from hwopt.errors import PassError
from hwopt.ir import Graph, Node, of_op
from hwopt.pipeline import Context, Pass, Phase, Refusal
from hwopt.target import Target
from passes._channel_scales import Rescaling, data_axis, givers, matrix, move, readers_of, taker

OPS = ("Conv", "Gemm", "MatMul")
STRENGTHS = tuple(step / 10 for step in range(3, 10))  # around the paper's 0.5 and its 0.6 to 0.9 for harder models
GAIN = 0.8  # of the error: what a Mul of its own must reach to be worth its time


@dataclass(frozen=True)
class Smooth(Pass):
    """x W -> (x / s) (diag(s) W), s_j = max|x_j|^a / max|W_j|^(1 - a): exact up to rounding, before quantize.

    The migration strength a is searched for every activation by the error of the outputs that int8 makes (one scale for the
    activation, one per output channel for the weights), on rows of the calibration data; nothing is moved where nothing is
    gained. 1 / s goes into the norm, layer or constants that compute x if only these layers read it, else into a Mul in front
    of them, unless insert=false. `strength` fixes a. Of convolutions larger than 1 x 1 every tap counts alone in the search.
    Plans have it in front of quantize, for all layers that read a value, where the measured error of a layer gets smaller.
    Xiao et al., "SmoothQuant: accurate and efficient post-training quantization for large language models", ICML 2023.
    """

    name: ClassVar[str] = "smooth"
    summary: ClassVar[str] = "move the range of activations into weights, strength searched per layer (before quantize)"
    phase: ClassVar[Phase] = Phase.SHARE
    exact: ClassVar[bool] = True
    order: ClassVar[int] = 10
    prepares: ClassVar[Phase | None] = Phase.QUANTIZE

    strength: float = 0.0  # a; 0: searched
    insert: bool = True  # a Mul where nothing in front takes the factors

    def check(self) -> None:
        super().check()
        if not 0 <= self.strength < 1:
            raise PassError(f"strength={self.strength} is not between 0 and 1", place=str(self))

    def run(self, graph: Graph, ctx: Context) -> Graph:
        self.check()
        self.check_site(graph)
        if ctx.calibration is None:
            raise PassError("the ranges of activations need calibration data", place=str(self), hint="give some with --calibrate")
        groups = readers_of(self._layers(graph, ctx))
        if not groups:
            return graph
        seen = {} if ctx.rough else activation_rows(graph, ctx.calibration, _axes(groups), _axes(readers_of(_all(graph))))
        scales = Rescaling(graph)
        for value, nodes in groups.items():
            channels = len(matrix(graph, nodes[0]))
            before = givers(graph, value, data_axis(nodes[0]), channels, [node.name for node in nodes])
            gain = 1.0 if isinstance(before, list) else GAIN
            factors = np.ones(channels) if ctx.rough else self._factors(graph, nodes, seen[value], gain)
            if factors is None:
                ctx.refuse(self, nodes[0], "no migration strength makes the outputs of int8 better")
            elif isinstance(before, str) and not self.insert:
                ctx.refuse(self, nodes[0], f"nothing in front takes its factors: {before}")
            else:
                move(scales, value, nodes, factors)
        edit = graph.edit()
        scales.write(edit)
        return edit.finish(str(self))

    def _layers(self, graph: Graph, ctx: Context) -> list[Node]:
        found = []
        for node in graph.nodes:
            if node.op not in OPS or not self.covers(node):
                continue
            if reason := _reason(graph, node):
                ctx.refuse(self, node, reason)
            else:
                found.append(node)
        return found

    @classmethod
    def candidates(cls, graph: Graph, target: Target) -> Iterator[Pass | Refusal]:  # noqa: ARG003
        """One for each value: all layers that read it share its factors."""
        for node in of_op(graph, *OPS):
            if reason := _reason(graph, node):
                yield Refusal(cls.name, node.name, reason)
        for nodes in readers_of(_all(graph)).values():
            yield cls(tuple(node.name for node in nodes))

    def _factors(self, graph: Graph, nodes: list[Node], rows: Rows, gain: float) -> np.ndarray | None:
        """s [channels] with the least error, or None if that is not below `gain` times the error without."""
        if self.strength:
            return factors_of(rows.largest, np.abs(_weights(graph, nodes)).max(1), self.strength)
        factors, share = _best_factors(graph, tuple(node.name for node in nodes), rows)
        return factors if share < gain else None


def _axes(groups: Mapping[str, list[Node]]) -> list[tuple[str, int]]:
    """Each value, and where its channels are."""
    return [(value, data_axis(nodes[0])) for value, nodes in groups.items()]


def _all(graph: Graph) -> list[Node]:
    return [node for node in of_op(graph, *OPS) if not _reason(graph, node)]


def _reason(graph: Graph, node: Node) -> str:
    """Why a layer stays as it is; empty if it can be smoothed."""
    if any(by.partition("{")[0] == Smooth.name for by in node.history):
        return "is smoothed already"
    if node.op == "Conv" and node.attr("group", 1) > 1:
        return "its channels meet in no sum: scales per channel serve them already"
    slot = taker(graph, node)
    return slot if isinstance(slot, str) else ""


@remembered
def _best_factors(graph: Graph, names: tuple[str, ...], rows: Rows) -> tuple[np.ndarray, float]:
    """s [channels] for these layers, and what is left of the error."""
    weights = _weights(graph, [graph.node[name] for name in names])
    tried = [factors_of(rows.largest, np.abs(weights).max(1), strength) for strength in STRENGTHS]
    errors = [int8_error(rows, weights, factors) for factors in tried]
    least = int(np.argmin(errors))
    return tried[least], errors[least] / max(int8_error(rows, weights, np.ones(len(weights))), 1e-30)


def _weights(graph: Graph, nodes: list[Node]) -> np.ndarray:
    return np.concatenate([matrix(graph, node) for node in nodes], axis=1)


def factors_of(activations: np.ndarray, weights: np.ndarray, strength: float) -> np.ndarray:
    """s [channels] from the largest magnitudes of both sides; 1 where a channel is zero on either."""
    used = (activations > 0) & (weights > 0)
    factors = np.ones(len(activations))
    factors[used] = activations[used].astype(np.float64) ** strength / weights[used] ** (1 - strength)
    factors[used] /= np.exp(np.log(factors[used]).mean()) if used.any() else 1.0
    return np.clip(factors, 1e-3, 1e3)


def int8_error(rows: Rows, weights: np.ndarray, factors: np.ndarray) -> float:
    """Squared error of the outputs of x / s and diag(s) W in 8 bits, relative; weights are [channels, outputs]."""
    scaled = rows.data / factors.astype(np.float32)
    low, high = min(float((rows.low / factors).min()), 0.0), max(float((rows.high / factors).max()), 0.0)
    step = max(high - low, 1e-30) / 255
    changed = weights * factors[:, None]
    size = np.maximum(np.abs(changed).max(0), 1e-30) / 127
    want = rows.data @ weights.astype(np.float32)
    found = (np.rint(scaled / step) * step).astype(np.float32) @ (np.rint(changed / size) * size).astype(np.float32)
    return float(np.square(want - found).sum() / max(float(np.square(want).sum()), 1e-30))
