"""Pools by their template: ONNX Runtime's numbers for every kind of window, and one kernel with what follows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hwopt.backends import ort
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.kernels.spec import PoolSpec
from hwopt.backends.tvm.lower import lower
from hwopt.backends.tvm.run import run_program
from hwopt.backends.tvm.templates import Templates
from hwopt.ir import Graph
from hwopt.plugins import find_target
from tests.test_lower import compare, graph_of, quantized

WINDOWS = {
    "at borders": ("kernel_shape = [3,3], strides = [2,2], pads = [1,1,1,1]", (6, 5)),
    "with holes": ("kernel_shape = [2,3], dilations = [2,2], pads = [1,2,0,1]", (10, 8)),
    "inside": ("kernel_shape = [2,2], strides = [2,2]", (5, 4)),
    "wider than the image": ("kernel_shape = [11,9], pads = [5,4,5,4]", (11, 9)),
    "on one side": ("kernel_shape = [3,3], strides = [3,3], pads = [0,0,2,2]", (4, 3)),
}
KINDS = ("MaxPool", "AveragePool", "AveragePool <count_include_pad = 1>")


@pytest.mark.parametrize("channels", [5, 16, 83])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", WINDOWS)
def test_windows_give_onnx_runtimes_values(window: str, kind: str, channels: int) -> None:
    attributes, (height, width) = WINDOWS[window]
    op, _, more = kind.partition(" <")
    attributes += f", {more.rstrip('>')}" if more else ""
    sizes = "11,9" if window != "inside" else "10,9"
    graph = graph_of(
        f"agraph (float[2,{channels},{sizes}] x) => (float[2,{channels},{height},{width}] y) {{ y = {op} <{attributes}> (x) }}"
    )
    assert pools_of(graph)
    compare(graph, 1e-6)


BODIES = {
    "a line": "(float[2,5,9] x) => (float[2,5,5] y) { y = MaxPool <kernel_shape = [3], strides = [2], pads = [1,1]> (x) }",
    "the whole image": "(float[1,21,6,5] x) => (float[1,21,1,1] y) { y = GlobalAveragePool (x) }",
    "activations": "(float[1,5,6,6] x) => (float[1,5,5,5] y) { p = AveragePool <kernel_shape = [2,2]> (x) y = Relu (p) }",
    "bytes": "(uint8[1,5,6,6] x) => (uint8[1,5,3,3] y) { y = MaxPool <kernel_shape = [2,2], strides = [2,2]> (x) }",
    "bytes of a sign": "(int8[1,70,6,6] x) => (int8[1,70,6,6] y) { y = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (x) }",
}  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
def test_pools_of_all_kinds_give_onnx_runtimes_values(body: str) -> None:
    graph = graph_of(f"agraph {BODIES[body]}")
    assert pools_of(graph)
    compare(graph, 1e-6)


def test_what_follows_a_pool_is_in_its_kernel() -> None:
    head = "agraph (float[1,24,6,6] x) => (uint8[1,24,3,3] y) <float s = {0.02}, uint8 z = {100}, float low = {-1.5}>"
    body = "p = MaxPool <kernel_shape = [2,2], strides = [2,2]> (x) r = Clip (p, low) y = QuantizeLinear (r, s, z)"
    graph = graph_of(f"{head} {{ {body} }}")
    (spec,) = pools_of(graph)
    assert spec.out_dtype == "uint8" and len(spec.epilogue) == 2
    compare(graph)


def test_bounds_that_are_computed_are_kept_behind_the_pool() -> None:
    body = "p = MaxPool <kernel_shape = [2,2]> (x) y = Clip (p, low)"
    graph = graph_of(f"agraph (float[1,5,6,6] x, float low) => (float[1,5,5,5] y) {{ {body} }}")
    (spec,) = pools_of(graph)
    assert spec.epilogue == ()
    compare(graph, 1e-6)


def test_a_mean_over_an_image_that_lies_so_is_no_copy() -> None:
    weight = ", ".join(["0.1"] * 63)
    head = f"agraph (float[1,3,6,6] x) => (float[1,21] y) <float[21,3,1,1] w = {{{weight}}}, int64[2] axes = {{2, 3}}>"
    graph = graph_of(f"{head} {{ c = Conv (x, w) s = Sin (c) y = ReduceMean <keepdims = 0> (s, axes) }}")
    assert pools_of(graph)
    compare(graph, 1e-5)


def test_the_largest_of_bytes_quantized_alike_stays_bytes() -> None:
    alike = quantized("a = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (rf) y = QuantizeLinear(a, t, v)")
    (spec,) = pools_of(alike)
    assert (spec.data_dtype, spec.out_dtype, spec.epilogue) == ("uint8", "uint8", ())
    compare(alike)
    (other,) = pools_of(quantized("a = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (rf) y = QuantizeLinear(a, s, z)"))
    assert len(other.epilogue) == 1


@pytest.mark.parametrize("op", ["GlobalMaxPool", "GlobalAveragePool"])
@pytest.mark.parametrize("after", ["t, v", "s, z"])
def test_quantized_images_are_pooled_as_bytes(op: str, after: str) -> None:
    graph = quantized(f"a = {op} (rf) y = QuantizeLinear(a, {after})", "uint8[1,8,1,1] y")
    (spec,) = pools_of(graph)
    assert spec.data_dtype == spec.out_dtype == "uint8" and bool(spec.epilogue) == ((op, after) != ("GlobalMaxPool", "t, v"))
    compare(graph)


HOLES = "kernel_shape = [2,2], dilations = [3,3], pads = [1,1,1,1]"


def test_windows_that_step_over_the_image_are_left_to_others() -> None:
    graph = graph_of(f"agraph (float[1,5,2,4] x) => (float[1,5,1,3] y) {{ y = MaxPool <{HOLES}> (x) }}")
    assert not pools_of(graph)
    compare(graph)
    compare(graph_of(f"agraph (uint8[1,5,2,4] x) => (uint8[1,5,1,3] y) {{ y = MaxPool <{HOLES}> (x) }}"))
    compare(quantized(f"a = MaxPool <{HOLES}, strides = [9,9]> (rf) y = QuantizeLinear(a, s, z)", "uint8[1,8,1,1] y"))


def test_the_largest_of_the_least_numbers_is_one_of_them() -> None:
    graph = graph_of("agraph (float[1,21,4,4] x) => (float[1,21,3,3] y) { y = MaxPool <kernel_shape = [2,2]> (x) }")
    assert pools_of(graph)
    for least in (-np.inf, np.finfo(np.float32).min):
        feeds = {"x": np.full((1, 21, 4, 4), least, np.float32)}
        found = run_program(compile_program(graph, find_target("host"), 1, "t"), feeds)["y"]
        assert (found == ort.run(graph, feeds)["y"]).all() and (found == least).all()


def test_pools_on_two_threads_give_the_same_bits() -> None:
    graph = graph_of("agraph (float[1,40,64,64] x) => (float[1,40,62,62] y) { y = AveragePool <kernel_shape = [3,3]> (x) }")
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 40, 64, 64)).astype(np.float32)}
    one, two = (run_program(compile_program(graph, find_target("host"), threads, "t"), feeds)["y"] for threads in (1, 2))
    assert (one == two).all()


def pools_of(graph: Graph) -> list[PoolSpec]:
    """What the pool template is asked for."""
    asked: list[PoolSpec] = []

    class Watching(Templates):
        def call_pool(self, spec: PoolSpec, *rest: Any) -> Any:
            asked.append(spec)
            return super().call_pool(spec, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hwopt.backends.tvm.lower.Templates", Watching)
        lower(graph, find_target("host"), 1)
    return asked
