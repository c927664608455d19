"""GPTQ: smaller errors of the outputs than rounding to the nearest, at the same size; judged by ONNX Runtime."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import pytest

from hwopt.analysis.covariance import damped
from hwopt.analysis.size import weight_bytes
from hwopt.backends.ort import run
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.run import run_program
from hwopt.errors import PassError, UsageError
from hwopt.ir import Graph, Node, TensorType, frozen, infer_types
from hwopt.pipeline import Context, parse
from hwopt.plugins import find_passes, find_target
from hwopt.samples import Samples
from passes._gptq import BLOCK, DAMPING, gptq_rows
from passes._rounding import round_rows, scales_of

ROWS = 256


def model(op: str, k: int = 192, n: int = 48) -> Graph:
    generator = np.random.default_rng(1)
    weight = (generator.standard_normal((n, k)) / np.sqrt(k)).astype(np.float32)
    attrs = {"transB": 1} if op == "Gemm" else {}
    weight = weight.T if op == "MatMul" else weight.reshape(n, k, 1, 1) if op == "Conv" else weight
    shape = (1, k, 1, ROWS) if op == "Conv" else (ROWS, k)
    node = Node(op, ("x", "w"), ("y",), "fc", MappingProxyType(attrs))
    params = MappingProxyType({"w": frozen(np.ascontiguousarray(weight))})
    return infer_types(
        Graph(op, ("x",), ("y",), (node,), MappingProxyType({"x": TensorType("float32", shape)}), params, {"": 21})
    )


def correlated(k: int, seed: int) -> np.ndarray:
    """Inputs in which few directions carry most, as in trained networks; the mixture is the same for every seed."""
    mixture = np.random.default_rng(7).standard_normal((k // 4, k)) * np.geomspace(3, 0.3, k)
    generator = np.random.default_rng(seed)
    return (generator.standard_normal((ROWS, k // 4)) @ mixture + 0.1 * generator.standard_normal((ROWS, k))).astype(np.float32)


def feed(graph: Graph, seed: int) -> np.ndarray:
    weight = graph.params["w"]
    data = correlated(max(weight.shape[:2]), seed)
    return data.T[None, :, None] if graph.node["fc"].op == "Conv" else data


def changed(graph: Graph, options: str) -> Graph:
    calibration = Samples({"x": feed(graph, 2)})
    return parse(f"quantize-weights{{{options}}}", find_passes()).run(graph, Context(calibration=calibration))


def error(graph: Graph, after: Graph) -> float:
    """Of the outputs for inputs that were not calibrated with, relative."""
    feeds = {"x": feed(graph, 3)}
    want = run(graph, feeds)["y"]
    return float(np.square(run(after, feeds)["y"] - want).sum() / np.square(want).sum())


@pytest.mark.parametrize("op", ["Gemm", "MatMul", "Conv"])
@pytest.mark.parametrize("form", ["bits=8", "bits=4", "bits=4,group=32", "bits=3,group=32", "bits=3"])
def test_outputs_are_nearer_than_with_nearest_rounding_at_the_same_size(op: str, form: str) -> None:
    graph = model(op)
    nearest, gptq, ordered = (changed(graph, form + more) for more in ("", ",method=gptq", ",method=gptq,act_order=true"))
    assert error(graph, gptq) < 0.7 * error(graph, nearest)
    assert error(graph, ordered) < 0.7 * error(graph, nearest)
    assert weight_bytes(gptq) == weight_bytes(ordered) == weight_bytes(nearest)


def reference(rows: np.ndarray, moment: np.ndarray, bits: int) -> np.ndarray:
    """One input after the other by the definition: the least-squares answer of all later inputs, solved anew each time."""
    weights, hessian = rows.astype(np.float64), damped(moment, DAMPING)
    scale = scales_of(rows, bits, rows.shape[1], np.diag(moment))
    for index in range(rows.shape[1]):
        before = weights[:, index].copy()
        weights[:, index] = round_rows(before[:, None], scale, bits)[:, 0] * scale[:, 0].astype(np.float64)
        later = slice(index + 1, None)
        change = np.outer(before - weights[:, index], hessian[index, later])
        weights[:, later] += np.linalg.solve(hessian[later, later], change.T).T
    return np.rint(weights / scale).astype(np.int8)


def test_it_solves_for_the_later_inputs_also_across_blocks() -> None:
    generator, k = np.random.default_rng(4), BLOCK + 40
    rows, data = generator.standard_normal((6, k)).astype(np.float32), correlated(k, 5).astype(np.float64)
    moment = data.T @ data / len(data)
    steps, _ = gptq_rows(rows, moment, 4, k)
    np.testing.assert_array_equal(steps, reference(rows, moment, 4))


def test_groups_across_blocks_take_scales_of_weights_that_are_up_to_date() -> None:
    generator, k = np.random.default_rng(4), 3 * 96
    rows, data = generator.standard_normal((6, k)).astype(np.float32), correlated(k, 5).astype(np.float64)
    moment = data.T @ data / len(data)
    wide = gptq_rows(rows, moment, 4, 96)[1][:, 1]  # inputs 96 to 191: from the first block into the second
    weights, hessian = rows.astype(np.float64), damped(moment, DAMPING)
    steps, scales = gptq_rows(rows, moment, 4, 96)
    fixed = steps[:, :96] * scales[:, :1].astype(np.float64)
    later = weights[:, 96:] + np.linalg.solve(hessian[96:, 96:], hessian[96:, :96] @ (weights[:, :96] - fixed).T).T
    want = scales_of(later[:, :96].astype(np.float32), 4, 96, np.diag(moment)[96:192])[:, 0]
    np.testing.assert_allclose(wide, want, rtol=1e-5)


def test_inputs_without_relations_are_rounded_to_the_nearest() -> None:
    rows = np.random.default_rng(6).standard_normal((4, 64)).astype(np.float32)
    steps, scales = gptq_rows(rows, np.eye(64), 4, 32, act_order=True)
    np.testing.assert_array_equal(steps, round_rows(rows, np.repeat(scales, 32, 1), 4))


def test_act_order_is_the_same_with_the_strongest_inputs_first() -> None:
    generator, k = np.random.default_rng(6), 96
    rows, data = generator.standard_normal((5, k)).astype(np.float32), correlated(k, 5).astype(np.float64)
    moment = (data.T @ data / len(data))[::-1, ::-1]  # in storage the weakest come first
    order = np.argsort(-np.diag(moment), kind="stable")
    steps, scales = gptq_rows(rows, moment, 4, k, act_order=True)
    np.testing.assert_array_equal(steps[:, order], reference(rows[:, order], moment[np.ix_(order, order)], 4))
    np.testing.assert_array_equal(scales, scales_of(rows, 4, k, np.diag(moment)))


def test_inputs_that_are_never_seen_do_not_end_it() -> None:
    moment = np.diag(np.arange(64) % 2).astype(float)
    steps, scales = gptq_rows(np.ones((2, 64), np.float32), moment, 4, 16)
    np.testing.assert_allclose(steps * np.repeat(scales, 16, 1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("form", ["bits=3,group=32", "bits=3"])
@pytest.mark.parametrize("op", ["Gemm", "MatMul", "Conv"])
def test_three_bits_are_stored_in_three_bits_and_compiled(op: str, form: str) -> None:
    graph = model(op, 128, 64)
    after = changed(graph, form)
    assert weight_bytes(after) < 64 * 128 * 3 / 8 + 64 * 4 * 4 + 400
    feeds = {"x": np.random.default_rng(8).standard_normal(graph.tensor("x").dims, np.float32)}
    want = run(after, feeds)["y"]
    program = compile_program(after, find_target("host"), compact=True)
    np.testing.assert_allclose(run_program(program, feeds)["y"], want, atol=2e-5 * np.abs(want).max())


def test_what_makes_no_sense_is_refused_with_the_next_step() -> None:
    graph = model("Gemm")
    for text, hint in (("method=gptq", "--calibrate"), ("method=gpqt", "gptq"), ("act_order=true", "method=gptq")):
        with pytest.raises((PassError, UsageError), match=hint):
            parse(f"quantize-weights{{{text}}}", find_passes()).run(graph, Context())
