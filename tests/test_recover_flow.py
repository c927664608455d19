"""Recovery in a compilation: deeper plans are trained, the plan has it on record and replays, nothing worse is shipped."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import hwopt
from hwopt.cli import cli
from hwopt.compiler import apply_model, plan_model
from hwopt.decide import replayed
from hwopt.delivery import _key
from hwopt.depends import dependencies
from hwopt.errors import BudgetError, DataError, UnsupportedError, UsageError
from hwopt.io.onnx import load, read, save
from hwopt.io.proto import to_model
from hwopt.job import prepare, quiet, with_training
from hwopt.plan.budget import Budget
from hwopt.plan.explain import explain
from hwopt.plan.plan import Plan, Recovery, plan_from_json
from hwopt.plan.search import Found
from hwopt.recover import Lottery, Outcome
from hwopt.recover.recipe import Distill
from hwopt.recovery import Trainer, relaxed
from hwopt.samples import write_npz
from tests._recover import blobs, trained_net
from tests.random_graphs import Builder

pytest.importorskip("torch")
RECIPE = "distill{epochs=6,batch=32,lr=0.003,threads=1,checks=4}"


def data(count: int, seed: int, labels: bool = False) -> dict[str, np.ndarray]:
    found = blobs(count, seed)
    assert found.labels is not None
    return {**found.arrays, **({"labels": found.labels} if labels else {})}


OPTIONS: dict[str, Any] = {
    "calibrate": data(320, 1), "evaluate": data(240, 2, True), "threads": 1, "passes": "prune-channels",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def unrepaired() -> Iterator[None]:
    """Cuts that are not made up for, so that there is something left to train."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("passes.prune_channels.repair", lambda work, samples: None)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    save(trained_net(), path)
    return path


@pytest.fixture(scope="module")
def compiled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> hwopt.Artifact:
    out = tmp_path_factory.mktemp("out") / "artifact"
    return hwopt.compile(model, out=out, budget=Budget(0.02), measure=False, recover=RECIPE, **OPTIONS)


def plan_of(artifact: hwopt.Artifact) -> Plan:
    return plan_from_json((artifact.path / "plan.json").read_text())


def test_a_plan_too_deep_without_training_is_shipped_with_it(compiled: hwopt.Artifact, model: Path) -> None:
    plan = plan_of(compiled)
    usual = plan_model(model, budget=Budget(0.02), **OPTIONS)
    assert plan.recovery and plan.seconds_after < usual.plan.seconds_after
    assert compiled.report["baseline"]["score"] - plan.recovery.score_before > 0.02 >= compiled.report["score_drop"]
    assert compiled.report["result"]["score"] == pytest.approx(plan.recovery.score_after)
    assert "prune-channels" in plan.families and plan.budget == Budget(0.02)


def test_the_plan_and_the_report_name_the_training(compiled: hwopt.Artifact) -> None:
    plan = plan_of(compiled)
    assert plan.recovery and f"by {plan.recovery.recipe}" in explain(plan)
    assert compiled.report["recovery"]["recipe"] == plan.recovery.recipe
    assert any(note.startswith("recovered: top-1 accuracy") for note in compiled.report["notes"])
    assert "until=" in plan.recovery.recipe and "distill{" in (compiled.path / "graph.txt").read_text()


def test_a_plan_with_training_replays_to_the_same_bytes(compiled: hwopt.Artifact, model: Path, tmp_path: Path) -> None:
    again = hwopt.compile(model, out=tmp_path / "again", measure=False, plan=compiled.path / "plan.json", **OPTIONS)
    for name in ("model.onnx", "libtiny.so", "tiny.c", "graph.txt", "plan.json"):
        assert (again.path / name).read_bytes() == (compiled.path / name).read_bytes(), name
    graph, _ = apply_model(model, plan=compiled.path / "plan.json", **{**OPTIONS, "passes": None})
    assert graph.digest == read(compiled.path / "model.onnx").digest


def test_a_plan_with_training_needs_data_and_says_when_they_are_others(compiled: hwopt.Artifact, model: Path) -> None:
    plan = compiled.path / "plan.json"
    with pytest.raises(UsageError, match="no data to train on"):
        apply_model(model, plan=plan)
    short = json.loads(plan.read_text())
    short["recovery"]["recipe"] = "distill{steps=2,until=2,batch=32,threads=1}"
    other = plan_from_json(json.dumps(short))
    given = {**OPTIONS, "calibrate": data(320, 3)}
    job = prepare(model, "host", None, None, given["calibrate"], given["evaluate"], None, None, 1, 0, quiet)
    found = replayed(with_training(job, None, replay=other), dataclasses.replace(other, calibration_digest=""))
    assert "trained on other data" in found.plan.note


def test_stated_passes_are_trained_too_and_only_kept_if_they_gain(model: Path) -> None:
    stated = {**OPTIONS, "passes": "quantize{weights=int4}"}
    found, plain = (plan_model(model, recover=recipe, **stated) for recipe in (RECIPE, None))
    assert found.plan.recovery is None or found.comparison.score >= plain.comparison.score
    harmful = plan_model(model, recover="distill{epochs=1,lr=5,warmup=0,batch=32,threads=1}", **stated)
    assert harmful.plan.recovery is None and harmful.graph.digest == plain.graph.digest


# a target that is stated: what widths are worth anything is another question on every processor
def test_a_size_that_no_plan_reaches_untrained_is_reached_with_training(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("passes.quantize.INT4_OPSET", 99)  # with 4 bits a layer, plans of any size lose little here
    budget = Budget(0.03, weight_bytes=5500)
    with pytest.raises(BudgetError):
        plan_model(model, target="x86-64-v3", budget=budget, **OPTIONS)
    found = plan_model(model, target="x86-64-v3", budget=budget, recover=RECIPE, **OPTIONS)
    assert found.plan.recovery and found.comparison and found.comparison.drop <= 0.03


def test_a_budget_that_training_cannot_keep_either_says_what_came_of_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("passes.quantize.INT4_OPSET", 99)
    brief = "distill{steps=8,batch=32,lr=0.001,threads=1,checks=1}"
    with pytest.raises(BudgetError, match=r"nearest plans.*no trained plan keeps it either \(\d tried, the least drop \+"):
        stated = OPTIONS | {"passes": "prune-channels,quantize"}
        plan_model(model, target="x86-64-v3", budget=Budget(0.0005, weight_bytes=5500), recover=brief, **stated)


def test_deeper_budgets_keep_the_other_limits() -> None:
    found = relaxed(Budget(0.01, weight_bytes=100))
    assert [round(one.max_drop, 3) for one in found] == [0.12, 0.04, 0.015] and {one.weight_bytes for one in found} == {100}
    assert [one.max_drop for one in relaxed(Budget(0.0))] == pytest.approx([0.06, 0.02, 0.0075])
    assert relaxed(Budget(0.6)) == ()


def test_recipes_are_checked_before_any_long_work(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean distill"):
        hwopt.compile(model, out=tmp_path / "a", recover="distil", **OPTIONS)
    with pytest.raises(UsageError, match="no data to train on"):
        hwopt.compile(model, out=tmp_path / "a", recover="distill")
    with pytest.raises(UsageError, match="without a recipe"):
        hwopt.compile(model, out=tmp_path / "a", train=data(8, 1), **OPTIONS)


def test_labels_that_fit_no_class_are_named_before_any_long_work(model: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    wrong = data(48, 2, True) | {"labels": np.full(48, 7)}
    for options in (
        {"evaluate": wrong},
        {"recover": "qat", "train": wrong},
        {"recover": "qat", "train": [(data(16, 1), [-1] * 16)]},
    ):
        with pytest.raises(DataError, match=r"label (7|-1) for a model with \d classes"):
            hwopt.compile(model, out=tmp_path / "a", progress=lambda *at: stages.append(at[0]), **{**OPTIONS, **options})
    assert set(stages) == {"loading"}


def test_no_graph_is_trained_twice(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []
    same = lambda case, recipe: trained.append(case.graph.digest) or Outcome(case.graph, recipe, 0.0)  # noqa: E731
    monkeypatch.setattr("hwopt.recovery.recovered", same)
    job = prepare(model, "host", None, None, data(32, 1), None, None, None, 1, 0, quiet)
    trainer, graph = Trainer(with_training(job, "distill"), None, None), load(model)
    found = [Found(Plan("host", 1, "", Budget(0.01), 0), graph, None)] * 2
    assert [trainer.train(one, 0) for one in found] == [None, None] and len(trained) == 1


def test_a_model_without_gradients_is_refused_before_any_long_work(tmp_path: Path) -> None:
    build = Builder()
    build.outputs.append(build.op("Multinomial", [build.input((1, 4))], (1, 1), dtype=6))
    job = prepare(to_model(build.graph()), "host", None, None, None, None, None, None, 1, 0, quiet)
    with pytest.raises(UnsupportedError, match="no gradients for Multinomial"):
        with_training(job, "distill", {"x0": np.zeros((8, 4), np.float32)})


def test_training_takes_as_many_threads_as_the_job_where_it_was_told_few(model: Path) -> None:
    def threads(target: str, asked: int | None, recipe: str) -> int:
        job = prepare(model, target, None, None, data(32, 1), None, None, None, asked, 0, quiet)
        found = with_training(dataclasses.replace(job, target=dataclasses.replace(job.target, cores=4)), recipe).training.recipe
        assert found is not None
        return found.threads

    assert threads("host", 1, "distill") == 1
    assert threads("host", 4, "distill") == 0
    assert threads("host", 1, "distill{threads=3}") == 3
    assert threads("cortex-a72", 1, "distill") == 0  # which says nothing about this machine


def test_training_leaves_the_number_of_threads_to_torch_and_puts_it_back() -> None:
    torch = pytest.importorskip("torch")
    from hwopt.recover.torch.schedule import settled

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # as OMP_NUM_THREADS=1 does
        with settled(Distill()) as threads:
            assert threads == torch.get_num_threads() == 1
        with settled(Distill(threads=2)) as threads:
            assert threads == torch.get_num_threads() == 2
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_command_line_trains(model: Path, tmp_path: Path) -> None:
    for name, arrays in (("calibrate", data(32, 1)), ("evaluate", data(48, 2, True)), ("train", data(320, 5))):
        write_npz(tmp_path / f"{name}.npz", arrays)
    out = tmp_path / "artifact"
    words = [
        "compile", str(model), "-o", str(out), "--calibrate", str(tmp_path / "calibrate.npz"), "--evaluate",
        str(tmp_path / "evaluate.npz"), "--passes", "quantize{weights=int4}", "--recover", "distill:epochs=4,batch=32,threads=1",
        "--train", str(tmp_path / "train.npz"), "--checkpoints", str(tmp_path / "kept"), "--no-measure", "--threads", "1",
        "--max-drop", "20%", "--json",
    ]  # fmt: skip
    found = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert found.exit_code == 0, found.output
    assert list((tmp_path / "kept").iterdir()) == []  # removed when all was done
    recovery = json.loads(found.stdout)["recovery"]
    assert recovery and recovery["score_after"] >= recovery["score_before"]


def test_training_that_would_not_be_heeded_is_refused(compiled: hwopt.Artifact, model: Path, tmp_path: Path) -> None:
    plan = compiled.path / "plan.json"
    with pytest.raises(UsageError, match="a training of its own"):
        hwopt.compile(model, out=tmp_path / "a", measure=False, plan=plan, recover="qat", **OPTIONS)
    with pytest.raises(UsageError, match="cannot import the loss"):
        plan_model(model, recover="distill{loss=nowhere:loss}", **OPTIONS)
    with pytest.raises(UsageError, match="read only once"):
        plan_model(model, recover="distill", train=iter([data(32, 1)]), **OPTIONS)
    found = plan_model(model, recover="distill", train=data(64, 1), passes="quantize")
    assert ("distill", "there are no data to choose and to judge by") in [(one.by, one.reason) for one in found.plan.refused]


def test_a_training_that_was_for_nothing_is_in_the_report(model: Path, tmp_path: Path) -> None:
    given = {**OPTIONS, "passes": "quantize{weights=int4}", "recover": "distill{epochs=1,lr=5,warmup=0,batch=32,threads=1}"}
    notes = hwopt.compile(model, out=tmp_path / "out", measure=False, **given).report["notes"]
    assert "no training is in it: distill made nothing better that keeps the limits" in notes
    assert any("1 trainings found no better state" in note for note in notes)


def test_a_report_says_what_refused_trainings_came_to(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hwopt.recovery._kept", lambda *_: False)
    found = plan_model(model, budget=Budget(0.02), recover=RECIPE, **OPTIONS).plan
    assert found.recovery is None and "trained plans the least drop was" in found.note


def test_a_plan_says_that_a_training_on_labels_had_none(model: Path) -> None:
    for labels in (False, True):
        found = plan_model(
            model, budget=Budget(0.02), train=data(320, 1, labels), recover=RECIPE.replace("distill", "qat"), **OPTIONS
        ).plan
        assert found.recovery and ("have no labels: qat learned the float model's answers" in found.note) != labels


def test_an_interrupted_training_is_in_the_plan(model: Path) -> None:
    def stopped(stage: str, done: int, total: int) -> None:
        if stage.startswith("recovering"):
            raise KeyboardInterrupt

    found = plan_model(model, budget=Budget(0.02), recover=RECIPE, progress=stopped, **OPTIONS)
    assert "interrupted" in found.plan.note


def test_a_report_says_which_judges_were_teachers_too(model: Path, tmp_path: Path) -> None:
    given = {**OPTIONS, "evaluate": OPTIONS["calibrate"] | {"labels": blobs(320, 1).labels}, "passes": "quantize{weights=int4}"}
    for options, told in ((given, True), ({**given, "evaluate": OPTIONS["evaluate"]}, False)):
        out = tmp_path / str(told)
        notes = hwopt.compile(model, out=out, measure=False, **options).report["notes"]
        assert ("320 of 320 samples that judge were also calibrated with: the score is too kind" in notes) == told


def test_what_a_recipe_reads_is_an_input_and_minutes_are_never_kept(model: Path, tmp_path: Path) -> None:
    recovery = Recovery(str(Lottery(checkpoint=str(model))), "", 0.0, 0.0)
    (tmp_path / "plan.json").write_text(Plan("host", 1, "", Budget(0.01), 0, recovery=recovery).to_json())
    other = tmp_path / "other.onnx"
    other.write_bytes(model.read_bytes())
    assert model.resolve() in dependencies(other, {"plan": tmp_path / "plan.json"})
    assert model.resolve() in dependencies(other, {"recover": str(Lottery(checkpoint=str(model)))})
    assert Path(__file__) in dependencies(other, {"recover": "distill{loss=tests.test_recover_flow:data}"})
    assert _key(other, {"recover": "distill"}) and not _key(other, {"recover": "distill{minutes=1}"})
