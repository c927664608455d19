"""Criteria for pruning: those by gradients equal their definitions, computed sample by sample with finite differences."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from types import MappingProxyType

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from hwopt.analysis import fisher
from hwopt.analysis.coupling import Group, coupling
from hwopt.backends.ort import run
from hwopt.errors import DataError, ToolchainError
from hwopt.ir import Graph
from hwopt.pipeline import Context, run_pass
from hwopt.samples import Samples
from passes._prune_criteria import CRITERIA
from passes.prune_channels import PruneChannels
from tests.random_graphs import Builder, conv, linear, random_graph, random_samples

pytest.importorskip("torch")


def net(batch: int = 1) -> Graph:
    """conv -> relu -> conv -> relu -> mean -> 4 classes: two groups of 5 and 6 channels, the first read twice."""
    b = Builder()
    x = b.same("Relu", conv(b, b.input((batch, 2, 5, 5)), 5))
    inner = b.same("Relu", b.same("Add", conv(b, x, 6), conv(b, x, 6, 1)))
    pooled = b.op("ReduceMean", [inner, b.ints(2, 3)], (batch, 6), keepdims=0)
    b.outputs.append(linear(b, pooled, 4))
    return b.graph()


def samples(graph: Graph, count: int = 6, labels: bool = True) -> Samples:
    data = random_samples(graph, 1, count)
    return dataclasses.replace(data, labels=np.arange(count) % 4) if labels else data


def free(graph: Graph) -> list[Group]:
    return [group for group in coupling(graph) if not group.frozen]


def gated(graph: Graph, group: Group, unit: int, gate: float) -> Graph:
    """The graph whose readers multiply one unit by a gate: the same as scaling the weights that read it."""
    params = dict(graph.params)
    for weight in (one for one in group.weights if one.data):
        factor = np.where(weight.unit == unit, gate, 1.0)
        shape = [-1 if axis == weight.axis else 1 for axis in range(params[weight.value].ndim)]
        params[weight.value] = (params[weight.value] * factor.reshape(shape)).astype(np.float64)
    return dataclasses.replace(graph, params=MappingProxyType(params))


def gate_slopes(graph: Graph, group: Group, data: Samples, loss) -> np.ndarray:
    """[samples, units]: dL/dgate of each sample by central differences, outputs in float64."""
    step, slopes = 1e-2, np.zeros((len(data), group.size))
    for unit in range(group.size):
        for row, feeds in enumerate(data.feeds(graph)):
            sides = [logits(gated(graph, group, unit, gate), feeds) for gate in (1 + step, 1 - step)]
            slopes[row, unit] = (loss(sides[0], row) - loss(sides[1], row)) / (2 * step)
    return slopes


def logits(graph: Graph, feeds: dict[str, np.ndarray]) -> np.ndarray:
    params = {name: array.astype(np.float32) if array.dtype == np.float64 else array for name, array in graph.params.items()}
    return run(dataclasses.replace(graph, params=MappingProxyType(params)), feeds)[graph.outputs[0]][0].astype(np.float64)


def cross_entropy(data: Samples):
    return lambda found, row: -log_softmax(found)[data.labels[row]]


def test_fisher_and_taylor_equal_their_definition_sample_by_sample() -> None:
    graph = net()
    data, groups = samples(graph), free(graph)
    ctx = Context(calibration=data)
    assert [group.size for group in groups] == [5, 6]
    for group, squares, sizes in zip(groups, CRITERIA["fisher"](graph, groups, ctx), CRITERIA["taylor"](graph, groups, ctx)):  # noqa: B905
        slopes = gate_slopes(graph, group, data, cross_entropy(data))
        assert np.allclose(squares, 0.5 * (slopes**2).mean(0), rtol=2e-2, atol=1e-7)
        assert np.allclose(sizes, np.abs(slopes).mean(0), rtol=2e-2, atol=1e-5)


def test_without_labels_fisher_is_the_expectation_over_the_models_own_classes() -> None:
    graph = net()
    data, groups = samples(graph, labels=False), free(graph)
    found = CRITERIA["fisher"](graph, groups, Context(calibration=data))
    for group, scores in zip(groups, found, strict=True):
        wanted = np.zeros(group.size)
        chances = [softmax(logits(graph, feeds)) for feeds in data.feeds(graph)]
        for label in range(4):
            slopes = gate_slopes(graph, group, data, lambda out, _, label=label: -log_softmax(out)[label])
            wanted += sum(chance[label] * row**2 for chance, row in zip(chances, slopes, strict=True))
        assert np.allclose(scores, 0.5 * wanted / len(data), rtol=2e-2, atol=1e-7)


def test_batches_keep_their_samples_apart() -> None:
    one, two = net(), net(batch=2)
    data = samples(one)
    for criterion in ("fisher", "taylor", "obd"):
        alone, together = (CRITERIA[criterion](graph, free(graph), Context(calibration=data)) for graph in (one, two))
        for first, second in zip(alone, together, strict=True):
            assert np.allclose(first, second, rtol=1e-4)


def test_obd_equals_its_definition_sample_by_sample() -> None:
    """1/2 sum w^2 mean (dL/dw)^2, over the last layer's weights, whose gradients are known: (softmax - label) x input."""
    graph = net()
    data = samples(graph)
    group = free(graph)[1]
    (last,) = [weight for weight in group.weights if weight.data]
    writers = [weight for weight in group.weights if weight.writes]
    observed = dataclasses.replace(graph, outputs=(last.data, *graph.outputs))
    squares = np.zeros_like(graph.params[last.value], np.float64)
    for row, feeds in enumerate(data.feeds(graph)):
        read, out = (array[0].astype(np.float64) for array in run(observed, feeds).values())
        slope = softmax(out) - np.eye(4)[data.labels[row]]
        squares += np.outer(read, slope) ** 2 if last.axis == 0 else np.outer(slope, read) ** 2
    weights = graph.params[last.value].astype(np.float64)
    read_part = 0.5 * (weights**2 * squares / len(data)).sum(1 - last.axis)
    alone = dataclasses.replace(group)
    alone.__dict__["weights"] = (last,)
    (scores,) = CRITERIA["obd"](graph, [alone], Context(calibration=data))
    assert np.allclose(scores, read_part, rtol=1e-4)
    (whole,) = CRITERIA["obd"](graph, [group], Context(calibration=data))
    assert (whole > scores).all() and len(writers) == 2


def test_geometric_median_sums_distances_between_filters() -> None:
    graph = net()
    group = free(graph)[0]
    (writer,) = [weight for weight in group.weights if weight.writes]
    filters = graph.params[writer.value].reshape(group.size, -1).astype(np.float64)
    distances = np.linalg.norm(filters[:, None] - filters, axis=-1).sum(1)
    (scores,) = CRITERIA["fpgm"](graph, [group], Context())
    assert np.allclose(scores, distances, rtol=1e-5)


def test_random_scores_come_from_the_seed() -> None:
    groups = free(net())
    one, same, other = (CRITERIA["random"](net(), groups, Context(seed=seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not np.array_equal(one[0], other[0])


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_every_criterion_prunes_every_kind_of_group(criterion: str) -> None:
    for seed in range(6):
        graph = random_graph(seed)
        ctx = Context(calibration=random_samples(graph, seed, 4))
        scores = CRITERIA[criterion](graph, free(graph), ctx)
        assert all(np.isfinite(one).all() and one.shape == (group.size,) for one, group in zip(scores, free(graph), strict=True))
        after = run_pass(PruneChannels(ratio=0.5, criterion=criterion), graph, ctx)
        assert sum(a.size for a in after.params.values()) < sum(a.size for a in graph.params.values())


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "obd"])
def test_gradients_need_calibration_data(criterion: str) -> None:
    with pytest.raises(DataError, match="needs calibration data; give --calibrate"):
        run_pass(PruneChannels(ratio=0.5, criterion=criterion), net(), Context())


def test_without_torch_the_next_step_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher.importlib.util, "find_spec", lambda name: None)
    graph = net()
    with pytest.raises(ToolchainError, match=r"torch is not installed; pip install 'hwopt\[torch\]'"):
        run_pass(PruneChannels(ratio=0.5, criterion="fisher"), graph, Context(calibration=samples(graph)))


def test_pruning_without_gradients_does_not_import_torch() -> None:
    code = "import sys, passes.prune_channels, hwopt.analysis.sensitivity; sys.exit('torch' in sys.modules)"
    assert importlib.util.find_spec("torch")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
