"""Sensitivity: predicted errors against what the outputs really do, pairs, calibration, and what is local about it."""

from __future__ import annotations

import dataclasses
import itertools
from types import MappingProxyType

import numpy as np
import pytest
from scipy import stats

from hwopt.analysis import fisher
from hwopt.analysis.sensitivity import calibrated, errors, neighbours, of_context, part_of, sensitivity
from hwopt.backends.ort import Session, run
from hwopt.errors import DataError, ToolchainError
from hwopt.evaluate import divergence
from hwopt.ir import Graph, of_op
from hwopt.pipeline import Context, run_pass
from hwopt.samples import Samples
from passes.prune_channels import PruneChannels
from passes.quantize import Quantize
from passes.share_weights import ShareWeights
from tests.random_graphs import Builder, conv, linear, random_samples

pytest.importorskip("torch")


def classifier(batch: int = 1) -> Graph:
    """Four convolutions, one of them around a residual, and 4 classes."""
    b = Builder()
    x = b.same("Relu", conv(b, b.input((batch, 3, 8, 8)), 16))
    for _ in range(2):
        x = b.same("Relu", b.same("Add", x, conv(b, x, 16)))
    x = b.same("Relu", conv(b, x, 16))
    b.outputs.append(linear(b, b.op("ReduceMean", [x, b.ints(2, 3)], (batch, 16), keepdims=0), 4))
    return b.graph()


def regression() -> Graph:
    b = Builder()
    b.outputs.append(conv(b, b.same("Relu", conv(b, b.input((1, 3, 8, 8)), 16)), 3))
    return b.graph()


def nudged(graph: Graph, site: str, size: float, seed: int = 0) -> Graph:
    """The weights of one node moved by random amounts relative to their own size."""
    name = graph.node[site].inputs[1]
    edit = graph.edit()
    noise = np.random.default_rng(seed).standard_normal(graph.params[name].shape)
    with np.errstate(over="ignore"):
        edit.set_param(name, (graph.params[name] * (1 + size * noise)).astype(np.float32))
    return edit.finish("nudge")


def layers(graph: Graph) -> list[str]:
    return [node.name for node in of_op(graph, "Conv", "Gemm", "MatMul")]


def measured(graph: Graph, changed: Graph, data: Samples) -> float:
    before, after = (
        np.concatenate([Session(one).run(feeds)[graph.outputs[0]] for feeds in data.feeds(graph)]) for one in (graph, changed)
    )
    return divergence(before, after)


@pytest.mark.parametrize("build", [classifier, regression])
def test_small_changes_are_predicted_to_a_few_percent(build) -> None:
    graph = build()
    data = random_samples(graph, 2, 24)
    found = sensitivity(graph, layers(graph), data, lambda site: nudged(graph, site, 0.01), expected=True, draws=24)
    for site in layers(graph):
        assert found.error(site) == pytest.approx(measured(graph, nudged(graph, site, 0.01), data), rel=0.25), site


def test_classes_taken_one_by_one_are_exact_for_small_changes() -> None:
    graph = classifier()
    data = random_samples(graph, 2, 8)
    found = sensitivity(graph, layers(graph), data, lambda site: nudged(graph, site, 0.003), expected=True)
    for site in layers(graph):
        assert found.error(site) == pytest.approx(measured(graph, nudged(graph, site, 0.003), data), rel=0.05), site


def test_random_signs_estimate_the_same_as_all_classes() -> None:
    graph = classifier()
    data = random_samples(graph, 2, 16)
    exact, drawn = (
        sensitivity(graph, layers(graph), data, lambda site: nudged(graph, site, 0.01), **how)
        for how in ({"expected": True}, {"draws": 32})
    )
    for site in layers(graph):
        assert drawn.error(site) == pytest.approx(exact.error(site), rel=0.25)


def test_two_changes_together_cost_both_and_their_pair() -> None:
    graph = classifier()
    data = random_samples(graph, 2, 16)
    found = sensitivity(graph, layers(graph), data, lambda site: nudged(graph, site, 0.01), expected=True)
    one, other = layers(graph)[1:3]
    assert found.error(one, other) == pytest.approx(found.error(one) + found.error(other) + found.pair(one, other))
    both = nudged(nudged(graph, one, 0.01), other, 0.01)
    assert found.error(one, other) == pytest.approx(measured(graph, both, data), rel=0.1)
    assert abs(found.pair(one, other)) > 0.01 * found.error(one)


def test_passes_are_ranked_like_their_measured_errors() -> None:
    graph = classifier()
    ctx = Context(calibration=random_samples(graph, 2, 32))
    candidates = [
        kind for site in layers(graph) for kind in (Quantize((site,)), ShareWeights((site,), 2), ShareWeights((site,), 4))
    ]
    candidates += [PruneChannels((layers(graph)[3],), keep=keep, criterion="l2") for keep in (4, 8, 12)]
    candidates = [one for one in candidates if run_pass(one, graph, ctx) is not graph]
    found = errors(graph, candidates, ctx, draws=4)
    actual = [measured(graph, run_pass(one, graph, ctx), ctx.calibration) for one in candidates]
    assert stats.spearmanr([found[one] for one in candidates], actual).statistic > 0.95


def test_a_candidate_that_changes_nothing_costs_nothing() -> None:
    graph = classifier()
    found = sensitivity(graph, ["nothing"], random_samples(graph, 2, 4), lambda _: graph)
    assert found.error("nothing") == found.error() == 0.0


def test_a_change_that_overflows_has_an_infinite_error() -> None:
    graph = classifier()
    site = layers(graph)[1]
    found = sensitivity(graph, [site], random_samples(graph, 2, 4), lambda one: nudged(graph, one, 1e39))
    assert found.error(site) == np.inf


def test_batches_respond_like_single_samples() -> None:
    one, two = classifier(), classifier(2)
    data = random_samples(one, 2, 8)
    alone, together = (
        sensitivity(g, layers(g), data, lambda site, g=g: nudged(g, site, 0.01), expected=True).error(*layers(g))
        for g in (one, two)
    )
    assert alone == pytest.approx(together, rel=1e-4)


def test_only_the_changed_nodes_are_run() -> None:
    graph = classifier()
    site = layers(graph)[1]
    part = part_of(graph, nudged(graph, site, 0.1))
    assert [node.name for node in part.nodes] == [site]
    assert part.outputs == graph.node[site].outputs
    data = dict(zip(part.inputs, [np.ones(graph.tensor(v).dims, np.float32) for v in part.inputs], strict=True))
    assert run(part, data)


def test_values_that_change_their_shape_belong_to_the_change() -> None:
    graph = classifier()
    ctx = Context(calibration=random_samples(graph, 2, 4))
    part = part_of(graph, run_pass(PruneChannels((layers(graph)[3],), keep=8), graph, ctx))
    assert all(graph.types[value] == part.types[value] for value in (*part.inputs, *part.outputs))
    assert {layers(graph)[3], layers(graph)[4]} <= {node.name for node in part.nodes}


def test_labels_make_it_the_gradients_of_their_cross_entropy() -> None:
    graph = classifier()
    data = random_samples(graph, 2, 6)
    labelled = dataclasses.replace(data, labels=np.arange(6) % 4)
    site = layers(graph)[0]
    with_labels = sensitivity(graph, [site], labelled, lambda one: nudged(graph, one, 1e-3))
    losses = []
    for one in (graph, nudged(graph, site, 1e-3)):
        outputs = [Session(one).run(feeds)[graph.outputs[0]][0].astype(np.float64) for feeds in data.feeds(graph)]
        losses.append([np.log(np.exp(out).sum()) - out[label] for out, label in zip(outputs, labelled.labels, strict=True)])
    change = np.subtract(*losses)
    assert with_labels.error(site) == pytest.approx(0.5 * (change**2).mean(), rel=0.1)


def test_the_scale_is_fitted_to_whole_configurations() -> None:
    graph = classifier()
    data = random_samples(graph, 2, 16)
    names = layers(graph)
    found = sensitivity(graph, names, data, lambda site: nudged(graph, site, 0.01), draws=2)
    together = {pair: 3.0 * found.error(*pair) for pair in itertools.combinations(names, 2)}
    after, report = calibrated(found, together)
    assert report.scale == pytest.approx(3.0)
    assert report.rank_correlation == pytest.approx(1.0)
    assert after.error(*names) == pytest.approx(3.0 * found.error(*names))
    with pytest.raises(DataError, match="no configuration changes the outputs"):
        calibrated(found, {(): 0.0})


def test_neighbours_are_named_with_their_pairs() -> None:
    graph = classifier()
    names = layers(graph)
    found = sensitivity(graph, names, random_samples(graph, 2, 4), lambda site: nudged(graph, site, 0.01))
    pairs = {(one, other): amount for one, other, amount in neighbours(graph, found, {name: [name] for name in names})}
    assert (names[0], names[1]) in pairs and (names[0], names[4]) not in pairs
    assert pairs[names[0], names[1]] == found.pair(names[0], names[1])


def test_the_same_seed_gives_the_same_numbers() -> None:
    graph = classifier()
    ctx = Context(calibration=random_samples(graph, 2, 4), seed=3)
    first, second = (of_context(graph, layers(graph), ctx, apply=lambda site: nudged(graph, site, 0.01)) for _ in range(2))
    assert all(np.array_equal(first.responses[one], second.responses[one]) for one in layers(graph))


def test_what_has_no_gradients_is_said_before_anything_runs() -> None:
    b = Builder()
    b.outputs.append(b.op("Det", [b.input((1, 3, 3))], (1,)))
    graph = b.graph()
    assert fisher.missing(graph) == "no gradients for Det"
    with pytest.raises(ToolchainError, match="no gradients for Det; choose one that needs no gradients"):
        sensitivity(graph, ["x"], Samples(MappingProxyType({})), lambda _: graph)
