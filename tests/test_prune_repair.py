"""Refitting after a cut: what the channels that stay can say of those that went is put into the weights that read them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hwopt.analysis.coupling import Group, coupling
from hwopt.analysis.covariance import FEW, fewness
from hwopt.backends.ort import run
from hwopt.ir import Graph
from hwopt.pipeline import Context, merged, parse, run_pass
from hwopt.plugins import find_passes
from hwopt.samples import Samples
from passes._prune_repair import removal_order
from passes.prune_channels import PruneChannels
from tests.random_graphs import Builder, conv, linear, random_graph, random_samples

COUNT, ROWS = 12, 40


def pointwise(b: Builder, data: str) -> str:
    return conv(b, data, 6, 1)


def padded(b: Builder, data: str) -> str:
    return conv(b, data, 6, 3)


def flat(b: Builder, data: str) -> str:
    moved = b.op("Transpose", [data], (1, 5, 5, COUNT), perm=(0, 2, 3, 1))
    return b.op("Add", [b.op("MatMul", [moved, b.weight(COUNT, 6, fan_in=COUNT)], (1, 5, 5, 6)), b.vector(6)], (1, 5, 5, 6))


def bare(b: Builder, data: str) -> str:
    """No bias, and no place for one."""
    moved = b.op("Transpose", [data], (1, 5, 5, COUNT), perm=(0, 2, 3, 1))
    return b.op("MatMul", [moved, b.weight(COUNT, 6, fan_in=COUNT)], (1, 5, 5, 6))


def pooled(b: Builder, data: str) -> str:
    return linear(b, b.op("ReduceMean", [data, b.ints(2, 3)], (1, COUNT), keepdims=0), 6)


def net(reader: Callable[[Builder, str], str], rank: int = 0, constant: float = 0.0, bent: bool = False) -> tuple[Graph, Samples]:
    """1x1 convolution to COUNT channels, read once; `rank`: so many of them tell the others, but for a constant."""
    b = Builder()
    mix = np.random.default_rng(5).standard_normal((COUNT, 4)).astype(np.float32)
    if rank:
        mix = (np.random.default_rng(6).standard_normal((COUNT, rank)).astype(np.float32)) @ mix[:rank]
    offset = b.param(np.linspace(-1, 1, COUNT, dtype=np.float32) * constant)
    x = b.op("Conv", [b.input((1, 4, 5, 5)), b.param(mix[:, :, None, None]), offset], (1, COUNT, 5, 5))
    b.outputs.append(reader(b, b.same("Relu", x) if bent else x))
    graph = b.graph()
    return graph, random_samples(graph, 3, ROWS)


def lost(graph: Graph, after: Graph, samples: Samples) -> float:
    """Mean square of what changed, over that of the outputs."""
    pairs = [(run(graph, feeds), run(after, feeds)) for feeds in samples.feeds(graph)]
    changed = sum(float(((one[name] - other[name]) ** 2).sum()) for one, other in pairs for name in one)
    return changed / sum(float((one[name] ** 2).sum()) for one, _ in pairs for name in one)


@pytest.mark.parametrize("reader", [pointwise, padded, flat, bare, pooled])
def test_channels_that_the_others_tell_are_not_missed(reader: Callable[[Builder, str], str]) -> None:
    graph, samples = net(reader, rank=3)
    ctx = Context(calibration=samples)
    dropped, fitted = (run_pass(PruneChannels(keep=5, criterion="l2", refit=refit), graph, ctx) for refit in (False, True))
    assert lost(graph, fitted, samples) < 5e-3 < 0.05 < lost(graph, dropped, samples)


@pytest.mark.parametrize("reader", [pointwise, flat, pooled])
def test_what_removed_channels_say_on_average_goes_into_the_bias(reader: Callable[[Builder, str], str]) -> None:
    graph, samples = net(reader, rank=1, constant=3.0)
    fitted = run_pass(PruneChannels(keep=4), graph, Context(calibration=samples))
    assert lost(graph, fitted, samples) < 1e-3


def test_without_data_a_cut_leaves_all_other_numbers_alone() -> None:
    graph, samples = net(pointwise)
    plain = run_pass(PruneChannels(keep=5), graph, Context())
    told = run_pass(PruneChannels(keep=5, refit=False), graph, Context(calibration=samples))
    assert all(np.array_equal(plain.params[name], told.params[name]) for name in plain.params)


def test_a_weight_that_is_shared_and_biases_that_are_stay_right_for_all_who_read_them() -> None:
    b = Builder()
    x = conv(b, b.input((1, 4, 5, 5)), 8, 1)
    y = conv(b, b.input((1, 8, 5, 5)), 8, 1)
    weight, bias = b.weight(6, 8, 1, 1, fan_in=8), b.vector(6)
    own = b.weight(6, 8, 1, 1, fan_in=8)
    b.outputs += [b.op("Conv", [x, own, bias], (1, 6, 5, 5)), b.op("Conv", [y, weight, bias], (1, 6, 5, 5))]
    graph = b.graph()
    samples = random_samples(graph, 0, 20)
    first = next(group.name for group in coupling(graph) if not group.frozen)
    after = run_pass(PruneChannels(site=(first,), keep=4), graph, Context(calibration=samples))
    feeds = next(iter(samples.feeds(graph)))
    other = graph.outputs[1]
    np.testing.assert_array_equal(run(graph, feeds)[other], run(after, feeds)[other])


@pytest.mark.parametrize("seed", range(16))
def test_refitting_loses_less_than_dropping_on_random_graphs(seed: int) -> None:
    graph = random_graph(seed)
    ctx = Context(calibration=random_samples(graph, seed, 64))
    dropped, fitted = (run_pass(PruneChannels(ratio=0.3, refit=refit), graph, ctx) for refit in (False, True))
    assert ctx.calibration is not None
    assert lost(graph, fitted, ctx.calibration) <= 1.05 * lost(graph, dropped, ctx.calibration)


def test_obs_removes_what_the_others_make_up_for_and_not_what_is_small() -> None:
    """Two large channels say the same, a smaller one says something of its own."""
    b = Builder()
    mix = np.array([[3, 0, 0], [3, 0.01, 0], [0, 2, 0], [0, 0, 1]], np.float32)
    x = b.op("Conv", [b.input((1, 3, 5, 5)), b.param(mix[:, :, None, None])], (1, 4, 5, 5))
    b.outputs.append(b.op("Conv", [x, b.param(np.ones((2, 4, 1, 1), np.float32))], (1, 2, 5, 5)))
    graph = b.graph()
    ctx = Context(calibration=random_samples(graph, 0, 20))
    for criterion, gone in (("l2", 3), ("obs", 0)):
        after = run_pass(PruneChannels(keep=3, criterion=criterion), graph, ctx)
        kept = after.params[graph.node["conv0"].inputs[1]][:, :, 0, 0]
        assert (kept[:, :1] != 0).sum() == (2 if gone == 3 else 1), criterion


@pytest.mark.parametrize("reader", [pointwise, flat])
def test_the_first_units_to_go_are_those_whose_loss_after_refitting_is_least(reader: Callable[[Builder, str], str]) -> None:
    graph, samples = net(reader, bent=True)
    group = next(one for one in coupling(graph) if not one.frozen)
    order = removal_order(graph, samples, group.name)
    assert order is not None and sorted(order) == list(range(COUNT))
    losses = [lost(graph, _without(graph, group, unit, samples), samples) for unit in range(COUNT)]
    assert losses[int(order.argmin())] <= min(losses) * 1.1 < 0.5 * max(losses)


def _without(graph: Graph, group: Group, unit: int, samples: Samples) -> Graph:
    from hwopt.analysis.coupling import analyse
    from passes._prune_cut import cut
    from passes._prune_repair import repair

    found = analyse(graph)
    kept = found.kept([(group, np.array([unit]))])
    return cut(graph, found, kept, "test", lambda work: repair(work, samples))


def test_units_of_several_channels_go_together() -> None:
    graph = random_graph(3, kind="transformer")
    samples = random_samples(graph, 0, 24)
    heads = [group for group in coupling(graph) if not group.frozen and group.granularity > 1]
    assert heads
    for group in heads:
        order = removal_order(graph, samples, group.name)
        assert order is not None and sorted(order) == list(range(group.size))


def test_few_rows_are_trusted_less() -> None:
    """Behind a pool each sample is one row: what as many rows as channels say of other samples is no better than nothing."""
    graph, _ = net(pooled)
    seen, unseen = random_samples(graph, 3, COUNT), random_samples(graph, 4, 200)
    node = graph.node[graph.nodes[-1].name if graph.nodes[-1].op == "MatMul" else graph.nodes[-2].name]
    assert fewness(graph, node, seen) == 1 + FEW and fewness(graph, graph.node["conv0"], seen) < 1.2
    fitted = run_pass(PruneChannels(keep=5), graph, Context(calibration=seen))
    dropped = run_pass(PruneChannels(keep=5), graph, Context())
    assert lost(graph, fitted, unseen) < lost(graph, dropped, unseen)


# One pass for many groups


def test_widths_of_several_groups_are_one_pass_and_one_text() -> None:
    one, other, third = PruneChannels(("a",), 8), PruneChannels(("b",), 4), PruneChannels(("c", "d"), 8)
    (joined,) = merged([one, other, third])
    assert str(joined) == "prune-channels{site=a+b+c+d,keep=8+4+8+8}" and parse(str(joined), find_passes()) == joined
    assert str(merged([one, third])[0]) == "prune-channels{site=a+c+d,keep=8}"
    assert merged([PruneChannels(("a",), 8, criterion="l1"), other]) == (PruneChannels(("a",), 8, criterion="l1"), other)
    again = merged([joined, PruneChannels(("b",), 2)])
    assert again == (joined,)
    assert len(merged([PruneChannels(keep=8), one])) == 2  # everywhere is not somewhere


def test_one_pass_gives_each_group_its_width() -> None:
    graph = random_graph(2, kind="cnn")
    free = [group for group in coupling(graph) if not group.frozen and group.size > 3]
    widths = {group.name: 2 + place % 2 for place, group in enumerate(free)}
    after = run_pass(PruneChannels(tuple(widths), tuple(widths.values())), graph, Context())
    assert {group.name: group.size for group in coupling(after) if group.name in widths} == widths
    assert len(widths) > 1
