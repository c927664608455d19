"""low-rank: factors compute what they promise, pay, compose, and refuse with a reason."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import pytest

from hwopt.analysis.covariance import output_error, second_moments
from hwopt.backends.ort import run
from hwopt.errors import DataError, PassError
from hwopt.ir import Graph, Node, TensorType, descended, frozen, infer_types, verify
from hwopt.pipeline import Context, Pass, Refusal, merged, parse, run_pass
from hwopt.samples import Samples
from hwopt.target import Target
from passes.low_rank import LowRank

OPSETS = {"": 21}


def graph_of(nodes: tuple[Node, ...], shape: tuple[int, ...], **params: np.ndarray) -> Graph:
    stored = MappingProxyType({name: frozen(array) for name, array in params.items()})
    types = MappingProxyType({"x": TensorType("float32", shape)})
    return infer_types(Graph("g", ("x",), ("y",), nodes, types, stored, OPSETS))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def of_rank(rank: int, rows: int, columns: int) -> np.ndarray:
    return normal(rows, rank, seed=1) @ normal(rank, columns, seed=2)


def gemm(weight: np.ndarray, **attrs: float) -> Graph:
    bias = normal(weight.shape[0] if attrs.get("transB") else weight.shape[1], seed=3)
    node = Node("Gemm", ("x", "w", "b"), ("y",), "fc", MappingProxyType(attrs))
    inputs = weight.shape[1] if attrs.get("transB") else weight.shape[0]
    return graph_of((node,), (inputs, 5) if attrs.get("transA") else (5, inputs), w=weight, b=bias)


def conv(weight: np.ndarray, size: int = 9, **attrs: object) -> Graph:
    inputs = weight.shape[1] * int(str(attrs.get("group", 1)))
    node = Node("Conv", ("x", "w", "b"), ("y",), "conv", MappingProxyType(attrs))
    return graph_of((node,), (2, inputs, size, size), w=weight, b=normal(weight.shape[0], seed=3))


def feed(graph: Graph) -> dict[str, np.ndarray]:
    return {"x": normal(*graph.tensor("x").dims, seed=7)}


def output(graph: Graph, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return run(graph, feeds)["y"]


def correlated(count: int, channels: int, *rest: int, seed: int = 5) -> Samples:
    """Data whose channels live mostly in a quarter of the directions, the same ones for every seed."""
    basis = normal(channels, channels, seed=11) * np.where(np.arange(channels) < channels // 4, 3.0, 0.1).astype(np.float32)
    draws = normal(count, channels, *rest, seed=seed)
    return Samples({"x": np.einsum("ck,nk...->nc...", basis, draws).astype(np.float32)})


def target(granule: int) -> Target:
    return Target("t", "", "cpu", 1, {}, (), {"float32": granule}, None, {})  # type: ignore[arg-type]


def refusals(one: Pass, graph: Graph, ctx: Context | None = None) -> list[str]:
    ctx = ctx or Context()
    assert run_pass(one, graph, ctx) is graph
    return [refusal.reason for refusal in ctx.refused]


PLAIN = LowRank(rank=4, method="plain")


@pytest.mark.parametrize(
    "attrs", [{}, {"transB": 1}, {"alpha": 0.5, "beta": 2.0}, {"transA": 1}, {"transA": 1, "transB": 1, "alpha": 3.0}], ids=str
)
def test_a_gemm_of_low_rank_is_factored_exactly(attrs: dict) -> None:
    graph = gemm(of_rank(4, 20, 24), **attrs)
    after = run_pass(PLAIN, graph, Context())
    assert [node.name for node in after.nodes] == ["fc:down", "fc"]
    assert after.nodes[1].outputs == ("y",)
    np.testing.assert_allclose(output(after, feed(graph)), output(graph, feed(graph)), rtol=1e-4, atol=1e-4)


def test_a_matmul_on_many_axes_is_factored_exactly() -> None:
    graph = graph_of((Node("MatMul", ("x", "w"), ("y",), "fc"),), (2, 3, 20), w=of_rank(4, 20, 24))
    after = run_pass(PLAIN, graph, Context())
    np.testing.assert_allclose(output(after, feed(graph)), output(graph, feed(graph)), rtol=1e-4, atol=1e-4)


def test_a_pointwise_convolution_keeps_strides_and_pads_in_the_first_factor() -> None:
    graph = conv(of_rank(4, 24, 20).reshape(24, 20, 1, 1), strides=(2, 2), pads=(1, 0, 1, 0))
    after = run_pass(PLAIN, graph, Context())
    assert after.tensor(after.nodes[0].output).dims == (2, 4, *graph.tensor("y").dims[2:])
    np.testing.assert_allclose(output(after, feed(graph)), output(graph, feed(graph)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["plain", "whitened"])
@pytest.mark.parametrize(("rank", "rank_in", "names"), [
    (6, 5, ["conv:down", "conv:core", "conv"]),
    (6, 16, ["conv:core", "conv"]),
    (24, 5, ["conv:down", "conv"]),
])  # fmt: skip
def test_a_convolution_of_low_tucker_rank_is_factored_exactly(method: str, rank: int, rank_in: int, names: list[str]) -> None:
    weight = np.einsum("op,pikl,ic->ockl", normal(24, 6), normal(6, 5, 3, 3, seed=1), normal(5, 16, seed=2)).astype(np.float32)
    graph = conv(weight, strides=(2, 1), pads=(1, 2, 0, 1), dilations=(2, 1))
    ctx = Context(calibration=correlated(4, 16, 9, 9))
    after = run_pass(LowRank(("conv",), rank, rank_in, method), graph, ctx)
    assert [node.name for node in after.nodes] == names
    scale = np.abs(output(graph, feed(graph))).max()
    np.testing.assert_allclose(output(after, feed(graph)), output(graph, feed(graph)), atol=1e-5 * scale)


def test_svd_meets_the_eckart_young_bound() -> None:
    weight = normal(20, 24)
    graph = gemm(weight)
    after = run_pass(PLAIN, graph, Context())
    product = after.params["fc:down.weight"] @ after.params["fc.weight"]
    tail = np.linalg.svd(weight.astype(np.float64))[1][4:]
    assert np.sum((weight - product) ** 2) == pytest.approx(np.sum(tail**2), rel=1e-4)


def test_whitened_svd_meets_the_bound_of_the_output_error() -> None:
    graph = gemm(normal(20, 24))
    samples = correlated(100, 20)
    after = run_pass(LowRank(rank=4, damping=0.0), graph, Context(calibration=samples))
    product = after.params["fc:down.weight"] @ after.params["fc.weight"]
    values = np.linalg.svd(samples.arrays["x"].astype(np.float64) @ graph.params["w"])[1]
    moment = second_moments(graph, samples, graph.nodes)["fc"]
    assert output_error(graph.params["w"], product, moment) == pytest.approx(
        np.sum(values[4:] ** 2) / np.sum(values**2), rel=1e-3
    )


@pytest.mark.parametrize("graph", [
    gemm(normal(32, 24)),
    conv(normal(24, 32, 1, 1)),
    conv(normal(24, 32, 3, 3), pads=(1, 1, 1, 1)),
], ids=["gemm", "pointwise", "spatial"])  # fmt: skip
def test_whitening_lowers_the_output_error_on_new_data(graph: Graph) -> None:
    rest = graph.tensor("x").dims[2:]
    fresh = {"x": correlated(graph.tensor("x").dims[0], 32, *rest, seed=99).arrays["x"]}
    wanted, errors = output(graph, fresh), {}
    for method in ("plain", "whitened"):
        after = run_pass(LowRank(rank=8, method=method), graph, Context(calibration=correlated(200, 32, *rest)))
        errors[method] = np.sum((output(after, fresh) - wanted) ** 2)
    assert errors["whitened"] < 0.7 * errors["plain"]


@pytest.mark.parametrize("graph", [gemm(normal(32, 24)), conv(normal(24, 32, 3, 3))], ids=["gemm", "spatial"])
def test_the_error_falls_as_the_rank_grows(graph: Graph) -> None:
    wanted = output(graph, feed(graph))
    ranks = (2, 4, 8, 12)
    after = [run_pass(LowRank(rank=rank, method="plain"), graph, Context()) for rank in ranks]
    errors = [np.sum((output(one, feed(graph)) - wanted) ** 2) for one in after]
    assert errors == sorted(errors, reverse=True)


def test_moments_are_those_of_the_rows_that_each_layer_reads() -> None:
    first = Node("Conv", ("x", "w"), ("h",), "skip", MappingProxyType({"strides": (2, 2)}))
    second = Node("Conv", ("x", "v"), ("i",), "full")
    tail = (Node("GlobalAveragePool", ("i",), ("p",), "pool"), Node("Flatten", ("p",), ("f",), "flat"))
    last = (Node("Gemm", ("f", "u"), ("z",), "fc"), Node("GlobalAveragePool", ("h",), ("q",), "pool2"))
    join = (Node("Flatten", ("q",), ("r",), "flat2"), Node("Add", ("z", "r"), ("y",), "add"))
    params = {"w": normal(4, 3, 1, 1), "v": normal(6, 3, 3, 3), "u": normal(6, 4)}
    graph = graph_of((first, second, *tail, *last, *join), (2, 3, 8, 8), **params)
    samples = Samples({"x": normal(6, 3, 8, 8, seed=4)})
    found = second_moments(graph, samples, [graph.node[name] for name in ("skip", "full", "fc")])
    pixels = samples.arrays["x"].transpose(0, 2, 3, 1).astype(np.float64)
    strided = pixels[:, ::2, ::2].reshape(-1, 3)
    np.testing.assert_allclose(found["skip"], strided.T @ strided / len(strided), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["full"], np.einsum("nhwc,nhwd->cd", pixels, pixels) / (6 * 64), rtol=1e-4, atol=1e-6)
    pooled = np.concatenate([run(graph_outputs(graph, "f"), feeds)["f"] for feeds in samples.feeds(graph)])
    np.testing.assert_allclose(found["fc"], pooled.T @ pooled / 6, rtol=1e-4, atol=1e-6)


def graph_outputs(graph: Graph, value: str) -> Graph:
    from hwopt.backends.ort import observing

    return observing(graph, [value])


def test_activations_that_overflow_are_named() -> None:
    graph = gemm(normal(8, 8))
    with pytest.raises(DataError, match="no finite activations at x"):
        second_moments(graph, Samples({"x": np.full((5, 8), 3e38, np.float32)}), graph.nodes)


def test_the_same_run_twice_gives_the_same_bytes() -> None:
    weight = normal(24, 32, 3, 3)
    digests = {
        run_pass(LowRank(rank=8), conv(weight.copy()), Context(calibration=correlated(8, 32, 9, 9))).digest for _ in range(2)
    }
    assert len(digests) == 1


def test_candidates_lie_on_the_granule_pay_and_print_as_they_parse() -> None:
    graph = gemm(normal(128, 96))
    found = list(LowRank.candidates(graph, target(8)))
    assert [one.rank for one in found if isinstance(one, LowRank)] == [8, 16, 24, 40]  # shares of 54.9
    for one in found:
        assert isinstance(one, LowRank)
        assert parse(str(one), {"low-rank": LowRank}) == one
        verify(run_pass(one, graph, Context(calibration=correlated(10, 128))))


def test_candidates_of_a_convolution_give_both_ranks() -> None:
    found = [one for one in LowRank.candidates(conv(normal(64, 32, 3, 3)), target(8)) if isinstance(one, LowRank)]
    assert [(one.rank, one.rank_in) for one in found] == [(8, 8), (16, 8), (24, 16), (32, 16), (40, 16)]


def test_a_layer_too_thin_for_the_granule_is_declined() -> None:
    assert list(LowRank.candidates(gemm(normal(12, 16)), target(16))) == [
        Refusal("low-rank", "fc", "rank below break-even would be 6, under the granule 16")
    ]


def shared() -> Graph:
    nodes = (Node("MatMul", ("x", "w"), ("h",), "fc1"), Node("MatMul", ("h", "w"), ("y",), "fc3"))
    return graph_of(nodes, (5, 20), w=normal(20, 20))


def computed() -> Graph:
    nodes = (Node("Transpose", ("x",), ("t",), "t"), Node("MatMul", ("t", "x"), ("y",), "fc1"))
    return graph_of(nodes, (20, 20))


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (shared(), "weight is shared with fc3"),
        (computed(), "weights are not constant"),
        (conv(normal(32, 4, 3, 3), group=8), "is a grouped convolution (group=8)"),
        (gemm(normal(8, 8)), "rank 4 does not pay: break-even is 4 for 8 x 8"),
        (conv(normal(4, 4, 3, 3)), "ranks 4 and 4 are full: nothing is saved"),
        (conv(normal(6, 6, 3, 3), size=64, strides=(8, 8)), "multiply-adds instead of 324 a position do not pay"),
    ],
)
def test_what_cannot_be_factored_is_refused_with_the_reason(graph: Graph, reason: str) -> None:
    assert reason in refusals(PLAIN, graph)[0]


def test_a_named_site_of_another_operator_is_refused() -> None:
    assert "is a Transpose" in refusals(LowRank(("t",), 4, method="plain"), computed())[0]


def test_whitening_without_calibration_is_refused() -> None:
    assert "needs calibration data" in refusals(LowRank(rank=4), gemm(normal(20, 24)))[0]


def test_an_unknown_site_or_method_is_an_error() -> None:
    with pytest.raises(PassError, match="did you mean fc"):
        run_pass(LowRank(("fcc",), 4), gemm(normal(20, 24)), Context())
    with pytest.raises(PassError, match="no method 'best'"):
        run_pass(LowRank(rank=4, method="best"), gemm(normal(20, 24)), Context())


def test_factors_are_found_by_the_old_name_and_not_factored_again() -> None:
    graph = gemm(normal(64, 64))
    after = run_pass(LowRank(("fc",), 16, method="plain"), graph, Context())
    assert [node.name for node in descended(after, "fc")] == ["fc:down", "fc"]
    assert refusals(LowRank(("fc",), 4, method="plain"), after) == ["is a factor already"] * 2


def test_sites_joined_by_the_planner_are_factored_in_one_run() -> None:
    nodes = (Node("MatMul", ("x", "w"), ("h",), "a"), Node("MatMul", ("h", "v"), ("y",), "b"))
    graph = graph_of(nodes, (5, 20), w=normal(20, 24), v=normal(24, 20))
    (one,) = merged([LowRank(("a",), 4), LowRank(("b",), 4)])
    after = run_pass(one, graph, Context(calibration=correlated(10, 20)))
    assert [node.name for node in after.nodes] == ["a:down", "a", "b:down", "b"]
    assert all(node.history == (str(one),) for node in after.nodes)
