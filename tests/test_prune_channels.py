"""prune-channels: the right units go, the result equals the masked model, on real structures and on random graphs."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import numpy as np
import pytest

from hwopt.analysis.activations import mean_magnitudes
from hwopt.analysis.coupling import analyse, coupling
from hwopt.backends.ort import run
from hwopt.errors import DataError, PassError, UsageError
from hwopt.ir import Graph
from hwopt.pipeline import Context, Refusal, merged, parse, run_pass
from hwopt.plugins import find_passes, find_target
from hwopt.samples import Samples
from hwopt.target import Target
from passes._prune_cut import cut
from passes.prune_channels import PruneChannels, granular, kept_units
from tests._prune_oracle import assert_same, masked, pruned_like_masked, random_removal
from tests.random_graphs import Builder, conv, layer_norm, linear, norm, random_feeds, random_graph, random_samples


def target() -> Target:
    return find_target("cortex-a72")


def two_convs(scale: tuple[float, ...] = (5, 1, 4, 2, 3, 0.5, 6, 7), second: float = 1.0) -> Graph:
    """relu(conv(x)) @ conv, filters of the given sizes: group conv0 of 8 channels."""
    b = Builder()
    weight = np.ones((len(scale), 3, 1, 1), np.float32) * np.array(scale, np.float32).reshape(-1, 1, 1, 1)
    x = b.op("Conv", [b.input((1, 3, 4, 4)), b.param(weight)], (1, len(scale), 4, 4))
    read = b.param(np.full((2, len(scale), 1, 1), second, np.float32))
    b.outputs.append(b.op("Conv", [b.same("Relu", x), read], (1, 2, 4, 4)))
    return b.graph()


def kept_of(before: Graph, after: Graph) -> list[float]:
    weight = after.params[before.node["conv0"].inputs[1]]
    return weight[:, 0, 0, 0].tolist()


# Real structures


def residual_cnn(b: Builder) -> str:
    x = conv(b, b.input((1, 3, 12, 12)), 16)
    for _ in range(2):
        inner = conv(b, b.same("Relu", norm(b, conv(b, x, 16))), 16)
        x = b.same("Relu", b.same("Add", inner, x))
    strided = conv(b, x, 32, stride=2)
    return b.same("Relu", b.same("Add", conv(b, conv(b, x, 32, stride=2), 32), strided))


def mobile(b: Builder) -> str:
    x = b.same("HardSwish", conv(b, b.input((1, 3, 12, 12)), 8))
    for _ in range(2):
        wide = b.same("HardSwish", norm(b, conv(b, x, 24, 1)))
        wide = b.same("Relu", norm(b, conv(b, wide, 24, groups=24)))
        pooled = b.op("GlobalAveragePool", [wide], (1, 24, 1, 1))
        gate = b.same("HardSigmoid", conv(b, b.same("Relu", conv(b, pooled, 6, 1)), 24, 1))
        x = b.same("Add", x, conv(b, b.same("Mul", wide, gate), 8, 1))
    return x


def dense(b: Builder) -> str:
    x = conv(b, b.input((1, 3, 12, 12)), 8)
    for _ in range(3):
        new = conv(b, b.same("Relu", norm(b, x)), 4)
        _, channels, height, width = b.shapes[x]
        x = b.op("Concat", [x, new], (1, channels + 4, height, width), axis=1)
    return x


def shuffle(b: Builder) -> str:
    """ShuffleNet V2: half of the channels take the branch, then all are shuffled."""
    x = conv(b, b.input((1, 3, 12, 12)), 16)
    for _ in range(2):
        same = b.op("Split", [x, b.ints(8, 8)], (1, 8, 12, 12), outputs=2, axis=1)
        branch = conv(b, b.same("Relu", conv(b, f"{same}_1", 8, 1)), 8, groups=8)
        x = b.op("Concat", [same, b.same("Relu", conv(b, branch, 8, 1))], (1, 16, 12, 12), axis=1)
        two = b.op("Reshape", [x, b.ints(1, 2, 8, 12, 12)], (1, 2, 8, 12, 12))
        turned = b.op("Transpose", [two], (1, 8, 2, 12, 12), perm=(0, 2, 1, 3, 4))
        x = b.op("Reshape", [turned, b.ints(1, 16, 12, 12)], (1, 16, 12, 12))
    return x


def pooled(build: Callable[[Builder], str]) -> Graph:
    b = Builder()
    x = build(b)
    b.outputs.append(conv(b, b.op("GlobalAveragePool", [x], (1, b.shapes[x][1], 1, 1)), 5, 1))
    return b.graph()


def transformer() -> Graph:
    b = Builder()
    x = linear(b, b.input((1, 6, 5)), 16)
    normal = layer_norm(b, x)
    query, key, value = (b.op("Reshape", [linear(b, normal, 16), b.ints(1, 6, 4, 4)], (1, 6, 4, 4)) for _ in range(3))
    query, value = (b.op("Transpose", [part], (1, 4, 6, 4), perm=(0, 2, 1, 3)) for part in (query, value))
    key = b.op("Transpose", [key], (1, 4, 4, 6), perm=(0, 2, 3, 1))
    scores = b.same("Softmax", b.op("MatMul", [query, key], (1, 4, 6, 6)), axis=-1)
    mixed = b.op("Transpose", [b.op("MatMul", [scores, value], (1, 4, 6, 4))], (1, 6, 4, 4), perm=(0, 2, 1, 3))
    x = b.same("Add", x, linear(b, b.op("Reshape", [mixed, b.ints(1, 6, 16)], (1, 6, 16)), 16))
    x = b.same("Add", x, linear(b, b.same("Gelu", linear(b, layer_norm(b, x), 32)), 16))
    b.outputs.append(linear(b, layer_norm(b, x), 3))
    return b.graph()


STRUCTURES: dict[str, tuple[Callable[[], Graph], list[tuple[int, int]]]] = {
    "residual": (lambda: pooled(residual_cnn), [(16, 1), (16, 1), (16, 1), (32, 1), (32, 1)]),
    "mobile": (lambda: pooled(mobile), [(8, 1), (24, 1), (6, 1), (24, 1), (6, 1)]),
    "dense": (lambda: pooled(dense), [(8, 1), (4, 1), (4, 1), (4, 1)]),
    "transformer": (transformer, [(4, 4), (32, 1)]),
}


@pytest.mark.parametrize(("build", "expected"), STRUCTURES.values(), ids=STRUCTURES)
def test_real_structures(build: Callable[[], Graph], expected: list[tuple[int, int]]) -> None:
    graph = build()
    free = [group for group in coupling(graph) if not group.frozen]
    assert sorted((group.size, group.granularity) for group in free) == sorted(expected)
    pruned = pruned_like_masked(graph, random_removal(graph, 3))
    assert sum(a.size for a in pruned.params.values()) < 0.6 * sum(a.size for a in graph.params.values())


def test_shuffle_net_keeps_its_halves_and_loses_channels() -> None:
    graph = pooled(shuffle)
    pruned = pruned_like_masked(graph, random_removal(graph, 3))
    half = next(node for node in pruned.nodes if node.op == "Split")
    sizes = [pruned.tensor(value).dims[1] for value in half.outputs]
    assert min(sizes) > 0 and sum(sizes) < 16


@pytest.mark.parametrize("seed", range(200))
def test_pruned_equals_masked_on_random_graphs(seed: int) -> None:
    graph = random_graph(seed, messy=seed % 2 == 1)
    pruned_like_masked(graph, random_removal(graph, seed, share=[0.3, 0.5, 0.8][seed % 3]))


def test_masking_is_felt_on_random_graphs() -> None:
    """The comparison above means something: nearly all of these graphs lose units that their outputs depend on."""
    changed = 0
    for seed in range(20):
        graph = random_graph(seed)
        kept = analyse(graph).kept(random_removal(graph, seed))
        feeds = random_feeds(graph)
        before, after = run(graph, feeds), run(masked(graph, kept), feeds)
        changed += any(np.abs(before[name] - after[name]).max() > 1e-3 for name in before)
    assert changed >= 18


# Which units go


def test_l2_keeps_the_largest_filters() -> None:
    graph = two_convs()
    after = run_pass(PruneChannels(site=("conv0",), keep=3), graph, Context())
    assert kept_of(graph, after) == [5, 6, 7]
    assert after.node["conv2"].history == after.node["conv0"].history == ("prune-channels{site=conv0,keep=3}",)


def test_criteria_sum_over_all_who_write_and_read() -> None:
    graph = two_convs(scale=(1, 1, 1, 1))
    edit = graph.edit()
    edit.set_param(graph.node["conv2"].inputs[1], np.array([[4, 1, 3, 2], [0, 3, 0, 3]], np.float32).reshape(2, 4, 1, 1))
    graph = edit.finish("weights")
    for criterion, lost in (("l1", 2), ("l2", 2)):
        after = run_pass(PruneChannels(keep=3, criterion=criterion), graph, Context())
        read = after.params[graph.node["conv2"].inputs[1]][0, :, 0, 0].tolist()
        assert read == [value for index, value in enumerate([4, 1, 3, 2]) if index != lost]


def test_l1_and_l2_disagree_where_they_should() -> None:
    graph = two_convs(scale=(1, 1), second=0.0)
    edit = graph.edit()
    edit.set_param(graph.node["conv0"].inputs[1], np.array([[3, 0, 0], [1.5, 1.5, 1.5]], np.float32).reshape(2, 3, 1, 1))
    graph = edit.finish("weights")
    kept = {c: kept_of(graph, run_pass(PruneChannels(keep=1, criterion=c), graph, Context())) for c in ("l1", "l2")}
    assert kept == {"l1": [1.5], "l2": [3]}


def test_activation_criterion_looks_at_what_the_readers_see() -> None:
    graph = two_convs(scale=(1, -9, 2, -8))  # relu silences the negative filters on positive data
    rng = np.random.default_rng(0)
    data = Samples(MappingProxyType({"x0": rng.random((6, 3, 4, 4), np.float32)}))
    after = run_pass(PruneChannels(keep=2, criterion="activation"), graph, Context(calibration=data))
    assert kept_of(graph, after) == [1, 2]
    with pytest.raises(DataError, match="needs calibration data"):
        run_pass(PruneChannels(keep=2, criterion="activation"), graph, Context())


def test_mean_magnitudes_of_inputs_and_inner_values() -> None:
    graph = two_convs(scale=(1, -2))
    data = random_samples(graph, count=5)
    found = mean_magnitudes(graph, data, [("x0", 1), ("relu1_out", 1)])
    x = data.arrays["x0"]
    assert np.allclose(found["x0", 1], np.abs(x).mean((0, 2, 3)), rtol=1e-6)
    sums = x.sum(1, dtype=np.float64)
    assert np.allclose(found["relu1_out", 1], [np.maximum(sums, 0).mean(), np.maximum(-2 * sums, 0).mean()], rtol=1e-5)


@pytest.mark.parametrize("criterion", ["l1", "l2", "activation"])
def test_every_criterion_scores_every_kind_of_group(criterion: str) -> None:
    for seed in range(12):
        graph = random_graph(seed)
        ctx = Context(calibration=random_samples(graph, seed, 4))
        after = run_pass(PruneChannels(ratio=0.5, criterion=criterion), graph, ctx)
        assert sum(a.size for a in after.params.values()) < sum(a.size for a in graph.params.values())


def test_a_part_of_a_split_never_loses_all_its_channels() -> None:
    b = Builder()
    x = conv(b, b.input((1, 3, 4, 4)), 8)
    half = b.op("Split", [x, b.ints(4, 4)], (1, 4, 4, 4), outputs=2, axis=1)
    b.outputs.extend((conv(b, half, 2, 1), conv(b, f"{half}_1", 2, 1)))
    group = coupling(b.graph())[0]
    assert kept_units(group, np.arange(8.0), 3).tolist() == [3, 6, 7]
    assert kept_units(group, np.arange(8.0), 1).tolist() == [3, 7]


# Options, refusals, candidates


def test_text_form_parses_back() -> None:
    one = PruneChannels(site=("/model/conv 1",), keep=48, criterion="l1")
    assert parse(str(one), find_passes()) == one


@pytest.mark.parametrize("options", [{"keep": -1}, {"ratio": 1.0}, {"keep": 3, "ratio": 0.5}, {"criterion": "l3"}])
def test_wrong_options_are_usage_errors(options: dict) -> None:
    with pytest.raises(UsageError):
        PruneChannels(**options)


def test_neither_keep_nor_ratio_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="how much"):
        PruneChannels().run(two_convs(), Context())


def test_frozen_and_narrow_groups_are_refused_with_the_reason() -> None:
    graph, ctx = two_convs(), Context()
    assert run_pass(PruneChannels(site=("conv2",), keep=1), graph, ctx) is graph
    assert run_pass(PruneChannels(site=("conv0",), keep=8), graph, ctx) is graph
    assert run_pass(PruneChannels(site=("relu1",), keep=1), graph, ctx) is graph
    reasons = [refusal.reason for refusal in ctx.refused]
    assert reasons[0] == "is the graph's output conv2_out"
    assert reasons[1:] == ["it has no more than 8 units", "no group of channels is called after this node"]


def test_unknown_group_names_the_nearest() -> None:
    with pytest.raises(PassError, match="no group conv9"):
        PruneChannels(site=("conv9",), keep=1).run(two_convs(), Context())


def test_candidates_lie_on_the_granule_and_frozen_groups_are_refused() -> None:
    graph = two_convs(scale=tuple(range(1, 33)))
    found = list(PruneChannels.candidates(graph, target()))
    widths = [width for one in found if isinstance(one, PruneChannels) for width in one.keep]
    granule = target().granule_of("int8")
    assert widths == [24, 16, 8] and all(width % granule == 0 for width in widths)
    assert found[-1] == Refusal("prune-channels", "conv2", "is the graph's output conv2_out")


def test_narrow_groups_fall_back_to_the_float_granule_or_are_refused() -> None:
    assert granular(coupling(two_convs())[0], target()) == [4]
    found = list(PruneChannels.candidates(two_convs(scale=(1, 2, 3)), target()))
    assert isinstance(found[0], Refusal) and "granule" in found[0].reason


def test_heads_count_with_all_their_channels() -> None:
    group = coupling(transformer())[1]
    assert (group.channels, granular(group, target())) == (16, [2])


def test_ratio_is_rounded_up_to_the_granule() -> None:
    graph = two_convs(scale=tuple(range(1, 33)))
    after = run_pass(PruneChannels(ratio=0.4), graph, Context(target=target()))
    assert len(kept_of(graph, after)) == 24
    assert len(kept_of(graph, run_pass(PruneChannels(ratio=0.4), graph, Context()))) == 19


def test_every_candidate_runs() -> None:
    for seed in (1, 4, 9):
        graph = random_graph(seed)
        ctx = Context(calibration=random_samples(graph, seed, 4))
        for one in PruneChannels.candidates(graph, target()):
            if isinstance(one, Refusal):
                continue
            group = next(group for group in coupling(graph) if group.name == one.site[0])
            after = run_pass(one, graph, ctx)
            written = group.weights[0]
            lost = graph.tensor(written.value).dims[written.axis] - after.tensor(written.value).dims[written.axis]
            assert lost == (group.size - one.keep[0]) * group.granularity


# Composition


@pytest.mark.parametrize("seed", range(40))
def test_names_outlive_the_pruning_of_other_groups(seed: int) -> None:
    """Groups pruned one after the other, each by its name, give the same model as all at once."""
    graph = random_graph(seed)
    removed = random_removal(graph, seed)
    coupled = analyse(graph)
    at_once = cut(graph, coupled, coupled.kept(removed), "prune")
    step = graph
    for group, units in removed:
        found = {group.name: group for group in coupling(step)}
        assert found[group.name].size == group.size
        step = cut(step, analyse(step), analyse(step).kept([(found[group.name], units)]), "prune")
    feeds = random_feeds(graph)
    assert_same(run(at_once, feeds), run(step, feeds))


def test_merged_instances_with_different_widths_all_apply() -> None:
    graph = pooled(mobile)
    names = [group.name for group in coupling(graph) if group.size == 24]
    plan = merged([PruneChannels(site=(names[0],), keep=16), PruneChannels(site=(names[1],), keep=8)])
    for one in plan:
        graph = run_pass(one, graph, Context())
    assert [group.size for group in coupling(graph) if group.name in names] == [16, 8]


@pytest.mark.parametrize("other", ["low-rank{rank=3}", "share-weights{bits=4}", "quantize"])
def test_what_other_passes_made_can_still_be_pruned(other: str) -> None:
    """The order of a plan is prune, factor, share, quantize; the reverse must be as exact."""
    for seed in (0, 2, 5, 6):
        graph = random_graph(seed)
        ctx = Context(target=target(), calibration=random_samples(graph, seed, 4))
        graph = run_pass(parse(other, find_passes()), graph, ctx)
        pruned_like_masked(graph, random_removal(graph, seed))


def test_a_pruned_graph_can_be_factored_and_quantized() -> None:
    graph = pooled(residual_cnn)
    ctx = Context(target=target(), calibration=random_samples(graph, 0, 4))
    pruned = run_pass(PruneChannels(ratio=0.5), graph, ctx)
    after = pruned
    for text in ("low-rank{rank=4}", "quantize"):
        after = run_pass(parse(text, find_passes()), after, ctx)
    feeds = random_feeds(graph)
    wanted, found = run(pruned, feeds), run(after, feeds)
    assert {name: array.shape for name, array in found.items()} == {name: array.shape for name, array in wanted.items()}
    assert any(node.op == "DequantizeLinear" for node in after.nodes)
