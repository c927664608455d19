"""Block reconstruction: the weights of a whole block round up or down such that the block's output stays near the float model's.

Li et al., "BRECQ: pushing the limit of post-training quantization by block reconstruction", ICLR 2021: AdaRound's soft choice
for all layers of a block at once, errors weighted by the diagonal of the Fisher information, sum of (dL/dz dz)^2. Here every
block starts from what AdaRound finds layer by layer, biases follow on the way, and a block that gains nothing stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from hwopt.analysis.fisher import missing, sweeps
from hwopt.backends.torch import Module, unsupported
from hwopt.ir import Graph, Node, frozen
from hwopt.ir.graph import in_order
from hwopt.samples import Samples, batch_of
from passes._adaround import BETA, WARM, adapted, float_weight, only
from passes._blocks import Block, blocks

SAMPLES = 256
BYTES = 2**28  # of what a block reads and should answer: with large images fewer samples count
BATCH = 2, 16  # samples of one step, at least and at most: as many as give ELEMENTS of the block's output
ELEMENTS = 2**17
ITERATIONS = 600
RATE = 0.05  # of Adam, for the soft choices, and for the biases in units of the noise that rounding makes
WEIGHT = 1000.0  # of the regularizer, per weight, beside the error relative to that at the start; less leaves weights undecided
KEPT = 0.3  # of a start: how far from AdaRound's choice towards the weight's own fraction
Refuse = Callable[[str, str], None]


def reconstructed(graph: Graph, quantized: Graph, names: Collection[str], samples: Samples, by: str, refuse: Refuse) -> Graph:
    """The quantized graph with the integer weights of these layers rounded anew, block by block in graph order.

    A block without an end that both graphs compute, or with operators that have no gradients, stays with AdaRound's choice;
    `refuse` is told its first layer and why. At most 256 samples count.
    """
    few = samples.head(max(SAMPLES, batch_of(graph)))
    found = list(blocks(graph, quantized, names))
    weights = _importance(graph, [block.end for block in found if block.end], few)
    ends: list[str] = []
    for block in found:
        quantized = adapted(graph, quantized, block.layers, samples, by)
        if not block.end:
            refuse(block.layers[0], "its block ends in no value that both graphs compute: rounded by layers")
            continue
        problem = _Problem.of(graph, quantized, block, ends)
        odd = unsupported(problem.inner)
        if odd:
            refuse(block.layers[0], f"its block has no gradients ({odd[0][1]}): rounded by layers")
        elif problem.soft:
            edit = quantized.edit()
            for name, array in _solve(problem, graph, quantized, few, weights.get(block.end), len(ends)).items():
                edit.set_param(name, array)
            quantized = edit.finish(by)
        ends.append(block.end)
    return quantized


def _importance(graph: Graph, ends: list[str], samples: Samples) -> Mapping[str, np.ndarray]:
    """Mean square of the gradient at every element of the nodes' outputs, mean 1; nothing where torch cannot run the graph."""
    if missing(graph):
        return {}
    values = {name: graph.node[name].output for name in ends}
    sums: dict[str, np.ndarray] = {}
    for sweep in sweeps(graph, samples, values.values()):
        for name, value in values.items():
            if value in sweep.gradients:
                square = sweep.weight * np.square(sweep.gradients[value])
                sums[name] = sums[name] + square if name in sums else square
    return {name: total / total.mean() for name, total in sums.items() if total.mean() > 0}


@dataclass(frozen=True, eq=False)
class _Soft:
    """Integer weights that are chosen: `exact` and `start` in steps of `scale`, all in the weights' shape."""

    stored: str  # the parameter
    value: str  # what the layer reads
    exact: np.ndarray
    start: np.ndarray
    scale: np.ndarray
    limit: int


@dataclass(frozen=True, eq=False)
class _Bias:
    """An int32 bias that follows, in steps of `unit`; `reach` is the usual size of a change."""

    stored: str
    value: str
    start: np.ndarray
    unit: np.ndarray
    reach: np.ndarray


@dataclass(frozen=True, eq=False)
class _Problem:
    """The block as a graph of its own, whose parameters are the dequantized weights and biases."""

    inner: Graph
    wanted: str  # the output's name in the float graph
    soft: tuple[_Soft, ...]
    biases: tuple[_Bias, ...]

    @classmethod
    def of(cls, graph: Graph, quantized: Graph, block: Block, before: Collection[str]) -> _Problem:
        soft = [one for one in (_soft(graph, quantized, name) for name in block.layers) if one is not None]
        biases = [one for one in (_bias(quantized, name) for name in block.layers) if one is not None]
        held = {one.value: one.start * one.scale for one in soft} | {one.value: one.start * one.unit for one in biases}
        inner = _inner(quantized, block.end, before, held)
        return cls(inner, graph.node[block.end].output, tuple(soft), tuple(biases))


def _soft(graph: Graph, quantized: Graph, name: str) -> _Soft | None:
    """The weights of a layer if they are stored as they are and nobody else reads them."""
    node = quantized.node[name]
    source = quantized.producer.get(node.inputs[1])
    stored = None if source is None or source.op != "DequantizeLinear" else quantized.constant(source.inputs[0])
    if source is None or stored is None or len(quantized.users[source.output]) > 1 or len(quantized.users[source.inputs[0]]) > 1:
        return None
    scale = _spread(source, quantized.params[source.inputs[1]], stored.ndim)
    start = stored.astype(np.float64)
    limit = max(int(np.abs(start).max(initial=1)), 1)  # every layer has a channel that reaches it
    return _Soft(source.inputs[0], source.output, float_weight(graph, graph.node[name]) / scale, start, scale, limit)


def _bias(quantized: Graph, name: str) -> _Bias | None:
    """The int32 bias of a layer."""
    node = quantized.node[name]
    source = quantized.producer.get(node.inputs[2]) if len(node.inputs) > 2 else None
    weight = quantized.producer.get(node.inputs[1])
    if source is None or source.op != "DequantizeLinear" or source.inputs[0] not in quantized.params or weight is None:
        return None
    products = quantized.tensor(node.inputs[1]).elements / max(quantized.params[source.inputs[0]].size, 1)
    unit = _spread(source, quantized.params[source.inputs[1]], 1)
    # activations of about 32 steps times errors of weights, uniform within half a step, in a sum of so many products
    return _Bias(source.inputs[0], source.output, quantized.params[source.inputs[0]].astype(np.float64), unit,
                 unit * 32 * np.sqrt(products / 12))  # fmt: skip


def _spread(source: Node, scale: np.ndarray, rank: int) -> np.ndarray:
    """A scale for the whole tensor or along an axis, to multiply with."""
    axis = source.attr("axis", 1) % rank
    shape = [-1 if one == axis else 1 for one in range(rank)] if scale.size > 1 else [1] * rank
    return scale.astype(np.float64).reshape(shape)


def _inner(quantized: Graph, end: str, before: Collection[str], held: Mapping[str, np.ndarray]) -> Graph:
    """What computes the block's end from what the ends of earlier blocks need."""
    value = quantized.node[end].output
    known = {node.name for node in in_order(quantized.nodes, [quantized.node[name].output for name in before])}
    nodes = [one for one in in_order(quantized.nodes, (value,)) if one.name not in known and not set(one.outputs) & held.keys()]
    made = {output for node in nodes for output in node.outputs}
    reads = dict.fromkeys(name for node in nodes for name in node.reads if name not in made)
    params = {name: quantized.params[name] for name in reads if name in quantized.params}
    params |= {name: frozen(array.astype(np.float32)) for name, array in held.items()}
    inputs = tuple(name for name in reads if name not in params)
    return replace(quantized, nodes=tuple(nodes), params=MappingProxyType(params), inputs=inputs, outputs=(value,))


class _Choice:
    """h(V) of AdaRound for one layer's weights: start + h - (1 if the start is the upper of both) lies between two integers."""

    def __init__(self, soft: _Soft) -> None:
        floor = np.clip(np.where(soft.exact < soft.start, soft.start - 1, soft.start), -soft.limit, soft.limit - 1)
        fraction = np.clip(soft.exact - floor, 0, 1)
        kept = np.clip(KEPT * fraction + (1 - KEPT) * (soft.start - floor), 0.02, 0.98)
        self.soft = soft
        self.floor, self.scale = torch.tensor(floor).float(), torch.tensor(soft.scale).float()
        self.chosen = torch.tensor(-np.log(1.2 / (kept + 0.1) - 1)).float().requires_grad_()

    def share(self) -> torch.Tensor:
        return torch.clamp(1.2 * torch.sigmoid(self.chosen) - 0.1, 0, 1)

    def weight(self) -> torch.Tensor:
        return (self.floor + self.share()) * self.scale

    def undecided(self, beta: float) -> torch.Tensor:
        return (1 - (2 * self.share() - 1).abs() ** beta).sum()

    def steps(self) -> np.ndarray:
        return (self.floor + (self.chosen >= 0)).detach().numpy()


def _solve(
    problem: _Problem, graph: Graph, quantized: Graph, samples: Samples, importance: np.ndarray | None, seed: int
) -> dict[str, np.ndarray]:
    """New integers by parameter; nothing where the block's output is no better than before."""
    module = Module(problem.inner)
    data = _collected(problem, graph, quantized, samples)
    counts = torch.ones(()) if importance is None else torch.from_numpy(0.5 + 0.5 * importance).float()
    runner = _Runner(module, data, counts, problem)
    before = runner.error()
    if before <= 0:
        return {}
    choices = [_Choice(soft) for soft in problem.soft]
    moves = [torch.zeros(one.start.shape, requires_grad=True) for one in problem.biases]
    optimizer = torch.optim.Adam([*(one.chosen for one in choices), *moves], lr=RATE)
    weights, random = sum(one.exact.size for one in problem.soft), np.random.default_rng(seed)
    for step in range(ITERATIONS):
        for one in choices:
            module.put(one.soft.value, one.weight())
        for bias, move in zip(problem.biases, moves, strict=True):
            module.put(bias.value, torch.tensor(bias.start * bias.unit).float() + move * torch.tensor(bias.reach).float())
        loss = weights * runner.loss(random.permutation(runner.count)[: runner.batch]) / before
        share = (step / ITERATIONS - WARM) / (1 - WARM)
        if share > 0:
            loss = loss + WEIGHT * sum(one.undecided(BETA[0] + share * (BETA[1] - BETA[0])) for one in choices)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return _landed(problem, runner, choices, moves, before, quantized)


def _landed(
    problem: _Problem, runner: _Runner, choices: list[_Choice], moves: list[torch.Tensor], before: float, quantized: Graph
) -> dict[str, np.ndarray]:
    """The integers, if the block is better with them on all samples."""
    found: dict[str, np.ndarray] = {}
    for one in choices:
        found[one.soft.stored] = one.steps().astype(quantized.params[one.soft.stored].dtype)
        runner.module.put(one.soft.value, torch.from_numpy(one.steps() * one.soft.scale).float())
    for bias, move in zip(problem.biases, moves, strict=True):
        exact = bias.start + move.detach().numpy() * bias.reach / bias.unit
        steps = np.clip(np.rint(exact), -(2.0**31 - 1), 2.0**31 - 1)
        found[bias.stored] = steps.astype(np.int32)
        runner.module.put(bias.value, torch.from_numpy(steps * bias.unit).float())
    after = runner.error()
    return found if after < before else {}


def _collected(problem: _Problem, graph: Graph, quantized: Graph, samples: Samples) -> dict[str, np.ndarray]:
    """[runs, ...] of everything that the block reads, and under its own name the float model's value to reach."""
    computed = [name for name in problem.inner.inputs if name in quantized.producer]
    seeing = only(quantized, *computed) if computed else None
    answering = only(graph, problem.wanted)
    rows: dict[str, list[np.ndarray]] = {name: [] for name in (*problem.inner.inputs, problem.inner.outputs[0])}
    size = sum(problem.inner.tensor(name).bytes for name in rows)
    for feeds in samples.head(max(BYTES // max(size, 1), 2) * batch_of(graph)).feeds(graph):
        found = {**feeds, **(seeing.run(feeds) if seeing else {})}
        for name in problem.inner.inputs:
            rows[name].append(found[name])
        rows[problem.inner.outputs[0]].append(answering.run(feeds)[problem.wanted])
    return {name: np.stack(arrays) for name, arrays in rows.items()}


class _Runner:
    """The block's error on some of the runs; several in one go where that gives the same."""

    def __init__(self, module: Module, data: Mapping[str, np.ndarray], counts: torch.Tensor, problem: _Problem) -> None:
        self.module, self.counts = module, counts
        self.want, self.value = data[problem.inner.outputs[0]], problem.inner.outputs[0]
        self.feeds = {name: data[name] for name in problem.inner.inputs}
        self.count = len(self.want)
        self.batch = int(np.clip(ELEMENTS // max(self.want[0].size, 1), *BATCH))
        few = {name: array[:2].reshape(-1, *array.shape[2:]) for name, array in self.feeds.items() if array.ndim > 1}
        self.stacked = len(few) == len(self.feeds) and self.count > 1 and module.stacks(few)

    def loss(self, runs: np.ndarray) -> Any:
        """Mean weighted squared error of these runs."""
        if not self.stacked:
            return sum(self._one({name: array[run] for name, array in self.feeds.items()}, self.want[run]) for run in runs) / len(
                runs
            )
        whole = {name: array[runs].reshape(-1, *array.shape[2:]) for name, array in self.feeds.items()}
        return self._one(whole, self.want[runs])

    def _one(self, feeds: Mapping[str, np.ndarray], want: np.ndarray) -> Any:
        found = self.module(feeds)[self.value].reshape(want.shape)
        return ((found - torch.from_numpy(want)) ** 2 * self.counts).mean()

    def error(self) -> float:
        """Over all runs."""
        with torch.no_grad():
            starts = range(0, self.count, self.batch)
            parts = [self.loss(np.arange(start, min(start + self.batch, self.count))) for start in starts]
            sizes = [min(self.batch, self.count - start) for start in starts]
            return float(np.average([float(part) for part in parts], weights=sizes))
