"""How much each candidate change costs: Fisher-weighted output perturbation, for all candidates from the same backward passes.

    dy = what the candidate's own nodes compute from the float model's values - what the float model computes there
    error = 1/2 E[(sum over its outputs of (dL/dy) dy)^2]

The gradients come from one backward pass per batch (hwopt.analysis.fisher), dy from running nothing but the changed nodes. Two
candidates together cost 1/2 E[(r_a + r_b)^2] of their responses r: the pairwise term is E[r_a r_b], at no further cost. Large
changes leave the quadratic regime, where a scale fitted to a few whole configurations corrects the level (`calibrated`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from scipy import stats

from hwopt.analysis.fisher import Sweep, currency_of, require_gradients, sweeps
from hwopt.backends.ort import Session
from hwopt.errors import DataError
from hwopt.ir import Graph, Node, numpy_dtype
from hwopt.samples import Samples, batch_of

SAMPLES = 64
CHUNK_BYTES = 2**30  # of changed weights that are held at once: more candidates take another sweep over the samples

C = TypeVar("C", bound=Hashable)
Apply = Callable[[Any], Graph]
Differences = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """z^T J dy by candidate, [directions], for each direction of each sample; `weights` sum their squares."""

    responses: Mapping[Any, np.ndarray]
    weights: np.ndarray
    scale: float = 1.0  # measured over predicted errors of whole configurations

    def error(self, *together: Any) -> float:
        """The expected error of these candidates together, pairwise terms included."""
        total = np.sum([self.responses[one] for one in together], axis=0) if together else np.zeros_like(self.weights)
        error = float(self.scale * 0.5 * (self.weights * total**2).sum())
        return error if np.isfinite(error) else np.inf

    def pair(self, one: Any, other: Any) -> float:
        """What two candidates cost together beyond the sum of both; negative where their errors cancel."""
        return float(self.scale * (self.weights * self.responses[one] * self.responses[other]).sum())


@dataclass(frozen=True)
class Calibration:
    """How predictions compare with what was measured on whole configurations, before the scale."""

    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    scale: float
    rank_correlation: float  # Spearman's; NaN for fewer than two configurations


@dataclass(frozen=True, eq=False)
class _Change:
    """The nodes that a candidate changes, as a graph of their own, ready to run; `outputs` are where the rest reads from it."""

    candidate: Any
    session: Session | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def sensitivity(
    graph: Graph,
    candidates: Iterable[C],
    samples: Samples,
    apply: Callable[[C], Graph],
    *,
    draws: int = 1,
    expected: bool = False,
    seed: int = 0,
) -> Sensitivity:
    """The responses of all candidates; `apply` makes the changed graph. One that changes nothing responds with zeros.

    A change that makes values which are not finite has an infinite error. Raises ToolchainError where there are no gradients (see
    fisher.missing).
    """
    require_gradients(graph, "sensitivity")
    currency = currency_of(graph, samples)
    responses: dict[Any, np.ndarray] = {}
    weights = np.zeros(0)
    for changes in _chunks(graph, candidates, apply):
        values = dict.fromkeys(value for change in changes for value in (*change.inputs, *change.outputs))
        rows: list[list[np.ndarray]] = [[] for _ in changes]
        weighted: list[np.ndarray] = []
        runs: tuple[Mapping[str, np.ndarray], list[Differences]] = ({}, [])
        for sweep in sweeps(graph, samples, values, currency=currency, draws=draws, expected=expected, seed=seed):
            if sweep.values is not runs[0]:  # another batch: directions of the same one share its values
                runs = sweep.values, [_differences(graph, change, sweep) for change in changes]
            for row, differences in zip(rows, runs[1], strict=True):
                row.append(_response(sweep, differences))
            weighted.append(np.full(sweep.batch, sweep.weight))
        weights = np.concatenate(weighted)
        responses.update((change.candidate, np.concatenate(row)) for change, row in zip(changes, rows, strict=True))
    count = len(samples) // batch_of(graph) * batch_of(graph)
    return Sensitivity(MappingProxyType(responses), weights / count)


def _differences(graph: Graph, change: _Change, sweep: Sweep) -> Differences:
    """What the changed nodes compute less what the float model has there, by value."""
    if change.session is None:
        return {}
    feeds = {name: sweep.values[name].astype(numpy_dtype(graph.tensor(name).dtype), copy=False) for name in change.inputs}
    found = change.session.run(feeds)
    with np.errstate(invalid="ignore"):
        return {name: found[name] - sweep.values[name] for name in change.outputs if name in sweep.gradients}


def _response(sweep: Sweep, differences: Differences) -> np.ndarray:
    """z^T J dy of every sample of the batch, float64 [batch]."""
    total = np.zeros(sweep.batch)
    for name, difference in differences.items():
        with np.errstate(over="ignore", invalid="ignore"):  # an infinite error says it
            product = (difference * sweep.gradients[name]).astype(np.float64)
            per_row = product.ndim and len(product) == sweep.batch
            total += product.reshape(sweep.batch, -1).sum(1) if per_row else product.sum() / sweep.batch
    return total


def errors(
    graph: Graph, candidates: Iterable[C], ctx: Any, *, apply: Callable[[C], Graph] | None = None, draws: int = 1
) -> dict[C, float]:
    """The error of each candidate alone on the context's calibration data: passes, or anything that `apply` understands."""
    found = of_context(graph, candidates, ctx, apply=apply, draws=draws)
    return {one: found.error(one) for one in found.responses}


def of_context(
    graph: Graph, candidates: Iterable[C], ctx: Any, *, apply: Callable[[C], Graph] | None = None, draws: int = 1
) -> Sensitivity:
    """The same with the pairwise terms; `ctx` is a pipeline.Context."""
    if ctx.calibration is None:
        raise DataError("sensitivity needs calibration data", hint="give --calibrate data.npz")
    run: Apply = apply or (lambda one: one.run(graph, ctx))
    return sensitivity(graph, candidates, ctx.calibration.head(SAMPLES), run, draws=draws, seed=ctx.seed)


def neighbours(graph: Graph, found: Sensitivity, sites: Mapping[C, Sequence[str]]) -> Iterator[tuple[C, C, float]]:
    """Pairs of candidates at adjoining sites (node names; one reads what the other writes, at most through nodes that no
    candidate names) with their pairwise terms."""
    named = {name for names in sites.values() for name in names}
    ends: dict[str, set[str]] = {value: set() for value in graph.inputs}
    touching: set[tuple[str, str]] = set()
    for node in graph.nodes:
        sources = set().union(*(ends.get(value, set()) for value in node.reads))
        if node.name in named:
            touching.update((source, node.name) for source in sources)
            sources = {node.name}
        ends.update(dict.fromkeys(node.outputs, sources))
    for one, other in itertools.combinations(found.responses, 2):
        pairs = set(itertools.product(sites.get(one, ()), sites.get(other, ())))
        if any(pair in touching or pair[::-1] in touching for pair in pairs):
            yield one, other, found.pair(one, other)


def calibrated(found: Sensitivity, measured: Mapping[tuple[Any, ...], float]) -> tuple[Sensitivity, Calibration]:
    """The same with the scale that fits whole configurations best: one number, by regression of the logarithms.

    `measured` maps configurations (candidates that are applied together) to their measured errors. Raises DataError if there is
    none with both errors above zero.
    """
    pairs = [(found.error(*together), error) for together, error in measured.items()]
    usable = np.array([(predicted, error) for predicted, error in pairs if 0 < predicted < np.inf and 0 < error < np.inf])
    if not len(usable):
        raise DataError("no configuration changes the outputs", place="sensitivity", hint="measure larger changes")
    scale = float(np.exp(np.log(usable[:, 1] / usable[:, 0]).mean()))
    predicted, errors_ = (tuple(float(one) for one in side) for side in zip(*pairs, strict=True))
    rank = float(stats.spearmanr(predicted, errors_).statistic) if len(set(predicted)) > 1 < len(set(errors_)) else float("nan")
    return dataclasses.replace(found, scale=found.scale * scale), Calibration(predicted, errors_, scale, rank)


def _chunks(graph: Graph, candidates: Iterable[C], apply: Apply) -> Iterator[list[_Change]]:
    chunk: list[_Change] = []
    held = 0
    for candidate in dict.fromkeys(candidates):
        changed = part_of(graph, apply(candidate))
        size = sum(array.nbytes for array in changed.params.values())
        if chunk and held + size > CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
        session = Session(changed) if changed.outputs else None
        chunk.append(_Change(candidate, session, changed.inputs, changed.outputs))
        held += size
    if chunk:
        yield chunk


def part_of(graph: Graph, changed: Graph) -> Graph:
    """The nodes of `changed` that `graph` does not have, as a graph of their own, with what they read from it as inputs.

    Its outputs are the values that unchanged nodes, or the model's outputs, read from it: they exist in both graphs. A node is
    unchanged if it has the same fields and reads the same parameters and values of the same types.
    """
    nodes = tuple(node for node in changed.nodes if not _same(graph, changed, node))
    inside = {value for node in nodes for value in node.outputs if value}
    names = {node.name for node in nodes}
    kept = {value for node in changed.nodes if node.name not in names for value in node.reads}
    outputs = tuple(v for node in nodes for v in node.outputs if v and (v in kept or v in changed.outputs))
    reads = dict.fromkeys(value for node in nodes for value in node.reads if value not in inside)
    inputs = tuple(value for value in reads if value not in changed.params)
    params = {name: changed.params[name] for name in reads if name in changed.params}
    return dataclasses.replace(changed, inputs=inputs, outputs=outputs, nodes=nodes, params=MappingProxyType(params))


def _same(graph: Graph, changed: Graph, node: Node) -> bool:
    known = graph.node.get(node.name)
    if known is None or (known.op, known.domain, known.inputs, known.outputs) != (
        node.op,
        node.domain,
        node.inputs,
        node.outputs,
    ):
        return False
    if known is not node and known.proto.SerializeToString(deterministic=True) != node.proto.SerializeToString(
        deterministic=True
    ):
        return False
    if any(graph.types.get(value) != changed.types.get(value) for value in (*node.reads, *node.outputs) if value):
        return False
    pairs = ((graph.params.get(value), changed.params.get(value)) for value in node.reads)
    return all(one is other or (one is not None and other is not None and np.array_equal(one, other)) for one, other in pairs)


def _bytes(node: Node) -> bytes:
    return node.proto.SerializeToString(deterministic=True)
