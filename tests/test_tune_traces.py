"""MetaSchedule's spaces for kernels that no template covers: sampled, right, stored as JSON and used by compilations."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import parser

from hwopt.backends import ort
from hwopt.backends.tvm import kernels
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.generic import traced
from hwopt.backends.tvm.kernels.loops import LoopsSpec, Traced, build_loops, traced_loops
from hwopt.backends.tvm.run import run_program
from hwopt.backends.tvm.tune.builder import build_candidate
from hwopt.backends.tvm.tune.database import CONFIRM, Database, Trial, Tuned
from hwopt.backends.tvm.tune.runner import Kernels, Runner
from hwopt.backends.tvm.tune.session import signature
from hwopt.backends.tvm.tune.task import Task, tasks_of
from hwopt.backends.tvm.tune.traces import TraceProposer, Traces, proposer_of
from hwopt.errors import ToolchainError
from hwopt.io.proto import from_model
from hwopt.ir import Graph
from hwopt.plugins import find_target

BODIES = {
    "rows": ("float[256,1] y", "y = ReduceL2(x, last)"),
    "columns": ("float[1,196] y", "y = ReduceSum(x, first)"),
    "moves": ("float[196,256] y", "t = Transpose(x) y = Mul(t, t)"),
    "roots": ("float[256,196] y", "r = Sqrt(x) y = Mul(r, x)"),
    "chain": ("float[256,196] y", "m = Expand(b, shape) c = Less(x, m) n = Mul(x, m) y = Where(c, n, m)"),
}
CONSTANTS = "int64[1] last = {1}, int64[1] first = {0}, int64[2] shape = {256, 196}"


def graph_of(kind: str) -> Graph:
    result, body = BODIES[kind]
    text = f"agraph (float[256,196] x, float[1,196] b) => ({result}) <{CONSTANTS}> {{ {body} }}"
    return from_model(parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}'))


def task_of(kind: str, threads: int = 1) -> Task:
    (task,) = tasks_of(graph_of(kind), find_target("host"), threads)
    return task


def proposed(task: Task, count: int = 12) -> list[Traced]:
    proposer = proposer_of(task, 0)
    assert isinstance(proposer, TraceProposer)
    found = [one for one in proposer.propose([], 2 * count) if isinstance(one, Traced)]
    assert len(found) >= count // 2
    return found[:count]


def worst(graph: Graph, trace: Traced, threads: int = 1) -> float:
    """The largest difference from ONNX Runtime, of the largest output."""

    def choose(spec: Any, micro: Any, cores: int) -> kernels.Schedule:
        return trace if isinstance(spec, LoopsSpec) else kernels.default_schedule(spec, micro, cores)

    random_numbers = np.random.default_rng(0)
    feeds = {name: random_numbers.standard_normal(graph.tensor(name).dims, np.float32) for name in graph.inputs}
    found = run_program(compile_program(graph, find_target("host"), threads, "test", choose), feeds)["y"]
    wanted = ort.run(graph, feeds)["y"]
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize(("kind", "threads"), [(kind, threads) for kind in BODIES for threads in (1, 2) if kind != "roots"])
def test_results_are_right_with_sampled_traces(kind: str, threads: int) -> None:
    for trace in proposed(task_of(kind, threads), 4):
        assert worst(graph_of(kind), trace, threads) < 1e-5, trace.trace


@pytest.mark.parametrize("kind", ["columns", "roots"])
def test_the_isolated_runner_finds_their_results_equal_to_the_default_ones(kind: str) -> None:
    """Also where results are NaN for half of the random numbers."""
    task = task_of(kind)
    schedules = [task.default, *proposed(task, 4)]
    built = {f"s{index}": build_candidate(task, one, f"s{index}") for index, one in enumerate(schedules)}
    assert not any(one.reason for one in built.values())
    with Runner() as runner:
        objects = {name: one.data for name, one in built.items()}
        found = runner.measure(Kernels(objects, signature(task, built["s0"].parameters)), rounds=2)
    assert {one.status for one in found.values()} == {"ok"}


def test_traces_are_the_same_in_every_process_and_new_ones_follow_the_best() -> None:
    task = task_of("rows")
    first = proposed(task)
    assert first == proposed(task)
    proposer = proposer_of(task, 0)
    assert isinstance(proposer, TraceProposer)
    trials = [Trial(one, "ok", 1.0, 2.0, 0.5, CONFIRM) for one in first]
    following = proposer.propose(trials, 16)
    assert following
    assert not {*following} & {*first}


def test_producers_are_never_computed_inside_of_vectors() -> None:
    """Such a kernel is wrong: TVM gives the producer room for one lane."""
    text = "agraph (float[1,480,1,6,80] x) => (float[1,480,1,2,40] y) "
    body = "{ p = AveragePool<kernel_shape=[1,3,2], strides=[1,3,2]>(x) y = Sigmoid(p) }"
    graph = from_model(parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}{body}'))
    task = next(one for one in tasks_of(graph, find_target("host"), 1) if isinstance(one.spec, LoopsSpec))
    for trace in proposed(task, 12):
        loops = build_loops(task.spec, trace, "s").script().split("T.vectorized")[1:]
        assert all(one.split("for ")[0].count("T.sblock(") <= 1 for one in loops)


def test_blocks_are_tiled_where_metaschedule_tiles_none() -> None:
    task = task_of("moves")
    scripts = [build_loops(task.spec, one, "s").script() for one in proposed(task)]  # type: ignore[arg-type]
    assert any("vectorized" in one for one in scripts)
    assert any(one.count("for ") >= 4 or "T.grid" in one for one in scripts)


def test_a_mutation_differs_in_its_decisions_only() -> None:
    task = task_of("rows")
    assert isinstance(task.spec, LoopsSpec)
    traces, generator = Traces(task.spec, task.tvm, 1), random.Random(0)
    parent = next(one for one in iter(lambda: traces.candidate(generator, []), None) if one)
    children = [traces.candidate(generator, [parent]) for _ in range(16)]
    assert any(one is not None and one != parent for one in children)


def test_a_trace_of_the_database_is_read_and_used(tmp_path: Path) -> None:
    graph, target, task = graph_of("columns"), find_target("host"), task_of("columns")
    better = proposed(task)[0]
    Database(tmp_path / "t.jsonl").add(task, [Trial(better, "ok", 1.0, 2.0, 0.5, CONFIRM)])
    tuned = Tuned(Database(tmp_path / "t.jsonl"), target)
    program = compile_program(graph, target, 1, "m", tuned)
    assert tuned.asked[task] == better
    assert [call.symbol for call in program.calls] != [call.symbol for call in compile_program(graph, target, 1, "m").calls]


def test_a_trace_chooses_between_the_bits_of_bfloat16() -> None:
    """As schedules do: TVM would widen both values, wrongly in vectors."""
    from tvm import te, tirx

    data = te.placeholder((64,), "bfloat16", "data")
    out = te.compute((64,), lambda i: tirx.if_then_else(i < 32, data[i], data[63 - i]), "out")
    found = traced(te.create_prim_func([data, out]), "[[], []]").script()
    assert found.count('T.reinterpret("uint16"') == 2


def test_a_trace_that_does_not_fit_is_one_clear_error() -> None:
    rows, columns = task_of("rows"), task_of("chain")
    assert isinstance(columns.spec, LoopsSpec)
    for trace in (proposed(rows)[0], traced_loops("[", 1)):
        with pytest.raises(ToolchainError, match="does not fit the kernel"):
            build_loops(columns.spec, trace, "s")


def test_metaschedule_comes_without_the_module_that_takes_half_a_minute() -> None:
    code = (
        "import sys; from tests.test_tune_traces import *; "
        "assert proposed(task_of('rows')) and 'tvm.s_tir.meta_schedule' in sys.modules; "
        "assert 'tvm.s_tir.tensor_intrin' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
