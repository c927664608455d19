"""Kernels that decode their weights are tuned like the other templates: right with every schedule, found, and used."""

from __future__ import annotations

import random
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import tvm

from hwopt.backends.tvm import kernels
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.kernels import packed
from hwopt.backends.tvm.kernels.decode import Coding
from hwopt.backends.tvm.kernels.packed import DIRECT_ROWS, WORKSPACE, PackedSpec, workspace_bytes
from hwopt.backends.tvm.run import run_program
from hwopt.backends.tvm.tune.database import CONFIRM, Database, Trial, Tuned
from hwopt.backends.tvm.tune.session import Effort, tune
from hwopt.backends.tvm.tune.space import Space, space_of
from hwopt.backends.tvm.tune.task import Task, make_task, operations, tasks_of
from hwopt.ir import Graph, Node, TensorType, frozen, infer_types
from hwopt.pipeline import Context, parse
from hwopt.plugins import find_passes
from hwopt.target import MicroKernel
from tests.test_tune import Here
from tests.test_weight_only import HOST, random_codes

SPECS = [
    PackedSpec(1, 200, 96, Coding(4), block=32),
    PackedSpec(5, 96, 77, Coding(3, 1)),
    PackedSpec(12, 64, 128, Coding(8)),
    PackedSpec(40, 200, 96, Coding(4), block=32, zeros=True),
    PackedSpec(4, 64, 96, Coding(4, 1), data_dtype="uint8", out_dtype="int32"),
]


def micro_of(spec: PackedSpec) -> MicroKernel | None:
    first = HOST.microkernels.get(spec.weight_dtype)
    able = (one for one in (first, *first.others) if first and one.rows == 1 and not packed.supports(spec, one)) if first else ()
    return next(iter(able), None)


def space_for(spec: PackedSpec, threads: int = 1) -> Space:
    micro = micro_of(spec)
    if micro is None:
        pytest.skip("this machine has no micro-kernel for it")
    space = space_of(make_task(spec, micro, HOST, threads))
    assert space is not None
    return space


def worst(spec: PackedSpec, micro: MicroKernel, schedule: kernels.Schedule) -> float:
    generator = np.random.default_rng(0)
    weights, dense = random_codes(spec, generator)
    data = generator.standard_normal((spec.m, spec.k), np.float32)
    if spec.data_dtype != "float32":
        data = generator.integers(0, 256, (spec.m, spec.k)).astype(spec.data_dtype)
    function = kernels.build(spec, schedule, micro, "kernel")
    with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
        library = tvm.tirx.build(tvm.IRModule({"kernel": function}), tvm.target.Target(dict(HOST.tvm)))
    out = tvm.runtime.tensor(np.zeros(spec.m * spec.n, spec.out_dtype))
    library["kernel"](*map(tvm.runtime.tensor, (data.reshape(-1), *packed.pack(spec, weights, micro))), out)
    want = (data.astype(np.float64) @ dense.T).reshape(-1)
    return float(np.abs(out.numpy() - want).max() / np.abs(want).max())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_results_are_right_with_any_schedule_of_the_space(spec: PackedSpec) -> None:
    space = space_for(spec)
    generator = random.Random(0)
    points = [space.sample(generator) for _ in range(40)]
    chosen = list(dict.fromkeys(space.schedule(one) for one in points if space.legal(one)))[:3]
    assert len(chosen) == 3
    for schedule in (space.task.default, *chosen):
        assert worst(spec, space.task.micro, schedule) < 3e-5, schedule


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_default_schedule_is_a_point_of_the_space(spec: PackedSpec) -> None:
    space = space_for(spec)
    assert space.legal(space.point(space.task.default))
    if spec.m > DIRECT_ROWS:
        assert space.schedule(space.point(space.task.default)).block_tiles > 0


def test_no_schedule_decodes_more_weights_at_once_than_the_cache_holds() -> None:
    spec = PackedSpec(64, 1024, 1024, Coding(4), block=32)
    space = space_for(spec)
    generator = random.Random(1)
    legal = [point for point in (space.sample(generator) for _ in range(300)) if space.legal(point)]
    assert legal
    assert all(workspace_bytes(spec, space.schedule(one), space.task.micro) <= WORKSPACE for one in legal)


def coded_graph(rows: int = 1, size: int = 512) -> Graph:
    """One product with 4-bit weights in blocks."""
    weight = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    node = Node("MatMul", ("x", "w"), ("y",), "product", MappingProxyType({}))
    types = MappingProxyType({"x": TensorType("float32", (rows, size))})
    params = MappingProxyType({"w": frozen(weight)})
    graph = infer_types(Graph("coded", ("x",), ("y",), (node,), types, params, MappingProxyType({"": 21})))
    return parse("quantize-weights{bits=4,group=32}", find_passes()).run(graph, Context(HOST))


def coded_task(graph: Graph) -> Task:
    return next(one for one in tasks_of(graph, HOST, 1, compact=True) if isinstance(one.spec, PackedSpec))


def test_under_a_size_budget_more_kernels_decode_and_are_tuned() -> None:
    graph = coded_graph(rows=512)
    assert not any(isinstance(one.spec, PackedSpec) for one in tasks_of(graph, HOST, 1))
    assert any(isinstance(one.spec, PackedSpec) for one in tasks_of(graph, HOST, 1, compact=True))


def test_a_model_s_coded_kernels_are_tuned_and_what_is_found_is_used(tmp_path: Path) -> None:
    graph = coded_graph()
    task = coded_task(graph)
    assert task.name == "matmul 1x512x512 float32, codes of 4 bits"
    assert operations(task.spec) == 2 * 512 * 512
    database = Database(tmp_path / "t.jsonl")
    state = tune({task: 1}, HOST, database, Effort(trials=3), batch=3, executor=Here())
    assert {one.status for one in database.trials(task)} == {"ok"}
    assert state.after <= state.before
    better = next(one.schedule for one in database.trials(task) if one.schedule != task.default)
    fresh = Database(tmp_path / "u.jsonl")
    fresh.add(task, [Trial(better, "ok", 1.0, 2.0, 0.5, CONFIRM)])
    tuned = Tuned(fresh, HOST)
    feeds = {"x": np.random.default_rng(1).standard_normal((1, 512), np.float32)}
    programs = (compile_program(graph, HOST, 1, "m", one, compact=True) for one in (tuned, kernels.default_schedule))
    found = [run_program(one, feeds)["y"] for one in programs]
    assert tuned.asked[task] == better
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-4)
