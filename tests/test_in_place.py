"""Residual sums over what they add: the arena holds one value less, and the numbers stay ONNX Runtime's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hwopt.analysis.liveness import peak_activation_bytes
from hwopt.backends import ort
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.run import run_program
from hwopt.emit.memory import bytes_of, plan_memory
from hwopt.emit.program import Program
from hwopt.ir import Graph
from hwopt.pipeline import Context, run_pass
from hwopt.plugins import find_target
from passes.quantize import Quantize
from tests.random_graphs import Builder, conv, random_feeds, random_samples


def residuals(blocks: int = 2, again: bool = False) -> Graph:
    """x = relu(conv); blocks of x + conv(relu(conv x)), a last conv; with `again` it adds the first x once more."""
    build = Builder(np.random.default_rng(1))
    first = x = build.same("Relu", conv(build, build.input((1, 3, 11, 13)), 16, 3))
    for _ in range(blocks):
        inner = build.same("Relu", conv(build, x, 16, 1))
        x = build.same("Relu", build.same("Add", conv(build, inner, 16, 3), x))
    x = build.same("Add", conv(build, x, 16, 1), first) if again else x
    build.outputs.append(conv(build, x, 2, 1))
    return build.graph(opset=18)


def compiled(graph: Graph, threads: int = 1) -> Program:
    return compile_program(graph, find_target("host"), threads, "test")


def views(program: Program) -> int:
    return sum(bool(buffer.alias) for buffer in program.buffers.values())


@pytest.mark.parametrize("threads", [1, 2])
def test_a_residual_that_dies_is_written_over(threads: int) -> None:
    graph = residuals()
    feeds, program = random_feeds(graph), compiled(graph, threads)
    (name,) = graph.outputs
    np.testing.assert_allclose(run_program(program, feeds)[name], ort.run(graph, feeds)[name], rtol=1e-4, atol=1e-5)
    assert views(program) == 2
    one = max(bytes_of(buffer) for buffer in program.buffers.values() if buffer.kind == "temporary")
    assert plan_memory(program).arena_bytes < 2.2 * one
    apart = {key: dataclasses.replace(buffer, alias="") for key, buffer in program.buffers.items()}
    assert plan_memory(dataclasses.replace(program, buffers=apart)).arena_bytes > 2.9 * one


def test_a_residual_that_others_read_later_stays() -> None:
    graph = residuals(1, again=True)
    feeds, program = random_feeds(graph), compiled(graph)
    (name,) = graph.outputs
    np.testing.assert_allclose(run_program(program, feeds)[name], ort.run(graph, feeds)[name], rtol=1e-4, atol=1e-5)
    assert views(program) == 1


def test_quantized_residuals_are_written_over_too() -> None:
    graph = residuals()
    graph = run_pass(Quantize(), graph, Context(calibration=random_samples(graph)))
    feeds, program = random_feeds(graph), compiled(graph)
    (name,) = graph.outputs
    found, wanted = run_program(program, feeds)[name], ort.run(graph, feeds)[name]
    assert np.abs(found - wanted).max() <= 0.02 * np.abs(wanted).max()
    assert views(program) == 2


@pytest.mark.parametrize("again", [False, True])
def test_the_planner_knows_which_residuals_lie_in_place(again: bool) -> None:
    graph = residuals(1, again)
    graph = run_pass(Quantize(), graph, Context(calibration=random_samples(graph)))
    assert peak_activation_bytes(graph) == pytest.approx(plan_memory(compiled(graph)).arena_bytes, rel=0.05)
