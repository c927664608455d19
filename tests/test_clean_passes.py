"""The exact clean-up passes: what each rewrites, what it leaves alone and why; ONNX Runtime is the oracle."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import MappingProxyType

import numpy as np
import pytest

from hwopt.ir import Graph, Node, TensorType, frozen, infer_types, to_text
from hwopt.pipeline import Context, PassManager, Phase, run_pass
from hwopt.plugins import find_passes
from passes.common_subexpressions import CommonSubexpressions
from passes.dedupe_weights import DedupeWeights
from passes.drop_identity import DropIdentity
from passes.fold_batch_norm import FoldBatchNorm
from passes.fold_constants import FoldConstants
from tests._clean import Spelling, apply, ops, spelled
from tests.random_graphs import Builder, random_graph

# Batch norm


def bn(b: Builder, x: str) -> str:
    channels = b.shapes[x][1]
    variance = b.param((0.5 + b.rng.random(channels)).astype(np.float32))
    inputs = [x, b.vector(channels, 1.0), b.vector(channels), b.vector(channels), variance]
    return b.op("BatchNormalization", inputs, b.shapes[x])


def conv(b: Builder, x: str, groups: int = 1, pad: int = 1, bias: bool = True) -> str:
    batch, depth, height, width = b.shapes[x]
    inputs = [x, b.weight(8, depth // groups, 3, 3, fan_in=9 * depth // groups), *([b.vector(8)] if bias else [])]
    shape = (batch, 8, height + 2 * pad - 2, width + 2 * pad - 2)
    return b.op("Conv", inputs, shape, group=groups, pads=(pad,) * 4)


def transposed_conv(b: Builder, x: str, groups: int) -> str:
    batch, depth, height, width = b.shapes[x]
    weight = b.weight(depth, 8 // groups, 3, 3, fan_in=9 * depth // groups)
    return b.op("ConvTranspose", [x, weight], (batch, 8, 2 * height + 1, 2 * width + 1), group=groups, strides=(2, 2))


IMAGE = (2, 4, 6, 7)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_folds_into_the_convolution_before_it(groups: int, bias: bool) -> None:
    after = apply(FoldBatchNorm(), spelled(lambda b, x: bn(b, conv(b, x, groups, bias=bias)), IMAGE))
    assert ops(after) == ["Conv"]
    assert after.nodes[0].history == ("fold-batch-norm",)


@pytest.mark.parametrize("groups", [1, 2])
def test_batch_norm_folds_into_the_transposed_convolution_before_it(groups: int) -> None:
    assert ops(apply(FoldBatchNorm(), spelled(lambda b, x: bn(b, transposed_conv(b, x, groups)), IMAGE))) == ["ConvTranspose"]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_batch_norm_folds_into_an_unpadded_convolution_behind_it(groups: int) -> None:
    after = apply(FoldBatchNorm(), spelled(lambda b, x: conv(b, bn(b, x), groups, pad=0), IMAGE))
    assert ops(after) == ["Conv"]


def test_batch_norm_before_padding_is_refused_but_its_factor_alone_is_not() -> None:
    graph, ctx = spelled(lambda b, x: conv(b, bn(b, x)), IMAGE), Context()
    assert run_pass(FoldBatchNorm(), graph, ctx) is graph
    assert [refusal.reason for refusal in ctx.refused] == ["its shift does not reach the padding of conv1"]

    def factor(b: Builder, x: str) -> str:
        return conv(b, b.same("Mul", x, b.param(np.arange(1, 5, dtype=np.float32).reshape(4, 1, 1))), 2)

    assert ops(apply(FoldBatchNorm(), spelled(factor, IMAGE))) == ["Conv"]


def test_shift_does_not_fold_into_a_transposed_convolution_but_a_factor_does() -> None:
    shifted = spelled(lambda b, x: transposed_conv(b, bn(b, x), 2), IMAGE)
    assert run_pass(FoldBatchNorm(), shifted, Context()) is shifted

    def factor(b: Builder, x: str) -> str:
        return transposed_conv(b, b.same("Div", x, b.param(np.arange(1, 5, dtype=np.float32).reshape(4, 1, 1))), 2)

    assert ops(apply(FoldBatchNorm(), spelled(factor, IMAGE))) == ["ConvTranspose"]


def test_factors_and_shifts_per_channel_count_as_batch_norms() -> None:
    def chain(b: Builder, x: str) -> str:
        y = b.same("Sub", b.same("Mul", conv(b, x, bias=False), b.param(b.rng.random((8, 1, 1), np.float32))), b.floats(0.3))
        y = b.same("Div", b.same("Add", y, b.param(b.rng.random((1, 8, 1, 1), np.float32))), b.floats(-2.0))
        return b.op("Sub", [b.floats(1.0), y], b.shapes[y])

    assert ops(apply(FoldBatchNorm(), spelled(chain, IMAGE))) == ["Conv"]


def test_factor_per_pixel_is_no_batch_norm() -> None:
    graph = spelled(lambda b, x: b.same("Mul", conv(b, x), b.param(b.rng.random((6, 7), np.float32))), IMAGE)
    assert run_pass(FoldBatchNorm(), graph, Context()) is graph


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_takes_the_batch_norms_on_both_sides(transposed: int) -> None:
    def layer(b: Builder, x: str) -> str:
        weight = b.weight(*((5, 8) if transposed else (8, 5)), fan_in=8)
        inputs = [bn(b, x), weight, b.vector(5)]
        return bn(b, b.op("Gemm", inputs, (2, 5), alpha=0.5, beta=2.0, transB=transposed))

    assert ops(apply(FoldBatchNorm(), spelled(layer, (2, 8)))) == ["Gemm"]


def test_factor_per_row_folds_only_where_rows_are_the_channels() -> None:
    def layer(b: Builder, x: str, transposed: int) -> str:
        rows = b.same("Mul", x, b.param(np.arange(1, 9, dtype=np.float32).reshape(8, 1)))
        return b.op("Gemm", [rows, b.weight(8, 5, fan_in=8)], (8, 5), transA=transposed)

    assert ops(apply(FoldBatchNorm(), spelled(lambda b, x: layer(b, x, 1), (8, 8)))) == ["Gemm"]
    graph = spelled(lambda b, x: layer(b, x, 0), (8, 8))
    assert run_pass(FoldBatchNorm(), graph, Context()) is graph


def test_gemm_whose_bias_differs_from_row_to_row_is_refused() -> None:
    def layer(b: Builder, x: str) -> str:
        return bn(b, b.op("Gemm", [x, b.weight(8, 5, fan_in=8), b.weight(2, 5, fan_in=1)], (2, 5)))

    graph, ctx = spelled(layer, (2, 8)), Context()
    assert run_pass(FoldBatchNorm(), graph, ctx) is graph
    assert [refusal.reason for refusal in ctx.refused] == ["gemm0: its bias differs from row to row"]


def test_matmul_takes_factors_and_keeps_one_add() -> None:
    def layer(b: Builder, x: str) -> str:
        y = b.same("Add", b.same("Mul", x, b.vector(8, 1.0)), b.vector(8))
        y = b.op("MatMul", [y, b.weight(8, 6, fan_in=8)], (2, 5, 6))
        return b.same("Mul", b.same("Add", y, b.vector(6)), b.vector(6))

    assert ops(apply(FoldBatchNorm(), spelled(layer))) == ["MatMul", "Add"]
    alone = spelled(lambda b, x: b.op("MatMul", [b.same("Add", x, b.vector(8)), b.weight(8, 6, fan_in=8)], (2, 5, 6)))
    assert ops(apply(FoldBatchNorm(), alone)) == ["MatMul", "Add"]


def test_plain_linear_layer_is_left_as_it_is() -> None:
    graph = spelled(lambda b, x: b.op("Add", [b.op("MatMul", [x, b.weight(8, 6, fan_in=8)], (2, 5, 6)), b.vector(6)], (2, 5, 6)))
    assert run_pass(FoldBatchNorm(), graph, Context()) is graph


def test_shared_weights_and_shared_values_are_refused_with_the_reason() -> None:
    build = Builder()
    x = build.input((1, 8, 6, 6))
    first = conv(build, x)
    second = build.op("Conv", [x, *build.nodes[-1].inputs[1:]], build.shapes[first], **build.nodes[-1].attrs)
    build.outputs = [bn(build, first), second]
    ctx = Context()
    assert run_pass(FoldBatchNorm(), build.graph(), ctx).nodes
    assert [refusal.reason for refusal in ctx.refused] == ["conv0: its weights are shared with conv1"]
    build = Builder()
    value = conv(build, build.input(IMAGE))
    build.outputs = [bn(build, value), value]
    ctx = Context()
    graph = build.graph()
    assert run_pass(FoldBatchNorm(), graph, ctx) is graph
    assert [refusal.reason for refusal in ctx.refused] == ["the output of conv0 is read elsewhere"]


def test_batch_norm_whose_folded_weights_overflow_is_refused() -> None:
    build = Builder()
    value = build.op(
        "Conv", [build.input((1, 1, 3, 3), "float16"), build.param(np.full((1, 1, 1, 1), 3e4, np.float16))], (1, 1, 3, 3)
    )
    ones = [build.param(np.full(1, number, np.float16)) for number in (5.0, 0.0, 0.0, 1.0)]
    build.outputs = [build.op("BatchNormalization", [value, *ones], (1, 1, 3, 3))]
    graph, ctx = build.graph(), Context()
    assert run_pass(FoldBatchNorm(), graph, ctx) is graph
    assert [refusal.reason for refusal in ctx.refused] == ["the folded weights do not fit float16"]


def test_batch_norm_alone_is_refused() -> None:
    ctx = Context()
    run_pass(FoldBatchNorm(), spelled(bn, IMAGE), ctx)
    assert [refusal.reason for refusal in ctx.refused] == ["no convolution or matrix product before or after it"]


# Nothing, twice, dead


NOTHING: dict[str, Spelling] = {
    "identity": lambda b, x: b.same("Identity", x),
    "dropout": lambda b, x: b.same("Dropout", x, b.floats(0.5)),
    "cast": lambda b, x: b.same("Cast", x, to=1),
    "wide cast and back": lambda b, x: b.same("Cast", b.same("Cast", x, to=11), to=1),
    "reshape": lambda b, x: b.same("Reshape", x, b.ints(0, -1, 8)),
    "reshape and back": lambda b, x: b.op("Reshape", [b.op("Reshape", [x, b.ints(-1)], (80,)), b.ints(2, 5, 8)], (2, 5, 8)),
    "transpose": lambda b, x: b.same("Transpose", x, perm=(0, 1, 2)),
    "transpose and back": lambda b, x: b.op(
        "Transpose", [b.op("Transpose", [x], (5, 8, 2), perm=(1, 2, 0))], (2, 5, 8), perm=(2, 0, 1)
    ),
    "default transpose twice": lambda b, x: b.op("Transpose", [b.op("Transpose", [x], (8, 5, 2))], (2, 5, 8)),
    "slice": lambda b, x: b.same("Slice", x, b.ints(0), b.ints(99), b.ints(1)),
    "pad": lambda b, x: b.same("Pad", x, b.ints(0, 0, 0, 0, 0, 0)),
    "concat": lambda b, x: b.same("Concat", x, axis=1),
    "max": lambda b, x: b.same("Max", x),
    "expand": lambda b, x: b.same("Expand", x, b.ints(1, 5, 8)),
    "times one": lambda b, x: b.op("Mul", [b.floats(1.0), x], b.shapes[x]),
    "plus zeros": lambda b, x: b.same("Add", x, b.param(np.zeros((5, 8), np.float32))),
    "minus zero": lambda b, x: b.same("Sub", x, b.floats(0.0)),
    "over one": lambda b, x: b.same("Div", x, b.floats(1.0)),
    "to the first": lambda b, x: b.same("Pow", x, b.floats(1.0)),
}


def between(spelling: Spelling) -> Graph:
    return spelled(lambda b, x: b.same("Tanh", spelling(b, b.same("Neg", x))))


@pytest.mark.parametrize("spelling", NOTHING.values(), ids=NOTHING)
def test_what_does_nothing_is_dropped(spelling: Spelling) -> None:
    after = apply(DropIdentity(), between(spelling))
    assert ops(after) == ["Neg", "Tanh"]
    assert not after.params


SOMETHING: dict[str, Spelling] = {
    "narrow cast and back": lambda b, x: b.same("Cast", b.same("Cast", x, to=10), to=1),
    "integer cast and back": lambda b, x: b.same("Cast", b.same("Cast", x, to=7), to=1),
    "reversed": lambda b, x: b.same("Slice", x, b.ints(-1), b.ints(-99), b.ints(1), b.ints(-1)),
    "times two": lambda b, x: b.same("Mul", x, b.floats(2.0)),
    "zero minus": lambda b, x: b.op("Sub", [b.floats(0.0), x], (2, 5, 8)),
    "one over": lambda b, x: b.op("Div", [b.floats(1.0), x], (2, 5, 8)),
    "broadcast": lambda b, x: b.op("Add", [x, b.param(np.zeros((3, 1, 1, 1), np.float32))], (3, 2, 5, 8)),
    "padded": lambda b, x: b.op("Pad", [x, b.ints(0, 0, 0, 0, 0, 1)], (2, 5, 9)),
    "training": lambda b, x: b.same("Dropout", x, b.floats(0.0), b.param(np.array(True))),
}


@pytest.mark.parametrize("spelling", SOMETHING.values(), ids=SOMETHING)
def test_what_does_something_stays(spelling: Spelling) -> None:
    graph = between(spelling)
    assert run_pass(DropIdentity(), graph, Context()) is graph


def test_consecutive_transposes_casts_and_reshapes_become_one() -> None:
    def chain(b: Builder, x: str) -> str:
        y = b.op("Transpose", [b.op("Transpose", [x], (5, 2, 8), perm=(1, 0, 2))], (8, 2, 5), perm=(2, 1, 0))
        y = b.op("Reshape", [b.op("Reshape", [y, b.ints(16, 5)], (16, 5)), b.ints(4, 20)], (4, 20))
        return b.same("Cast", b.same("Cast", y, to=11), to=10)

    after = apply(DropIdentity(), spelled(chain))
    assert ops(after) == ["Transpose", "Reshape", "Cast"]
    assert after.nodes[0].attr("perm") == (2, 0, 1)


def test_identity_from_input_to_output_has_to_stay() -> None:
    graph = spelled(lambda b, x: b.same("Identity", x))
    assert run_pass(DropIdentity(), graph, Context()) is graph


def test_identity_between_two_outputs_has_to_stay() -> None:
    build = Builder()
    value = build.same("Tanh", build.input((2, 3)))
    build.outputs = [value, build.same("Identity", value)]
    graph = build.graph()
    assert run_pass(DropIdentity(), graph, Context()) is graph


def test_large_integers_do_not_survive_a_float_and_a_read_mask_needs_its_dropout() -> None:
    build = Builder()
    wide = build.same("Cast", build.same("Cast", build.input((2, 3), "int64"), to=11), to=7)
    dropped = build.op("Dropout", [build.input((2, 3))], (2, 3), outputs=2)
    build.outputs = [build.same("Neg", wide), build.same("Neg", dropped), build.same("Not", f"{dropped}_1")]
    graph = build.graph()
    assert run_pass(DropIdentity(), graph, Context()) is graph


def test_dead_nodes_and_parameters_are_dropped() -> None:
    graph = spelled(lambda b, x: b.same("Tanh", x))
    dead = Node("Relu", ("x0",), ("unread",), "dead")
    unread = MappingProxyType({"unused": frozen(np.ones(3, np.float32))})
    after = apply(DropIdentity(), infer_types(dataclasses.replace(graph, nodes=(dead, *graph.nodes), params=unread)))
    assert ops(after) == ["Tanh"]
    assert not after.params


def test_equal_expressions_are_computed_once() -> None:
    def twins(b: Builder, x: str) -> str:
        left = b.same("Exp", b.same("Add", x, b.floats(0.5)))
        right = b.same("Exp", b.op("Add", [b.floats(0.5), x], b.shapes[x]))
        return b.same("Mul", left, b.same("Neg", right))

    assert ops(apply(CommonSubexpressions(), spelled(twins))) == ["Add", "Exp", "Neg", "Mul"]


def test_different_attributes_constants_and_random_numbers_are_not_equal() -> None:
    def near(b: Builder, x: str) -> str:
        y = b.same("Mul", b.same("LeakyRelu", x, alpha=0.1), b.same("LeakyRelu", x, alpha=0.2))
        y = b.same("Mul", y, b.same("Mul", b.same("Sub", x, b.floats(1.0)), b.same("Sub", x, b.floats(2.0))))
        return b.same("Mul", y, b.same("Add", b.same("RandomNormalLike", x), b.same("RandomNormalLike", x)))

    graph = spelled(near)
    assert run_pass(CommonSubexpressions(), graph, Context()) is graph


def test_equal_outputs_keep_their_names() -> None:
    build = Builder()
    x = build.input((2, 3))
    build.outputs = [build.same("Tanh", x), build.same("Tanh", x)]
    graph = build.graph()
    after = apply(CommonSubexpressions(), graph)
    assert after.outputs == graph.outputs


def test_equal_weights_are_stored_once_but_not_zeros_or_small_ones() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)

    def layers(b: Builder, x: str) -> str:
        for array in (weight, weight.copy(), np.zeros((8, 8), np.float32), np.zeros((8, 8), np.float32)):
            x = b.same("Add", b.same("MatMul", x, b.param(array)), b.floats(0.5))
        return x

    graph = spelled(layers)
    after = apply(DedupeWeights(), graph)
    assert len(graph.params) - len(after.params) == 1
    assert after.nodes[0].inputs[1] == after.nodes[2].inputs[1]


def test_constants_and_shapes_are_folded() -> None:
    def shaped(b: Builder, x: str) -> str:
        rows = b.op("Gather", [b.op("Shape", [x], (3,)), b.ints(0)], (1,), axis=0)
        shape = b.op("Concat", [rows, b.ints(-1)], (2,), axis=0)
        scale = b.same("Sqrt", b.floats(4.0))
        return b.same("Mul", b.op("Reshape", [x, shape], (2, 40)), scale)

    assert ops(apply(FoldConstants(), spelled(shaped))) == ["Reshape", "Mul"]


# All of them


def clean() -> PassManager:
    return PassManager(tuple(kind() for kind in find_passes().values() if kind.phase is Phase.CLEAN and kind.exact))


@pytest.mark.parametrize("kind", ["cnn", "transformer"])
def test_clean_up_of_a_messy_graph(kind: str, golden: Callable[[str, str], None]) -> None:
    graph = clean().run(random_graph(5, kind=kind, messy=True), Context()).graph
    lines = [line for line in to_text(graph, history=True).splitlines() if not line.startswith("param")]
    golden("\n".join(lines) + "\n", f"clean_{kind}")


def test_ten_thousand_nodes_are_cleaned_in_seconds() -> None:
    scale, shape = frozen(np.full((4, 1, 1), 1.01, np.float32)), frozen(np.array([1, 4, 1, 1], np.int64))
    nodes, value = [], "x"

    def add(op: str, *inputs: str, **attrs: object) -> None:
        nonlocal value
        name = f"n{len(nodes)}"
        nodes.append(Node(op, inputs, (f"{name}_out",), name, MappingProxyType(attrs)))
        value = f"{name}_out"

    for _ in range(834):
        start = value
        add("Conv", value, "weight")
        add("Mul", value, "scale")
        add("Identity", value)
        add("Transpose", value, perm=(0, 2, 3, 1))
        add("Transpose", value, perm=(0, 3, 1, 2))
        add("Reshape", value, "shape")
        gate = value
        add("Neg", value)
        add("Exp", value)
        add("Add", value, "one")
        add("Div", gate, value)
        add("Relu", value)
        add("Add", start, value)
    params = {"weight": frozen(np.full((4, 4, 1, 1), 0.01, np.float32)), "scale": scale, "shape": shape}
    params["one"] = frozen(np.array(1.0, np.float32))
    types = {"x": TensorType("float32", (1, 4, 1, 1))}
    graph = infer_types(Graph("long", ("x",), (value,), tuple(nodes), types, params, {"": 21}))
    after = clean().run(graph, Context()).graph
    assert len(nodes) > 10_000
    assert ops(after)[:6] == ["Conv", "Mul", "Sigmoid", "Mul", "Relu", "Add"]
