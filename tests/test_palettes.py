"""Palettes of vectors and of channels with scales of their own: decoded by ONNX Runtime, judged by error and by bytes."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import pytest

from hwopt.analysis.compressed import Compressed, compressed
from hwopt.analysis.constant import constant
from hwopt.analysis.size import weight_bytes
from hwopt.analysis.workload import kernels
from hwopt.backends.ort import run
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.run import run_program
from hwopt.errors import PassError
from hwopt.ir import Graph, Node, TensorType, frozen, infer_types
from hwopt.job import clean
from hwopt.pipeline import Context, parse
from hwopt.plugins import find_passes, find_target
from hwopt.samples import Samples
from passes._vectors import vector_codebook

HOST = find_target("host")
SHAPES = {"Conv": (64, 32, 3, 3), "Gemm": (64, 128), "MatMul": (128, 64)}
INPUTS = {"Conv": (1, 32, 6, 6), "Gemm": (1, 128), "MatMul": (1, 5, 128)}
CHANNEL = {"Conv": 0, "Gemm": 0, "MatMul": 1}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def layer(op: str, uneven: bool = False) -> Graph:
    """`uneven`: output channels of very different sizes."""
    weight = normal(*SHAPES[op])
    sizes = np.geomspace(0.02, 2, 64, dtype=np.float32)
    shape = [-1 if axis == CHANNEL[op] else 1 for axis in range(weight.ndim)]
    node = Node(op, ("x", "w"), ("y",), "fc", MappingProxyType({"transB": 1} if op == "Gemm" else {}))
    params = MappingProxyType({"w": frozen(weight * sizes.reshape(shape) if uneven else weight)})
    types = MappingProxyType({"x": TensorType("float32", INPUTS[op])})
    return infer_types(Graph(op, ("x",), ("y",), (node,), types, params, {"": 21}))


def shared(graph: Graph, options: str, data: np.ndarray | None = None) -> Graph:
    ctx = Context(target=HOST, calibration=None if data is None else Samples({"x": data}))
    return parse(f"share-weights{{{options}}}", find_passes()).run(graph, ctx)


def weights(graph: Graph) -> np.ndarray:
    found = constant(graph, graph.node["fc"].inputs[1])
    assert found is not None
    return found


def error(graph: Graph, options: str) -> float:
    """Relative to each channel's own size: what a scale for every channel is for."""
    before, after = graph.params["w"], weights(shared(graph, options))
    axes = tuple(axis for axis in range(before.ndim) if axis != CHANNEL[graph.node["fc"].op])
    return float((np.square(after - before).sum(axes) / np.square(before).sum(axes)).mean())


@pytest.mark.parametrize("op", SHAPES)
@pytest.mark.parametrize(
    "options", ["bits=8,dim=4", "bits=4,scales=channel", "bits=8,dim=4,scales=channel", "bits=3,scales=channel"]
)
def test_libraries_compute_with_the_decoded_weights(op: str, options: str) -> None:
    after = shared(layer(op, uneven=True), options)
    feeds = {"x": normal(*INPUTS[op], seed=1)}
    want = run(after, feeds)["y"]
    program = compile_program(after, HOST, compact=True)
    np.testing.assert_allclose(run_program(program, feeds)["y"], want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("op", SHAPES)
def test_every_four_weights_are_an_entry_and_that_is_the_nearest(op: str) -> None:
    graph = layer(op)
    after = shared(graph, "bits=6,dim=4")
    book = after.params["fc:codebook"]
    assert book.shape == (64, 4)
    before, found = (array.reshape(-1, 4) for array in (graph.params["w"], weights(after)))
    nearest = np.square(before[:, None] - book[None]).sum(2).min(1)
    np.testing.assert_allclose(np.square(before - found).sum(1), nearest, rtol=1e-4, atol=1e-6)


def test_vectors_are_better_than_numbers_of_as_many_bits() -> None:
    assert error(layer("Conv"), "bits=8,dim=4") < 0.85 * error(layer("Conv"), "bits=2")


@pytest.mark.parametrize("op", SHAPES)
def test_scales_serve_channels_of_different_sizes(op: str) -> None:
    graph = layer(op, uneven=True)
    assert error(graph, "bits=4,scales=channel") < 0.1 * error(graph, "bits=4")


@pytest.mark.parametrize(("options", "expected"), [
    ("bits=8,dim=4", 64 * 128 / 4 + 256 * 4 * 4), ("bits=4,scales=channel", 64 * 128 / 2 + 16 * 4 + 64 * 4),
])  # fmt: skip
def test_the_model_holds_indices_entries_and_scales(options: str, expected: float) -> None:
    after = shared(layer("Gemm"), options)
    assert expected <= weight_bytes(after) <= expected + 96
    assert weight_bytes(clean(after, Context(target=HOST))) == weight_bytes(after)  # constant folding unpacks nothing


@pytest.mark.parametrize("op", SHAPES)
def test_kernels_decode_numbers_with_scales_and_say_why_not_vectors(op: str) -> None:
    after = shared(layer(op, uneven=True), "bits=4,scales=channel")
    found = compressed(after, after.node["fc"])
    assert isinstance(found, Compressed)
    assert found.per_channel
    assert found.books is not None and found.scales is not None
    rows = found.books[0][found.codes] * found.scales
    want = np.moveaxis(weights(after), CHANNEL[op], 0).reshape(64, -1)
    np.testing.assert_allclose(rows, want, rtol=1e-6)
    vectors = shared(layer(op), "bits=8,dim=4")
    assert compressed(vectors, vectors.node["fc"]) == "its weights are computed in another way"


def test_strong_inputs_count_more_in_vectors_too() -> None:
    loud = np.geomspace(0.02, 3, 128, dtype=np.float32)
    graph, feeds = layer("MatMul"), {"x": normal(1, 5, 128, seed=3) * loud}
    errors = []
    for sensitivity in ("uniform", "activation"):
        after = shared(graph, f"bits=6,dim=2,sensitivity={sensitivity}", normal(40, 5, 128, seed=2) * loud)
        errors.append(float(np.square(run(after, feeds)["y"] - run(graph, feeds)["y"]).sum()))
    assert errors[1] < 0.95 * errors[0]


def test_few_distinct_vectors_are_kept_exactly_and_runs_repeat() -> None:
    points = normal(8, 3)[np.random.default_rng(0).integers(0, 8, 500)]
    book, indices = vector_codebook(points, None, 16)
    np.testing.assert_allclose(book[indices], points, atol=1e-6)
    np.testing.assert_array_equal(vector_codebook(points, None, 16)[0], book)


def test_what_makes_no_sense_is_refused() -> None:
    for text in ("dim=4,axis=channel-group,group=8", "scales=channel,axis=channel-group,group=8", "dim=0", "scales=row"):
        with pytest.raises(PassError):
            shared(layer("Gemm"), text)
    ctx, graph = Context(), layer("Gemm")
    assert parse("share-weights{dim=3}", find_passes()).run(graph, ctx) is graph
    assert "vectors of 3 do not divide" in ctx.refused[0].reason


@pytest.mark.parametrize("op", SHAPES)
@pytest.mark.parametrize("options", ["bits=3", "bits=8,dim=4", "bits=2,scales=channel", "bits=2,axis=channel-group,group=8"])
def test_what_is_only_priced_has_the_same_kernels_and_bytes_without_a_search_for_entries(op: str, options: str) -> None:
    graph, one = layer(op), parse(f"share-weights{{{options}}}", find_passes())
    exact = Context(HOST, Samples({"x": normal(16, *INPUTS[op][1:], seed=1)}))
    after, rough = (one.run(graph, ctx) for ctx in (exact, exact.roughly(graph)))
    assert [work for _, work in kernels(rough)] == [work for _, work in kernels(after)]
    assert [node.op for node in rough.nodes] == [node.op for node in after.nodes]
    assert weight_bytes(rough) == weight_bytes(after)
    assert not np.array_equal(weights(rough), weights(after))
