"""Tuning of kernels that no template covers: found, searched like the others, used, and right with every schedule."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from onnx import parser

from hwopt.backends import ort
from hwopt.backends.tvm import kernels
from hwopt.backends.tvm.build import compile_program, reading
from hwopt.backends.tvm.kernels.loops import LANE_COUNTS, VECTOR_COUNTS, LoopsSpec
from hwopt.backends.tvm.run import run_program
from hwopt.backends.tvm.tune.database import CONFIRM, Database, Trial, Tuned
from hwopt.backends.tvm.tune.session import Effort, tune
from hwopt.backends.tvm.tune.space import space_of
from hwopt.backends.tvm.tune.task import tasks_of
from hwopt.io.proto import from_model
from hwopt.ir import Graph
from hwopt.plugins import find_target

BODIES = {
    "rows": ("float[256,1] y", "y = ReduceSum(x, last)"),
    "columns": ("float[1,196] y", "y = ReduceSum(x, first)"),
    "chain": ("float[256,196] y", "m = Expand(b, shape) c = Less(x, m) n = Mul(x, m) y = Where(c, n, m)"),
}
CONSTANTS = "int64[1] last = {1}, int64[1] first = {0}, int64[2] shape = {256, 196}"


def graph_of(kind: str) -> Graph:
    result, body = BODIES[kind]
    text = f"agraph (float[256,196] x, float[1,196] b) => ({result}) <{CONSTANTS}> {{ {body} }}"
    return from_model(parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}'))


def worst(graph: Graph, choose: object) -> float:
    """The largest difference from ONNX Runtime with schedules by `choose`, of the largest output."""
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal(graph.tensor(name).dims, np.float32) for name in graph.inputs}
    found = run_program(compile_program(graph, find_target("host"), 1, "test", choose), feeds)["y"]  # type: ignore[arg-type]
    wanted = ort.run(graph, feeds)["y"]
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("kind", BODIES)
def test_results_are_right_with_every_schedule(kind: str) -> None:
    graph = graph_of(kind)
    asked = []
    for lanes, vectors in itertools.product(LANE_COUNTS, VECTOR_COUNTS):

        def choose(spec: object, micro: object, threads: int, lanes: int = lanes, vectors: int = vectors) -> kernels.Schedule:
            asked.append(spec)
            default = kernels.default_schedule(spec, micro, threads)  # type: ignore[arg-type]
            return dataclasses.replace(default, tile_columns=lanes, vectors=vectors)

        assert worst(graph, choose) < 1e-5, (lanes, vectors)
    assert any(isinstance(spec, LoopsSpec) for spec in asked)


def test_a_better_schedule_of_the_database_is_used(tmp_path: Path) -> None:
    graph, target = graph_of("rows"), find_target("host")
    (task,) = tasks_of(graph, target, 1)
    assert space_of(task) is not None
    database = Database(tmp_path / "t.jsonl")
    better = dataclasses.replace(task.default, tile_columns=4)
    database.add(task, [Trial(better, "ok", 1.0, 2.0, 0.5, CONFIRM)])
    tuned = Tuned(database, target)
    assert worst(graph, tuned) < 1e-5
    assert tuned.asked[task] == better
    symbols = [[call.symbol for call in compile_program(graph, target, 1, "m", one).calls] for one in (tuned, Tuned(Database(
        tmp_path / "none.jsonl"), target))]  # fmt: skip
    assert symbols[0] != symbols[1]


def test_a_search_records_its_schedules_and_never_ends_above_the_default(tmp_path: Path) -> None:
    graph, target = graph_of("rows"), find_target("host")
    database = Database(tmp_path / "t.jsonl")
    state = tune(tasks_of(graph, target, 1), target, database, Effort(trials=3), batch=3)
    records = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert records and {one["status"] for one in records} == {"ok"}
    assert all(set(one["workload"]["spec"]) >= {"digest", "bytes"} and "source" not in one["workload"]["spec"] for one in records)
    assert state.after <= state.before
    assert worst(graph, Tuned(database, target)) < 1e-5


def test_small_kernels_and_those_that_read_indices_are_not_tuned() -> None:
    small = "agraph (float[8,8] x) => (float[8,8] y) { y = Sin(x) }"
    gathers = "agraph (float[512,64] x, int64[300] i) => (float[300,64] y) { y = Gather(x, i) }"
    for text in (small, gathers):
        graph = from_model(parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}'))
        assert tasks_of(graph, find_target("host"), 1) == {}


@pytest.mark.parametrize(("size", "parallel"), [(256, False), (1024, True)])
def test_short_copies_run_on_one_core(size: int, parallel: bool) -> None:
    """Moving 50,000 numbers takes 2 us, starting a thread about as long."""
    text = f"agraph (float[196,{size}] x) => (float[{size},196] y) {{ y = Transpose(x) }}"
    graph = from_model(parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}'))
    kernels_of = reading(graph, find_target("host"), 2).functions.values()
    assert any("T.parallel" in one.script() for one in kernels_of) == parallel
