"""Ranges: streaming histograms against numpy, calibrators against their definitions, grids against ONNX Runtime."""

from __future__ import annotations

import math
from types import MappingProxyType

import numpy as np
import pytest
from onnx import TensorProto, helper

from hwopt.analysis.ranges import (
    BINS,
    CALIBRATORS,
    RANGE,
    ChannelMean,
    Grid,
    Histogram,
    entropy,
    grid_of,
    mean_square,
    min_max,
    observe,
    observed,
    percentile,
)
from hwopt.backends.ort import Session, observing
from hwopt.errors import DataError
from hwopt.io.onnx import read
from hwopt.samples import Samples
from tests.random_graphs import Builder

RNG = np.random.default_rng(5)
NORMAL = RNG.standard_normal(50_000).astype(np.float32)
RELU = np.maximum(NORMAL, 0)
TAILED = (RNG.standard_t(2, 50_000) * 0.1).astype(np.float32)


def seen(*arrays: np.ndarray) -> Histogram:
    histogram = Histogram()
    for array in arrays:
        histogram = histogram.add(array)
    return histogram


def test_counts_are_those_of_numpy_with_zeros_apart() -> None:
    histogram = seen(RELU)
    wanted, _ = np.histogram(RELU[RELU > 0].astype(np.float64), histogram.edges)
    assert np.array_equal(histogram.counts, wanted)
    assert histogram.zeros == (RELU == 0).sum()
    assert (histogram.low, histogram.high) == (0.0, RELU.max())


@pytest.mark.parametrize("seed", range(5))
def test_neither_order_nor_batching_changes_a_histogram(seed: int) -> None:
    values = TAILED * np.exp2(np.arange(len(TAILED)) % 17).astype(np.float32)
    whole = seen(values)
    parts = np.array_split(np.random.default_rng(seed).permutation(values), seed + 2)
    for streamed in (seen(*parts), seen(*parts[:1]).merge(seen(*parts[1:]))):
        assert (streamed.exponent, streamed.start, streamed.zeros) == (whole.exponent, whole.start, whole.zeros)
        assert np.array_equal(streamed.counts, whole.counts)


def test_memory_does_not_grow_with_the_samples_and_no_value_is_lost() -> None:
    histogram, count = Histogram(), 0
    for step in range(60):
        histogram = histogram.add(NORMAL[:1000] * np.float32(2.0**step))
        count += 1000
        assert histogram.counts.shape == (BINS,)
    assert histogram.counts.sum() + histogram.zeros == count


@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1e20, 3e38])
def test_tiny_and_huge_values_fill_at_least_half_of_the_bins(scale: float) -> None:
    values = (np.linspace(-1, 1, 10_001) * scale).astype(np.float32)
    histogram = seen(values)
    assert histogram.counts.sum() + histogram.zeros == len(values)
    assert (histogram.high - histogram.low) / histogram.width >= min(BINS / 2 - 1, 1000)
    assert histogram.edges[0] <= values.min() and values.max() <= histogram.edges[-1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("axis", [None, 1])
def test_values_that_are_not_finite_are_named(bad: float, axis: int | None) -> None:
    batch = np.ones((2, 3), np.float32)
    batch[1, 1] = bad
    with pytest.raises(DataError, match="value conv7_out: holds NaN or infinity"):
        observe([{"conv7_out": batch}], [("conv7_out", axis)])


@pytest.mark.parametrize("axis", [1, -1])
def test_channel_means_stream(axis: int) -> None:
    batches = [RNG.standard_normal((2, 3, 4, 5)).astype(np.float32) for _ in range(4)]
    mean = ChannelMean(axis)
    for batch in batches:
        mean = mean.add(batch)
    others = tuple({0, 1, 2, 3} - {axis % 4})
    assert np.allclose(mean.mean, np.concatenate(batches).mean(others), atol=1e-6)


def test_a_model_is_observed_batch_by_batch_inputs_included() -> None:
    build = Builder()
    x = build.input((2, 3), name="x")
    build.outputs.append(build.same("Relu", build.same("Neg", x)))
    graph = build.graph()
    data = np.arange(12, dtype=np.float32).reshape(4, 3)
    found = observed(graph, Samples(MappingProxyType({"x": data})), [("x", None), ("neg0_out", None), ("x", 1)])
    assert (found.histogram("x").low, found.histogram("x").high) == (0.0, 11.0)
    assert (found.histogram("neg0_out").low, found.histogram("neg0_out").high) == (-11.0, 0.0)
    assert np.allclose(found.mean("x", 1), data.mean(0))


@pytest.mark.parametrize("values", [NORMAL, RELU, TAILED, -RELU, NORMAL + 3])
@pytest.mark.parametrize("percent", [99.0, 99.9, 99.99])
def test_percentile_is_the_quantile_to_within_a_bin(values: np.ndarray, percent: float) -> None:
    histogram, cut, one = seen(values), (100 - percent) / 200, 1.5 / len(values)
    for found, share in zip(percentile(histogram, percent), (cut, 1 - cut), strict=True):
        least, most = np.quantile(values, [share - one, share + one])
        inside = least - histogram.width <= found <= most + histogram.width
        assert inside or (found == 0 and not least <= 0 <= most)  # zero is always in the range


@pytest.mark.parametrize("values", [NORMAL, RELU, TAILED, -RELU, NORMAL - 1])
def test_mean_square_is_as_good_as_the_best_range_found_by_trying(values: np.ndarray) -> None:
    def error(low: float, high: float) -> float:
        grid = grid_of(low, high, "uint8")
        return float(((grid.dequantize(grid.quantize(values)) - values) ** 2).mean())

    shares = np.linspace(0.05, 1, 40)
    best = min(error(values.min() * a, values.max() * b) for a in shares for b in shares)
    assert error(*mean_square(seen(values))) <= 1.05 * best
    assert error(*mean_square(seen(values))) <= error(*min_max(seen(values)))


def brute_force_entropy(values: np.ndarray, width: float, levels: int) -> float:
    """The threshold by the words of the definition, bin by bin."""
    counts = np.bincount((np.abs(values[values != 0]).astype(np.float64) / width).astype(int)).astype(np.float64)
    best, threshold = math.inf, 0.0
    for size in range(levels, len(counts) + 1):
        reference = counts[:size].copy()
        reference[-1] += counts[size:].sum()
        candidate = np.zeros(size)
        for level in range(levels):
            bins = slice(level * size // levels, (level + 1) * size // levels)
            used = reference[bins] > 0
            candidate[bins][used] = counts[:size][bins].sum() / max(used.sum(), 1)
        used = reference > 0
        if (candidate[used] == 0).any():
            continue
        p, q = reference[used] / reference.sum(), candidate[used] / candidate.sum()
        divergence = float((p * np.log(p / q)).sum())
        if divergence < best - 1e-12:
            best, threshold = divergence, size * width
    return threshold


@pytest.mark.parametrize(("values", "levels"), [(TAILED[:4000], 128), (np.abs(TAILED[:4000]), 256)])
def test_entropy_is_the_brute_force_minimum(values: np.ndarray, levels: int) -> None:
    histogram = seen(values)
    threshold = brute_force_entropy(values, histogram.width, levels)
    low, high = entropy(histogram)
    assert high == pytest.approx(min(threshold, histogram.high))
    assert low == pytest.approx(max(-threshold, histogram.low))


@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.parametrize("values", [np.zeros(9), np.full(9, 4.0), np.full(9, -0.3), np.array([1e-30, 2.0])])
def test_degenerate_data_give_a_finite_range_within_what_was_seen(name: str, values: np.ndarray) -> None:
    low, high = CALIBRATORS[name](seen(values.astype(np.float32)))
    assert min(values.min(), 0) - 1e-6 <= low <= 0 <= high <= max(values.max(), 0) + 1e-6
    assert grid_of(low, high, "uint8").scale > 0


@pytest.mark.parametrize("name", ["mse", "entropy"])
def test_exact_zeros_do_not_move_the_range(name: str) -> None:
    positive = np.abs(TAILED)
    assert CALIBRATORS[name](seen(positive)) == CALIBRATORS[name](seen(positive, np.zeros(10**6, np.float32)))


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("limits", [(0.0, 6.0), (-1.3, 2.9), (0.5, 4.0), (-3.0, -1.0), (-1e-41, 1e-41), (0.0, 0.0)])
def test_grids_hold_zero_exactly_and_reach_both_ends(dtype: str, limits: tuple[float, float]) -> None:
    grid = grid_of(*limits, dtype)
    bottom, top = grid.bounds
    assert bottom <= grid.zero_point <= top
    assert grid.dequantize(grid.quantize(np.zeros(1))) == 0
    ends = grid.dequantize(np.array([bottom, top], dtype))
    assert ends[0] <= limits[0] + grid.scale and ends[1] >= limits[1] - grid.scale
    assert grid_of(*limits, "int8", symmetric=True).zero_point == 0


@pytest.mark.parametrize("grid", [grid_of(-1.3, 2.9, "uint8"), grid_of(0, 6, "int8"), grid_of(-2, 1, "int8", symmetric=True)])
def test_quantize_rounds_and_saturates_as_onnx_runtime(grid: Grid) -> None:
    build = Builder()
    x = build.input((999,))
    names = [build.param(np.array(grid.scale, np.float32)), build.param(np.array(grid.zero_point, grid.dtype))]
    integers = build.op("QuantizeLinear", [x, *names], (999,))
    build.outputs += [integers, build.op("DequantizeLinear", [integers, *names], (999,))]
    values = np.concatenate([NORMAL[:799] * 3, (np.arange(200) - 100.5) * np.float32(grid.scale)]).astype(np.float32)
    found = list(Session(build.graph()).run({x: values}).values())
    assert np.array_equal(grid.quantize(values), found[0])
    assert np.array_equal(grid.dequantize(found[0]), found[1])


def test_watching_a_value_runs_only_what_leads_to_it() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Neg", ["a"], ["b"]), helper.make_node("Abs", ["a"], ["y"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in ("x", "y")]
    model = helper.make_model(
        helper.make_graph(nodes, "fork", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    )
    watched = observing(read(model), ["b", "x"])
    assert [node.op for node in watched.nodes] == ["Relu", "Neg"] and watched.outputs == ("b",)
    assert Session(watched).run({"x": np.array([[1, -1]], np.float32)})["b"].tolist() == [[-1, 0]]


def test_the_extremes_alone_are_those_of_the_histogram() -> None:
    random = np.random.default_rng(5)
    batches = [{"x": random.standard_normal((2, 3)).astype(np.float32)} for _ in range(4)]
    found = observe(batches, [("x", None), ("x", RANGE)])
    assert (found.extremes("x").low, found.extremes("x").high) == (found.histogram("x").low, found.histogram("x").high)
    with pytest.raises(DataError, match="NaN"):
        observe([{"x": np.array([np.nan], np.float32)}], [("x", RANGE)])
