"""Global pools in the kernel of the convolution before them: ONNX Runtime's numbers from one kernel, in float and in 8 bits."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest

from hwopt.backends import ort
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.kernels import Schedule, default_schedule
from hwopt.backends.tvm.kernels.spec import ConvSpec, Mean
from hwopt.backends.tvm.run import run_program
from hwopt.backends.tvm.tune.space import space_of
from hwopt.backends.tvm.tune.task import tasks_of
from hwopt.ir import Graph
from hwopt.pipeline import Context, run_pass
from hwopt.plugins import find_target
from hwopt.target import MicroKernel
from passes.quantize import Quantize
from tests.random_graphs import Builder, conv, linear, random_feeds, random_samples

CASES = {
    "1x1": {"shape": (1, 24, 7, 7), "channels": 37, "kernel": 1},
    "1x1, three images": {"shape": (3, 17, 5, 4), "channels": 64, "kernel": 1},
    "3x3 with borders": {"shape": (2, 16, 7, 6), "channels": 48, "kernel": 3},
    "residual": {"shape": (1, 32, 7, 7), "channels": 32, "kernel": 3, "residual": True},
    "strides": {"shape": (1, 16, 14, 15), "channels": 130, "kernel": 3, "stride": 2},
    "flat mean": {"shape": (2, 16, 6, 6), "channels": 40, "kernel": 1, "flat": True},
}


def network(case: str, tail: str = "") -> Graph:
    """Conv [-> add] -> relu -> mean over the image [-> linear], which a second reader may need whole."""
    given = CASES[case]
    build = Builder(np.random.default_rng(3))
    x = build.input(given["shape"])
    value = conv(build, x, given["channels"], given["kernel"], stride=given.get("stride", 1))
    value = build.same("Add", value, x) if given.get("residual") else value
    value = build.same("Relu", value)
    batch, channels = build.shapes[value][:2]
    if given.get("flat"):
        mean = build.op("ReduceMean", [value, build.ints(2, 3)], (batch, channels), keepdims=0)
    else:
        mean = build.op("Flatten", [build.op("GlobalAveragePool", [value], (batch, channels, 1, 1))], (batch, channels))
    build.outputs.append(linear(build, mean, 70))
    if tail == "read twice":
        build.outputs.append(value)
    return build.graph(opset=18)


def in_8_bits(graph: Graph) -> Graph:
    return run_pass(Quantize(), graph, Context(calibration=random_samples(graph)))


def kernels_of(graph: Graph, target: str = "host", threads: int = 1) -> list[ConvSpec]:
    return [task.spec for task in tasks_of(graph, find_target(target), threads) if isinstance(task.spec, ConvSpec)]


def averages(spec: ConvSpec) -> bool:
    return any(isinstance(step, Mean) for step in spec.epilogue)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_float_means_are_onnx_runtimes(case: str, threads: int) -> None:
    graph = network(case)
    feeds = random_feeds(graph)
    program = compile_program(graph, find_target("host"), threads, "test")
    (name,) = graph.outputs
    np.testing.assert_allclose(run_program(program, feeds)[name], ort.run(graph, feeds)[name], rtol=1e-4, atol=1e-5)
    assert [averages(spec) for spec in kernels_of(graph, "host", threads)] == [True]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_integer_means_are_within_a_step(case: str, threads: int) -> None:
    graph = in_8_bits(network(case))
    feeds = random_feeds(graph)
    program = compile_program(graph, find_target("host"), threads, "test")
    (name,) = graph.outputs
    found, wanted = run_program(program, feeds)[name], ort.run(graph, feeds)[name]
    assert np.abs(found - wanted).max() <= 0.02 * np.abs(wanted).max()
    assert [averages(spec) for spec in kernels_of(graph, "neoverse-n1", threads)] == [True]


def test_a_matrix_unit_keeps_its_convolution() -> None:
    graph = in_8_bits(network("3x3 with borders"))
    assert [averages(spec) for spec in kernels_of(graph, "sapphire-rapids")] == [False]


def test_each_tuned_schedule_computes_the_same() -> None:
    graph = network("strides")
    feeds, (name,) = random_feeds(graph), graph.outputs
    (task,) = (one for one in tasks_of(graph, find_target("host"), 1) if isinstance(one.spec, ConvSpec))
    space = space_of(task)
    assert space is not None
    expected = ort.run(graph, feeds)[name]

    def choose(spec: Any, micro: MicroKernel, threads: int, at: Any) -> Schedule:
        return space.schedule(at) if isinstance(spec, ConvSpec) else default_schedule(spec, micro, threads)

    for point in itertools.islice(space.neighbours(space.point(task.default)), 0, None, 6):
        program = compile_program(graph, find_target("host"), 1, "test", functools.partial(choose, at=point))
        np.testing.assert_allclose(run_program(program, feeds)[name], expected, rtol=1e-4, atol=1e-5)


def test_a_value_that_others_read_is_written() -> None:
    graph = network("1x1", "read twice")
    feeds = random_feeds(graph)
    found, wanted = run_program(compile_program(graph, find_target("host")), feeds), ort.run(graph, feeds)
    assert not any(averages(spec) for spec in kernels_of(graph))
    for name in graph.outputs:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-5)


def test_nothing_is_copied_between_a_pool_and_the_layer_behind_its_flat_form() -> None:
    program = compile_program(network("1x1"), find_target("host"))
    assert len(program.calls) == 3  # the input's channels last, the convolution, the matmul
