"""quantize: static int8, calibrated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from hwopt.analysis.ranges import CALIBRATORS, Grid, Histogram, check_calibrator, grid_of, histograms
from hwopt.errors import PassError
from hwopt.ir import Graph, of_op
from hwopt.pipeline import Context, Pass, Phase, Refusal
from hwopt.target import Target
from passes._quantize_layers import OPS, QUANTIZED, Layer, layer_of
from passes._quantize_places import RIGHT, Key, Places, places_of
from passes._quantize_rewrite import rewrite


@dataclass(frozen=True)
class Quantize(Pass):
    """conv(x, w) + b -> Q(conv(DQ(x8), DQ(w8)) + DQ(b32)): the standard QDQ form, which integer kernels compute.

    Activations: one scale per value, uint8 or int8 as the target's kernels take them, zero is exact. Weights: int8, symmetric,
    one scale per output channel. Biases: int32 in steps of input scale x weight scale. `site` names Conv, Gemm and MatMul
    nodes (their parts after low-rank included); without a site all of them. A MatMul of two computed values (attention) is
    quantized where `site` names it. What lies between quantized layers (activations, residual adds, pools, concats, moves)
    stays in 8 bits. Needs calibration data.

    Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference", 2018.
    """

    name: ClassVar[str] = "quantize"
    summary: ClassVar[str] = "static int8: weights per channel, activations calibrated"
    phase: ClassVar[Phase] = Phase.QUANTIZE

    calibrator: str = "minmax"
    percent: float = 99.99  # what the percentile calibrator keeps
    reduce_range: bool = False  # 7-bit weights, for kernels that add pairs of products in 16 bits

    def run(self, graph: Graph, ctx: Context) -> Graph:
        self.check_site(graph)
        check_calibrator(self.calibrator)
        layers = self._layers(graph, ctx)
        if not layers:
            return graph
        if ctx.calibration is None:
            raise PassError("static quantization needs calibration data", place=str(self), hint="give some with --calibrate")
        places = places_of(graph, {name: layer.weight is None for name, layer in layers.items()})
        grids = self._grids(places, ctx, everywhere(graph))
        return rewrite(places, layers, grids, reduce_range=self.reduce_range).finish(str(self))

    @classmethod
    def candidates(cls, graph: Graph, target: Target) -> Iterator[Pass | Refusal]:
        for node in of_op(graph, *OPS):
            layer = layer_of(graph, node)
            if "int8" not in target.microkernels and "int8" not in target.peak:
                yield Refusal(cls.name, node.name, "target has no int8 kernels")
            elif isinstance(layer, str):
                yield Refusal(cls.name, node.name, layer)
            else:
                yield cls((node.name,))

    def _layers(self, graph: Graph, ctx: Context) -> dict[str, Layer]:
        """The layers to quantize, by node name; the others are refused."""
        found: dict[str, Layer] = {}
        for node in graph.nodes:
            if not self.covers(node) or (node.op not in OPS and node.name not in self.site):
                continue
            layer = layer_of(graph, node)
            if isinstance(layer, Layer) and layer.weight is None and not self.site:
                layer = "multiplies two computed values: name it in site to quantize it"
            if isinstance(layer, Layer):
                found[node.name] = layer
            elif layer != QUANTIZED:
                ctx.refuse(self, node, layer)
        return found

    def _grids(self, places: Places, ctx: Context, others: list[str]) -> dict[Key, Grid]:
        """One grid for each group of values that must share it, from the histogram of all of them."""
        if ctx.calibration is None:
            return {}
        seen = histograms(places.graph, ctx.calibration, [value for value, _ in places.points], others)
        grids: dict[Key, Grid] = {}
        merged: dict[Key, Histogram] = {}
        for key in places.points:
            group = places.group(key)
            merged[group] = merged[group].merge(seen[key[0]]) if group in merged else seen[key[0]]
        for group, histogram in merged.items():
            options = {"percent": self.percent} if self.calibrator == "percentile" else {}
            low, high = CALIBRATORS[self.calibrator](histogram, **options)
            dtype = "int8" if group[1] == RIGHT else ctx.target.activation if ctx.target else "uint8"
            grids[group] = grid_of(low, high, dtype, symmetric=group[1] == RIGHT)
        return grids


def everywhere(graph: Graph) -> list[str]:
    """The values that quantizing every layer would quantize: observed together when planners ask for layer after layer."""
    layers = {node.name: layer_of(graph, node) for node in of_op(graph, *OPS)}
    wanted = {name: layer.weight is None for name, layer in layers.items() if isinstance(layer, Layer)}
    return [value for value, _ in places_of(graph, wanted).points]
