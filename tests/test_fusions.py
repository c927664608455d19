"""Re-fusion of LayerNorm, GELU, SiLU, HardSwish and attention from the spellings of exporters; ONNX Runtime is the oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hwopt.pipeline import Context, Pass, run_pass
from passes.fuse_attention import FuseAttention
from passes.fuse_gelu import FuseGelu
from passes.fuse_hard_swish import FuseHardSwish
from passes.fuse_layer_norm import FuseLayerNorm
from passes.fuse_silu import FuseSilu
from tests._clean import Spelling, apply, ops, spelled
from tests.random_graphs import Builder

# Layer normalization


def mean(b: Builder, x: str, axis: int = -1) -> str:
    shape = list(b.shapes[x])
    shape[axis] = 1
    return b.op("ReduceMean", [x, b.ints(axis)], tuple(shape), keepdims=1)


def centred(b: Builder, x: str, axis: int = -1) -> str:
    return b.same("Sub", x, mean(b, x, axis))


def deviation(b: Builder, c: str, axis: int = -1) -> str:
    return b.same("Sqrt", b.same("Add", mean(b, b.same("Mul", c, c), axis), b.floats(1e-5)))


def ln_pow_div(b: Builder, x: str) -> str:
    c = centred(b, x)
    variance = b.same("Add", mean(b, b.same("Pow", c, b.floats(2.0))), b.floats(1e-5))
    normal = b.same("Div", c, b.same("Sqrt", variance))
    return b.same("Add", b.same("Mul", normal, b.vector(8, 1.0)), b.vector(8))


def ln_twice_centred(b: Builder, x: str) -> str:
    normal = b.same("Div", centred(b, x), deviation(b, centred(b, x)))
    return b.op("Add", [b.vector(8), b.op("Mul", [b.vector(8, 1.0), normal], b.shapes[x])], b.shapes[x])


def ln_reciprocal(b: Builder, x: str) -> str:
    c = centred(b, x)
    normal = b.same("Mul", c, b.same("Reciprocal", deviation(b, c)))
    return b.same("Add", b.same("Mul", normal, b.vector(8, 1.0)), b.vector(8))


def ln_scaled_inverse(b: Builder, x: str) -> str:
    c = centred(b, x)
    inverse = b.same("Div", b.floats(1.0), deviation(b, c))
    ratio = b.op("Mul", [inverse, b.vector(8, 1.0)], b.shapes[x])
    return b.same("Add", b.same("Mul", c, ratio), b.vector(8))


def ln_tensorflow(b: Builder, x: str) -> str:
    average = mean(b, x)
    inverse = b.same("Reciprocal", deviation(b, b.same("Sub", x, average)))
    ratio = b.op("Mul", [inverse, b.vector(8, 1.0)], b.shapes[x])
    shift = b.op("Sub", [b.vector(8), b.op("Mul", [average, ratio], b.shapes[x])], b.shapes[x])
    return b.same("Add", b.same("Mul", x, ratio), shift)


def ln_bare(b: Builder, x: str) -> str:
    c = centred(b, x)
    return b.same("Div", c, deviation(b, c))


def ln_scalar_scale(b: Builder, x: str) -> str:
    return b.same("Mul", ln_bare(b, x), b.floats(1.5))


@pytest.mark.parametrize(
    "spelling", [ln_pow_div, ln_twice_centred, ln_reciprocal, ln_scaled_inverse, ln_tensorflow, ln_bare, ln_scalar_scale]
)
def test_layer_norm_becomes_one_node(spelling: Spelling) -> None:
    assert ops(apply(FuseLayerNorm(), spelled(spelling))) == ["LayerNormalization"]


def test_layer_norm_over_two_axes_keeps_both() -> None:
    def both(b: Builder, x: str) -> str:
        c = b.same("Sub", x, b.op("ReduceMean", [x, b.ints(-2, -1)], (2, 1, 1), keepdims=1))
        square = b.op("ReduceMean", [b.same("Mul", c, c), b.ints(1, 2)], (2, 1, 1), keepdims=1)
        return b.same("Div", c, b.same("Sqrt", b.same("Add", square, b.floats(1e-5))))

    after = apply(FuseLayerNorm(), spelled(both))
    assert ops(after) == ["LayerNormalization"]
    assert after.nodes[0].attr("axis") == -2


def test_layer_norm_over_an_inner_axis_is_none() -> None:
    def inner(b: Builder, x: str) -> str:
        c = centred(b, x, 1)
        return b.same("Div", c, deviation(b, c, 1))

    graph = spelled(inner)
    assert run_pass(FuseLayerNorm(), graph, Context()) is graph


def test_layer_norm_keeps_a_computed_scale_behind_it() -> None:
    def adaptive(b: Builder, x: str) -> str:
        return b.same("Mul", ln_bare(b, x), b.same("Sigmoid", x))

    assert sorted(ops(apply(FuseLayerNorm(), spelled(adaptive)))) == ["LayerNormalization", "Mul", "Sigmoid"]


def test_layer_norm_whose_inside_is_read_elsewhere_is_refused() -> None:
    build = Builder()
    c = centred(build, build.input((2, 5, 8)))
    build.outputs = [build.same("Div", c, deviation(build, c)), c]
    graph, ctx = build.graph(), Context()
    assert run_pass(FuseLayerNorm(), graph, ctx) is graph
    assert [refusal.reason for refusal in ctx.refused] == ["an intermediate value is read elsewhere"]


def test_fusions_leave_old_opsets_alone() -> None:
    build = Builder()
    build.outputs = [gelu_div(build, build.input((2, 8)))]
    graph = build.graph(opset=19)
    assert run_pass(FuseGelu(), graph, Context()) is graph


# Activations


def gelu_div(b: Builder, x: str) -> str:
    gate = b.same("Add", b.same("Erf", b.same("Div", x, b.floats(math.sqrt(2)))), b.floats(1.0))
    return b.same("Mul", b.same("Mul", x, gate), b.floats(0.5))


def gelu_half_first(b: Builder, x: str) -> str:
    gate = b.same("Add", b.same("Erf", b.same("Mul", x, b.floats(math.sqrt(0.5)))), b.floats(1.0))
    return b.same("Mul", b.same("Mul", x, b.floats(0.5)), gate)


def gelu_gate_halved(b: Builder, x: str) -> str:
    gate = b.same("Add", b.floats(1.0), b.same("Erf", b.same("Div", x, b.floats(1.41421))))
    return b.same("Mul", b.same("Mul", gate, b.floats(0.5)), x)


def tanh_gate(b: Builder, x: str, cubic: str) -> str:
    gate = b.same("Add", b.same("Tanh", b.same("Mul", cubic, b.floats(math.sqrt(2 / math.pi)))), b.floats(1.0))
    return b.same("Mul", b.same("Mul", x, b.floats(0.5)), gate)


def gelu_tanh_pow(b: Builder, x: str) -> str:
    cube = b.same("Mul", b.same("Pow", x, b.floats(3.0)), b.floats(0.044715))
    return tanh_gate(b, x, b.same("Add", x, cube))


def gelu_tanh_factored(b: Builder, x: str) -> str:
    square = b.same("Mul", b.same("Mul", x, x), b.floats(0.044715))
    return tanh_gate(b, x, b.same("Mul", x, b.same("Add", square, b.floats(1.0))))


def gelu_tanh_products(b: Builder, x: str) -> str:
    cube = b.same("Mul", b.same("Mul", b.same("Mul", x, x), x), b.floats(0.044715))
    return tanh_gate(b, x, b.same("Add", cube, x))


@pytest.mark.parametrize("spelling", [gelu_div, gelu_half_first, gelu_gate_halved])
def test_erf_gelu_becomes_one_node(spelling: Spelling) -> None:
    after = apply(FuseGelu(), spelled(spelling), tolerance=1e-5)
    assert ops(after) == ["Gelu"]
    assert after.nodes[0].attr("approximate", "none") == "none"


@pytest.mark.parametrize("spelling", [gelu_tanh_pow, gelu_tanh_factored, gelu_tanh_products])
def test_tanh_gelu_becomes_one_node(spelling: Spelling) -> None:
    after = apply(FuseGelu(), spelled(spelling))
    assert ops(after) == ["Gelu"]
    assert after.nodes[0].attr("approximate") == "tanh"


def test_gelu_with_another_constant_stays() -> None:
    def quick(b: Builder, x: str) -> str:
        gate = b.same("Add", b.same("Erf", b.same("Div", x, b.floats(1.5))), b.floats(1.0))
        return b.same("Mul", b.same("Mul", x, gate), b.floats(0.5))

    graph = spelled(quick)
    assert run_pass(FuseGelu(), graph, Context()) is graph


def one_plus_exp(b: Builder, x: str) -> str:
    return b.same("Add", b.same("Exp", b.same("Neg", x)), b.floats(1.0))


SILU: dict[str, Spelling] = {
    "divided": lambda b, x: b.same("Div", x, one_plus_exp(b, x)),
    "reciprocal": lambda b, x: b.same("Mul", b.same("Reciprocal", one_plus_exp(b, x)), x),
    "one over": lambda b, x: b.same("Mul", x, b.same("Div", b.floats(1.0), one_plus_exp(b, x))),
    "tanh": lambda b, x: b.same(
        "Mul",
        x,
        b.same("Mul", b.same("Add", b.same("Tanh", b.same("Mul", x, b.floats(0.5))), b.floats(1.0)), b.floats(0.5)),
    ),
}


@pytest.mark.parametrize("spelling", SILU.values(), ids=SILU)
def test_silu_becomes_sigmoid_and_product(spelling: Spelling) -> None:
    assert ops(apply(FuseSilu(), spelled(spelling))) == ["Sigmoid", "Mul"]


def plus_three(b: Builder, x: str) -> str:
    return b.same("Add", x, b.floats(3.0))


def relu6(b: Builder, x: str) -> str:
    return b.same("Clip", plus_three(b, x), b.floats(0.0), b.floats(6.0))


HARD_SWISH: dict[str, Spelling] = {
    "clip over six": lambda b, x: b.same("Div", b.same("Mul", x, relu6(b, x)), b.floats(6.0)),
    "gate over six": lambda b, x: b.same("Mul", b.same("Div", relu6(b, x), b.floats(6.0)), x),
    "times sixth": lambda b, x: b.same("Mul", b.same("Mul", x, b.floats(1 / 6)), relu6(b, x)),
    "min max": lambda b, x: b.same(
        "Div",
        b.same("Mul", x, b.same("Min", b.same("Max", plus_three(b, x), b.floats(0.0)), b.floats(6.0))),
        b.floats(6.0),
    ),
    "relu6": lambda b, x: b.same(
        "Mul", x, b.same("Div", b.same("Min", b.same("Relu", plus_three(b, x)), b.floats(6.0)), b.floats(6.0))
    ),
    "hard sigmoid": lambda b, x: b.same("Mul", x, b.same("HardSigmoid", x, alpha=1 / 6, beta=0.5)),
}


@pytest.mark.parametrize("spelling", HARD_SWISH.values(), ids=HARD_SWISH)
def test_hard_swish_becomes_one_node(spelling: Spelling) -> None:
    assert ops(apply(FuseHardSwish(), spelled(spelling))) == ["HardSwish"]


def test_hard_sigmoid_becomes_one_node_and_keeps_another_slope() -> None:
    after = apply(FuseHardSwish(), spelled(lambda b, x: b.same("Div", relu6(b, x), b.floats(6.0))))
    assert ops(after) == ["HardSigmoid"]
    steep = spelled(lambda b, x: b.same("Mul", x, b.same("HardSigmoid", x, alpha=0.2, beta=0.5)))
    assert run_pass(FuseHardSwish(), steep, Context()) is steep


# Attention


def softmax(b: Builder, x: str, *, stable: bool) -> str:
    narrow = (*b.shapes[x][:-1], 1)
    if stable:
        x = b.same("Sub", x, b.op("ReduceMax", [x, b.ints(-1)], narrow, keepdims=1))
    exponent = b.same("Exp", x)
    return b.same("Div", exponent, b.op("ReduceSum", [exponent, b.ints(-1)], narrow, keepdims=1))


@pytest.mark.parametrize("stable", [True, False])
def test_exploded_softmax_becomes_one_node(stable: bool) -> None:
    after = apply(FuseAttention(), spelled(lambda b, x: softmax(b, x, stable=stable)))
    assert ops(after) == ["Softmax"]
    assert after.nodes[0].attr("axis") == -1


def attend(b: Builder, x: str, *, before: bool = False, behind: bool = False, mask_first: bool = False) -> str:
    """Self-attention whose scale stands before the product (in q and k), behind it, or in both places."""
    q = b.op("Transpose", [b.same("Tanh", x)], (2, 8, 5), perm=(0, 2, 1))
    query = b.op("Transpose", [q], (2, 5, 8), perm=(0, 2, 1))
    key = b.same("Sigmoid", x)
    if before:
        query, key = b.same("Mul", query, b.floats(0.7)), b.same("Div", key, b.floats(2.0))
    turned = b.op("Transpose", [key], (2, 8, 5), perm=(0, 2, 1))
    scores = b.op("MatMul", [query, turned], (2, 5, 5))
    if behind:
        scores = b.same("Div", scores, b.floats(3.0))
    mask = b.param(np.triu(np.full((5, 5), -9.0, np.float32), 1))
    masked = b.op("Add", [mask, scores] if mask_first else [scores, mask], (2, 5, 5))
    return b.op("MatMul", [b.same("Softmax", masked, axis=2), x], (2, 5, 8))


@pytest.mark.parametrize(("before", "behind"), [(True, False), (False, True), (True, True)])
def test_attention_has_one_scale_behind_the_product(before: bool, behind: bool) -> None:
    graph = spelled(lambda b, x: attend(b, x, before=before, behind=behind, mask_first=True))
    after = apply(FuseAttention(), graph)
    tail = ops(after)[-5:]
    assert tail == ["MatMul", "Mul", "Add", "Softmax", "MatMul"]
    assert [op for op in ops(after) if op in ("Mul", "Div")] == ["Mul"]
    scale, add = after.nodes[-4], after.nodes[-3]
    expected = (0.35 if before else 1.0) / (3.0 if behind else 1.0)
    assert after.params[scale.inputs[1]] == pytest.approx(expected)
    assert add.inputs[0] == scale.output
    assert after.nodes[-2].attr("axis") == -1


def test_scaled_query_that_is_read_elsewhere_stays() -> None:
    build = Builder()
    x = build.input((2, 5, 8))
    query = build.same("Mul", build.same("Tanh", x), build.floats(0.5))
    turned = build.op("Transpose", [x], (2, 8, 5), perm=(0, 2, 1))
    scores = build.same("Softmax", build.op("MatMul", [query, turned], (2, 5, 5)), axis=-1)
    build.outputs = [build.op("MatMul", [scores, x], (2, 5, 8)), query]
    graph = build.graph()
    assert run_pass(FuseAttention(), graph, Context()) is graph


def unchanged(one: Pass, build: Builder, *outputs: str) -> bool:
    build.outputs = list(outputs)
    graph = build.graph()
    return run_pass(one, graph, Context()) is graph


def test_activation_whose_inside_is_read_elsewhere_stays() -> None:
    build = Builder()
    x = build.input((2, 8))
    denominator = one_plus_exp(build, x)
    assert unchanged(FuseSilu(), build, build.same("Div", x, denominator), denominator)
    build = Builder()
    x = build.input((2, 8))
    clip = relu6(build, x)
    assert unchanged(FuseHardSwish(), build, build.same("Div", build.same("Mul", x, clip), build.floats(6.0)), clip)


def test_gate_of_another_value_is_no_hard_swish() -> None:
    build = Builder()
    x, y = build.input((2, 8)), build.input((2, 8))
    assert unchanged(FuseHardSwish(), build, build.same("Mul", y, build.same("HardSigmoid", x, alpha=1 / 6, beta=0.5)))


def test_scale_per_token_stays_behind_the_layer_norm() -> None:
    after = apply(FuseLayerNorm(), spelled(lambda b, x: b.same("Mul", ln_bare(b, x), b.param(np.full((5, 1), 2, np.float32)))))
    assert ops(after) == ["LayerNormalization", "Mul"]


def test_layer_norm_in_double_precision_stays() -> None:
    build = Builder()
    x = build.input((2, 8), "float64")
    c = centred(build, x)
    variance = build.same("Add", mean(build, build.same("Mul", c, c)), build.param(np.array(1e-5)))
    assert unchanged(FuseLayerNorm(), build, build.same("Div", c, build.same("Sqrt", variance)))


def test_half_precision_scales_stay_before_the_product() -> None:
    build = Builder()
    x, y = build.input((2, 5, 8), "float16"), build.input((2, 8, 5), "float16")
    query = build.same("Mul", build.same("Tanh", x), build.param(np.array(0.25, np.float16)))
    scores = build.op("MatMul", [query, y], (2, 5, 5))
    assert unchanged(FuseAttention(), build, build.op("MatMul", [build.same("Softmax", scores, axis=-1), x], (2, 5, 8)))


def test_swish_node_becomes_the_pair_unless_its_slope_differs() -> None:
    graph = spelled(lambda b, x: b.same("Swish", x), opset=24)
    assert ops(run_pass(FuseSilu(), graph, Context())) == ["Sigmoid", "Mul"]
    steep = spelled(lambda b, x: b.same("Swish", x, alpha=2.0), opset=24)
    assert run_pass(FuseSilu(), steep, Context()) is steep
