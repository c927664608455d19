"""hwopt evaluate: the library that ships beside its float model, in every number it tells."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hwopt
from hwopt.artifact import Artifact
from hwopt.backends.ort import Session
from hwopt.errors import UsageError
from hwopt.evaluate import divergences
from hwopt.evaluation import evaluate_artifact, summary
from hwopt.evaluation.calibration import bin_table, calibration_data, expected_error
from hwopt.evaluation.changed import write_png
from hwopt.evaluation.classes import class_data
from hwopt.evaluation.outputs import interval_of
from hwopt.evaluation.page import page
from hwopt.io.onnx import save
from hwopt.io.preprocess import folded, parse_preprocess
from hwopt.ir import Graph
from tests.test_cli import hwopt as command
from tests.test_compiler import pictures, small_net

NAMES = tuple("abcdefghij")


@functools.cache
def net() -> Graph:
    """A float model whose answers differ from picture to picture: the mean of its logits is zero."""
    graph = small_net()
    session = Session(graph)
    logits = np.concatenate([session.run({"x": image[None]})["y"] for image in pictures(40, 2)["x"]])
    edit = graph.edit()
    edit.set_param("b4", -logits.mean(0))
    return edit.finish("test")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized artifact and the float model that it was compiled from."""
    folder = tmp_path_factory.mktemp("evaluate")
    save(net(), folder / "net.onnx")
    options: dict[str, Any] = {"calibrate": pictures(8, 1), "passes": "quantize{}", "threads": 1, "measure": False}
    hwopt.compile(folder / "net.onnx", out=folder / "artifact", **options)
    return folder


def labelled(count: int = 40) -> dict[str, np.ndarray]:
    """Pictures with the float model's own answers as labels, every eighth one wrong."""
    images = pictures(count, 2)["x"]
    session = Session(net())
    answers = np.array([int(session.run({"x": image[None]})["y"].argmax()) for image in images])
    answers[::8] = (answers[::8] + 1) % 10
    return {"x": images, "labels": answers, "classes": np.array(NAMES)}


@pytest.fixture(scope="module")
def report(place: Path) -> dict[str, Any]:
    return evaluate_artifact(
        place / "artifact", labelled(), robustness=("gaussian-noise", "jpeg"), severities=(1, 5), attacks=("fgsm", "pgd"),
        epsilon=32 / 255, steps=3, save_changed_to=place / "changed", keep=4,
    )  # fmt: skip


def test_the_library_that_ships_is_what_is_scored(place: Path, report: dict[str, Any]) -> None:
    data, library = labelled(), Artifact(place / "artifact")
    answers = np.array([int(library.run({"x": image[None]})["y"].argmax()) for image in data["x"]])
    score = report["score"]
    assert score["float"]["score"] == pytest.approx(35 / 40)
    assert score["compressed"]["score"] == pytest.approx((answers == data["labels"]).mean())
    assert score["samples"] == 40 and score["float"]["interval"][0] < 35 / 40 < score["float"]["interval"][1]
    lost = int(((answers != data["labels"]) & (np.arange(40) % 8 != 0)).sum())
    assert score["paired_flips"]["right_to_wrong"] == lost
    original = np.where(np.arange(40) % 8 == 0, (data["labels"] - 1) % 10, data["labels"])
    assert report["difference"]["flips"] == int((answers != original).sum())
    assert report["library_sha256"] == library.manifest["files"][library.manifest["library"]]


def test_a_report_is_data_and_text_and_a_page(report: dict[str, Any]) -> None:
    again = json.loads(json.dumps(report, allow_nan=False))
    assert "paired flips:" in summary(again) and "pgd made on the compressed model" in summary(again)
    html = page(again)
    assert html.count("data:image/png;base64,") == len(report["changed"]["rows"])
    assert all(word in html for word in ("Calibration", "Corruptions", "Attacks", "Who pays", "Most changed samples"))


def test_the_most_changed_samples_come_first_and_are_saved(place: Path, report: dict[str, Any]) -> None:
    rows = report["changed"]["rows"]
    assert len(rows) == 4 and rows == sorted(rows, key=lambda row: -row["divergence"])
    assert rows[0]["divergence"] == pytest.approx(report["difference"]["largest"])
    saved = np.load(place / "changed" / "changed.npz")
    data = labelled()
    np.testing.assert_array_equal(saved["input_x"], data["x"][saved["sample"]])
    wanted = Artifact(place / "artifact").run({"x": data["x"][saved["sample"][0]][None]})["y"][0]
    np.testing.assert_array_equal(saved["compressed"][0], wanted)
    assert sorted(path.name for path in (place / "changed").glob("*.png")) == sorted(row["picture"] for row in rows)


def test_corruptions_and_attacks_hurt_the_more_the_stronger(report: dict[str, Any]) -> None:
    noise = {row["severity"]: row for row in report["robustness"] if row["corruption"] == "gaussian-noise"}
    assert noise[5]["float"]["score"] <= noise[1]["float"]["score"] <= report["score"]["float"]["score"]
    attacks = {(row["attack"], row["made_on"]): row for row in report["attacks"]}
    assert len(attacks) == 4 and not report["refused"]
    assert attacks["pgd", "float"]["float"]["score"] <= attacks["fgsm", "float"]["float"]["score"]
    assert attacks["fgsm", "float"]["float"]["score"] < report["score"]["float"]["score"]


def test_without_labels_the_float_model_is_the_measure(place: Path) -> None:
    found = evaluate_artifact(place / "artifact", {"x": labelled()["x"]}, attacks=("fgsm",), model=place / "net.onnx")
    assert found["score"]["metric"] == "top-1 agreement" and found["score"]["float"]["score"] == 1
    assert "calibration" not in found and found["classes"]["by"] == "the float model's answer"
    assert found["attacks"][0]["metric"] == "top-1 agreement with the float model on clean samples"


def test_the_original_is_found_by_its_contents_or_asked_for(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = Artifact(place / "artifact").publish(tmp_path / "inner" / "deep" / "moved")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"net.onnx is not here, or was changed since; give --model float.onnx"):
        evaluate_artifact(moved, labelled(8))
    (tmp_path / "net.onnx").write_bytes((place / "net.onnx").read_bytes())
    assert not evaluate_artifact(moved, labelled(8))["notes"][1:]  # but that there are few samples


def test_another_float_model_is_noted_and_one_that_does_not_fit_refused(place: Path, tmp_path: Path) -> None:
    graph = net()
    other = graph.edit()
    other.set_param("b4", np.ones(10, np.float32))
    notes = evaluate_artifact(place / "artifact", labelled(8), model=other.finish("test"))["notes"]
    assert "not the graph that the artifact was compiled from" in notes[0]
    pixels = folded(graph, parse_preprocess("mean=1"))
    with pytest.raises(UsageError, match=r"takes and gives x: uint8\[1,3,16,16\]"):
        evaluate_artifact(place / "artifact", labelled(8), model=pixels)


def test_preprocessing_is_done_before_a_library_that_lacks_it(place: Path) -> None:
    data = labelled()
    shades = np.rint(data["x"] * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    inside = evaluate_artifact(place / "artifact", {**data, "x": shades.transpose(0, 3, 1, 2).astype(np.float32) / 255})
    outside = evaluate_artifact(place / "artifact", {**data, "x": shades}, preprocess="scale=1/255,layout=nhwc")
    assert outside["score"]["compressed"] == inside["score"]["compressed"]
    assert outside["difference"]["mean"] == pytest.approx(inside["difference"]["mean"], rel=1e-2)


def test_a_function_of_run_scores_by_itself(place: Path) -> None:
    found = evaluate_artifact(place / "artifact", "tests.test_evaluation:own_score")
    assert found["score"]["metric"] == "own_score" and found["score"]["samples"] == 3 and "difference" not in found


def own_score(run: Any) -> list[float]:
    return [float(run({"x": image[None]})["y"].max()) for image in pictures(3, 5)["x"]]


def test_the_command_writes_all_of_it(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **labelled(8))
    files = ("--json", tmp_path / "e.json", "--report", tmp_path / "e.html", "--save-changed", tmp_path / "changed")
    arguments = ("--data", tmp_path / "data.npz", "--robustness", "blur", "--severities", "2", "--keep", "2")
    code, out, err = command(capsys, "evaluate", place / "artifact", *arguments, *files)
    assert (code, err.count("Traceback")) == (0, 0), err
    assert "top-1 accuracy on 8 samples" in out and "blur (severity 2)" in out
    assert json.loads((tmp_path / "e.json").read_text())["score"]["samples"] == 8
    assert "Who pays" in (tmp_path / "e.html").read_text() and (tmp_path / "changed" / "changed.npz").exists()
    code, out, _ = command(capsys, "evaluate", place / "artifact", "--data", tmp_path / "data.npz", "--json", "-")
    assert code == 0 and json.loads(out)["artifact"] == "net"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--data", "none.npz"), 5, "none.npz: no such file"),
        (("--data", "none.npz", "--robustness", "blurr"), 2, "did you mean blur?"),
        (("--data", "none.npz", "--attack", "pdg"), 2, "did you mean pgd?"),
        (("--data", "none.npz", "--severities", "0-3"), 2, "not within 1 to 5"),
        (("--data", "none.npz", "--epsilon", "much"), 2, "write 2/255 or 0.01"),
        (("--data", "{data}", "--robustness", "characters"), 2, "tokenizer=module:function"),
        (("--data", "{data}", "--model", "none.onnx"), 3, "none.onnx: no such file"),
        (("--data", "{data}", "--save-changed", "{folder}"), 5, "holds something else"),
        ((), 2, "Missing option '--data'"),
    ],
)
def test_what_cannot_be_evaluated_is_said_at_once(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, arguments: tuple, code: int, message: str
) -> None:
    np.savez(tmp_path / "data.npz", **labelled(8))
    filled = [text.format(data=tmp_path / "data.npz", folder=place) for text in arguments]
    found, _, err = command(capsys, "evaluate", place / "artifact", *filled)
    assert found == code and message in err


# The parts


def test_calibration_error_is_the_weighted_gap_between_confidence_and_accuracy() -> None:
    sure = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    right = np.array([1.0, 1, 1, 0, 1, 0])
    assert expected_error(sure, right, 10) == pytest.approx((4 * 0.20 + 2 * 0.05) / 6)
    count, confidence, accuracy = bin_table(np.array([0.0, 0.1, 0.1001, 1.0]), np.array([0.0, 1, 1, 1]), 10)
    assert count.tolist() == [2, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert (confidence[0], accuracy[0]) == (pytest.approx(0.05), 0.5)


def test_an_overconfident_model_has_the_larger_calibration_error() -> None:
    random = np.random.default_rng(0)
    logits = random.standard_normal((400, 4)) * 2
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([random.choice(4, p=row) for row in chances])  # the softmax tells the truth
    found = calibration_data((logits, logits * 4), labels, 0)
    assert found["float"]["ece"] < 0.06 < found["compressed"]["ece"]
    assert found["ece_change_interval"][0] > 0
    chosen = np.log(chances[np.arange(400), labels])
    assert found["float"]["negative_log_likelihood"] == pytest.approx(-chosen.mean())


def test_classes_that_lose_most_come_first_and_chance_is_told_from_loss() -> None:
    groups = np.repeat([0, 1, 2], 20)
    before, after = np.ones(60), np.ones(60)
    after[20:32], before[40] = 0, 0
    found = class_data(groups, before, after, ("red", "green", "blue"), "label")
    assert [row["name"] for row in found["rows"]] == ["green", "red", "blue"]
    assert found["worst"] == ["green"] == found["significant"] and (found["losing"], found["gaining"]) == (1, 1)
    assert found["rows"][0]["mcnemar_p"] == pytest.approx(2 * 0.5**12)
    assert found["rows"][0]["holm_p"] == pytest.approx(3 * 2 * 0.5**12)


def test_the_interval_of_a_share_never_leaves_zero_to_one() -> None:
    assert interval_of(np.ones(10)) == (pytest.approx(0.7225, abs=1e-4), 1.0)  # Wilson's
    low, high = interval_of(np.array([0.1, 0.2, 0.4]))  # type: ignore[misc]
    assert low < 0.7 / 3 < high and interval_of(np.array([1.0])) is None


def test_pictures_are_written_without_pillow_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("matplotlib.image")
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    shades = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
    with monkeypatch.context() as patch:
        patch.setattr(image, "imsave", lambda path, array, **_: np.save(path.with_suffix(".npy"), array))
        write_png(tmp_path / "a.png", shades)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), shades)


def test_coarse_probabilities_are_probabilities_where_the_float_models_are() -> None:
    exact = np.random.default_rng(0).dirichlet(np.ones(10), 50)
    coarse = np.round(exact * 256) / 256
    assert abs(coarse.sum(1) - 1).max() > 2e-3 and divergences(exact, coarse).mean() < 0.01
    found = calibration_data((exact, coarse), exact.argmax(1), 0)
    assert found["compressed"]["mean_confidence"] == pytest.approx(found["float"]["mean_confidence"], abs=2e-3)
