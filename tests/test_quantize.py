"""quantize: 8 bits everywhere between quantized layers, close to float, refusals with their reasons."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
import pytest

import hwopt
from hwopt.analysis.narrow import fits
from hwopt.analysis.qdq import dequantized, quantization, quantized_weight
from hwopt.analysis.regions import integer_operands, regions
from hwopt.backends.ort import Session
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.run import run_program
from hwopt.errors import DataError, ModelError, PassError
from hwopt.io.proto import from_model
from hwopt.ir import Graph, Node, frozen, of_op
from hwopt.pipeline import Context, Refusal, merged, run_pass
from hwopt.plugins import find_target
from hwopt.samples import Samples
from passes._pairs import kept
from passes.low_rank import LowRank
from passes.quantize import Quantize
from passes.share_weights import ShareWeights
from tests.random_graphs import Builder, attention, conv, gemm, linear, random_graph, random_samples

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def quantized(graph: Graph, ctx: Context | None = None, **options: object) -> Graph:
    ctx = ctx or Context(calibration=random_samples(graph))
    return run_pass(Quantize(**options), graph, ctx)  # type: ignore[arg-type]


def error(graph: Graph, after: Graph) -> float:
    """Squared error over signal power, of all outputs over the calibration data."""
    wanted, found = Session(graph), Session(after)
    ratio = 0.0
    for feeds in random_samples(graph).feeds(graph):
        expected, got = wanted.run(feeds), found.run(feeds)
        for name in graph.outputs:
            power = float((expected[name].astype(np.float64) ** 2).sum())
            ratio = max(ratio, float(((expected[name].astype(np.float64) - got[name]) ** 2).sum()) / max(power, 1e-9))
    return ratio


def floats_between(graph: Graph) -> list[str]:
    """Values that one kernel hands to another in float."""
    return [r.output for r in regions(graph) if r.output not in graph.outputs and graph.tensor(r.output).dtype == "float32"]


def needless_pairs(graph: Graph) -> list[str]:
    """Quantizations of a value that was only just dequantized, directly or through an operator that moves values."""
    found = []
    for node in of_op(graph, "QuantizeLinear"):
        source = graph.producer.get(node.inputs[0])
        while source is not None and source.op in ("Reshape", "Transpose", "Flatten", "MaxPool", "Slice", "Split", "Squeeze"):
            source = graph.producer.get(source.inputs[0])
        if source is not None and source.op == "DequantizeLinear":
            found.append(node.name)
    return found


# --- hand-made models ---


def relu(build: Builder, x: str) -> str:
    return build.same("Relu", x)


def head(build: Builder, x: str) -> None:
    batch, channels = build.shapes[x][:2]
    pooled = build.op("GlobalAveragePool", [x], (batch, channels, 1, 1))
    flat = build.op("Flatten", [pooled], (batch, channels), axis=1)
    build.outputs.append(gemm(build, flat, 5))


def residual() -> Graph:
    build = Builder()
    x = relu(build, conv(build, build.input((1, 3, 12, 12)), 8))
    for _ in range(2):
        y = conv(build, relu(build, conv(build, x, 8)), 8)
        x = relu(build, build.same("Add", x, y))
    wide = build.op("MaxPool", [x], (1, 8, 6, 6), kernel_shape=(3, 3), strides=(2, 2), pads=(1, 1, 1, 1))
    shortcut, y = conv(build, wide, 16, 1), conv(build, wide, 16)
    head(build, relu(build, build.same("Add", shortcut, y)))
    return build.graph()


def mobilenet() -> Graph:
    build = Builder()
    limits = build.floats(0.0), build.floats(6.0)
    x = build.same("Clip", conv(build, build.input((1, 3, 12, 12)), 8), *limits)
    for stride in (1, 2, 1):
        wide = build.same("Clip", conv(build, x, 24, 1), *limits)
        deep = build.same("Clip", conv(build, wide, 24, groups=24, stride=stride), *limits)
        narrow = conv(build, deep, 8, 1)
        x = build.same("Add", x, narrow) if stride == 1 else narrow
    gated = build.same("Mul", x, build.same("Sigmoid", conv(build, build.op("GlobalAveragePool", [x], (1, 8, 1, 1)), 8, 1)))
    head(build, build.same("HardSwish", conv(build, gated, 12, groups=4)))
    return build.graph()


def decoder(groups: int = 1) -> Graph:
    build = Builder()
    x = relu(build, conv(build, build.input((1, 3, 10, 12)), 8))
    for channels in (8, 6):
        inputs = [x, build.weight(8, channels // groups, 4, 4, fan_in=32 // groups), build.vector(channels)]
        up = (1, channels, build.shapes[x][2] * 2, build.shapes[x][3] * 2)
        x = relu(build, build.op("ConvTranspose", inputs, up, strides=(2, 2), pads=(1, 1, 1, 1), group=groups))
    for mode in ("nearest", "linear"):
        larger = (*build.shapes[x][:2], build.shapes[x][2] * 2, build.shapes[x][3] * 2)
        x = build.op("Resize", [x, "", build.floats(1, 1, 2, 2)], larger, mode=mode)
    build.outputs.append(conv(build, x, 4))
    return build.graph()


def concat() -> Graph:
    build = Builder()
    x = relu(build, conv(build, build.input((1, 3, 12, 12)), 8))
    pooled = build.op("AveragePool", [x], (1, 8, 12, 12), kernel_shape=(3, 3), pads=(1, 1, 1, 1))
    branches = [relu(build, conv(build, x, 4, 1)), conv(build, x, 4), conv(build, pooled, 8, 1), x]
    joined = build.op("Concat", branches, (1, 24, 12, 12), axis=1)
    split = build.op("Split", [joined, build.ints(12, 12)], (1, 12, 12, 12), outputs=2, axis=1)
    swapped = build.op("Concat", [f"{split}_1", split], (1, 24, 12, 12), axis=1)
    padded = build.op("Pad", [swapped, build.ints(0, 0, 1, 1, 0, 0, 1, 1)], (1, 24, 14, 14))
    head(build, relu(build, conv(build, padded, 8)))
    return build.graph()


NETS: dict[str, tuple[Callable[[], Graph], int]] = {
    "residual": (residual, 9),
    "mobilenet": (mobilenet, 16),
    "concat": (concat, 8),
    "decoder": (decoder, 5),
    "decoder in groups": (lambda: decoder(2), 5),
}


@pytest.mark.parametrize("name", NETS)
def test_between_quantized_layers_everything_is_8_bits_and_nothing_is_converted_twice(name: str) -> None:
    graph, quantizations = NETS[name][0](), NETS[name][1]
    after = quantized(graph)
    assert needless_pairs(after) == []
    assert floats_between(after) == []
    assert len(list(of_op(after, "QuantizeLinear"))) == quantizations
    assert all(integer_operands(after, node) for node in of_op(after, *LAYERS))
    assert error(graph, after) < 0.01


def test_quantization_stands_behind_the_residual_add_and_both_sides_are_8_bits() -> None:
    after = quantized(residual())
    for node in of_op(after, "Add"):
        assert [user.op for user in after.users[node.output]] == ["QuantizeLinear"]
        assert sorted(after.producer[value].op for value in node.inputs) == ["Conv", "DequantizeLinear"]


def test_limits_of_the_grid_replace_relu_and_clip() -> None:
    assert not list(of_op(quantized(mobilenet()), "Clip"))
    assert not list(of_op(quantized(residual()), "Relu"))
    assert list(of_op(quantized(mobilenet()), "HardSwish"))


def test_a_clip_that_the_grid_does_not_repeat_stays() -> None:
    build = Builder()
    x = build.same("Clip", conv(build, build.input((1, 3, 6, 6)), 4, 1), build.floats(-0.1), build.floats(0.1))
    build.outputs.append(conv(build, x, 4, 1))
    graph = build.graph()
    assert not list(of_op(quantized(graph), "Clip"))
    widened = quantized(graph, Context(calibration=random_samples(graph)), site=("conv0",))
    assert list(of_op(widened, "Clip"))


def test_concat_shares_one_grid_and_works_on_integers() -> None:
    after = quantized(concat())
    for node in of_op(after, "Concat"):
        assert {after.tensor(value).dtype for value in (*node.inputs, node.output)} == {"uint8"}
    grids = {float(quantization(after, node).scale) for node in of_op(after, "QuantizeLinear")}  # type: ignore[union-attr]
    assert len(grids) == 8 - 3  # four branches, one grid


def test_a_float_layer_between_quantized_ones_reads_and_writes_float() -> None:
    graph = residual()
    site = tuple(node.name for node in of_op(graph, *LAYERS) if node.name != "conv2")
    after = quantized(graph, site=site)
    assert integer_operands(after, after.node["conv2"]) is None
    assert after.params[after.node["conv2"].inputs[1]].dtype == np.float32
    assert after.node["conv2"].inputs[0] in {node.output for node in of_op(after, "DequantizeLinear")}
    assert error(graph, after) < 0.01


@pytest.mark.parametrize("seed", range(40))
def test_random_models_stay_close_to_float_however_the_sites_are_divided(seed: int) -> None:
    graph = random_graph(seed, messy=seed % 2 == 1)
    names = [node.name for node in of_op(graph, *LAYERS)]
    parts = np.array_split(np.random.default_rng(seed).permutation(names), 1 + seed % 3)
    passes = [Quantize(tuple(part.tolist()), ("minmax", "mse", "percentile")[i]) for i, part in enumerate(parts) if len(part)]
    ctx = Context(calibration=random_samples(graph))
    after = graph
    for one in merged(passes):
        after = run_pass(one, after, ctx)
    assert ctx.refused == []
    assert error(graph, after) < 0.05
    assert all(integer_operands(after, node) for node in of_op(after, *LAYERS))
    assert run_pass(Quantize(tuple(names)), after, ctx) is after


def test_weights_and_biases_are_the_definitions() -> None:
    graph = residual()
    after = quantized(graph, correct_bias=False)
    for before in of_op(graph, "Conv", "Gemm"):
        node, weight = after.node[before.name], graph.params[before.inputs[1]]
        axis = 0 if node.op == "Conv" or node.attr("transB", 0) else 1
        rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
        found = quantized_weight(after, node.inputs[1], axis)
        assert found is not None
        assert np.allclose(found[1], np.abs(rows).max(1) / 127)
        restored = np.moveaxis(found[0], axis, 0).reshape(rows.shape) * found[1][:, None]
        assert np.all(np.abs(restored - rows) <= 0.5001 * found[1][:, None])
        if len(before.inputs) > 2:
            data = dequantized(after, node.inputs[0])
            bias = after.producer[node.inputs[2]]
            steps, scale = after.params[bias.inputs[0]], after.params[bias.inputs[1]]
            assert data is not None and steps.dtype == np.int32
            assert np.allclose(scale, data[1].scale * found[1])
            assert np.array_equal(steps, np.rint(graph.params[before.inputs[2]] / scale.astype(np.float64)))


def test_gemm_factors_are_folded() -> None:
    build = Builder()
    x = build.input((2, 6))
    weight, bias = build.weight(6, 4, fan_in=6), build.vector(4)
    build.outputs.append(build.op("Gemm", [x, weight, bias], (2, 4), alpha=0.5, beta=3.0))
    graph = build.graph()
    after = quantized(graph)
    assert after.node["gemm0"].attr("alpha", 1.0) == 1.0
    assert error(graph, after) < 1e-3


def test_the_corrected_bias_keeps_the_mean_of_every_channel() -> None:
    build = Builder()
    x = relu(build, build.input((1, 16, 8, 8)))
    build.outputs.append(conv(build, x, 32, 1))
    graph = build.graph()
    samples = random_samples(graph, count=64)

    def shift(**options: object) -> float:
        after = quantized(graph, Context(calibration=samples), reduce_range=True, **options)
        runs = [(Session(graph).run(f)["conv1_out"], Session(after).run(f)["conv1_out"]) for f in samples.feeds(graph)]
        return float(np.abs(np.mean([b - a for a, b in runs], axis=(0, 1, 3, 4))).mean())

    assert shift() < 0.5 * shift(correct_bias=False)


def test_silent_channels_keep_their_bias() -> None:
    build = Builder()
    x = build.input((1, 3, 4, 4))
    weight = np.zeros((3, 3, 1, 1), np.float32)
    weight[1], weight[2] = 1e-35, 1.0
    bias = np.array([0.123456, 7.0, 0.0], np.float32)
    build.outputs.append(build.op("Conv", [x, build.param(weight), build.param(bias)], (1, 3, 4, 4)))
    graph = build.graph()
    feeds = next(random_samples(graph).feeds(graph))
    found = Session(quantized(graph)).run(feeds)["conv0_out"]
    assert np.allclose(found[:, 0], 0.123456, atol=1e-6)
    assert np.allclose(found[:, 1], 7.0, atol=1e-5)


def test_a_value_that_is_always_zero_is_no_obstacle() -> None:
    build = Builder()
    x = build.same("Mul", build.input((1, 3, 4, 4)), build.floats(0.0))
    build.outputs.append(conv(build, conv(build, x, 4, 1), 4, 1))
    graph = build.graph()
    assert error(graph, quantized(graph)) < 0.01


def transformer() -> Graph:
    build = Builder()
    x = build.input((2, 8, 12))
    build.outputs.append(linear(build, attention(build, x), 12))
    return build.graph()


def test_matmuls_of_two_computed_values_are_quantized_where_asked() -> None:
    graph = transformer()
    pairs = [node.name for node in of_op(graph, "MatMul") if node.inputs[1] in graph.producer]
    ctx = Context(calibration=random_samples(graph))
    after = quantized(graph, ctx)
    assert [refusal.site for refusal in ctx.refused] == pairs
    asked = quantized(graph, site=tuple(node.name for node in of_op(graph, "MatMul")))
    for name in pairs:
        assert integer_operands(after, after.node[name]) is None
        operands = integer_operands(asked, asked.node[name])
        assert operands is not None and operands.right_quantization is not None
        assert int(operands.data_quantization.zero_point) == 0
    assert error(graph, asked) < 0.01


def test_what_float_operators_compute_is_read_in_float_by_float_operators() -> None:
    build = Builder()
    x = build.input((2, 8, 12))
    normal = build.op("LayerNormalization", [x, build.vector(12, 1.0), build.vector(12)], (2, 8, 12), axis=-1)
    y = linear(build, normal, 12)
    last = build.same("Add", normal, y)
    build.outputs.append(build.op("LayerNormalization", [last, build.vector(12, 1.0), build.vector(12)], (2, 8, 12), axis=-1))
    after = quantized(build.graph())
    assert normal in after.producer[last].inputs


def test_an_exploded_layer_norm_keeps_its_float_inputs() -> None:
    build = Builder()
    x = linear(build, build.input((2, 8, 12)), 12)
    mean = build.op("ReduceMean", [x, build.ints(-1)], (2, 8, 1))
    centered = build.same("Sub", x, mean)
    variance = build.op("ReduceMean", [build.same("Mul", centered, centered), build.ints(-1)], (2, 8, 1))
    build.outputs.append(linear(build, build.same("Div", centered, build.same("Sqrt", variance)), 12))
    after = quantized(build.graph())
    assert centered in after.node[next(of_op(after, "Div")).name].inputs
    assert x in next(of_op(after, "Sub")).inputs


def test_a_mean_over_rows_stays_one() -> None:
    """Of tokens, as heads of vision transformers have it, where other layers read the same value as integers."""
    build = Builder()
    x = linear(build, build.input((1, 8, 8)), 8)
    mean = build.op("ReduceMean", [x, build.ints(1)], (1, 8), keepdims=0)
    build.outputs += [linear(build, mean, 4), linear(build, x, 4)]
    graph = build.graph()
    assert error(graph, quantized(graph)) < 0.01


def test_a_mean_over_the_image_becomes_an_integer_pool() -> None:
    build = Builder()
    x = relu(build, conv(build, build.input((1, 3, 8, 8)), 6))
    mean = build.op("ReduceMean", [x, build.ints(2, 3)], (1, 6), keepdims=0)
    build.outputs.append(gemm(build, mean, 4))
    graph = build.graph()
    after = quantized(graph)
    assert [node.op for node in after.nodes if node.op in ("ReduceMean", "GlobalAveragePool")] == ["GlobalAveragePool"]
    assert floats_between(after) == []
    assert error(graph, after) < 0.01


@pytest.mark.parametrize("activation", ["uint8", "int8"])
def test_the_compiled_chain_stays_in_integers_channels_last_and_gives_onnx_runtimes_numbers(activation: str) -> None:
    graph, target = residual(), find_target("host")
    kernel = dataclasses.replace(target.microkernels["int8"], activation=activation)
    ctx = Context(dataclasses.replace(target, microkernels={**target.microkernels, "int8": kernel}), random_samples(graph))
    after = quantized(graph, ctx)
    program = compile_program(after, target)
    feeds = next(random_samples(graph).feeds(graph))
    wanted, found = Session(after).run(feeds), run_program(program, feeds)
    assert all(np.allclose(found[name], wanted[name], atol=1e-5) for name in graph.outputs)
    assert len([call for call in program.calls if "transpose" in call.label]) <= 1  # of the network's input


def test_a_quantization_that_the_model_has_already_is_used_again() -> None:
    build = Builder()
    x = relu(build, build.input((1, 3, 6, 6)))
    scale = build.floats(0.02)
    eight = build.same("QuantizeLinear", x, scale)
    build.outputs += [conv(build, x, 4, 1), build.same("DequantizeLinear", eight, scale)]
    after = quantized(build.graph())
    assert len(list(of_op(after, "QuantizeLinear"))) == 1
    operands = integer_operands(after, next(of_op(after, "Conv")))
    assert operands is not None and operands.data == eight and float(operands.data_quantization.scale) == np.float32(0.02)


MOVES: dict[str, Callable[[Builder, str], str]] = {
    "DepthToSpace": lambda build, x: build.op("DepthToSpace", [x], (1, 2, 12, 12), blocksize=2),
    "SpaceToDepth": lambda build, x: build.op("SpaceToDepth", [x], (1, 32, 3, 3), blocksize=2),
    "Tile": lambda build, x: build.op("Tile", [x, build.ints(1, 1, 2, 1)], (1, 8, 12, 6)),
    "Expand": lambda build, x: build.op("Expand", [x, build.ints(2, 8, 6, 6)], (2, 8, 6, 6)),
    "Gather": lambda build, x: build.op("Gather", [x, build.ints(3, 1, 2)], (1, 3, 6, 6), axis=1),
    "Slice": lambda build, x: build.op("Slice", [x, build.ints(0), build.ints(4), build.ints(1)], (1, 4, 6, 6)),
    "Transpose": lambda build, x: build.op("Transpose", [x], (1, 6, 8, 6), perm=(0, 2, 1, 3)),
    "Reshape": lambda build, x: build.op("Reshape", [x, build.ints(1, 4, 6, 12)], (1, 4, 6, 12)),
    "MaxPool": lambda build, x: build.op("MaxPool", [x], (1, 8, 6, 6), kernel_shape=(3, 3), pads=(1, 1, 1, 1)),
    "Pad": lambda build, x: build.op("Pad", [x, build.ints(1, 1, 1, 1), "", build.ints(2, 3)], (1, 8, 8, 8)),
    "Pad reflect": lambda build, x: build.op("Pad", [x, build.ints(0, 0, 1, 1, 0, 0, 1, 1)], (1, 8, 8, 8), mode="reflect"),
    "Resize": lambda build, x: build.op(
        "Resize", [x, "", build.param(np.array([1, 1, 2, 2], np.float32))], (1, 8, 12, 12), mode="nearest"
    ),
}


@pytest.mark.parametrize("activation", ["uint8", "int8"])
@pytest.mark.parametrize("name", MOVES)
def test_operators_that_move_values_move_integers(name: str, activation: str) -> None:
    build = Builder()
    x = build.same("LeakyRelu", conv(build, build.input((1, 3, 6, 6)), 8), alpha=0.3)
    build.outputs.append(conv(build, MOVES[name](build, x), 4, 1))
    graph, target = build.graph(), find_target("cortex-a72")
    kernel = dataclasses.replace(target.microkernels["int8"], activation=activation)
    ctx = Context(dataclasses.replace(target, microkernels={"int8": kernel}), random_samples(graph))
    after = quantized(graph, ctx)
    assert {after.tensor(node.output).dtype for node in of_op(after, name.split(maxsplit=1)[0])} == {activation}
    assert needless_pairs(after) == floats_between(after) == []
    assert error(graph, after) < 0.001


# --- composition ---


def test_the_parts_of_a_factored_layer_are_quantized_by_its_old_name() -> None:
    build = Builder()
    build.outputs.append(relu(build, linear(build, build.input((4, 32)), 32)))
    graph = build.graph()
    ctx = Context(calibration=random_samples(graph, count=64))
    layer = next(of_op(graph, *LAYERS)).name
    factored = run_pass(LowRank((layer,), rank=8), graph, ctx)
    after = run_pass(Quantize((layer,)), factored, ctx)
    parts = list(of_op(after, *LAYERS))
    assert len(parts) == 2
    assert all(integer_operands(after, node) for node in parts)
    assert floats_between(after) == []


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 6}, {"bits": 3, "axis": "channel-group", "group": 16}])
def test_the_codebook_of_shared_weights_becomes_int8(options: dict) -> None:
    build = Builder()
    build.outputs.append(conv(build, build.input((1, 16, 6, 6)), 32))
    graph = build.graph()
    ctx = Context(calibration=random_samples(graph))
    shared = run_pass(ShareWeights(("conv0",), **options), graph, ctx)
    after = run_pass(Quantize(("conv0",)), shared, ctx)
    assert not [name for name, array in after.params.items() if array.dtype == np.float32 and array.size > 32]
    assert after.producer[after.node["conv0"].inputs[1]].op == "DequantizeLinear"
    assert [region.integer for region in regions(after) if region.kind == "conv"] == [True]
    assert run_pass(Quantize(("conv0",)), after, ctx) is after
    assert error(shared, after) < 0.01


# --- options, targets, refusals ---


def test_the_target_says_which_signedness_activations_have() -> None:
    graph = residual()
    for name in ("host", "cortex-a72", "nvidia-t4"):
        target = find_target(name)
        after = quantized(graph, Context(target, random_samples(graph)))
        kinds = {after.tensor(node.output).dtype for node in of_op(after, "QuantizeLinear")}
        assert kinds == {target.activation}
        assert error(graph, after) < 0.01


def test_reduced_range_leaves_room_for_pairs_of_products() -> None:
    after = quantized(residual(), reduce_range=True)
    weights = [array for array in after.params.values() if array.dtype == np.int8 and array.ndim > 1]
    assert max(int(np.abs(weight.astype(int)).max()) for weight in weights) == 64


@pytest.mark.parametrize(("depth", "limit"), [(8, 64), (4, 64), (2, 127)])
def test_weights_take_7_bits_where_the_targets_kernels_add_pairs_in_16_bits(depth: int, limit: int) -> None:
    known = find_target("x86-64-v2")
    pairs = known.microkernels["int8"]
    chosen = next(one for one in (pairs, *pairs.others) if one.depth == depth)
    target = dataclasses.replace(known, microkernels={**known.microkernels, "int8": chosen})
    graph = residual()
    after = quantized(graph, Context(target, random_samples(graph)))
    weights = [array for array in after.params.values() if array.dtype == np.int8 and array.ndim > 1]
    assert max(int(np.abs(weight.astype(int)).max()) for weight in weights) == limit
    kept = quantized(graph, Context(target, random_samples(graph)), reduce_range=False)
    assert max(int(np.abs(array.astype(int)).max()) for array in kept.params.values() if array.dtype == np.int8) == 127


def test_rounding_by_outputs_leaves_sums_within_16_bits_where_the_nearest_weights_had_them() -> None:
    graph = residual()
    nearest, adapted = (quantized(graph, reduce_range=True, rounding=one) for one in ("nearest", "adaround"))
    layers = [(node, nearest.producer[node.inputs[1]].inputs[0]) for node in of_op(nearest, "Conv", "Gemm")]
    known = [(node, name) for node, name in layers if fits(nearest.params[name], node)]
    assert known and all(fits(adapted.params[name], node) for node, name in known)
    large = adapted.edit()
    for _, name in known:
        large.set_param(name, np.full_like(adapted.params[name], 50))
    settled = kept(large.finish("test"), nearest, [node.name for node, _ in known], "test")
    assert all(fits(settled.params[name], node) for node, name in known)


def test_candidates_are_the_layers_that_the_target_can_compute() -> None:
    graph, target = residual(), find_target("cortex-a72")
    layers = [node.name for node in of_op(graph, *LAYERS)]
    found = list(Quantize.candidates(graph, target))
    *forms, last = found
    assert [one for one in forms if one.weights == ("int8",) and not one.dynamic] == [Quantize((name,)) for name in layers]
    assert [one.site[0] for one in forms if one.weights == ("int4",)] == layers
    assert last == Refusal("quantize", graph.name, "target has no bfloat16 kernels")
    bare = dataclasses.replace(target, microkernels={}, peak={"float32": 1e9})
    reasons = {refusal.reason for refusal in Quantize.candidates(graph, bare) if isinstance(refusal, Refusal)}
    assert reasons == {"target has no int8 kernels", "target has no bfloat16 kernels"}


def single(op: str, shape: tuple[int, ...], weight: tuple[int, ...], out: tuple[int, ...], **attrs: object) -> Graph:
    build = Builder()
    build.outputs.append(build.op(op, [build.input(shape), build.weight(*weight, fan_in=9)], out, **attrs))
    return build.graph()


def computed_weights() -> Graph:
    build = Builder()
    x, w = build.input((1, 3, 6, 6)), build.input((4, 3, 1, 1))
    build.outputs.append(build.op("Conv", [x, build.same("Neg", w)], (1, 4, 6, 6)))
    return build.graph()


def long_products() -> Graph:
    graph = single("MatMul", (1, 90_000), (90_000, 2), (1, 2))
    weight = frozen(np.ones((90_000, 2), np.float32))
    return dataclasses.replace(graph, params=MappingProxyType({"p0": weight}))


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (computed_weights(), "weights are computed"),
        (long_products(), "int32 accumulation could overflow: k = 90000"),
        (single("Gemm", (3, 2), (3, 4), (2, 4), transA=1), "its data are transposed"),
        (single("Conv", (1, 2, 4, 4, 4), (2, 2, 1, 1, 1), (1, 2, 4, 4, 4)), "no integer kernel for convolutions of"),
        (single("ConvTranspose", (1, 2, 4, 4, 4), (2, 2, 1, 1, 1), (1, 2, 4, 4, 4)), "no integer kernel for convolutions of"),
    ],
)
def test_what_must_stay_float_is_refused_with_the_reason(graph: Graph, reason: str) -> None:
    ctx = Context(calibration=random_samples(graph))
    assert quantized(graph, ctx) is graph
    assert reason in ctx.refused[0].reason
    refusal = next(iter(Quantize.candidates(graph, find_target("cortex-a72"))))
    assert isinstance(refusal, Refusal) and reason in refusal.reason


def test_long_dot_products_of_small_weights_are_not_refused() -> None:
    graph = single("MatMul", (1, 90_000), (90_000, 2), (1, 2))
    assert integer_operands(quantized(graph), quantized(graph).node["matmul0"])


def test_a_site_that_is_no_layer_is_refused_and_an_unknown_one_is_an_error() -> None:
    graph = residual()
    ctx = Context(calibration=random_samples(graph))
    assert quantized(graph, ctx, site=("relu1",)) is graph
    assert ctx.refused == [Refusal("quantize", "relu1", "Relu has no integer kernel")]
    with pytest.raises(PassError, match="did you mean conv0"):
        quantized(graph, site=("convo0",))


def test_missing_or_broken_calibration_is_a_clear_error() -> None:
    graph = residual()
    with pytest.raises(PassError, match="needs calibration data"):
        quantized(graph, Context())
    data = dict(random_samples(graph).arrays)
    data["x0"] = np.where(data["x0"] > 2, np.nan, data["x0"]).astype(np.float32)
    with pytest.raises(DataError, match="value x0: holds NaN"):
        quantized(graph, Context(calibration=Samples(data)))
    with pytest.raises(PassError, match="did you mean mse"):
        quantized(graph, calibrator="mes")
    with pytest.raises(PassError, match="needs opset 13"):
        quantized(dataclasses.replace(graph, opsets={"": 12}))


@pytest.mark.parametrize("position", [1, 2])
def test_broken_weights_name_the_value(position: int) -> None:
    graph = residual()
    node = next(node for node in of_op(graph, "Conv", "Gemm") if len(node.inputs) > 2)
    name = node.inputs[position]
    broken = graph.params[name].copy()
    broken.flat[0] = np.nan
    graph = dataclasses.replace(graph, params=MappingProxyType({**graph.params, name: frozen(broken)}))
    with pytest.raises(ModelError, match=f"value {name}: .* NaN"):
        Quantize((node.name,)).run(graph, Context(calibration=random_samples(graph)))


def test_infinite_activations_name_the_value() -> None:
    build = Builder()
    x = build.same("Exp", build.same("Mul", build.input((1, 3, 4, 4)), build.floats(1e4)))
    build.outputs.append(conv(build, x, 4, 1))
    with pytest.raises(DataError, match="value exp1_out: holds NaN or infinity"):
        quantized(build.graph())


def test_an_output_in_the_middle_of_a_chain_stays_float_and_keeps_its_name() -> None:
    build = Builder()
    x = relu(build, conv(build, build.input((1, 3, 8, 8)), 4))
    pooled = build.op("MaxPool", [x], (1, 4, 4, 4), kernel_shape=(2, 2), strides=(2, 2))
    build.outputs += [x, pooled, conv(build, pooled, 4)]
    graph = build.graph()
    after = quantized(graph)
    assert after.outputs == graph.outputs
    assert {after.tensor(value).dtype for value in after.outputs} == {"float32"}
    assert error(graph, after) < 0.01


def test_the_demo_model_loses_less_than_half_a_point() -> None:
    folder = Path(hwopt.__file__).parent / "demo"
    graph = from_model(onnx.load(folder / "fashion.onnx"))
    with np.load(folder / "fashion.npz") as data:
        calibration = data["calibrate"][:64].astype(np.float32) / 255
        images, labels = data["evaluate"][:1000].astype(np.float32) / 255, data["labels"][:1000]
    after = quantized(graph, Context(calibration=Samples(MappingProxyType({"image": calibration}))))
    right = [
        float(np.mean(Session(one, optimize=True).run({"image": images})["logits"].argmax(1) == labels)) for one in (graph, after)
    ]
    assert right[0] - right[1] < 0.005
    assert all(isinstance(node, Node) and integer_operands(after, node) for node in of_op(after, *LAYERS))
