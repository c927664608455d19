"""The main job from end to end on a small model: plan, artifact, report, replay, budgets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

import hwopt
from hwopt.backends.ort import Session
from hwopt.compiler import plan_model
from hwopt.errors import ArtifactError, BudgetError, UnsupportedError, UsageError
from hwopt.evaluate import compare
from hwopt.io.onnx import load, save
from hwopt.ir import Graph, Node, TensorType, frozen, infer_types
from hwopt.job import clean, prepare, quiet
from hwopt.measure import Timing
from hwopt.pipeline import Context
from hwopt.plan.budget import Budget
from hwopt.plan.plan import plan_from_json
from hwopt.plugins import find_target
from hwopt.report.outcome import _alone_faster
from hwopt.report.summary import summary


def small_net() -> Graph:
    """Three convolutions with a residual, pooling and a classifier; wide enough that every family has something to do."""
    random = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return frozen((random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32))

    params = {"w1": weight(32, 3, 3, 3), "w2": weight(64, 32, 3, 3), "w3": weight(64, 64, 3, 3), "w4": weight(64, 10)}
    params |= {"b1": frozen(np.full(32, 0.1, np.float32)), "b4": frozen(np.zeros(10, np.float32))}
    same = {"pads": (1, 1, 1, 1), "kernel_shape": (3, 3)}
    nodes = (
        Node("Conv", ("x", "w1", "b1"), ("c1",), "first", same),
        Node("Relu", ("c1",), ("r1",), "relu1"),
        Node("Conv", ("r1", "w2"), ("c2",), "second", same),
        Node("Relu", ("c2",), ("r2",), "relu2"),
        Node("Conv", ("r2", "w3"), ("c3",), "third", same),
        Node("Add", ("c3", "r2"), ("s",), "add"),
        Node("Relu", ("s",), ("r3",), "relu3"),
        Node("GlobalAveragePool", ("r3",), ("p",), "pool"),
        Node("Flatten", ("p",), ("f",), "flatten"),
        Node("Gemm", ("f", "w4", "b4"), ("y",), "head"),
    )
    types = {"x": TensorType("float32", (1, 3, 16, 16))}
    return infer_types(Graph("small", ("x",), ("y",), nodes, MappingProxyType(types), MappingProxyType(params), {"": 21}))


def pictures(count: int, seed: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).random((count, 3, 16, 16), np.float32)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.onnx"
    save(small_net(), path)
    return path


@pytest.fixture(scope="module")
def compiled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> hwopt.Artifact:
    out = tmp_path_factory.mktemp("out") / "artifact"
    return hwopt.compile(model, out=out, calibrate=pictures(16, 1), evaluate=pictures(64, 2), budget=Budget(0.2), threads=1)


def test_artifact_holds_everything_it_promises(compiled: hwopt.Artifact) -> None:
    present = {path.name for path in compiled.path.iterdir()}
    assert {"model.onnx", "plan.json", "report.json", "graph.txt", "manifest.json", "small.h", "libsmall.so"} <= present
    report = compiled.report
    for side in ("baseline", "result"):
        assert {"score", "latency_seconds", "weight_bytes", "peak_activation_bytes"} <= set(report[side])
    assert report["result"]["weight_bytes"] < report["baseline"]["weight_bytes"]
    assert report["speedup"] == report["baseline"]["latency_seconds"] / report["result"]["latency_seconds"]
    inside = [report[side]["library_weight_bytes"] for side in ("baseline", "result")]
    assert f"({inside[0] / inside[1]:.2f} in the library)" in summary(report)
    low, high = report["score_drop_interval"]
    assert low <= report["score_drop"] <= high and report["score_drop"] <= 0.2
    assert report["layers"] and report["machine"]["cpu"] and report["versions"]["apache-tvm"]


def test_library_computes_what_its_onnx_model_says(compiled: hwopt.Artifact) -> None:
    reference = Session(load(compiled.path / "model.onnx"))
    for row in range(8):
        feeds = {"x": pictures(8, 5)["x"][row : row + 1]}
        wanted, found = reference.run(feeds)["y"], compiled.run(feeds)["y"]
        np.testing.assert_allclose(found, wanted, atol=0.03 * np.abs(wanted).max())


def test_a_library_without_a_heap_runs_from_python_as_the_others_do(model: Path, tmp_path: Path) -> None:
    form = hwopt.Form(("shared",), "serial", heap=False)
    artifact = hwopt.compile(model, out=tmp_path / "bare", passes="none", threads=1, form=form, measure=False)
    image = pictures(1, 5)["x"]
    unaligned = np.frombuffer(b"1234" + image.tobytes(), np.float32)[1:].reshape(image.shape)
    (wanted,) = Session(load(artifact.path / "model.onnx")).run({"x": image}).values()
    for _ in range(2):
        (found,) = hwopt.Artifact(artifact.path).run({"x": unaligned}).values()
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_plan_records_numbers_and_replays_to_the_same_bytes(compiled: hwopt.Artifact, model: Path, tmp_path: Path) -> None:
    plan = plan_from_json((compiled.path / "plan.json").read_text())
    assert plan.decisions and plan.refused and plan.rounds
    assert all(decision.seconds_after < decision.seconds_before for decision in plan.decisions)
    again = hwopt.compile(
        model,
        out=tmp_path / "again",
        calibrate=pictures(16, 1),
        evaluate=pictures(64, 2),
        budget=Budget(0.2),
        threads=1,
        plan=plan,
    )
    for name in ("model.onnx", "libsmall.so", "small.c", "graph.txt"):
        assert (again.path / name).read_bytes() == (compiled.path / name).read_bytes(), name


def test_plan_for_another_model_is_refused(compiled: hwopt.Artifact, tmp_path: Path) -> None:
    other = small_net().edit()
    other.set_param("b1", np.zeros(32, np.float32))
    save(other.finish("other"), tmp_path / "other.onnx")
    with pytest.raises(UsageError, match="made for another model"):
        hwopt.compile(tmp_path / "other.onnx", out=tmp_path / "x", calibrate=pictures(8, 1), plan=compiled.path / "plan.json")


def test_without_data_nothing_lossy_is_done(model: Path) -> None:
    found = plan_model(model)
    assert found.plan.decisions == ()
    assert {one.reason for one in found.plan.refused} == {"there are no data to choose and to judge by"}


def test_stated_passes_are_applied_as_they_are(model: Path) -> None:
    found = plan_model(model, passes="quantize{}", calibrate=pictures(8, 1))
    assert [decision.by for decision in found.plan.decisions] == [("quantize",)]
    assert any(node.op == "QuantizeLinear" for node in found.graph.nodes)


def test_size_budget_is_kept_or_answered_with_the_nearest_plan(model: Path) -> None:
    data = {"calibrate": pictures(16, 1), "evaluate": pictures(32, 2)}
    found = plan_model(model, budget=Budget(0.5, weight_bytes=60_000), **data)
    assert found.plan.decisions
    with pytest.raises(BudgetError, match=r"nearest plan|no combination"):
        plan_model(model, budget=Budget(0.0, weight_bytes=2_000), **data)


def test_memory_budget_bounds_the_arena_that_is_allocated(model: Path, tmp_path: Path, compiled: hwopt.Artifact) -> None:
    limit = 0.5 * compiled.report["baseline"]["peak_activation_bytes"]
    data = {"calibrate": pictures(16, 1), "evaluate": pictures(32, 2), "threads": 1}
    found = hwopt.compile(model, out=tmp_path / "a", budget=Budget(0.5, activation_bytes=limit), **data)
    assert found.report["result"]["peak_activation_bytes"] <= limit
    assert found.manifest["peak_activation_bytes"] == found.report["result"]["peak_activation_bytes"]


def test_latency_budget_that_no_plan_meets_is_refused_with_the_numbers(model: Path, tmp_path: Path) -> None:
    data = {"calibrate": pictures(16, 1), "evaluate": pictures(32, 2), "threads": 1}
    with pytest.raises(BudgetError, match=r"latency|no combination"):
        hwopt.compile(model, out=tmp_path / "a", budget=Budget(0.5, latency_seconds=1e-9), **data)
    assert not (tmp_path / "a").exists()


def test_reachable_latency_budgets_are_reached(model: Path) -> None:
    data = {"calibrate": pictures(16, 1), "evaluate": pictures(64, 2), "target": "cortex-a72"}
    free = plan_model(model, budget=Budget(0.3), **data).plan
    for share in (0.9, 0.6):
        limit = free.seconds_before * share
        plan = plan_model(model, budget=Budget(0.3, latency_seconds=limit), **data).plan
        assert free.seconds_after < plan.seconds_after <= limit or plan.seconds_after <= limit


def test_limits_hold_for_stated_passes_too(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="weights"):
        hwopt.compile(model, out=tmp_path / "a", passes="quantize{}", calibrate=pictures(8, 1), budget=Budget(weight_bytes=10))


def test_every_output_counts(tmp_path: Path) -> None:
    graph = small_net()
    edit = graph.edit()
    two = dataclasses.replace(edit.finish("same"), outputs=("y", "f"))
    save(two, tmp_path / "two.onnx")
    found = plan_model(tmp_path / "two.onnx", calibrate=pictures(16, 1), evaluate=pictures(32, 2), budget=Budget(0.5))
    errors = {text: one.error for one in found.plan.decisions for text in one.by if "third" in text or "second" in text}
    assert errors and all(error > 0 for error in errors.values())
    assert found.comparison is not None and found.comparison.metric == "cosine similarity"


def test_one_set_of_data_is_halved_between_choosing_and_judging(model: Path) -> None:
    job = prepare(model, "host", None, None, pictures(16, 1), None, None, None, 1, 0, quiet)
    assert job.ctx.calibration is not None and job.evaluation is not None
    chosen, judged = job.ctx.calibration.arrays["x"], job.evaluation.arrays["x"]
    assert len(chosen) == len(judged) == 8
    assert not any((row == other).all() for row in chosen for other in judged)


def test_a_model_without_anything_to_change_is_compiled_as_it_is(tmp_path: Path) -> None:
    nodes = (Node("Relu", ("x",), ("y",), "relu"),)
    save(
        infer_types(Graph("lone", ("x",), ("y",), nodes, {"x": TensorType("float32", (1, 8))}, {}, {"": 21})),
        tmp_path / "lone.onnx",
    )
    data = {"x": np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)}
    artifact = hwopt.compile(tmp_path / "lone.onnx", out=tmp_path / "a", calibrate=data, evaluate=data, threads=1)
    assert artifact.plan["decisions"] == []
    assert any(note.startswith("nothing was changed") for note in artifact.report["notes"])


def test_plans_are_the_same_for_the_same_seed(model: Path) -> None:
    data: Mapping[str, object] = {"calibrate": pictures(16, 1), "evaluate": pictures(32, 2), "budget": Budget(0.1)}
    first, second = (plan_model(model, target="cortex-a72", **data).plan.to_json() for _ in range(2))
    assert first == second


def test_foreign_hardware_is_planned_but_not_compiled(model: Path, tmp_path: Path) -> None:
    for target in ("nvidia-t4", "systolic-16x16", "cortex-a72"):
        found = plan_model(model, target=target, calibrate=pictures(16, 1), evaluate=pictures(32, 2), budget=Budget(0.1))
        assert found.plan.target == target
        assert found.plan.seconds_after <= found.plan.seconds_before
    with pytest.raises(UnsupportedError, match="no code generator for asic"):
        hwopt.compile(model, out=tmp_path / "x", target="ethos-u55")
    assert not (tmp_path / "x").exists()


def test_a_folder_of_somebody_else_is_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="precious"):
        hwopt.compile(model, out=tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_interrupted_search_keeps_the_best_plan(model: Path) -> None:
    def impatient(stage: str, done: int, total: int) -> None:
        if stage == "solving and measuring" and done == 0:
            raise KeyboardInterrupt

    found = plan_model(model, calibrate=pictures(16, 1), evaluate=pictures(64, 2), budget=Budget(0.02), progress=impatient)
    uniform = {"int8", "bfloat16"} & set(
        find_target("host").microkernels
    )  # scored before the first round, twice if the budget is missed
    assert 1 <= len(found.plan.rounds) <= 2 * len(uniform)
    assert found.plan.note.startswith("interrupted: the best plan of")


def test_cleaning_keeps_the_outputs(model: Path) -> None:
    graph = load(model)
    feeds = {"x": pictures(1, 3)["x"]}
    before, after = Session(graph).run(feeds)["y"], Session(clean(graph, Context())).run(feeds)["y"]
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-5)


def test_what_plain_c_cannot_run_goes_to_the_virtual_machine(tmp_path: Path) -> None:
    nodes = (Node("TopK", ("x", "k"), ("values", "indices"), "top"),)
    params = {"k": frozen(np.array([3], np.int64))}
    types = {"x": TensorType("int64", (2, 9))}
    graph = infer_types(Graph("sorts", ("x",), ("values", "indices"), nodes, types, params, {"": 21}))
    save(graph, tmp_path / "sorts.onnx")
    artifact = hwopt.compile(tmp_path / "sorts.onnx", out=tmp_path / "a", threads=1)
    assert artifact.kind == "vm" and "top (TopK): sorts" in artifact.manifest["reason"]
    assert any("virtual machine" in note for note in artifact.report["notes"])
    x = np.random.default_rng(0).permutation(18).reshape(2, 9)
    found, wanted = artifact.run({"x": x}), Session(graph).run({"x": x})
    for name in ("values", "indices"):
        np.testing.assert_array_equal(found[name], wanted[name])


def test_report_reads_back_as_json(compiled: hwopt.Artifact) -> None:
    assert json.loads((compiled.path / "report.json").read_text()) == compiled.report
    assert compare("x", np.ones(3), np.ones(3)).drop == 0


@pytest.mark.parametrize(("one", "said"), [(1e-3, True), (1.9e-3, False)])
def test_a_library_that_is_faster_on_one_thread_says_so(
    compiled: hwopt.Artifact, monkeypatch: pytest.MonkeyPatch, one: float, said: bool
) -> None:
    timed = {"1": Timing(one, one, one, 40), "2": Timing(2e-3, 2e-3, 2e-3, 40)}
    monkeypatch.setattr("hwopt.report.outcome.interleaved", lambda runners: [run() for run in runners.values()] and timed)
    monkeypatch.setattr("hwopt.report.outcome.sample_feeds", lambda job, built: {"x": pictures(1, 3)["x"]})
    built = SimpleNamespace(kind="c", artifact=compiled, library=SimpleNamespace(name="small"))
    notes = _alone_faster(cast(Any, SimpleNamespace(threads=2)), cast(Any, built), cast(Any, built))
    assert bool(notes) == said
    assert not said or notes[0].startswith("one thread is faster here: 1 ms against 2 ms on 2")
