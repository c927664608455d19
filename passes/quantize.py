"""quantize: static int8, calibrated; or bfloat16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

from hwopt.analysis.ranges import CALIBRATORS, Probe, observed
from hwopt.analysis.regions import kind_of
from hwopt.errors import PassError, ToolchainError
from hwopt.ir import Graph, descends, of_op
from hwopt.pipeline import Context, Pass, Phase, Refusal, at_site
from hwopt.samples import Samples
from hwopt.target import Target
from passes._adaround import adapted
from passes._bfloat16 import Rounding, layer_problem
from passes._calibrate import AUTO, grids_of, probe_of
from passes._dynamic import dynamic, undynamic
from passes._pairs import kept
from passes._quantize_layers import OPS, QUANTIZED, Layer, layer_of
from passes._quantize_places import places_of
from passes._quantize_rewrite import rewrite

OPSET = 13  # brought one scale per channel, and bfloat16 to Cast
DTYPES = ("int8", "bf16")
ROUNDINGS = ("nearest", "adaround", "block")
WEIGHTS = {"int8": 8, "int4": 4}
INT4_OPSET = 21


@dataclass(frozen=True)
class Quantize(Pass):
    """conv(x, w) + b -> Q(conv(DQ(x8), DQ(w8)) + DQ(b32)): the standard QDQ form, which integer kernels compute.

    Activations: one scale per value, uint8 or int8 as the target's kernels take them, zero is exact. Weights: int8, symmetric,
    one scale per output channel. Biases: int32 in steps of input scale x weight scale. `site` names Conv, ConvTranspose, Gemm
    and MatMul nodes (their parts after low-rank included); without a site all of them. A MatMul of two computed values
    (attention) is quantized where `site` names it. What lies between quantized layers (activations, residual adds, pools,
    concats, moves) stays in 8 bits. Needs calibration data.

    On processors whose instructions add pairs of 8-bit products in 16 bits (x86 without VNNI), weights take 7 bits, so that the
    sums are exact, but for depthwise layers: kernels are a quarter faster. reduce_range=false keeps 8, true takes 7 anywhere.

    weights=int4: symmetric, in [-7, 7], one scale per output channel, the one with the least squared error. Half the size of
    the model; the kernels of 8 bits compute them, and libraries hold them unpacked for these. Needs opset 21. With a site, one
    word for all of its layers or one for each: weights=int4+int8.

    rounding=adaround: weights round up or down as the outputs of their layer ask for, layer after layer, each on what the ones
    before it hand over (Nagel et al. 2020); the biases follow. Takes minutes; worth it with weights=int4.

    dynamic=true: the data of Gemm and MatMul in 8 bits by rows, each row's largest magnitude found at run time; needs no data,
    nothing is clipped, and one pass over the data more than the static form. Weights are int8, rounded to the nearest.

    dtype=bf16:  conv(x, w) + b -> conv(f32(bf16(x)), f32(bf16 w)) + b, with casts that vanish: the kernels multiply and store
    bfloat16 and add in float32. Residuals and moves in between are bfloat16, everything else stays float32, products of two
    computed values are taken as well. Needs no data.

    minmax is the default: it alone suits convolutions and transformers. On MiniLM the others clip the few large activations
    that carry meaning; on EfficientNet-Lite0 mse and percentile are better by half a dB, entropy is worse by 8. auto takes for
    every value the one whose rounding disturbs the outputs of the layers that read it least.

    Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference", 2018.
    """

    name: ClassVar[str] = "quantize"
    summary: ClassVar[str] = "static int8 (weights per channel, activations calibrated), or dtype=bf16"
    phase: ClassVar[Phase] = Phase.QUANTIZE
    knobs: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({"calibrator": (*CALIBRATORS, AUTO)})
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"calibrator": (*CALIBRATORS, AUTO), "dtype": DTYPES, "weights": tuple(WEIGHTS), "rounding": ROUNDINGS}
    )
    each: ClassVar[tuple[str, ...]] = ("weights",)

    calibrator: str = "minmax"
    percent: float = 99.99  # what the percentile calibrator keeps
    correct_bias: bool = True  # biases make up for the mean error of rounded weights
    reduce_range: bool | None = None  # 7-bit weights; if not said, where the target's kernels add pairs of products in 16 bits
    dtype: str = "int8"  # or bf16
    weights: tuple[str, ...] = ("int8",)  # or int4
    rounding: str = "nearest"  # or adaround, block
    dynamic: bool = False  # data by rows, at run time

    def __post_init__(self) -> None:
        weights = (self.weights,) if isinstance(self.weights, str) else tuple(self.weights)
        object.__setattr__(self, "weights", weights[:1] if len(set(weights)) < 2 else weights)

    def run(self, graph: Graph, ctx: Context) -> Graph:
        self.check()
        self.check_site(graph)
        if self.dtype == "bf16":
            return self._to_bfloat16(graph, ctx)
        needed = INT4_OPSET if "int4" in self.weights else OPSET
        if graph.opsets.get("", 0) < needed:
            what = "4-bit weights need" if "int4" in self.weights else "one scale per channel needs"
            raise PassError(f"{what} opset {needed}, the model has {graph.opsets.get('')}", place=str(self))
        layers = self._layers(graph, ctx)
        if not layers:
            return graph
        if self.dynamic:
            return self._dynamically(graph, layers, ctx)
        if ctx.calibration is None:
            raise PassError("static quantization needs calibration data", place=str(self), hint="give some with --calibrate")
        places = places_of(graph, {name: layer.weight is None for name, layer in layers.items()})
        probes: list[Probe] = [probe_of(value, self.calibrator) for value, _ in places.points]
        if self.correct_bias:
            probes += [mean_probe(layer) for layer in layers.values() if layer.weight is not None]
        seen = observed(graph, ctx.calibration, probes, everywhere(graph, self.correct_bias, self.calibrator))
        means = {name: seen.mean(*mean_probe(layer)) for name, layer in layers.items() if mean_probe(layer) in seen.found}
        activation = ctx.target.activation if ctx.target else "uint8"
        grids = grids_of(places, seen, ctx.calibration, activation, self.calibrator, self.percent)
        bits = {name: self._bits(name) for name in layers}
        if self.rounding != "nearest":  # which leaves no mean error that a bias behind a MatMul would take back
            means = {name: mean for name, mean in means.items() if layers[name].node.op != "MatMul"}
        reduced = [name for name, layer in layers.items() if self._reduced(graph, layer, ctx)]
        after = rewrite(places, layers, grids, means, reduced=reduced, bits=bits).finish(str(self))
        weighted = [name for name, layer in layers.items() if layer.weight is not None and bits[name] == min(bits.values())]
        if self.rounding == "nearest":
            return after
        return kept(self._rounded(graph, after, weighted, ctx.calibration, ctx), after, reduced, str(self))

    def _bits(self, name: str) -> int:
        """Of the weights of a layer."""
        place = next((place for place, site in enumerate(self.site) if descends(name, site)), 0)
        return WEIGHTS[at_site(self.weights, place) or "int8"]

    def _reduced(self, graph: Graph, layer: Layer, ctx: Context) -> bool:
        """Whether its weights take 7 bits. Depthwise kernels add every product by itself."""
        if self.reduce_range is not None:
            return self.reduce_range
        kernel = ctx.target.microkernels.get("int8") if ctx.target else None
        return kernel is not None and kernel.narrow > 0 and kind_of(graph, layer.node) != "depthwise"

    def _dynamically(self, graph: Graph, layers: dict[str, Layer], ctx: Context) -> Graph:
        """Data of products in 8 bits by rows, at run time."""
        reasons = {name: undynamic(graph, layer.node, layer) for name, layer in layers.items()}
        for name in (name for name, reason in reasons.items() if reason):
            ctx.refuse(self, name, reasons[name])
        chosen = [layer for name, layer in layers.items() if not reasons[name]]
        activation = ctx.target.activation if ctx.target else "uint8"
        reduced = [layer.node.name for layer in chosen if self._reduced(graph, layer, ctx)]
        return dynamic(graph, chosen, activation, reduced=reduced).finish(str(self)) if chosen else graph

    def _rounded(self, graph: Graph, after: Graph, names: list[str], samples: Samples, ctx: Context) -> Graph:
        """With the integer weights of these layers rounded by what they do to outputs."""
        if self.rounding == "adaround":
            return adapted(graph, after, names, samples, str(self))
        try:
            from passes._reconstruct_torch import reconstructed
        except ImportError as error:
            hint = "pip install 'hwopt[torch]', or take rounding=adaround"
            raise ToolchainError("block reconstruction needs torch", place=str(self), hint=hint) from error
        return reconstructed(graph, after, names, samples, str(self), lambda site, why: ctx.refuse(self, site, why))

    def check(self) -> None:
        super().check()
        if len(self.weights) not in (1, len(self.site)):
            hint = "write one word for all of them, or one for each"
            raise PassError(f"{len(self.weights)} forms of weights for {len(self.site)} layers", place=str(self), hint=hint)
        if self.dtype == "bf16" and "int4" in self.weights:
            raise PassError("no weights int4 with dtype bf16", place=str(self), hint="leave weights or dtype out")
        if self.dynamic and (self.dtype, self.weights, self.rounding) != ("int8", ("int8",), "nearest"):
            hint = "leave dtype, weights and rounding out, or dynamic"
            raise PassError("dynamic=true has int8 weights, rounded to the nearest", place=str(self), hint=hint)
        if not 50 < self.percent <= 100:
            hint = "write what the percentile calibrator keeps, such as percent=99.9"
            raise PassError(f"percent={self.percent} is not above 50 and at most 100", place=str(self), hint=hint)

    def finer(self) -> Iterator[Pass]:
        """4-bit weights, rounded by what that does to a layer's outputs; whole blocks gain little more in many times as long."""
        if "int4" in self.weights and self.rounding == "nearest":
            yield replace(self, rounding="adaround")

    @property
    def apart(self) -> bool:
        return self.dynamic

    @property
    def prepared(self) -> bool:
        return self.dtype == "int8"  # of floats every size is rounded alike

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
                if layer.weight is not None and not layer.lookup and graph.opsets.get("", 0) >= INT4_OPSET:
                    yield cls((node.name,), weights=("int4",))
                if not undynamic(graph, node, layer):
                    yield cls((node.name,), dynamic=True)
        yield from cls._bfloat16_candidates(graph, target)

    @classmethod
    def _bfloat16_candidates(cls, graph: Graph, target: Target) -> Iterator[Pass | Refusal]:
        if "bfloat16" not in target.microkernels:
            yield Refusal(cls.name, graph.name, "target has no bfloat16 kernels")
            return
        for node in of_op(graph, *OPS):
            reason = layer_problem(graph, node)
            yield Refusal(cls.name, node.name, f"bf16: {reason}") if reason else cls((node.name,), dtype="bf16")

    def _to_bfloat16(self, graph: Graph, ctx: Context) -> Graph:
        """Of products of two computed values all are taken: there is no calibration that outliers could spoil."""
        if graph.opsets.get("", 0) < OPSET:
            raise PassError(f"bfloat16 needs opset {OPSET}, the model has {graph.opsets.get('')}", place=str(self))
        layers = []
        for node in graph.nodes:
            if not self.covers(node) or (node.op not in OPS and node.name not in self.site):
                continue
            reason = layer_problem(graph, node)
            if not reason:
                layers.append(node)
            elif reason != QUANTIZED:
                ctx.refuse(self, node, reason)
        return Rounding(graph).layers(layers).finish(str(self)) if layers else graph

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


def mean_probe(layer: Layer) -> tuple[str, int]:
    """The layer's input and the axis of its channels."""
    return layer.node.inputs[0], 1 if layer.node.op in ("Conv", "ConvTranspose") else -1


def everywhere(graph: Graph, means: bool, calibrator: str) -> list[Probe]:
    """What quantizing every layer would observe: observed together when planners ask for layer after layer."""
    found = (layer_of(graph, node) for node in of_op(graph, *OPS))
    layers = [layer for layer in found if isinstance(layer, Layer)]
    places = places_of(graph, {layer.node.name: layer.weight is None for layer in layers})
    probes: list[Probe] = [probe_of(value, calibrator) for value, _ in places.points]
    return probes + [mean_probe(layer) for layer in layers if means and layer.weight is not None]
