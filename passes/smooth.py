"""smooth: large channels of activations are made smaller and their weights larger, so that 8 bits serve both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwopt.analysis.rows import Rows, activation_rows
from hwopt.errors import PassError
from hwopt.ir import Graph, Node
from hwopt.pipeline import Context, Pass, Phase
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
    Xiao et al., "SmoothQuant: accurate and efficient post-training quantization for large language models", ICML 2023.
    """

    name: ClassVar[str] = "smooth"
    summary: ClassVar[str] = "move the range of activations into weights, strength searched per layer (before quantize)"
    phase: ClassVar[Phase] = Phase.SHARE
    exact: ClassVar[bool] = True
    order: ClassVar[int] = 10

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
        seen = activation_rows(graph, ctx.calibration, [(value, data_axis(nodes[0])) for value, nodes in groups.items()])
        scales = Rescaling(graph)
        for value, nodes in groups.items():
            before = givers(graph, value, data_axis(nodes[0]), len(seen[value].low), [node.name for node in nodes])
            factors = self._factors(graph, nodes, seen[value], 1.0 if isinstance(before, list) else GAIN)
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
            slot = taker(graph, node)
            reason = slot if isinstance(slot, str) else ""
            if node.op == "Conv" and node.attr("group", 1) > 1:
                reason = "its channels meet in no sum: scales per channel serve them already"
            if any(by.partition("{")[0] == self.name for by in node.history):
                reason = "is smoothed already"
            if reason:
                ctx.refuse(self, node, reason)
            else:
                found.append(node)
        return found

    def _factors(self, graph: Graph, nodes: list[Node], rows: Rows, gain: float) -> np.ndarray | None:
        """s [channels] with the least error, or None if that is not below `gain` times the error without."""
        weights = np.concatenate([matrix(graph, node) for node in nodes], axis=1)
        tried = [factors_of(rows.largest, np.abs(weights).max(1), a) for a in ((self.strength,) if self.strength else STRENGTHS)]
        if self.strength:
            return tried[0]
        errors = [int8_error(rows, weights, factors) for factors in tried]
        least = int(np.argmin(errors))
        return tried[least] if errors[least] < gain * int8_error(rows, weights, np.ones(len(weights))) else None


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
