"""The command line as a user meets it: what it prints, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hwopt import errors
from hwopt.cli import main
from hwopt.demo import MODEL
from tests.test_toml_target import CPU


def hwopt(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


IMAGE = ("--shape", "image=1,1,28,28")


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).random((count, 1, 28, 28), np.float32)


def test_a_target_shows_its_figures_and_a_kind_of_file_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = hwopt(capsys, "targets", "cortex-a72")
    assert "memory lpddr4" in out and "4 GB/s" in out
    _, out, _ = hwopt(capsys, "targets", "gpu", "--json")
    keys = {row["key"]: row for row in json.loads(out)["rows"]}
    assert keys["[[memories]]"]["default"] == "needed" and keys["launch_seconds"]["default"] == "3e-06"
    assert keys["arch"]["value"].startswith("'sm_75' or")
    code, _, err = hwopt(capsys, "targets", "cortex-a73")
    assert code == 2 and "did you mean cortex-a7" in err


def test_a_file_of_a_target_is_shown_as_it_was_understood_or_refused_by_its_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    good, bad = tmp_path / "mine.toml", tmp_path / "other.toml"
    good.write_text(CPU)
    bad.write_text('name = "mine"\nkind = "asic"\n')
    code, out, _ = hwopt(capsys, "targets", good)
    assert code == 0 and "my-board: a board with two caches" in out and "memory dram" in out
    code, _, err = hwopt(capsys, "targets", bad)
    assert code == 2 and "other.toml:2: kind" in err and "systolic" in err


def test_passes_and_targets_are_listed_as_data(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = hwopt(capsys, "passes", "--json")
    names = [row["name"] for row in json.loads(out)]
    assert code == 0 and {"prune-channels", "low-rank", "share-weights", "quantize"} <= set(names)
    code, out, _ = hwopt(capsys, "targets", "--json")
    assert code == 0 and {row["kind"] for row in json.loads(out)} == {"cpu", "gpu", "asic"}


def test_one_pass_is_shown_with_all_it_can_be_told(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = hwopt(capsys, "passes", "quantize", "--json")
    shown = json.loads(out)
    options = {row["option"]: row for row in shown["options"]}
    assert code == 0 and "Weights: int8, symmetric" in shown["description"]
    assert options["dtype"] | {"searched": ""} == {
        "option": "dtype", "type": "word", "default": "int8", "choices": "int8, bf16", "searched": "",
    }  # fmt: skip
    assert "auto" in options["calibrator"]["choices"] and options["dynamic"]["type"] == "true or false"
    code, out, _ = hwopt(capsys, "passes", "low-rank")
    assert code == 0 and "integer or word" in out and "tucker, cp" in out and "break-even" in out
    code, _, err = hwopt(capsys, "passes", "lowrank")
    assert code == 2 and "did you mean low-rank?" in err


def test_a_way_to_recover_shows_what_it_can_be_told(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = hwopt(capsys, "passes", "lottery")
    assert code == 0 and "Frankle" in out and "epochs" in out
    code, out, _ = hwopt(capsys, "passes", "distill", "--json")
    assert code == 0 and {"temperature", "lr"} <= {row["option"] for row in json.loads(out)["options"]}


def test_every_pass_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = hwopt(capsys, "passes", "--json")
    for row in json.loads(out):
        code, _, _ = hwopt(capsys, "passes", row["name"])
        assert code == 0


def test_a_name_that_had_to_change_is_noted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    line = ("compile", MODEL, *IMAGE, "--passes", "none", "--no-measure", "--emit", "source")
    for name, note in (("my model", "became my_model"), ("mine", "")):
        code, _, err = hwopt(capsys, *line, "-o", tmp_path / name, "--name", name)
        assert code == 0 and ("became" in err) == bool(note) and note in err


def test_print_shows_every_layer(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = hwopt(capsys, "print", MODEL)
    assert code == 0
    assert "input image: float32[s77,1,28,28]" in out
    assert "@dense.0.first" in out


def test_print_shows_the_history_of_an_artifact(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    made = tmp_path / "made"
    passes = ("--passes", "low-rank{site=head,rank=4,method=plain}", "--no-measure")
    assert hwopt(capsys, "compile", MODEL, "-o", made, *passes, *IMAGE)[0] == 0
    plain, told = (hwopt(capsys, "print", made, *more)[1] for more in ((), ("--history",)))
    assert "; low-rank{" in told and "; low-rank{" not in plain
    code, _, err = hwopt(capsys, "print", MODEL, "--history")
    assert code == 2 and "print an artifact's folder" in err


def test_every_exit_code_is_explained_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.HwoptError)]
    code, out, _ = hwopt(capsys, "--help")
    lines = out.partition("Exit codes:")[2].splitlines()
    explained = {int(line.split()[0]): line for line in lines if line.strip()}
    assert code == 0 and explained.keys() == errors.EXIT_CODES.keys() >= {kind.exit_code for kind in kinds}
    assert len({kind.exit_code for kind in kinds} - {1}) == len(kinds) - 2  # VerifyError and PassError share one


def test_apply_diff_and_print_work_on_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = tmp_path / "small.onnx"
    passes = "low-rank{site=head,rank=4,method=plain}"
    code, out, err = hwopt(capsys, "apply", MODEL, "-o", small, "--passes", passes, *IMAGE)
    assert (code, out.strip()) == (0, f"wrote {small}"), err
    code, out, _ = hwopt(capsys, "diff", MODEL, small)
    assert code == 1 and "head" in out
    assert hwopt(capsys, "diff", small, small) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("compile", "nowhere.onnx", "-o", "x"), 3, "nowhere.onnx"),
        (("compile", MODEL, "-o", "x"), 2, "--shape image="),
        (("compile", MODEL, "-o", "x", *IMAGE, "--max-drop", "1"), 2, "--max-drop: 1 would be the whole score; write 1% or 0.01"),
        (("compile", MODEL, "-o", "x", *IMAGE, "--target", "hots"), 2, "did you mean host?"),
        (("compile", MODEL, "-o", "x", *IMAGE, "--passes", "quantise"), 2, "did you mean quantize?"),
        (("compile", MODEL, "-o", "x", "--shape", "image=1,x"), 2, "write --shape input=1,3,224,224"),
        (("compile", MODEL, "-o", "x", "--shape", "imgae=1,1,28,28"), 2, "image"),
        (("compile", MODEL, "-o", "x", *IMAGE, "--budget", "size=1"), 2, "write a number and one of B"),
        (("compile", MODEL, "-o", "x", *IMAGE, "--max-drop", "many"), 2, "write 1% or 0.01"),
        (("compile", MODEL, "-o", "x", *IMAGE, "--calibrate", "none.npz"), 5, "none.npz: no such file"),
        (("compile", MODEL, "-o", "x", *IMAGE, "--target", "ethos-u55"), 4, "hwopt plan and hwopt apply work for it"),
        (("compile", MODEL, "-o", "x", *IMAGE, "--plan", "none.json"), 2, "none.json: no such file"),
        (("compile", MODEL), 2, "Missing option"),
        (("compile", "nowhere.onnx", "-o", "x", "--no-heap"), 2, "run serially: --parallel serial"),
        (
            ("compile", "nowhere.onnx", "-o", "x", "--name", "int"),
            2,
            "--name: 'int' is a word of C or C++",
        ),
        (("compile", "nowhere.onnx", "-o", "x", "--name", "--"), 2, "'--' has no letter"),
        (("explain", MODEL), 2, "is no text; give an artifact's folder or a plan.json"),
        (("explain", "none.json"), 2, "give an artifact's folder or a plan.json"),
        (("compile", MODEL, "-o", "x", *IMAGE, "--plan", "none.json"), 2, "hwopt plan writes one"),
        (
            ("compile", MODEL, "-o", "x", *IMAGE, "--target", "nope.toml"),
            2,
            "no such target file; hwopt targets lists",
        ),
        (("apply", MODEL, "-o", "x.onnx", *IMAGE), 2, "give --plan plan.json or --passes"),
        (("explain", "none.json"), 2, "none.json: no such file"),
        (("run", "nowhere", "in.npz", "out.npz"), 8, "nowhere"),
        (("frobnicate",), 2, "No such command"),
    ],
)
def test_bad_input_is_one_clear_message(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple,
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    found, out, err = hwopt(capsys, *arguments)
    assert (found, out) == (code, "")
    assert message in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"picture": images(4)}, "lacks input 'image'"),
        ({"image": images(4), "extra": images(4)}, "no input 'extra'"),
        ({"image": images(4).astype(np.float64)}, "is float64, the model takes float32"),
        ({"image": images(4)[:, 0]}, "has 3 dimensions"),
        ({"image": images(4)[..., :27]}, "has shape [4, 1, 28, 27]"),
        ({"image": images(0)}, "0 samples"),
        ({"image": images(4), "labels": np.zeros(3, np.int64)}, "3 labels for 4 samples; give one label for each"),
        ({"image": images(4), "labels": np.eye(4)}, "labels have shape [4, 4]"),
        ({"image": images(4), "labels": np.full(4, 0.5)}, "label 0.5 of sample 0 is no class index (4 of 4 are none)"),
        ({"image": images(4), "labels": np.array([0, 1, -1, 2])}, "label -1 of sample 2 is no class index (1 of 4"),
        ({"image": images(4), "labels": np.array(["a"] * 4)}, "are no class indices"),
        ({"image": np.where(images(4) > 0.5, np.nan, images(4)).astype(np.float32)}, "holds nan at"),
    ],
)
def test_data_that_do_not_fit_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    file = npz(tmp_path / "data.npz", **arrays)
    code, _, err = hwopt(capsys, "compile", MODEL, "-o", tmp_path / "x", *IMAGE, "--calibrate", file)
    assert code == 5
    assert message in err and "data.npz" in err
    assert not (tmp_path / "x").exists()


def test_damaged_data_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = npz(tmp_path / "data.npz", image=images(4))
    file.write_bytes(file.read_bytes()[:200])
    code, _, err = hwopt(capsys, "compile", MODEL, "-o", tmp_path / "x", *IMAGE, "--calibrate", file)
    assert code == 5 and "not a readable .npz" in err
    file.write_text("a page of text")
    *_, err = hwopt(capsys, "compile", MODEL, "-o", tmp_path / "x", *IMAGE, "--calibrate", file)
    assert "not a readable .npz" in err and "pickle" not in err


def test_scoring_function_is_found_where_the_user_stands(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def score(run):\n    return 0.5\n")
    command = "import sys; sys.path.remove(''); from hwopt.cli import main; main()"
    data = npz(tmp_path / "data.npz", image=images(8))
    line = [sys.executable, "-c", command, "plan", str(MODEL), "-o", "plan.json", *IMAGE, "--calibrate", str(data)]
    done = subprocess.run(
        [*line, "--passes", "quantize{}", "--evaluate", "mine:score"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plan.json").exists()
