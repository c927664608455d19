"""low-rank: replace a layer by two or three thin ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from hwopt.analysis.covariance import fewness, second_moments
from hwopt.analysis.memo import remembered
from hwopt.errors import PassError
from hwopt.ir import Edit, Graph, Node, frozen, of_op, part
from hwopt.pipeline import Context, Pass, Phase, Refusal
from hwopt.target import Target
from passes._cp import cp_factors
from passes._factors import svd_factors, tucker_factors
from passes._vbmf import vbmf_rank

OPS = ("Conv", "Gemm", "MatMul")
METHODS = ("whitened", "plain")
KINDS = ("tucker", "cp")
VBMF = "vbmf"
SVD_SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)  # of the break-even rank
TUCKER_SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8)  # of both channel counts


@dataclass(frozen=True)
class LowRank(Pass):
    """x @ W -> (x @ U) @ V;  a k x k convolution -> 1x1 `:down`, k x k `:core`, 1x1.

    SVD for Gemm, MatMul and 1x1 convolutions, Tucker-2 (Kim et al. 2016) for the others. `whitened` minimises the error of
    the layer's output on the calibration data, `plain` that of the weights. The last factor keeps the node's name, output
    and bias, the others are parts of it (`fc1:down`). Applies where the weights are constant, unshared and ungrouped, and
    where the factors need fewer multiply-adds than the layer. rank 0 means half of the break-even rank (a pass in braces
    must state its rank); rank_in is the input rank of k x k convolutions, 0 for the same share of the channels as rank; a
    full rank leaves its 1x1 out. rank=vbmf takes as many directions as the weights have above their noise, by variational
    Bayes (Nakajima et al. 2013): a start.

    kind=cp:  a k x k convolution -> 1x1 `:down`, depthwise k x k `:core`, 1x1, by CP decomposition whose degenerate terms are
    corrected (Phan et al. 2020), so that quantizing or training the factors does not ruin them.
    """

    name: ClassVar[str] = "low-rank"
    summary: ClassVar[str] = "factor Gemm, MatMul and Conv by (whitened) SVD, Tucker-2 and CP"
    phase: ClassVar[Phase] = Phase.FACTOR
    knobs: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({"damping": (0.01, 0.001, 0.1), "kind": KINDS})
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({"method": METHODS, "kind": KINDS})

    rank: int | str = 0  # or vbmf
    rank_in: int = 0
    method: str = "whitened"
    damping: float = 0.01  # share of the mean variance added to the covariance, more where few rows were seen
    kind: str = "tucker"  # of k x k convolutions; or cp

    def run(self, graph: Graph, ctx: Context) -> Graph:
        self.check()
        self.check_site(graph)
        edit, layers = graph.edit(), []
        for node in graph.nodes if self.site else of_op(graph, *OPS):
            layer = layer_of(graph, node, self.kind) if self.covers(node) else None
            if isinstance(layer, str) and (node.op in OPS or node.name in self.site):
                ctx.refuse(self, node, layer)
            if not isinstance(layer, Layer):
                continue
            reason = layer.unprofitable(*self._ranks(layer, ctx.target)) or self._lacks(ctx)
            if reason:
                ctx.refuse(self, node, reason)
            else:
                layers.append(layer)
        for layer, moment in zip(layers, self._moments(graph, layers, ctx), strict=True):
            damping = self.damping * (fewness(graph, layer.node, ctx.calibration) if ctx.calibration else 1.0)
            _split(edit, layer, self._factors(layer, moment, damping, *self._ranks(layer, ctx.target)))
        return edit.finish(str(self))

    @classmethod
    def candidates(cls, graph: Graph, target: Target) -> Iterator[Pass | Refusal]:
        granule = target.granule_of("float32")
        for node in of_op(graph, *OPS):
            layer = layer_of(graph, node)
            if isinstance(layer, str):
                yield Refusal(cls.name, node.name, layer)
                continue
            ranks = _with_estimate(layer.worthwhile(granule), layer, granule)
            for rank, rank_in in ranks:
                yield cls((node.name,), rank, rank_in if layer.spatial else 0)
            if not ranks:
                yield Refusal(cls.name, node.name, layer.hopeless(granule))

    def turned(self, **knobs: Any) -> Pass:
        """CP has one rank, the output's, and matrices have no other kind."""
        if knobs.get("kind", self.kind) == self.kind or not self.rank_in:
            return super().turned(**{name: value for name, value in knobs.items() if name != "kind"})
        return super().turned(**{**knobs, "rank_in": 0})

    def check(self) -> None:
        super().check()
        if isinstance(self.rank, str):
            if self.rank != VBMF or self.rank_in:
                raise PassError(f"rank={self.rank} is no rank", place=str(self), hint="write rank=16, or rank=vbmf alone")
        elif self.rank < 0:
            raise PassError(f"rank={self.rank} is below zero", place=str(self), hint="write rank=16, or rank=vbmf")
        if self.rank_in < 0 or not 0 <= self.damping < math.inf:
            raise PassError("rank_in and damping must not be negative", place=str(self), hint="leave them out for the usual ones")

    def check_stated(self) -> None:
        """Half of the break-even rank is a start for candidates, which are judged; what is stated is applied unjudged."""
        self.check()
        if self.rank == 0:
            raise PassError("which rank?", place=str(self), hint="write rank=16, or rank=vbmf")

    def _lacks(self, ctx: Context) -> str:
        missing = self.method == "whitened" and ctx.calibration is None
        return "method=whitened needs calibration data; give some or take method=plain" if missing else ""

    def _ranks(self, layer: Layer, target: Target | None) -> tuple[int, int]:
        """Output and input rank for this layer, the options' zeros filled in."""
        granule = target.granule_of("float32") if target else 1
        if isinstance(self.rank, str):
            return layer.snapped_estimate(granule)
        rank = self.rank or _snapped(layer.default_rank, granule)
        if not layer.tucker:
            return rank, layer.inputs
        share = min(1.0, rank / layer.outputs)
        return min(rank, layer.outputs), min(self.rank_in or _snapped(share * layer.inputs, granule), layer.inputs)

    def _moments(self, graph: Graph, layers: Sequence[Layer], ctx: Context) -> Iterator[np.ndarray | None]:
        if self.method == "plain" or ctx.calibration is None or not layers:
            return iter([None] * len(layers))
        others = [node for node in of_op(graph, *OPS) if isinstance(layer_of(graph, node), Layer)]
        found = second_moments(graph, ctx.calibration, [layer.node for layer in layers], others)
        return (found[layer.node.name] for layer in layers)

    def _factors(self, layer: Layer, moment: np.ndarray | None, damping: float, rank: int, rank_in: int) -> list[Factor]:
        if layer.cp:
            return _cp(layer, moment, damping, rank)
        if layer.spatial:
            return _tucker(layer, moment, damping, rank, rank_in)
        u, v = svd_factors(as_matrix(layer.weight, layer.transposed), moment, damping)
        return _pair(layer, u[:, :rank], v[:rank])


@dataclass(frozen=True, eq=False)
class Layer:
    """A factorable node: `inputs` channels to `outputs` channels through `taps` weights each.

    `grid` is input positions per output position: what the first factor of a strided convolution costs more. `cp`: a k x k
    convolution to be factored by CP.
    """

    node: Node
    weight: np.ndarray
    inputs: int
    outputs: int
    taps: int = 1
    grid: float = 1.0
    cp: bool = False

    @property
    def spatial(self) -> bool:
        return self.taps > 1

    @property
    def tucker(self) -> bool:
        """True for two ranks, one of the outputs and one of the inputs."""
        return self.spatial and not self.cp

    @property
    def transposed(self) -> bool:
        return self.node.op == "Conv" or bool(self.node.attr("transB", 0))

    @property
    def break_even(self) -> float:
        """The rank from which on the factors of a matrix, or of CP, cost no less than the layer."""
        return self.macs / self.factored_macs(1, 0)

    @property
    def default_rank(self) -> float:
        return self.outputs / 2 if self.tucker else self.break_even / 2

    def estimated_ranks(self) -> tuple[int, int]:
        """Of the outputs and of the inputs: the directions above the noise."""
        return _estimated_ranks(self.weight) if self.spatial else (_estimated_rank(self.weight),) * 2

    def snapped_estimate(self, granule: int) -> tuple[int, int]:
        """(rank, rank_in) by that, on the granule."""
        outer, inner = (_snapped(one, granule) for one in self.estimated_ranks())
        return (min(outer, self.outputs), min(inner, self.inputs)) if self.tucker else (max(outer, inner), self.inputs)

    @property
    def macs(self) -> float:
        """Multiply-adds of the layer for each output position."""
        return self.inputs * self.outputs * self.taps

    def factored_macs(self, rank: int, rank_in: int) -> float:
        """Multiply-adds of the factors for each output position of the layer."""
        if self.cp:
            return rank * (self.inputs * self.grid + self.taps + self.outputs)
        if not self.spatial:
            return rank * (self.inputs + self.outputs)
        down = self.inputs * rank_in * self.grid if rank_in < self.inputs else 0.0
        up = rank * self.outputs if rank < self.outputs else 0.0
        return down + rank * rank_in * self.taps + up

    def unprofitable(self, rank: int, rank_in: int) -> str:
        """Why these ranks do not pay; empty if they do."""
        if not self.tucker and rank >= self.break_even:
            return f"rank {rank} does not pay: break-even is {self.break_even:.4g} for {self.inputs} x {self.outputs}"
        if self.cp:
            return ""
        if rank >= self.outputs and rank_in >= self.inputs:
            return f"ranks {rank} and {rank_in} are full: nothing is saved"
        after = self.factored_macs(rank, rank_in)
        return f"{after:.0f} multiply-adds instead of {self.macs:.0f} a position do not pay" if after >= self.macs else ""

    def worthwhile(self, granule: int) -> list[tuple[int, int]]:
        """(rank, rank_in) on the granule, smallest first, that pay."""
        if self.spatial:
            pairs = [(_snapped(s * self.outputs, granule), _snapped(s * self.inputs, granule)) for s in TUCKER_SHARES]
            pairs = [(min(rank, self.outputs), min(rank_in, self.inputs)) for rank, rank_in in pairs]
        else:
            pairs = [(_snapped(share * self.break_even, granule), self.inputs) for share in SVD_SHARES]
        return [pair for pair in dict.fromkeys(pairs) if not self.unprofitable(*pair)]

    def hopeless(self, granule: int) -> str:
        """Why no rank on the granule pays."""
        if self.spatial:
            return f"no ranks on the granule {granule} save multiply-adds for {self.inputs} -> {self.outputs} channels"
        largest = math.ceil(self.break_even) - 1
        return f"rank below break-even would be {largest}, under the granule {granule}"


def _with_estimate(ranks: list[tuple[int, int]], layer: Layer, granule: int) -> list[tuple[int, int]]:
    """With the ranks that the weights have above their noise instead of the nearest ones: no more to look at. Where these pay."""
    if not ranks or not all(layer.estimated_ranks()):  # nothing but noise
        return ranks
    estimated = layer.snapped_estimate(granule)
    if estimated in ranks or layer.unprofitable(*estimated):
        return ranks
    nearest = min(ranks, key=lambda pair: sum(abs(one - other) for one, other in zip(pair, estimated, strict=True)))
    return [estimated if pair == nearest else pair for pair in ranks]


def layer_of(graph: Graph, node: Node, kind: str = "tucker") -> Layer | str:
    """What low-rank can factor, or the reason why it cannot."""
    if node.op not in OPS or node.domain:
        return f"is a {node.op}; low-rank factors {', '.join(OPS)}"
    weight = graph.constant(node.inputs[1])
    if weight is None:
        return "weights are not constant"
    if any(stamp.startswith(LowRank.name) for stamp in node.history):
        return "is a factor already"
    others = [user.name for user in graph.users[node.inputs[1]] if user.name != node.name]
    if others or node.inputs[1] in graph.outputs:
        return f"weight is shared with {', '.join(others) or 'the outputs'}"
    if weight.dtype.kind != "f":
        return f"weights are {weight.dtype}"
    if node.op == "Conv":
        return _conv_layer(graph, node, weight, kind)
    if weight.ndim != 2:
        return f"weights have {weight.ndim} dimensions"
    inputs, outputs = weight.shape[::-1] if node.attr("transB", 0) else weight.shape
    return Layer(node, weight, inputs, outputs) if weight.size else "weights are empty"


def _conv_layer(graph: Graph, node: Node, weight: np.ndarray, kind: str) -> Layer | str:
    if node.attr("group", 1) != 1:
        return f"is a grouped convolution (group={node.attr('group')})"
    if not weight.size:
        return "weights are empty"
    outputs, inputs = weight.shape[:2]
    data, result = graph.tensor(node.inputs[0]), graph.tensor(node.output)
    if data.static and result.static and result.elements:
        grid = (data.elements / inputs) / (result.elements / outputs)
    else:
        grid = float(math.prod(node.attr("strides", (1,))))
    taps = weight[0, 0].size
    return Layer(node, weight, inputs, outputs, taps, grid, kind == "cp" and taps > 1)


@dataclass(frozen=True, eq=False)
class Factor:
    """One node of the factored layer, as it will be emitted; the last of a list keeps the layer's name."""

    suffix: str
    weight: np.ndarray
    attrs: Mapping[str, Any]


@remembered
def as_matrix(weight: np.ndarray, transposed: bool) -> np.ndarray:
    """[inputs, outputs] float32 of a Gemm, MatMul or 1x1 convolution."""
    matrix = weight.reshape(weight.shape[0], -1)
    return frozen(np.array(matrix.T if transposed else matrix, dtype=np.float32, order="C"))


@remembered
def _estimated_rank(weight: np.ndarray) -> int:
    return vbmf_rank(weight.reshape(len(weight), -1))


@remembered
def _estimated_ranks(weight: np.ndarray) -> tuple[int, int]:
    outputs, inputs = weight.shape[:2]
    turned = np.moveaxis(weight, 1, 0)
    return vbmf_rank(weight.reshape(outputs, -1)), vbmf_rank(turned.reshape(inputs, -1))


@remembered
def _as_taps(weight: np.ndarray) -> np.ndarray:
    return frozen(np.array(weight.reshape(*weight.shape[:2], -1), dtype=np.float32))


def _pair(layer: Layer, u: np.ndarray, v: np.ndarray) -> list[Factor]:
    attrs = dict(layer.node.attrs)
    if layer.node.op == "MatMul":
        return [Factor("down", u, {}), Factor("", v, {})]
    if layer.node.op == "Gemm":
        first = {key: value for key, value in attrs.items() if key in ("alpha", "transA")}
        return [Factor("down", u, first), Factor("", v, {key: value for key, value in attrs.items() if key == "beta"})]
    ones = (1,) * (layer.weight.ndim - 2)
    return [Factor("down", u.T.reshape(*u.T.shape, *ones), attrs), Factor("", v.T.reshape(*v.T.shape, *ones), _pointwise(ones))]


def _tucker(layer: Layer, moment: np.ndarray | None, damping: float, rank: int, rank_in: int) -> list[Factor]:
    """1x1 -> k x k -> 1x1; strides, pads and dilations stay with the core, which sees zero padding as the layer did."""
    inner, core, outer = tucker_factors(_as_taps(layer.weight), moment, damping, rank_in, rank)
    if rank_in == layer.inputs:  # a full rank needs no factor of its own: it goes into the core
        core = np.einsum("pit,ic->pct", core, inner)
    if rank == layer.outputs:
        core = np.einsum("op,pit->oit", outer, core)
    kernel = layer.weight.shape[2:]
    ones = (1,) * len(kernel)
    factors = [Factor("core", core.reshape(*core.shape[:2], *kernel), layer.node.attrs)]
    if rank_in < layer.inputs:
        factors.insert(0, Factor("down", inner.reshape(*inner.shape, *ones), _pointwise(ones)))
    if rank < layer.outputs:
        factors.append(Factor("", outer.reshape(*outer.shape, *ones), _pointwise(ones)))
    return factors


def _cp(layer: Layer, moment: np.ndarray | None, damping: float, rank: int) -> list[Factor]:
    """1x1 -> depthwise k x k -> 1x1; strides, pads and dilations stay with the core, which sees zero padding as the layer did."""
    inner, core, outer = cp_factors(_as_taps(layer.weight), moment, damping, rank)
    kernel = layer.weight.shape[2:]
    ones = (1,) * len(kernel)
    deep = {**layer.node.attrs, "group": rank}
    return [
        Factor("down", inner.reshape(*inner.shape, *ones), _pointwise(ones)),
        Factor("core", core.reshape(rank, 1, *kernel), deep),
        Factor("", outer.reshape(*outer.shape, *ones), _pointwise(ones)),
    ]


def _pointwise(ones: tuple[int, ...]) -> Mapping[str, Any]:
    return {"kernel_shape": ones}


def _split(edit: Edit, layer: Layer, factors: list[Factor]) -> None:
    node, value = layer.node, layer.node.inputs[0]
    *first, last = factors
    for factor in first:
        name = part(node, factor.suffix)
        weight = edit.param(f"{name}.weight", factor.weight.astype(layer.weight.dtype))
        value = edit.emit(node.op, [value, weight], attrs=factor.attrs, name=name, like=node)
    weight = edit.param(f"{node.name}.weight", last.weight.astype(layer.weight.dtype))
    edit.replace(node, inputs=(value, weight, *node.inputs[2:]), attrs=last.attrs)


def _snapped(wanted: float, granule: int) -> int:
    """The nearest multiple of the granule, at least one of it."""
    return max(granule, round(wanted / granule) * granule)
