"""The kernel templates against numpy: odd shapes, every epilogue, every micro-kernel that this machine can execute."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tvm

from hwopt.analysis.narrow import NARROW, pairs_that_fit
from hwopt.backends.tvm import kernels
from hwopt.backends.tvm.kernels import schedule as schedules
from hwopt.backends.tvm.kernels.spec import Activation, Add, Bias, ConvSpec, MatmulSpec, Mean, Multiply, PoolSpec, Quantize, Scale
from targets import _isa_arm, _isa_x86

INT8 = {"data_dtype": "uint8", "weight_dtype": "int8", "out_dtype": "int32"}
FLAGS = {
    "sse": {"sse4_2", "ssse3", "popcnt"},
    "avx2": {"avx2", "fma"},
    "avx-vnni": {"avx2", "fma", "avx_vnni"},
    "avx512": {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512-vnni": {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
}


@functools.cache
def machine_flags():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return frozenset(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), ()))


def machine():
    """The best level that this machine executes."""
    return next((flags for flags in reversed(FLAGS.values()) if flags <= machine_flags()), set())


def compiled(spec, micro, target, cores=1):
    with mock.patch.object(schedules, "SERIAL_CYCLES", 0):  # as many tasks as large kernels have
        schedule = kernels.default_schedule(spec, micro, cores)
    function = kernels.build(spec, schedule, micro, "kernel")
    with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
        return tvm.tirx.build(tvm.IRModule({"kernel": function}), tvm.target.Target(target))


def run(spec, data, weights, tensors=(), cores=1, flags=None):
    """The kernel's output, flat."""
    flags = machine() if flags is None else flags
    micro = kernels.suited(spec, _isa_x86.microkernels(flags)["float32" if spec.weight_dtype == "float32" else "int8"])
    assert kernels.supports(spec, micro) == ""
    library = compiled(spec, micro, _isa_x86.llvm(flags), cores)
    packed = kernels.pack(spec, weights, micro) if getattr(spec, "constant", True) else weights
    out = tvm.runtime.tensor(np.zeros(out_size(spec), spec.out_dtype))
    arguments = [tvm.runtime.tensor(np.ascontiguousarray(item).reshape(-1)) for item in (data, packed, *tensors)]
    library["kernel"](*arguments, out)
    return out.numpy()


def out_size(spec):
    if isinstance(spec, MatmulSpec):
        return spec.batch * spec.m * spec.n
    if any(isinstance(step, Mean) for step in spec.epilogue):
        return spec.batch * spec.out_channels
    return spec.batch * spec.out_height * spec.out_width * spec.out_channels


def run_pool(spec, data, cores=1):
    micro = _isa_x86.microkernels(machine())["float32"]
    library = compiled(spec, micro, _isa_x86.llvm(machine()), cores)
    out = tvm.runtime.tensor(np.zeros(spec.batch * spec.out_height * spec.out_width * spec.channels, spec.out_dtype))
    library["kernel"](tvm.runtime.tensor(data.reshape(-1)), out)
    return out.numpy().reshape(spec.batch, spec.out_height, spec.out_width, spec.channels)


def conv(height, width, channels, out, kernel, integer=False, **more):
    kind = INT8 if integer else {}
    return ConvSpec(more.pop("batch", 1), height, width, channels, out, kernel, **{**kind, **more})


def random(spec, seed=0):
    """Data [batch, height, width, channels] and weights in ONNX's layout."""
    generator = np.random.default_rng(seed)
    shape = (spec.batch, spec.height, spec.width, spec.in_channels)
    weights = (spec.out_channels, spec.in_channels // spec.groups, *spec.kernel)
    if spec.weight_dtype == "float32":
        return generator.standard_normal(shape, np.float32), generator.standard_normal(weights, np.float32)
    low, high = (0, 256) if spec.data_dtype == "uint8" else (-128, 128)
    least, most = (-NARROW // spec.narrow, NARROW // spec.narrow) if spec.narrow else (-128, 127)
    found = generator.integers(least, most + 1, weights).astype(np.int8)
    return generator.integers(low, high, shape).astype(spec.data_dtype), found


def _taken(spec, axis, tap):
    """The padded positions along an axis that one tap multiplies."""
    first, stride = tap * spec.dilations[axis], spec.strides[axis]
    return slice(first, first + ((spec.out_height, spec.out_width)[axis] - 1) * stride + 1, stride)


def accumulators(spec, data, weights):
    """The convolution in float64 (exact for integers), channels last."""
    top, left, bottom, right = spec.pads
    padded = np.pad(data.astype(float), ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=spec.pad_value)
    out = np.zeros((spec.batch, spec.out_height, spec.out_width, spec.groups, spec.out_channels // spec.groups))
    grouped = padded.reshape(*padded.shape[:3], spec.groups, -1)
    kernels_of = weights.astype(float).reshape(spec.groups, -1, *weights.shape[1:])
    for y in range(spec.kernel[0]):
        for x in range(spec.kernel[1]):
            rows, columns = (_taken(spec, axis, tap) for axis, tap in enumerate((y, x)))
            out += np.einsum("byxgk,gnk->byxgn", grouped[:, rows, columns], kernels_of[:, :, :, y, x], optimize=True)
    return out.reshape(spec.batch, spec.out_height, spec.out_width, spec.out_channels)


def close(got, want, relative=2e-5):
    assert np.abs(got - want.reshape(-1)).max() <= relative * max(1.0, np.abs(want).max())


SHAPES = [
    {"height": 8, "width": 9, "channels": 16, "out": 32, "kernel": (3, 3), "pads": (1, 1, 1, 1)},
    {"height": 9, "width": 7, "channels": 5, "out": 19, "kernel": (3, 3), "pads": (1, 0, 2, 1)},
    {"height": 12, "width": 12, "channels": 3, "out": 37, "kernel": (3, 3), "strides": (2, 2), "pads": (0, 0, 1, 1)},
    {
        "height": 11,
        "width": 13,
        "channels": 8,
        "out": 24,
        "kernel": (3, 5),
        "dilations": (2, 2),
        "pads": (2, 4, 2, 4),
        "batch": 2,
    },
    {"height": 10, "width": 10, "channels": 12, "out": 40, "kernel": (3, 3), "groups": 4, "pads": (1, 1, 1, 1)},
    {"height": 10, "width": 10, "channels": 6, "out": 10, "kernel": (3, 3), "groups": 2},
    {"height": 1, "width": 23, "channels": 1, "out": 5, "kernel": (1, 3)},
    {"height": 40, "width": 40, "channels": 7, "out": 70, "kernel": (2, 2), "batch": 3, "strides": (1, 2)},
    {"height": 1, "width": 1, "channels": 30, "out": 1000, "kernel": (1, 1)},
    {"height": 13, "width": 5, "channels": 33, "out": 49, "kernel": (1, 1), "strides": (2, 3), "pads": (1, 1, 1, 1)},
    {"height": 9, "width": 11, "channels": 48, "out": 48, "kernel": (3, 3), "groups": 48, "pads": (1, 1, 1, 1), "batch": 2},
    {
        "height": 9,
        "width": 30,
        "channels": 21,
        "out": 21,
        "kernel": (5, 5),
        "groups": 21,
        "pads": (2, 2, 2, 2),
        "strides": (2, 2),
    },
    {"height": 12, "width": 7, "channels": 5, "out": 5, "kernel": (3, 2), "groups": 5, "pads": (3, 0, 1, 2), "dilations": (2, 3)},
    {"height": 7, "width": 7, "channels": 32, "out": 32, "kernel": (7, 7), "groups": 32},
    {
        "height": 1,
        "width": 40,
        "channels": 17,
        "out": 17,
        "kernel": (1, 4),
        "groups": 17,
        "pads": (0, 6, 0, 5),
        "strides": (1, 3),
    },
]


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolutions_of_any_shape_equal_numpy(shape, cores):
    spec = conv(**shape)
    data, weights = random(spec)
    close(run(spec, data, weights, cores=cores), accumulators(spec, data, weights))


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integer_accumulators_are_exact_with_the_zero_point_in_the_padding(shape, cores):
    spec = conv(**shape, integer=True, pad_value=7)
    data, weights = random(spec)
    assert (run(spec, data, weights, cores=cores) == accumulators(spec, data, weights).reshape(-1)).all()


ATROUS = [  # taps lie further apart than a block's rows, or than the image is wide
    {"height": 9, "width": 12, "channels": 1600, "out": 8, "kernel": (3, 3), "pads": (6, 5, 6, 5), "dilations": (6, 5)},
    {
        "height": 17,
        "width": 9,
        "channels": 700,
        "out": 9,
        "kernel": (3, 3),
        "pads": (5, 8, 6, 9),
        "dilations": (5, 8),
        "strides": (2, 1),
    },
    {
        "height": 5,
        "width": 30,
        "channels": 12,
        "out": 18,
        "kernel": (3, 1),
        "pads": (4, 0, 5, 3),
        "dilations": (4, 1),
        "groups": 3,
    },
]


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("zero_point", [None, 0, 7])
@pytest.mark.parametrize("shape", ATROUS, ids=str)
def test_taps_that_see_only_padding_are_left_out_where_it_is_zeros(shape, zero_point, cores):
    spec = conv(**shape, integer=True, pad_value=zero_point) if zero_point is not None else conv(**shape)
    data, weights = random(spec)
    close(run(spec, data, weights, cores=cores), accumulators(spec, data, weights))


LINES = [  # results in one row, of whatever data
    {"height": 3, "width": 90, "channels": 16, "out": 24, "kernel": (3, 3)},
    {"height": 1, "width": 400, "channels": 400, "out": 16, "kernel": (1, 4), "strides": (1, 3), "dilations": (1, 2)},
    {"height": 1, "width": 900, "channels": 200, "out": 9, "kernel": (1, 1), "strides": (2, 2)},
    {"height": 2, "width": 70, "channels": 10, "out": 9, "kernel": (1, 1), "strides": (2, 2)},
    {"height": 1, "width": 80, "channels": 12, "out": 18, "kernel": (1, 5), "groups": 3, "batch": 2},
]


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("shape", [*SHAPES, *LINES], ids=str)
def test_bytes_that_are_widened_in_workspace_make_the_same_integers(shape, cores):
    spec = conv(**shape, integer=True, pad_value=7)
    data, weights = random(spec)
    want = accumulators(spec, data, weights).reshape(-1)
    assert (run(spec, data, weights, cores=cores, flags=FLAGS["sse"]) == want).all()


POOLED = [
    {"height": 16, "width": 16, "channels": 512, "out": 16, "kernel": (3, 3), "pads": (1, 1, 1, 1)},
    {"height": 31, "width": 31, "channels": 512, "out": 16, "kernel": (1, 1), "strides": (2, 2)},
    {"height": 16, "width": 16, "channels": 1024, "out": 16, "kernel": (1, 1)},
]


@pytest.mark.parametrize("shape", POOLED, ids=str)
def test_a_mean_is_over_the_whole_image_however_large_its_workspace(shape):
    spec = conv(**shape, integer=True, epilogue=(Scale(), Mean()))
    spec = dataclasses.replace(spec, out_dtype="float32")
    data, weights = random(spec)
    want = accumulators(spec, data, weights).mean((1, 2)).reshape(-1)
    close(run(spec, data, weights, [np.ones(16, np.float32)], flags=FLAGS["sse"]), want)


@pytest.mark.parametrize("level", FLAGS)
@pytest.mark.parametrize("integer", [False, True])
def test_every_x86_level_that_runs_here_computes_the_same(level, integer):
    if not FLAGS[level] <= machine_flags():
        pytest.skip(f"this machine lacks {level}")
    spec = conv(9, 7, 5, 19, (3, 3), pads=(1, 0, 2, 1), integer=integer)
    data, weights = random(spec)
    close(run(spec, data, weights, flags=FLAGS[level]), accumulators(spec, data, weights), 0 if integer else 2e-5)


@pytest.mark.parametrize("level", ["sse", "avx2", "avx512"])
@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize(("depth", "out"), [(10, 19), (16, 32), (3, 32)])
def test_sums_of_pairs_in_16_bits_are_exact_for_the_largest_numbers_that_are_allowed(level, pairs, depth, out):
    if not FLAGS[level] <= machine_flags():
        pytest.skip(f"this machine lacks {level}")
    spec = dataclasses.replace(conv(9, 7, depth, out, (3, 3), pads=(1, 0, 2, 1), integer=True), narrow=pairs)
    data, weights = random(spec)
    data[:, :4], weights[:3], weights[3:6] = 255, -NARROW // pairs, NARROW // pairs
    assert pairs_that_fit(weights) == pairs
    first = _isa_x86.microkernels(FLAGS[level])["int8"]
    assert next(one for one in (first, *first.others) if not kernels.supports(spec, one)).narrow == pairs
    assert (run(spec, data, weights, flags=FLAGS[level]) == accumulators(spec, data, weights).reshape(-1)).all()


def erf(x):
    return np.vectorize(math.erf)(x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


FUNCTIONS = {
    Activation("relu"): lambda x: np.maximum(x, 0),
    Activation("clip", (-1.0, 2.5)): lambda x: np.clip(x, -1, 2.5),
    Activation("leaky_relu", (0.1,)): lambda x: np.where(x < 0, 0.1 * x, x),
    Activation("hard_swish"): lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    Activation("hard_sigmoid", (0.3, 0.4)): lambda x: np.clip(0.3 * x + 0.4, 0, 1),
    Activation("sigmoid"): sigmoid,
    Activation("silu"): lambda x: x * sigmoid(x),
    Activation("scaled_silu", (1.702,)): lambda x: x * sigmoid(1.702 * x),
    Activation("tanh"): np.tanh,
    Activation("gelu"): lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    Activation("gelu_tanh"): lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize("step", FUNCTIONS, ids=lambda step: step.function)
def test_an_activation_follows_the_bias(step):
    spec = conv(5, 6, 4, 21, (3, 3), pads=(1, 1, 1, 1), epilogue=(Bias(), step))
    data, weights = random(spec)
    bias = np.linspace(-30, 30, 21, dtype=np.float32)
    want = FUNCTIONS[step](accumulators(spec, data, weights) + bias)
    assert np.abs(run(spec, data, weights, [bias]) - want.reshape(-1)).max() < 2e-5 * max(1, np.abs(want).max())


def quantized(x, scale, zero_point, dtype):
    info = np.iinfo(dtype)
    return np.clip(np.round(x / scale) + zero_point, info.min, info.max)


INTEGER_CHAINS = {
    "plain": (),
    "relu": (Activation("relu"),),
    "clip": (Activation("clip", (0.0, 6.0)),),
    "residual then relu": (Add("uint8", 0.05, 100), Activation("relu")),
    "silu": (Activation("silu"),),
    "silu then residual": (Activation("silu"), Add("int8", 0.02, -3)),
    "float residual then gated": (Add(), Multiply("full")),
    "per channel and image": (Multiply("channels"), Activation("leaky_relu", (0.2,)), Multiply("image")),
}


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("chain", INTEGER_CHAINS.values(), ids=INTEGER_CHAINS)
def test_requantized_chains_are_within_one_step(chain, dtype):
    last = Quantize(0.07, 10, dtype)
    spec = conv(5, 6, 4, 21, (3, 3), True, pads=(1, 1, 1, 1), pad_value=3, batch=2, epilogue=(Bias(), Scale(), *chain, last))
    spec = dataclasses.replace(spec, out_dtype=dtype)
    data, weights = random(spec)
    generator = np.random.default_rng(1)
    bias = generator.integers(-5000, 5000, 21).astype(np.int32)
    scale = generator.uniform(1e-4, 2e-4, 21).astype(np.float32)
    shape = (2, spec.out_height, spec.out_width, 21)
    value, tensors = (accumulators(spec, data, weights) + bias) * scale, [bias, scale]
    for step in chain:
        value = applied(step, value, tensors, generator, shape)
    want = quantized(value, 0.07, 10, dtype).reshape(-1)
    got = run(spec, data, weights, tensors).astype(float)
    assert np.abs(got - want).max() <= 1
    assert (got != want).mean() < 0.02
    assert len(np.unique(want)) > 20


def applied(step, value, tensors, generator, shape):
    """The step in numpy; appends its tensor."""
    if isinstance(step, Activation):
        return FUNCTIONS.get(step, lambda x: ACTIVATIONS[step.function](x, *step.parameters))(value)
    if isinstance(step, Multiply):
        size = {"channels": shape[-1:], "image": (shape[0], 1, 1, shape[-1]), "full": shape}[step.over]
        tensors.append(generator.uniform(0.5, 1.5, size).astype(np.float32))
        return value * tensors[-1]
    if step.dtype == "float32":
        tensors.append(generator.standard_normal(shape, np.float32))
        return value + tensors[-1]
    info = np.iinfo(step.dtype)
    tensors.append(generator.integers(info.min, info.max + 1, shape).astype(step.dtype))
    return value + (tensors[-1].astype(float) - step.zero_point) * step.scale


ACTIVATIONS = {
    "clip": np.clip,
    "leaky_relu": lambda x, slope: np.where(x < 0, slope * x, x),
}


def test_a_pointwise_convolution_knows_its_image():
    spec = conv(3, 5, 8, 20, (1, 1), batch=2, epilogue=(Multiply("image"),))
    data, weights = random(spec)
    factor = np.random.default_rng(6).standard_normal((2, 1, 1, 20), np.float32)
    close(run(spec, data, weights, [factor]), accumulators(spec, data, weights) * factor)


def test_ties_round_to_even_and_both_ends_saturate():
    spec = conv(1, 8, 1, 1, (1, 1), True, epilogue=(Scale(), Quantize(1.0, 2, "uint8")))
    spec = dataclasses.replace(spec, out_dtype="uint8")
    data = np.array([1, 3, 5, 7, 0, 2, 200, 255], np.uint8)
    got = run(spec, data, np.full((1, 1, 1, 1), 1, np.int8), [np.array([0.5], np.float32)])
    assert got.tolist() == [2, 4, 4, 6, 2, 3, 102, 130]
    one = [np.ones(1, np.float32)]
    assert run(spec, data, np.full((1, 1, 1, 1), -100, np.int8), one).tolist() == [0, 0, 0, 0, 2, 0, 0, 0]
    assert run(spec, data, np.full((1, 1, 1, 1), 100, np.int8), one).tolist() == [102, 255, 255, 255, 2, 202, 255, 255]


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1000, 30), (1, 7, 33, 13), (2, 128, 48, 96), (3, 1, 5, 1)], ids=str)
def test_matmuls_with_constant_weights_equal_numpy(sizes, integer):
    batch, m, n, k = sizes
    spec = MatmulSpec(batch, m, n, k, **(INT8 if integer else {}))
    generator = np.random.default_rng(2)
    data, weights = generator.standard_normal((batch, m, k), np.float32), generator.standard_normal((k, n), np.float32)
    if integer:
        data, weights = np.clip(data * 60 + 128, 0, 255).astype(np.uint8), np.clip(weights * 60, -128, 127).astype(np.int8)
    close(run(spec, data, weights), data.astype(float) @ weights.astype(float), 0 if integer else 2e-5)


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("sizes", [(2, 7, 33, 13), (3, 64, 100, 70), (1, 17, 16, 64), (2, 1, 5, 1)], ids=str)
def test_matmuls_with_a_computed_right_side_equal_numpy(sizes, shared, transposed, integer, cores):
    batch, m, n, k = sizes
    spec = MatmulSpec(batch, m, n, k, False, transposed, shared, **(INT8 if integer else {}))
    generator = np.random.default_rng(3)
    data, right = generator.standard_normal((batch, m, k), np.float32), generator.standard_normal((batch, k, n), np.float32)
    if integer:
        data, right = np.clip(data * 60 + 128, 0, 255).astype(np.uint8), np.clip(right * 60, -128, 127).astype(np.int8)
    right = right[:1] if shared else right
    given = right.swapaxes(1, 2) if transposed else right
    close(run(spec, data, given, cores=cores), data.astype(float) @ right.astype(float), 0 if integer else 2e-5)


def beside(array, heads):
    """[batch, rows, size] with its products beside one another: [batch / heads, rows, heads, size]."""
    return array.reshape(-1, heads, *array.shape[1:]).transpose(0, 2, 1, 3)


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sides", [("data",), ("right",), ("out",), ("data", "right", "out")], ids=str)
@pytest.mark.parametrize("sizes", [(6, 7, 33, 13), (6, 37, 32, 70)], ids=str)
def test_matmuls_of_heads_that_lie_beside_one_another_equal_numpy(sizes, sides, transposed, integer, cores):
    batch, m, n, k = sizes
    spec = MatmulSpec(batch, m, n, k, False, transposed, heads=3, beside=sides, **(INT8 if integer else {}))
    generator = np.random.default_rng(4)
    data, right = generator.standard_normal((batch, m, k), np.float32), generator.standard_normal((batch, k, n), np.float32)
    if integer:
        data, right = np.clip(data * 60 + 128, 0, 255).astype(np.uint8), np.clip(right * 60, -128, 127).astype(np.int8)
    want = data.astype(float) @ right.astype(float)
    given = {"data": data, "right": right.swapaxes(1, 2) if transposed else right, "out": want}
    given |= {side: beside(given[side], 3) for side in sides}
    close(run(spec, given["data"], given["right"], cores=cores), given["out"], 0 if integer else 2e-5)


def _window(spec, axis, position):
    first = position * spec.strides[axis]
    return slice(first, first + (spec.kernel[axis] - 1) * spec.dilations[axis] + 1, spec.dilations[axis])


def pooled(spec, values):
    """The pool of float64 values; padded places are left out."""
    top, left, bottom, right = spec.pads
    padded = np.pad(values, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=np.nan)
    out = np.zeros((spec.batch, spec.out_height, spec.out_width, spec.channels))
    for y in range(spec.out_height):
        for x in range(spec.out_width):
            rows, columns = (_window(spec, axis, position) for axis, position in enumerate((y, x)))
            window = padded[:, rows, columns]
            if spec.function == "max":
                out[:, y, x] = np.nanmax(window, (1, 2))
            elif spec.include_pads:
                out[:, y, x] = np.nansum(window, (1, 2)) / (spec.kernel[0] * spec.kernel[1])
            else:
                out[:, y, x] = np.nanmean(window, (1, 2))
    return out


POOLS = [
    {"kernel": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1)},
    {"kernel": (2, 3), "strides": (1, 2), "pads": (0, 1, 1, 0), "dilations": (2, 2)},
    {"kernel": (9, 11)},
    {"kernel": (2, 2), "strides": (2, 2)},
]


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("function", ["max", "average", "average with pads"])
@pytest.mark.parametrize("channels", [3, 64, 85])
@pytest.mark.parametrize("shape", POOLS, ids=str)
def test_pools_of_floats_equal_numpy(shape, channels, function, cores):
    spec = PoolSpec(2, 9, 11, channels, **shape, function=function.split()[0], include_pads="with" in function)
    data = np.random.default_rng(4).standard_normal((2, 9, 11, channels), np.float32)
    assert np.abs(run_pool(spec, data, cores) - pooled(spec, data.astype(float))).max() < 1e-5


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("function", ["max", "average"])
@pytest.mark.parametrize("shape", POOLS, ids=str)
def test_pools_of_quantized_data_requantize_within_one_step(shape, function, dtype):
    last = Quantize(0.04, 20, dtype)
    spec = PoolSpec(
        2, 9, 11, 85, **shape, function=function, data_dtype=dtype, out_dtype=dtype, scale=0.05, zero_point=7, epilogue=(last,)
    )
    info = np.iinfo(dtype)
    data = np.random.default_rng(5).integers(info.min, info.max + 1, (2, 9, 11, 85)).astype(dtype)
    want = quantized(pooled(spec, (data.astype(float) - 7) * 0.05), 0.04, 20, dtype)
    assert np.abs(run_pool(spec, data) - want).max() <= 1
    if function == "max":
        kept = dataclasses.replace(spec, epilogue=())
        assert (run_pool(kept, data) == pooled(spec, data.astype(float))).all()


@pytest.mark.parametrize(
    ("flags", "integer", "instruction"),
    [(set(), False, "fmla"), ({"asimddp"}, True, "sdot"), (set(), True, "smull")],
    ids=["neon float", "dot product", "plain neon"],
)
def test_arm_kernels_use_the_instruction_that_they_are_for(flags, integer, instruction):
    spec = conv(9, 7, 5, 19, (3, 3), pads=(1, 0, 2, 1), integer=integer)
    if integer:
        spec = dataclasses.replace(spec, data_dtype="int8")
    micro = _isa_arm.microkernels(flags)["int8" if integer else "float32"]
    assembly = compiled(spec, micro, _isa_arm.llvm(flags)).inspect_source("asm")
    assert assembly.count(f"\t{instruction}") > 20


def test_what_a_microkernel_cannot_take_is_refused_with_the_reason():
    spec = conv(4, 4, 4, 4, (1, 1), integer=True)
    assert "accumulates" in kernels.supports(spec, _isa_x86.AVX2_FLOAT)
    assert "uint8" in kernels.supports(dataclasses.replace(spec, data_dtype="int8"), _isa_x86.AVX_VNNI)


def test_a_schedule_survives_json():
    schedule = kernels.default_schedule(conv(**SHAPES[0]), _isa_x86.AVX512_FLOAT, 4)
    assert kernels.Schedule(**json.loads(json.dumps(dataclasses.asdict(schedule)))) == schedule


def test_short_kernels_are_not_worth_a_parallel_launch():
    """What counts is the time of one core: int8 products are faster than those of floats."""
    floats = MatmulSpec(1, 16, 128, 128)
    integers = dataclasses.replace(floats, **INT8)
    vectors = _isa_x86.microkernels(FLAGS["avx512-vnni"])
    found = [
        kernels.default_schedule(spec, micro, 2).parallel
        for spec, micro in zip((floats, integers), (vectors["float32"], vectors["int8"]), strict=True)
    ]
    assert found == [True, False]
