"""sparsify drops the weights that matter least and stores the others: judged by ONNX Runtime and by the definitions."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import pytest

from hwopt.analysis.constant import constant
from hwopt.analysis.size import weight_bytes
from hwopt.backends.ort import run
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.run import run_program
from hwopt.errors import HwoptError
from hwopt.ir import Graph, Node, TensorType, frozen, infer_types
from hwopt.job import clean
from hwopt.pipeline import Context, Refusal, parse
from hwopt.plan.budget import Budget
from hwopt.plan.options import Pricer, collect
from hwopt.plugins import find_passes, find_target
from hwopt.samples import Samples
from passes._sparse import gradient_squares

HOST = find_target("host")
SHAPES = {"Conv": (24, 16, 3, 3), "Gemm": (24, 64), "MatMul": (64, 24)}
INPUTS = {"Conv": (1, 16, 6, 6), "Gemm": (1, 64), "MatMul": (1, 5, 64)}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def layer(op: str, weight: np.ndarray | None = None) -> Graph:
    node = Node(op, ("x", "w"), ("y",), "fc", MappingProxyType({"transB": 1} if op == "Gemm" else {}))
    params = MappingProxyType({"w": frozen(normal(*SHAPES[op]) if weight is None else weight)})
    types = MappingProxyType({"x": TensorType("float32", INPUTS[op])})
    return infer_types(Graph(op, ("x",), ("y",), (node,), types, params, {"": 21}))


def sparse(graph: Graph, options: str, data: np.ndarray | None = None) -> Graph:
    ctx = Context(target=HOST, calibration=None if data is None else Samples({"x": data}))
    return parse(f"sparsify{{{options}}}", find_passes()).run(graph, ctx)


def weights(graph: Graph) -> np.ndarray:
    found = constant(graph, graph.node["fc"].inputs[1])
    assert found is not None
    return found


@pytest.mark.parametrize("op", SHAPES)
@pytest.mark.parametrize("options", ["ratio=0.7", "pattern=2:4", "pattern=1:4"])
def test_kept_weights_are_as_they_were_and_kernels_compute_with_them(op: str, options: str) -> None:
    graph = layer(op)
    after = sparse(graph, options)
    before, found = graph.params["w"], weights(after)
    np.testing.assert_array_equal(found[found != 0], before[found != 0])
    share = {"ratio=0.7": 0.3, "pattern=2:4": 0.5, "pattern=1:4": 0.25}[options]
    assert np.count_nonzero(found) == round(share * before.size)
    feeds = {"x": normal(*INPUTS[op], seed=1)}
    want = run(after, feeds)["y"]
    np.testing.assert_allclose(run_program(compile_program(after, HOST), feeds)["y"], want, atol=1e-5 * np.abs(want).max())


def test_the_largest_stay() -> None:
    after = weights(sparse(layer("MatMul"), "ratio=0.75"))
    before = np.abs(layer("MatMul").params["w"])
    assert before[after != 0].min() >= before[after == 0].max()


@pytest.mark.parametrize("op", SHAPES)
def test_two_of_every_four_input_channels_stay(op: str) -> None:
    found = weights(sparse(layer(op), "pattern=2:4"))
    rows = np.moveaxis(found, 0 if op == "MatMul" else 1, -1).reshape(-1, 4)
    assert (np.count_nonzero(rows, axis=1) == 2).all()
    before = np.abs(np.moveaxis(layer(op).params["w"], 0 if op == "MatMul" else 1, -1).reshape(-1, 4))
    np.testing.assert_allclose(np.abs(rows).sum(1), np.sort(before, axis=1)[:, 2:].sum(1), rtol=1e-6)


@pytest.mark.parametrize(("options", "share"), [("ratio=0.9", 0.1), ("ratio=0.5", 0.5), ("pattern=2:4", 0.5)])
def test_the_model_holds_a_bit_for_each_weight_and_the_values_left(options: str, share: float) -> None:
    graph = layer("Conv")
    size = graph.params["w"].size
    after = sparse(graph, options)
    stored = weight_bytes(after) - (size / 8 + 4 * round(share * size))
    assert 0 <= stored <= 160
    assert weight_bytes(clean(after, Context(target=HOST))) == weight_bytes(after)  # constant folding unpacks nothing


def test_strong_inputs_keep_their_weights() -> None:
    data = normal(50, 5, 64, seed=2) * np.linspace(0.05, 3, 64, dtype=np.float32)
    graph, feeds = layer("MatMul"), normal(1, 5, 64, seed=3) * np.linspace(0.05, 3, 64, dtype=np.float32)
    errors = {}
    for criterion in ("magnitude", "activation"):
        after = sparse(graph, f"ratio=0.6,criterion={criterion}", data)
        errors[criterion] = np.square(run(after, {"x": feeds})["y"] - run(graph, {"x": feeds})["y"]).sum()
    assert errors["activation"] < 0.7 * errors["magnitude"]


def test_obd_is_half_the_squared_weight_times_the_mean_square_of_each_samples_gradient() -> None:
    pytest.importorskip("torch")
    graph, data, labels = layer("Gemm"), normal(6, 64, seed=4) / 8, np.arange(6) % 3
    samples = Samples({"x": data}, labels)
    logits = data @ graph.params["w"].T
    rest = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(24)[labels]  # dL/dy of the cross entropy
    squares = np.mean([np.outer(one, x) ** 2 for one, x in zip(rest, data, strict=True)], axis=0)
    np.testing.assert_allclose(gradient_squares(graph, samples, ("w",), 0)["w"], squares, rtol=1e-4)
    one = parse("sparsify{ratio=0.5,criterion=obd}", find_passes())
    found = weights(one.run(graph, Context(calibration=samples)))
    scores = 0.5 * graph.params["w"] ** 2 * squares
    assert scores[found != 0].min() >= (1 - 1e-4) * scores[found == 0].max()


def test_planners_take_it_for_size_only_and_say_why_not_for_speed() -> None:
    graph = layer("Conv")
    ctx = Context(target=HOST, calibration=Samples({"x": normal(4, 16, 6, 6)}))
    kind = find_passes()["sparsify"]
    for budget, offered in ((Budget(latency_seconds=1e-6), False), (Budget(weight_bytes=1000), True)):
        _, options, refused = collect(graph, ctx, [kind], Pricer(HOST, 1), budget, lambda *_: None)
        assert bool(options) == offered
        assert offered or any("smaller, not faster" in one.reason for one in refused if isinstance(one, Refusal))


@pytest.mark.parametrize("text", ["pattern=4:2", "pattern=half", "ratio=1.5", "criterion=magnitud", "criterion=obd"])
def test_impossible_options_are_errors(text: str) -> None:
    with pytest.raises(HwoptError):
        sparse(layer("Gemm"), text)


def test_what_cannot_be_sparse_is_refused_with_the_reason() -> None:
    graph, ctx = layer("Conv"), Context()
    assert parse("sparsify{pattern=2:3}", find_passes()).run(graph, ctx) is graph
    assert "no multiple of 3" in ctx.refused[-1].reason
    tiny = layer("Conv", normal(2, 16, 1, 1))
    assert parse("sparsify{ratio=0.5}", find_passes()).run(tiny, ctx) is tiny
    assert "bytes, the weights" in ctx.refused[-1].reason
