"""Coupling groups, one case for every rule: the groups are the expected ones, and cutting them equals masking them."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import onnx
import pytest

from hwopt.analysis.coupling import analyse, coupling
from hwopt.ir import Node
from tests._couplings import (
    Build,
    batch_norm,
    between,
    channels_last,
    chosen,
    concatenated,
    depth_to_space,
    einsum,
    embedded,
    exported_group_norm,
    flattened,
    flattened_channels_last,
    gate,
    grouped,
    grouped_queries,
    head,
    image,
    joined_with_constants,
    joint_heads,
    layer_norm_of_all,
    made,
    multi_head,
    one_head,
    padded_channels,
    padded_shortcut,
    per_channel_activations,
    permuted,
    pooled_and_expanded,
    quantized,
    residual,
    resized,
    shared,
    shuffled,
    sliced,
    split_and_added,
    split_apart,
    split_to_output,
    transposed_conv,
    unclear_reshape,
    weights_left,
)
from tests._prune_oracle import pruned_like_masked, random_removal
from tests.random_graphs import Builder, conv, layer_norm, linear

Found = list[tuple[int, int, str]]  # size, granularity, the reason why a group is frozen


CHANNELS: dict[str, Build] = {
    "relu": between(lambda b, x: b.same("Relu", x)),
    "clip": between(lambda b, x: b.same("Clip", x, b.floats(0.0), b.floats(6.0))),
    "cast": between(lambda b, x: b.same("Cast", b.same("Cast", x, to=11), to=1)),
    "sigmoid, which is not zero at zero": between(lambda b, x: b.same("Sigmoid", x)),
    "a number per channel": between(lambda b, x: b.same("Add", x, b.param(np.ones((8, 1, 1), np.float32)))),
    "prelu": between(lambda b, x: b.same("PRelu", x, b.param(np.ones((8, 1, 1), np.float32) / 4))),
    "batch norm": between(batch_norm),
    "instance norm": between(lambda b, x: b.same("InstanceNormalization", x, b.vector(8, 1.0), b.vector(8))),
    "pool": between(lambda b, x: b.op("AveragePool", [x], (1, 8, 3, 3), kernel_shape=(2, 2), strides=(2, 2))),
    "spatial mean": between(lambda b, x: b.op("ReduceMean", [x, b.ints(-1)], (1, 8, 6, 1), keepdims=1)),
    "spatial softmax": between(lambda b, x: b.same("Softmax", x, axis=-1)),
    "spatial pad": between(lambda b, x: b.op("Pad", [x, b.ints(0, 0, 1, 0, 0, 0, 1, 2)], (1, 8, 8, 8))),
    "padded channels": between(padded_channels),
    "pool, squeeze, unsqueeze, expand": between(pooled_and_expanded),
    "where": between(chosen),
    "joined with constants": between(joined_with_constants),
    "spatial normalization": between(lambda b, x: b.same("MeanVarianceNormalization", x)),
    "triangle": between(lambda b, x: b.same("Trilu", x)),
    "resize": between(resized),
    "permutation": between(permuted),
    "tile": between(lambda b, x: b.op("Tile", [x, b.ints(1, 2, 1, 2)], (1, 16, 6, 12))),
    "space to depth": between(lambda b, x: b.op("SpaceToDepth", [x], (1, 32, 3, 3), blocksize=2)),
    "depthwise": grouped(8, 8),
    "depthwise transposed": transposed_conv(8),
    "flatten": flattened,
    "flatten, channels last": flattened_channels_last,
    "quantized": quantized,
    "quantized per channel": between(per_channel_activations),
    "left weights": weights_left,
    "embeddings": embedded,
}


@pytest.mark.parametrize("build", CHANNELS.values(), ids=CHANNELS)
def test_channels_pass(build: Build) -> None:
    graph = made(build)
    first, last = coupling(graph)
    assert (first.size, first.granularity, first.frozen) == (8, 1, "")
    assert last.frozen
    pruned = pruned_like_masked(graph, random_removal(graph, 1))
    assert coupling(pruned)[0].size == 4


GROUPS: dict[str, tuple[Build, Found]] = {
    "residual": (residual, [(8, 1, "")]),
    "concat": (concatenated, [(4, 1, ""), (6, 1, "")]),
    "split and multiplied": (split_and_added, [(4, 2, "")]),
    "split apart": (split_apart, [(8, 1, "")]),
    "the part of a split that is no output": (split_to_output, [(5, 1, "")]),
    "few wide groups are thinned": (grouped(2, 8), [(4, 2, ""), (4, 2, "")]),
    "many groups go as a whole": (grouped(16, 32), [(16, 2, "")]),
    "transposed convolution": (transposed_conv(1), [(8, 1, ""), (8, 1, "")]),
    "grouped transposed convolution": (transposed_conv(2), [(4, 2, ""), (4, 1, "")]),
    "channels last": (between(channels_last), [(8, 1, ""), (8, 1, "")]),
    "group norm": (between(lambda b, x: b.same("GroupNormalization", x, b.vector(8), b.vector(8), num_groups=4)), [(4, 2, "")]),
    "exported group norm": (between(exported_group_norm), [(4, 2, "")]),
    "padded shortcut": (padded_shortcut, [(8, 1, "")]),
    "slice": (sliced(1), [(8, 1, "")]),
    "slice with a stride": (sliced(2), [(8, 1, "has a stride")]),
    "squeeze and excite": (between(gate), [(8, 1, ""), (4, 1, "")]),
    "channel shuffle": (between(shuffled), [(4, 2, "")]),
    "depth to space, columns first": (depth_to_space("DCR"), [(2, 4, "")]),
    "depth to space, rows first": (depth_to_space("CRD"), [(2, 4, "")]),
    "einsum": (einsum, [(4, 1, ""), (3, 1, "")]),
    "attention heads": (multi_head, [(4, 3, "")]),
    "heads of one joint product": (joint_heads, [(4, 9, "")]),
    "grouped queries": (grouped_queries, [(2, 6, "")]),
    "a single head": (one_head, [(8, 1, ""), (8, 1, "")]),
    "shared weights": (shared, [(8, 1, "is the graph's input")]),
    "unclear reshape": (between(unclear_reshape), [(8, 1, "without a clear factorisation")]),
    "layer norm": (between(layer_norm_of_all), [(8, 1, "works across this axis")]),
    "softmax": (between(lambda b, x: b.same("Softmax", x, axis=1)), [(8, 1, "works across this axis")]),
    "sum of channels": (between(lambda b, x: b.op("ReduceSum", [x, b.ints(1)], (1, 1, 6, 6))), [(8, 1, "across")]),
    "best channel": (between(lambda b, x: b.same("Cast", b.op("ArgMax", [x], (1, 1, 6, 6), axis=1), to=1)), [(8, 1, "across")]),
    "response norm": (between(lambda b, x: b.same("LRN", x, size=3)), [(8, 1, "works across this axis")]),
    "unit length": (between(lambda b, x: b.same("LpNormalization", x, axis=1)), [(8, 1, "works across this axis")]),
    "no rule": (between(lambda b, x: b.same("CumSum", x, b.param(np.array(2)))), [(8, 1, "has no rule")]),
    "a shape that is computed": (
        between(lambda b, x: b.op("Reshape", [x, b.op("Shape", [x], (4,))], (1, 8, 6, 6))),
        [(8, 1, "Shape shape1 has no rule")],
    ),
}


@pytest.mark.parametrize(("build", "expected"), GROUPS.values(), ids=GROUPS)
def test_groups(build: Build, expected: Found) -> None:
    graph = made(build)
    found = [group for group in coupling(graph) if "the graph's output" not in group.frozen]
    assert [(group.size, group.granularity) for group in found] == [(size, width) for size, width, _ in expected]
    for group, (_, _, reason) in zip(found, expected, strict=True):
        assert reason in group.frozen and bool(reason) == bool(group.frozen)
    removed = random_removal(graph, 2)
    pruned = pruned_like_masked(graph, removed)
    assert all(len(units) for _, units in removed)
    assert bool(removed) == (sum(a.size for a in pruned.params.values()) < sum(a.size for a in graph.params.values()))


def test_equal_vectors_stored_once_do_not_tie_channels() -> None:
    b = Builder()
    zeros, ones = b.param(np.zeros(8, np.float32)), b.param(np.full((8, 1, 1), 2, np.float32))
    x = image(b)
    for _ in range(2):
        weight = b.weight(8, b.shapes[x][1], 1, 1, fan_in=3)
        x = b.same("Mul", b.op("Conv", [x, weight, zeros], (1, 8, 6, 6)), ones)
    head(b, x)
    graph = b.graph()
    assert [(group.size, group.frozen) for group in coupling(graph)[:2]] == [(8, ""), (8, "")]
    pruned = pruned_like_masked(graph, [(coupling(graph)[0], np.array([1, 4, 5]))])
    biases = [node.inputs[2] for node in pruned.nodes if node.op == "Conv" and len(node.inputs) == 3]
    assert [pruned.tensor(bias).dims for bias in biases[:2]] == [(5,), (8,)]


def test_a_vector_that_is_moved_in_one_place_and_added_in_another() -> None:
    """The convolution's bias is also the source of a slice: cutting one reader must not starve the other."""
    b = Builder()
    vector = b.vector(8)
    x = b.op("Conv", [image(b), b.weight(8, 3, 1, 1, fan_in=3), vector], (1, 8, 6, 6))
    part = b.op("Slice", [vector, b.ints(0), b.ints(6), b.ints(0)], (6,))
    y = b.op("Reshape", [b.same("Mul", part, part), b.ints(6, 1, 1)], (6, 1, 1))
    z = b.same("Add", b.op("Conv", [image(b), b.weight(6, 3, 1, 1, fan_in=3)], (1, 6, 6, 6)), y)
    head(b, x)
    head(b, z)
    graph = b.graph()
    first, second = (group for group in coupling(graph) if not group.frozen)
    pruned_like_masked(graph, [(first, np.array([0, 2]))])
    pruned_like_masked(graph, [(second, np.array([1, 3, 4]))])
    pruned_like_masked(graph, [(first, np.array([5, 2])), (second, np.array([1, 3, 4]))])


def test_members_map_every_index_to_its_unit() -> None:
    graph = made(flattened)
    group = coupling(graph)[0]
    units = {member.param: member.unit.tolist() for member in group.members}
    weight = graph.node["gemm3"].inputs[1]
    assert units[weight] == [channel for channel in range(8) for _ in range(6)]
    assert group.producers == ("conv0",)


def test_a_value_captured_by_a_branch_is_frozen() -> None:
    builder = Builder()
    x = conv(builder, image(builder), 8)
    head(builder, x)
    body = [onnx.helper.make_node("Identity", [x], ["inner"])]
    branch = onnx.helper.make_graph(body, "branch", [], [onnx.helper.make_tensor_value_info("inner", 1, (1, 8, 6, 6))])
    condition = builder.param(np.array(True))
    attrs = MappingProxyType({"then_branch": branch, "else_branch": branch})
    builder.nodes.append(Node("If", (condition,), ("chosen",), "if", attrs))
    builder.outputs.append("chosen")
    assert coupling(builder.graph())[0].frozen == "If if has no rule"


def test_softmax_of_old_opsets_normalises_all_trailing_axes() -> None:
    def build(b: Builder) -> None:
        last = b.op("Transpose", [conv(b, image(b), 8)], (1, 6, 6, 8), perm=(0, 2, 3, 1))
        b.outputs.append(linear(b, b.same("Softmax", last, axis=2), 2))

    assert not coupling(made(build, opset=13))[0].frozen
    assert "works across this axis" in coupling(made(build, opset=12))[0].frozen


def test_split_of_old_opsets_states_its_sizes_in_an_attribute() -> None:
    def build(b: Builder) -> None:
        x = b.op("Split", [conv(b, image(b), 8)], (1, 4, 6, 6), outputs=2, axis=1, split=(4, 4))
        head(b, x)
        head(b, f"{x}_1")

    graph = made(build, opset=11)
    group = coupling(graph)[0]
    pruned = pruned_like_masked(graph, [(group, np.array([0, 1, 5]))])
    assert pruned.node["split1"].attr("split") == (2, 3)


def test_dynamic_batch_is_no_obstacle() -> None:
    builder = Builder()
    head(builder, conv(builder, image(builder), 8))
    fixed = builder.inputs["x0"]
    builder.inputs["x0"] = type(fixed)("float32", ("n", 3, 6, 6))
    assert [bool(group.frozen) for group in coupling(builder.graph())] == [False, True]


def test_analysis_is_kept_for_as_long_as_its_graph() -> None:
    graph = made(residual)
    assert analyse(graph) is analyse(graph)
    assert analyse(made(residual)) is not analyse(graph)


def test_layer_norm_on_the_last_axis_freezes_the_stream_but_not_the_hidden_layer() -> None:
    def build(b: Builder) -> None:
        x = linear(b, b.input((1, 5, 6)), 8)
        hidden = b.same("Gelu", linear(b, layer_norm(b, x), 16))
        b.outputs.append(b.same("Add", x, linear(b, hidden, 8)))

    stream, hidden = coupling(made(build))
    assert "LayerNormalization" in stream.frozen and len(stream.producers) == 2
    assert (hidden.size, hidden.frozen) == (16, "")
