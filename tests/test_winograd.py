"""Winograd's algorithm for convolutions of bytes gives the integers of the direct form, or is not used."""

import dataclasses

import numpy as np
import onnx
import pytest

from hwopt import compiler
from hwopt.analysis.workload import workloads
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.kernels.spec import Activation, Add, Bias, Mean, Quantize, Scale
from hwopt.backends.tvm.kernels.winograd_forms import exact
from hwopt.backends.tvm.kernels.winograd_schedule import (
    WinogradSpec,
    able,
    default_schedule,
    multiplier,
    pays,
    tiles,
    winograd_spec,
    words_at_once,
)
from hwopt.backends.tvm.learn.counted_winograd import share_of_direct
from hwopt.backends.tvm.transformed import transformed
from hwopt.backends.tvm.tune.task import tasks_of
from hwopt.backends.tvm.weighted import Kernel
from hwopt.build import build
from hwopt.emit.products import Form
from hwopt.io.onnx import load
from hwopt.io.proto import to_model
from hwopt.job import prepare, quiet
from hwopt.plan.budget import Budget
from hwopt.plugins import find_target
from hwopt.target import Workload
from targets import _isa_x86
from tests.test_kernels import FLAGS, accumulators, conv, random, run

VNNI = _isa_x86.microkernels(FLAGS["avx512-vnni"])["int8"]
SHAPES = {
    "whole tiles": (12, 16, 32, 32),
    "ends of tiles": (9, 14, 18, 21),
    "less than a tile": (3, 2, 16, 16),
    "many channels": (8, 8, 34, 130),
    "few rows": (5, 40, 20, 48),
}


def by_winograd(shape, **more):
    height, width, channels, out = shape
    more.setdefault("pads", (1, 1, 1, 1))
    return winograd_spec(conv(height, width, channels, out, (3, 3), integer=True, **more))


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sums_are_those_of_the_direct_form(shape, cores):
    spec = by_winograd(shape, batch=2, pad_value=9)
    data, weights = random(spec)
    assert (run(spec, data, weights, cores=cores) == accumulators(spec, data, weights).reshape(-1)).all()


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float_results_are_as_near_as_those_of_the_direct_form(shape, cores):
    height, width, channels, out = shape
    plain = conv(height, width, channels, out, (3, 3), batch=2, pads=(1, 0, 2, 1))
    data, weights = random(plain)
    wanted = accumulators(plain, data, weights).reshape(-1)
    errors = [np.abs(run(spec, data, weights, cores=cores) - wanted).max() for spec in (winograd_spec(plain), plain)]
    assert errors[0] < max(2 * errors[1], 1e-6 * np.abs(wanted).max())


def test_what_is_not_finite_stays_in_its_windows():
    spec = winograd_spec(conv(9, 9, 16, 16, (3, 3), pads=(1, 1, 1, 1)))
    data, weights = random(spec)
    data[0, 3, 4, 5] = np.inf
    finite = np.isfinite(run(spec, data, weights).reshape(9, 9, 16)).all(2)
    reached = np.zeros((9, 9), bool)
    reached[2:5, 3:6] = True
    assert (finite == ~reached).all()


def test_images_of_a_batch_share_the_transformed_weights():
    spec = by_winograd((7, 6, 64, 64), batch=6)
    assert default_schedule(spec, VNNI).block_rows > tiles(spec)[0]
    data, weights = random(spec)
    assert (run(spec, data, weights) == accumulators(spec, data, weights).reshape(-1)).all()


def test_where_channels_are_many_and_tiles_few_their_parts_are_summed_up():
    spec = by_winograd((7, 7, 416, 40), narrow=1)
    wide = multiplier(spec, VNNI)
    assert words_at_once(spec, default_schedule(spec, VNNI), wide) == 26 < 416 // wide.depth
    data, weights = random(spec)
    assert (run(spec, data, weights) == accumulators(spec, data, weights).reshape(-1)).all()


@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (2, 0, 1, 3)])
def test_any_border_is_filled_with_the_zero_point(pads):
    spec = by_winograd((10, 11, 16, 16), pads=pads, pad_value=200)
    data, weights = random(spec)
    assert (run(spec, data, weights) == accumulators(spec, data, weights).reshape(-1)).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_that_it_takes_are_exact(sign):
    spec = by_winograd((8, 8, 114, 16))
    data = np.full((1, 8, 8, 114), 255, np.uint8)
    weights = np.full((16, 114, 3, 3), 127 * sign, np.int8)
    assert exact(weights) and not exact(np.repeat(weights, 2, 1))
    assert (run(spec, data, weights) == accumulators(spec, data, weights).reshape(-1)).all()


@pytest.mark.parametrize("function", ["relu", "silu"])
def test_the_epilogue_is_the_same(function):
    steps = (Bias(), Scale(), Add("uint8", 0.1, 3), Activation(function), Quantize(0.05, 4, "uint8"))
    spec = by_winograd((9, 12, 16, 40), epilogue=steps, out_dtype="uint8")
    plain = conv(9, 12, 16, 40, (3, 3), integer=True, pads=(1, 1, 1, 1), epilogue=steps, out_dtype="uint8")
    data, weights = random(spec)
    bias, scale = np.arange(40, dtype=np.int32) * 50, np.linspace(1e-4, 3e-4, 40, dtype=np.float32)
    addend = np.random.default_rng(1).integers(0, 256, (9, 12, 40)).astype(np.uint8)
    found, direct = (run(one, data, weights, (bias, scale, addend)) for one in (spec, plain))
    assert (found == direct).all() and len(np.unique(found)) > 50


def kernel(spec, weights):
    return Kernel(spec, None, weights, (), (), spec.out_dtype, True)


def test_it_is_chosen_where_it_pays_and_is_exact():
    large = conv(28, 28, 128, 128, (3, 3), integer=True, pads=(1, 1, 1, 1))
    weights = np.ones((128, 128, 3, 3), np.int8)
    assert transformed(kernel(large, weights), VNNI).spec == winograd_spec(large)
    assert transformed(kernel(large, weights * 127), VNNI).spec is large  # 255 x 127 x 1152 > 2^25
    small = dataclasses.replace(large, height=7, width=7)
    assert transformed(kernel(small, weights), VNNI).spec is small


@pytest.mark.parametrize(
    "change",
    [{"strides": (2, 2)}, {"dilations": (2, 2)}, {"kernel": (5, 5)}, {"in_channels": 65}, {"groups": 2}, {"out_channels": 8}],
    ids=str,
)
def test_other_convolutions_are_left_alone(change):
    large = conv(40, 40, 64, 64, (3, 3), integer=True, pads=(1, 1, 1, 1))
    assert able(large, VNNI) and not able(dataclasses.replace(large, **change), VNNI)


def test_a_matrix_unit_keeps_its_convolutions():
    amx = _isa_x86.AMX_INT8
    assert not pays(conv(40, 40, 64, 64, (3, 3), integer=True, pads=(1, 1, 1, 1)), amx)


def test_its_price_is_less_than_the_direct_form_s():
    work = Workload("conv", "conv", "int8", 3136, 64, 576, taps=9, window=(1, 56, 56, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1))
    assert share_of_direct(work, VNNI) < 0.8
    assert share_of_direct(work, _isa_x86.AMX_INT8) == 1.0


def test_where_memory_is_scarce_it_is_not_used():
    """Workspace of transformed data counts: of a library without a heap, the caller provides it."""
    graph = square_conv()
    roomy = find_target("x86-64-v3")
    scarce = roomy.cramped()
    assert compile_program(graph, scarce).scratch_bytes < 250_000 < compile_program(graph, roomy).scratch_bytes
    budget = Budget(activation_bytes=1e6)
    found = prepare(to_model(graph), "x86-64-v4,x86-64-v3", None, None, None, None, budget, None, 1, 0, quiet).target
    assert not found.spacious and [one.spacious for one in found.fallbacks] == [False]


def test_without_a_heap_all_that_is_measured_and_what_ships_take_little(tmp_path, monkeypatch):
    """In every instruction set of the library."""
    graph, both, form = square_conv(), find_target("x86-64-v4,x86-64-v3"), Form(parallel="serial", heap=False)
    targets = []
    monkeypatch.setattr(compiler, "build", lambda *given: targets.append(given[1]) or build(*given))
    made = compiler.compile_model(
        to_model(graph), out=tmp_path / "a", target=both, passes="none", threads=1, measure=False, form=form
    )  # fmt: skip
    small = build(graph, both.cramped(), 1, tmp_path, form=form)
    assert targets == [both.cramped()] and made.manifest["workspace_bytes"] == small.library.workspace_bytes


@pytest.mark.parametrize("spacious", [True, False])
def test_a_mean_over_the_image_stays_a_kernel_of_its_own_as_it_is_priced(spacious):
    """In the convolution's own kernel it would take the direct form."""
    graph, target = square_conv(14, pooled=True), find_target("x86-64-v3")
    first, *_ = tasks_of(graph, target if spacious else target.cramped(), 1)
    assert isinstance(first.spec, WinogradSpec) == spacious
    assert any(isinstance(step, Mean) for step in first.spec.epilogue) != spacious
    assert share_of_direct(workloads(graph)[0], target.microkernels["float32"]) < 1


def square_conv(side=28, pooled=False):
    weight = onnx.numpy_helper.from_array(np.ones((64, 64, 3, 3), np.float32), "w")
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])
    pool = onnx.helper.make_node("GlobalAveragePool", ["y"], ["z"])
    first = onnx.helper.make_tensor_value_info("x", 1, (1, 64, side, side))
    last = onnx.helper.make_tensor_value_info("z" if pooled else "y", 1, None)
    graph = onnx.helper.make_graph([node, pool] if pooled else [node], "square", [first], [last], [weight])
    return load(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9))
