"""share-weights: the codebook is optimal, the stored model is small, and what it computes is the nearest entry."""

from __future__ import annotations

import itertools
from types import MappingProxyType

import numpy as np
import pytest

from hwopt.analysis.covariance import channel_moments, second_moments
from hwopt.analysis.fold import fold_constants
from hwopt.analysis.size import weight_bytes
from hwopt.backends.ort import observing, run
from hwopt.errors import PassError
from hwopt.io.proto import to_model
from hwopt.ir import Graph, Node, TensorType, frozen, infer_types, verify
from hwopt.pipeline import Context, Refusal, parse, run_pass
from hwopt.samples import Samples
from hwopt.target import Target
from passes._kmeans import nearest, optimal_codebook
from passes._packing import pack
from passes.low_rank import LowRank
from passes.share_weights import ShareWeights

TARGET = Target("t", "", "cpu", 1, {}, (), {"float32": 8}, None, {})  # type: ignore[arg-type]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def graph_of(nodes: tuple[Node, ...], shape: tuple[int, ...], opset: int = 21, **params: np.ndarray) -> Graph:
    stored = MappingProxyType({name: frozen(array) for name, array in params.items()})
    types = MappingProxyType({"x": TensorType("float32", shape)})
    return infer_types(Graph("g", ("x",), ("y",), nodes, types, stored, {"": opset}))


def layer(op: str, weight: np.ndarray, opset: int = 21, **attrs: int) -> Graph:
    if op == "Conv":
        shape: tuple[int, ...] = (1, weight.shape[1] * attrs.get("group", 1), 5, 5)
    else:
        shape = (3, weight.shape[1 if attrs.get("transB") else 0])
    return graph_of((Node(op, ("x", "w"), ("y",), "fc", MappingProxyType(attrs)),), shape, opset, w=weight)


def decoded(graph: Graph) -> np.ndarray:
    """What the layer's weights are after decoding, by ONNX Runtime."""
    value = graph.node["fc"].inputs[1]
    feeds = {"x": np.zeros(graph.tensor("x").dims, np.float32)}
    return run(observing(graph, [value]), feeds)[value]


def error(values: np.ndarray, weights: np.ndarray, codebook: np.ndarray) -> float:
    return float(np.sum(weights * (values - codebook[nearest(values, codebook)]) ** 2))


def brute_force(values: np.ndarray, weights: np.ndarray, size: int) -> float:
    """The least error over all ways to cut the ascending values into `size` intervals."""
    order = np.argsort(values)
    values, weights = values[order], weights[order]
    best = np.inf
    for cuts in itertools.combinations(range(1, len(values)), min(size, len(values)) - 1):
        parts = zip((0, *cuts), (*cuts, len(values)), strict=True)
        spans = [(values[a:b], weights[a:b]) for a, b in parts]
        best = min(best, sum(float(np.sum(w * (v - np.average(v, weights=w)) ** 2)) for v, w in spans))
    return best


@pytest.mark.parametrize("seed", range(40))
def test_the_codebook_is_the_optimum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(int(rng.integers(3, 11))).round(1)  # rounded: some are equal
    weights, size = rng.random(len(values)), int(rng.integers(2, 6))
    found = error(values, weights, optimal_codebook(values, weights, size))
    assert found == pytest.approx(brute_force(values, weights, size), abs=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_lloyd_from_any_start_finds_nothing_better(weighted: bool) -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_t(3, 20_000) * 0.05  # more distinct values than the histogram has cells, and outliers
    weights = rng.random(values.size) if weighted else np.ones(values.size)
    ours = error(values, weights, optimal_codebook(values, weights if weighted else None, 16))
    for seed in range(5):
        book = np.sort(np.random.default_rng(seed).choice(values, 16, replace=False))
        for _ in range(100):
            index = nearest(values, book)
            sums = np.bincount(index, weights, minlength=16)
            book = np.bincount(index, weights * values, minlength=16) / sums
        assert ours <= error(values, weights, book) * (1 + 1e-4)


def test_few_distinct_values_are_kept_exactly() -> None:
    values = np.array([0.5, -1.0, 0.5, 3.0, 0.0], np.float32)
    assert optimal_codebook(values, None, 4).tolist() == [-1.0, 0.0, 0.5, 3.0]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_very_small_and_large_weights_keep_their_codebook(scale: float) -> None:
    values = normal(3000).astype(np.float64)
    expected = optimal_codebook(values, None, 8)
    np.testing.assert_allclose(optimal_codebook(values * scale, None, 8) / scale, expected, rtol=1e-6)


def test_a_constant_offset_does_not_cost_precision() -> None:
    values = normal(3000).astype(np.float64)
    expected = optimal_codebook(values, None, 8)
    np.testing.assert_allclose(optimal_codebook(values + 1e6, None, 8) - 1e6, expected, atol=1e-4)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("op", "shape", "attrs"),
    [
        ("Conv", (13, 7, 3, 3), {}),
        ("Conv", (24, 10, 3, 3), {"group": 4}),
        ("Gemm", (36, 33), {"transB": 1}),
        ("MatMul", (37, 35), {}),
    ],
)
def test_decoded_weights_are_the_nearest_entries(bits: int, op: str, shape: tuple[int, ...], attrs: dict[str, int]) -> None:
    weight = normal(*shape)
    graph = layer(op, weight, **attrs)
    after = run_pass(ShareWeights(bits=bits), graph, Context())
    book = after.params["fc:codebook"]
    found = decoded(after)
    assert found.shape == weight.shape
    np.testing.assert_allclose(np.abs(found - weight), np.abs(weight[..., None] - book).min(axis=-1), atol=1e-7)


@pytest.mark.parametrize(
    ("op", "shape", "attrs", "axis"),
    [
        ("Conv", (24, 16, 3, 3), {}, 0),
        ("Gemm", (24, 33), {"transB": 1}, 0),
        ("Gemm", (33, 24), {}, 1),
        ("MatMul", (33, 24), {}, 1),
    ],
)
def test_every_group_of_channels_has_its_own_codebook(op: str, shape: tuple[int, ...], attrs: dict[str, int], axis: int) -> None:
    weight = normal(*shape) * np.expand_dims(np.arange(1, 25, dtype=np.float32), [a for a in range(len(shape)) if a != axis])
    after = run_pass(ShareWeights(bits=3, axis="channel-group", group=8), layer(op, weight, **attrs), Context())
    found = np.moveaxis(decoded(after), axis, 0).reshape(3, -1)
    wanted = np.moveaxis(weight, axis, 0).reshape(3, -1)
    for one, (values, book) in enumerate(zip(wanted, after.params["fc:codebooks"], strict=True)):
        np.testing.assert_array_equal(book, optimal_codebook(values, None, 8, 512).astype(np.float32))
        np.testing.assert_array_equal(found[one], book[nearest(values, book)])


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_stored_model_shrinks_to_its_bits(bits: int) -> None:
    graph = layer("MatMul", normal(256, 128))
    after = run_pass(ShareWeights(bits=bits), graph, Context())
    expected = 256 * 128 * bits / 8 + 4 * 2**bits
    assert expected <= weight_bytes(after) <= expected + 96
    assert len(to_model(after).SerializeToString()) < expected + 2500  # the nodes themselves
    assert weight_bytes(graph) == 256 * 128 * 4


def test_sub_byte_parameters_count_packed() -> None:
    import ml_dtypes

    graph = graph_of((Node("Identity", ("x",), ("y",), "i"),), (1,))
    params = {"a": frozen(np.zeros(5, ml_dtypes.int4)), "b": frozen(np.array(["ab", "c"], object))}
    assert weight_bytes(Graph("g", ("x",), ("y",), graph.nodes, graph.types, params, graph.opsets)) == 3 + 3


@pytest.mark.parametrize("width", [1, 2, 4])
def test_packing_puts_the_first_index_into_the_lowest_bits(width: int) -> None:
    indices = np.arange(11, dtype=np.uint8) % 2**width
    packed = pack(indices, width).ravel()
    bits = np.unpackbits(packed, bitorder="little").reshape(-1, width)
    np.testing.assert_array_equal(bits[:11] @ (1 << np.arange(width)), indices)
    assert len(packed) == -(-11 * width // 8)


def loud(count: int, channels: int, *rest: int) -> Samples:
    """Data whose first channels are a hundred times louder than the others."""
    scale = np.where(np.arange(channels) < 4, 10.0, 0.1).reshape(channels, *(1,) * len(rest))
    return Samples({"x": (normal(count, channels, *rest, seed=9) * scale).astype(np.float32)})


@pytest.mark.parametrize(
    ("op", "shape", "attrs", "inputs"),
    [
        ("MatMul", (32, 24), {}, 0),
        ("Gemm", (24, 32), {"transB": 1}, 1),
        ("Conv", (24, 32, 3, 3), {}, 1),
        ("Conv", (32, 8, 3, 3), {"group": 4}, 1),
    ],
)
@pytest.mark.parametrize("axis", ["tensor", "channel-group"])
def test_sensitivity_lowers_the_error_of_the_output(op: str, shape: tuple[int, ...], attrs: dict, inputs: int, axis: str) -> None:
    weight = normal(*shape)
    np.moveaxis(weight, inputs, 0)[:4] *= 0.2  # loud inputs have small weights
    graph = layer(op, weight, **attrs)
    data = loud(60, 32, *graph.tensor("x").dims[2:])
    feeds = next(loud(5, 32, *graph.tensor("x").dims[2:]).feeds(graph))
    wanted, errors = run(graph, feeds)["y"], {}
    for sensitivity in ("uniform", "activation"):
        one = ShareWeights(("fc",), 2, axis, 8 if axis == "channel-group" else 0, sensitivity)
        errors[sensitivity] = np.sum((run(run_pass(one, graph, Context(calibration=data)), feeds)["y"] - wanted) ** 2)
    assert errors["activation"] < 0.9 * errors["uniform"]


def test_channel_moments_are_the_mean_and_the_diagonal_of_the_moments() -> None:
    graph = layer("Conv", normal(24, 32, 3, 3))
    samples = loud(10, 32, 5, 5)
    full = second_moments(graph, samples, graph.nodes)["fc"]
    mean, square = channel_moments(graph, samples, graph.nodes)["fc"]
    np.testing.assert_allclose(square, np.diag(full), rtol=1e-4)
    np.testing.assert_allclose(mean, samples.arrays["x"].mean(axis=(0, 2, 3)), rtol=1e-3, atol=1e-6)


BIAS = normal(24, seed=5)
CASES = {
    "conv": ((Node("Conv", ("x", "w", "b"), ("y",), "fc"),), (24, 32, 1, 1), (4, 32, 5, 5)),
    "conv without bias": ((Node("Conv", ("x", "w"), ("y",), "fc"),), (24, 32, 1, 1), (4, 32, 5, 5)),
    "grouped": ((Node("Conv", ("x", "w", "b"), ("y",), "fc", MappingProxyType({"group": 4})),), (24, 8, 1, 1), (4, 32, 3, 3)),
    "gemm": ((Node("Gemm", ("x", "w", "b"), ("y",), "fc", MappingProxyType({"alpha": 2.0, "beta": 0.5})),), (32, 24), (4, 32)),
    "transposed": ((Node("Gemm", ("x", "w", "b"), ("y",), "fc", MappingProxyType({"transB": 1})),), (24, 32), (4, 32)),
    "matmul": ((Node("MatMul", ("x", "w"), ("h",), "fc"), Node("Add", ("b", "h"), ("y",), "add")), (32, 24), (4, 32)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("axis", ["tensor", "channel-group"])
def test_the_bias_takes_back_the_mean_error(case: str, axis: str) -> None:
    nodes, weights, inputs = CASES[case]
    graph = graph_of(nodes, inputs, w=normal(*weights), b=BIAS)
    data = np.abs(normal(64, *inputs[1:], seed=6)) + 1
    one = ShareWeights(("fc",), 2, axis, 8 if axis == "channel-group" else 0)
    after = run_pass(one, graph, Context(calibration=Samples({"x": data})))
    found = [run(after, feeds)["y"] - run(graph, feeds)["y"] for feeds in Samples({"x": data}).feeds(graph)]
    errors = np.moveaxis(np.concatenate(found), 1, 0).reshape(24, -1)
    assert np.abs(errors.mean(axis=1)).max() < 1e-3 * errors.std()


def test_a_product_without_a_bias_gets_none() -> None:
    after = run_pass(ShareWeights(("fc",)), layer("MatMul", normal(32, 24)), Context(calibration=loud(6, 32)))
    assert not [name for name in after.params if "bias" in name]


def test_the_same_run_twice_gives_the_same_bytes() -> None:
    weight, samples = normal(64, 64), loud(10, 64)
    digests = {run_pass(ShareWeights(), layer("MatMul", weight.copy()), Context(calibration=samples)).digest for _ in range(2)}
    assert len(digests) == 1


def test_candidates_run_shrink_and_print_as_they_parse() -> None:
    graph = layer("MatMul", normal(64, 96))
    found = list(ShareWeights.candidates(graph, TARGET))
    assert [(one.bits, one.group, one.dim) for one in found if isinstance(one, ShareWeights)] == [
        (2, 0, 1), (3, 0, 1), (4, 0, 1), (6, 0, 1), (8, 0, 1), (2, 32, 1), (3, 32, 1), (4, 32, 1), (8, 0, 4),
    ]  # fmt: skip
    for one in found:
        assert isinstance(one, ShareWeights)
        assert parse(str(one), {"share-weights": ShareWeights}) == one
        after = run_pass(one, graph, Context())
        verify(after)
        assert weight_bytes(after) < weight_bytes(graph)


def test_constant_folding_leaves_packed_weights_packed() -> None:
    for one in (ShareWeights(bits=3), ShareWeights(bits=8), ShareWeights(bits=4, axis="channel-group", group=32)):
        after = run_pass(one, layer("MatMul", normal(64, 96)), Context())
        assert weight_bytes(fold_constants(after)) <= weight_bytes(after)


def twins(*, embedding: bool = False) -> Graph:
    second = Node("Gather", ("w", "i"), ("z",), "fc3") if embedding else Node("MatMul", ("x", "w"), ("z",), "fc3")
    nodes = (Node("MatMul", ("x", "w"), ("h",), "fc1"), second, Node("Add", ("h", "z"), ("y",), "add"))
    return graph_of(nodes, (3, 32), w=normal(32, 32), i=np.array([0, 1, 2]))


def test_a_weight_read_twice_is_stored_once() -> None:
    after = run_pass(ShareWeights(), twins(), Context())
    assert after.node["fc1"].inputs[1] == after.node["fc3"].inputs[1]
    assert [node.op for node in after.nodes].count("Gather") == 1
    feeds = {"x": normal(3, 32)}
    book, weight = after.params["fc1:codebook"], normal(32, 32)
    np.testing.assert_allclose(run(after, feeds)["y"], 2 * feeds["x"] @ book[nearest(weight, book)], rtol=1e-5, atol=1e-5)


def test_an_embedding_is_shared_with_the_layer_that_is_tied_to_it() -> None:
    graph = twins(embedding=True)
    after = run_pass(ShareWeights(bits=8), graph, Context(calibration=loud(6, 32)))
    assert after.node["fc1"].inputs[1] == after.node["fc3"].inputs[0]
    feeds = {"x": normal(3, 32)}
    np.testing.assert_allclose(run(after, feeds)["y"], run(graph, feeds)["y"], atol=0.2)


def test_gathers_of_shapes_are_no_embeddings() -> None:
    nodes = (Node("Shape", ("x",), ("s",), "shape"), Node("Gather", ("s", "i"), ("y",), "dim"))
    assert list(ShareWeights.candidates(graph_of(nodes, (3, 32), i=np.array(0)), TARGET)) == []


@pytest.mark.parametrize(
    ("graph", "one", "reason"),
    [
        (twins(), ShareWeights(("fc1",)), "weight is shared with fc3"),
        (twins(embedding=True), ShareWeights(("fc1",)), "weight is shared with fc3"),
        (twins(embedding=True), ShareWeights((), 4, "channel-group", 8), "weight is shared with fc3"),
        (twins(embedding=True), ShareWeights(("fc3",), 4, "channel-group", 8), "an embedding has no output channels"),
        (twins(), ShareWeights(("add",)), "is a Add; share-weights takes Conv, Gemm, MatMul, Gather"),
        (layer("MatMul", normal(8, 8)), ShareWeights(bits=8), "need 1184 bytes, the weights 256"),
        (
            layer("MatMul", normal(32, 30)),
            ShareWeights(axis="channel-group", group=8),
            "group 8 does not divide 30 output",
        ),
        (layer("MatMul", normal(64, 64), opset=17), ShareWeights(), "indices of 4 bits need opset 18"),
        (layer("MatMul", normal(64, 64).astype(np.int32)), ShareWeights(), "weights are int32"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_the_reason(graph: Graph, one: ShareWeights, reason: str) -> None:
    ctx = Context()
    assert run_pass(one, graph, ctx) is graph
    assert reason in ctx.refused[0].reason


def test_eight_bits_need_no_new_operators() -> None:
    after = run_pass(ShareWeights(bits=8), layer("MatMul", normal(64, 64), opset=13), Context())
    assert "Gather" in [node.op for node in after.nodes]


def test_a_tiny_layer_is_declined() -> None:
    assert list(ShareWeights.candidates(layer("MatMul", normal(4, 4)), TARGET)) == [
        Refusal("share-weights", "fc", "indices and codebook need 116 bytes, the weights 64")
    ]


@pytest.mark.parametrize("text", [
    "share-weights{bits=1}", "share-weights{bits=9}", "share-weights{axis=row}", "share-weights{sensitivity=magic}",
    "share-weights{group=8}", "share-weights{axis=channel-group}", "share-weights{site=fc9}",
])  # fmt: skip
def test_impossible_options_are_errors(text: str) -> None:
    with pytest.raises(PassError):
        run_pass(parse(text, {"share-weights": ShareWeights}), layer("MatMul", normal(64, 64)), Context())


def test_factors_of_a_layer_are_shared_by_its_old_name() -> None:
    graph = layer("MatMul", normal(64, 64))
    factored = run_pass(LowRank(("fc",), 16, method="plain"), graph, Context())
    after = run_pass(ShareWeights(("fc",), 8), factored, Context())
    assert [name for name in after.params if "codebook" in name] == ["fc:down:codebook", "fc:codebook"]
    assert weight_bytes(after) < 0.6 * weight_bytes(factored)
    feeds = {"x": normal(3, 64)}
    np.testing.assert_allclose(run(after, feeds)["y"], run(factored, feeds)["y"], atol=0.15)
