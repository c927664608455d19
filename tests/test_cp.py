"""CP factors of convolutions and ranks by variational Bayes: exact where they can be, stable where least squares is not."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

import numpy as np
import pytest

from hwopt.backends.ort import run
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.run import run_program
from hwopt.errors import PassError
from hwopt.ir import Graph, Node, TensorType, frozen, infer_types
from hwopt.pipeline import Context, parse
from hwopt.plugins import find_passes, find_target
from hwopt.samples import Samples
from passes._cp import corrected, least_squares, sensitivity
from passes._vbmf import vbmf_rank

HOST = dataclasses.replace(find_target("host"))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def conv(weight: np.ndarray, **attrs: object) -> Graph:
    node = Node("Conv", ("x", "w", "b"), ("y",), "conv", MappingProxyType(attrs))
    params = {"w": frozen(weight.astype(np.float32)), "b": frozen(normal(len(weight), seed=9).astype(np.float32))}
    types = MappingProxyType({"x": TensorType("float32", (1, weight.shape[1], 10, 9))})
    return infer_types(Graph("net", ("x",), ("y",), (node,), types, MappingProxyType(params), {"": 21}))


def factored(graph: Graph, options: str, ctx: Context | None = None) -> Graph:
    return parse(f"low-rank{{{options}}}", find_passes()).run(graph, ctx or Context())


def whole(factors: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.einsum("or,cr,tr->oct", *factors)


@pytest.mark.parametrize("method", ["plain", "whitened"])
def test_a_convolution_of_low_rank_is_factored_exactly_and_compiled(method: str) -> None:
    weight = np.einsum("or,cr,rkl->ockl", normal(24, 6), normal(16, 6, seed=1), normal(6, 3, 3, seed=2))
    graph = conv(weight, strides=(2, 1), pads=(1, 2, 0, 1), dilations=(2, 1))
    ctx = Context(calibration=Samples({"x": normal(4, 16, 10, 9).astype(np.float32)}))
    after = factored(graph, f"kind=cp,rank=6,method={method}", ctx)
    assert [(node.name, node.attr("group", 1)) for node in after.nodes] == [("conv:down", 1), ("conv:core", 6), ("conv", 1)]
    feeds = {"x": normal(1, 16, 10, 9, seed=3).astype(np.float32)}
    want = run(graph, feeds)["y"]
    np.testing.assert_allclose(run(after, feeds)["y"], want, atol=2e-3 * np.abs(want).max())
    np.testing.assert_allclose(run_program(compile_program(after, HOST), feeds)["y"], want, atol=2e-3 * np.abs(want).max())


def test_the_correction_takes_away_terms_that_cancel_at_no_larger_error() -> None:
    tensor = normal(24, 16, 9)
    rough = least_squares(tensor, 30)
    stable = corrected(tensor, rough)
    before, after = (float(np.square(tensor - whole(one)).sum()) for one in (rough, stable))
    assert after == pytest.approx(before, rel=1e-6)
    assert sensitivity(stable) < 0.6 * sensitivity(rough)
    sizes = [np.prod([np.linalg.norm(factor, axis=0) for factor in one], axis=0) for one in (rough, stable)]
    assert np.linalg.norm(sizes[1]) < 0.7 * np.linalg.norm(sizes[0])  # terms that are larger than their sum


def test_sensitivity_is_the_change_that_noise_in_the_factors_makes() -> None:
    factors = (normal(5, 3), normal(4, 3, seed=1), normal(6, 3, seed=2))
    random, size = np.random.default_rng(0), 1e-4
    changes = [
        np.square(whole(tuple(one + size * random.standard_normal(one.shape) for one in factors)) - whole(factors)).sum()
        for _ in range(4000)
    ]
    assert np.mean(changes) / size**2 == pytest.approx(sensitivity(factors), rel=0.05)


def test_the_output_counts_with_calibration_data() -> None:
    graph = conv(normal(24, 16, 3, 3), pads=(1, 1, 1, 1))
    scale = np.geomspace(3, 0.05, 16).reshape(1, 16, 1, 1)
    ctx = Context(calibration=Samples({"x": (normal(30, 16, 10, 9) * scale).astype(np.float32)}))
    feeds = {"x": (normal(1, 16, 10, 9, seed=3) * scale).astype(np.float32)}
    want = run(graph, feeds)["y"]
    plain, whitened = (
        float(np.square(run(factored(graph, f"kind=cp,rank=16,method={method}", ctx), feeds)["y"] - want).sum())
        for method in ("plain", "whitened")
    )
    assert whitened < 0.8 * plain


@pytest.mark.parametrize(("rank", "noise"), [(0, 1.0), (5, 0.1), (12, 0.3)])
@pytest.mark.parametrize("turned", [False, True])
def test_vbmf_finds_the_rank_below_the_noise(rank: int, noise: float, turned: bool) -> None:
    matrix = normal(60, rank) @ normal(rank, 200, seed=1) + noise * normal(60, 200, seed=2)
    assert vbmf_rank(matrix.T if turned else matrix) == rank


def test_ranks_start_at_what_vbmf_finds() -> None:
    matrix = normal(64, 6) @ normal(6, 96, seed=1) + 0.05 * normal(64, 96, seed=2)
    node = Node("MatMul", ("x", "w"), ("y",), "fc")
    types = MappingProxyType({"x": TensorType("float32", (5, 64))})
    params = MappingProxyType({"w": frozen(matrix.astype(np.float32))})
    graph = infer_types(Graph("net", ("x",), ("y",), (node,), types, params, {"": 21}))
    after = factored(graph, "rank=vbmf,method=plain")
    assert after.params["fc:down.weight"].shape == (64, 6)
    weight = np.einsum("op,pikl,ic->ockl", normal(24, 5), normal(5, 4, 3, 3, seed=1), normal(4, 16, seed=2))
    tucker = factored(conv(weight + 0.02 * normal(24, 16, 3, 3, seed=5)), "rank=vbmf,method=plain")
    assert tucker.params["conv:core.weight"].shape[:2] == (5, 4)


def test_what_makes_no_sense_is_refused() -> None:
    graph, ctx = conv(normal(24, 16, 3, 3)), Context()
    for text in ("kind=cpd", "rank=many", "rank=vbmf,rank_in=3"):
        with pytest.raises(PassError):
            factored(graph, text)
    assert factored(graph, "kind=cp,rank=71,method=plain", ctx) is graph
    assert "rank 71 does not pay: break-even is" in ctx.refused[0].reason
    one = parse("low-rank{rank=vbmf,kind=cp}", find_passes())
    assert parse(str(one), find_passes()) == one
