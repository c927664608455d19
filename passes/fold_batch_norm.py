"""fold-batch-norm: batch norms and other constant factors and shifts per channel become part of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hwopt.ir import Graph
from hwopt.pipeline import Context, Pass, Phase
from passes._affine import Affine, Layer, affine_of, layer_of


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """BatchNorm(x * W + b) -> x * W' + b';  BatchNorm(x) * W + b -> x * W' + b'.

    Counts as a batch norm: BatchNormalization in inference, and Mul, Div, Add or Sub with a constant per channel (or with
    one number). The layer is a Conv, ConvTranspose, Gemm or MatMul with constant weights that nobody else reads, and
    nothing else reads the value in between. Into the layer behind it a shift folds only where no padding is: the zeros
    around the picture are not shifted. A MatMul's shift stays an Add behind it. Computed in float64.
    Jacob et al. 2018, section 3.2.
    """

    name: ClassVar[str] = "fold-batch-norm"
    summary: ClassVar[str] = "fold batch norms and factors per channel into the weights before or after them"
    phase: ClassVar[Phase] = Phase.CLEAN
    exact: ClassVar[bool] = True
    order: ClassVar[int] = 30  # after the fusions, whose factors and shifts it would tear apart

    def run(self, graph: Graph, ctx: Context) -> Graph:
        self.check_site(graph)
        layers: dict[str, Layer] = {}  # by the value that each computes in the end
        waiting: dict[str, Affine] = {}  # by the value that each computes: no layer in front of these
        reasons: dict[str, str] = {}
        for node in graph.nodes:
            affine = affine_of(graph, node) if self.covers(node) else None
            if affine is not None:
                _take(graph, affine, layers, waiting, reasons)
                continue
            layer = layer_of(graph, node)
            if isinstance(layer, Layer):
                _reach_back(graph, layer, waiting, reasons)
                layers[layer.result] = layer
            elif layer:
                reasons.update(dict.fromkeys((node.output, node.inputs[0]), f"{node.name}: {layer}"))
        edit = graph.edit()
        written = [layer for layer in layers.values() if layer.write(edit)]
        overflown = {
            affine.node.output: f"the folded weights do not fit {layer.array.dtype}"
            for layer in layers.values()
            if layer not in written
            for affine in layer.taken
        }
        folded = {affine.node.name for layer in written for affine in layer.taken}
        self._refuse(graph, ctx, folded, {**reasons, **overflown})
        return edit.finish(str(self))

    def _refuse(self, graph: Graph, ctx: Context, folded: set[str], reasons: dict[str, str]) -> None:
        for node in graph.nodes:
            if node.op == "BatchNormalization" and node.name not in folded and self.covers(node):
                nothing = "no convolution or matrix product before or after it"
                ctx.refuse(self, node, reasons.get(node.output) or reasons.get(node.inputs[0]) or nothing)


def _take(graph: Graph, affine: Affine, layers: dict[str, Layer], waiting: dict[str, Affine], reasons: dict[str, str]) -> None:
    """Give the affine to the layer in front of it, or let it wait for one behind."""
    layer = layers.get(affine.source)
    reason = "" if layer is None else layer.refuses_behind(graph, affine)
    if layer is not None and not reason:
        del layers[affine.source]
        layer.append(affine)
        layers[layer.result] = layer
        return
    waiting[affine.node.output] = affine
    if reason:
        reasons[affine.node.output] = reason


def _reach_back(graph: Graph, layer: Layer, waiting: dict[str, Affine], reasons: dict[str, str]) -> None:
    """Let the layer take the affines in front of it, nearest first."""
    while layer.source in waiting:
        affine = waiting[layer.source]
        reason = layer.refuses_ahead(graph, affine)
        if reason:
            reasons[layer.source] = reason
            return
        layer.prepend(affine)
