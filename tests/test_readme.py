"""The README tells the truth: its commands run, its files are the real ones."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hwopt
from hwopt.io.onnx import save
from tests.test_compiler import small_net

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README assumes: a model of one's own with data."""
    folder = tmp_path_factory.mktemp("readme")
    graph = small_net()
    random = np.random.default_rng(0)
    images = random.random((48, 3, 32, 32), np.float32)
    save(_renamed(graph), folder / "model.onnx")
    np.savez(folder / "calibrate.npz", input=images[:16])
    np.savez(folder / "evaluate.npz", input=images[16:], labels=random.integers(0, 10, 32))
    np.savez(folder / "train.npz", input=images[:16])
    np.savez(folder / "sample.npz", input=images[:1])
    return folder


def _renamed(graph):  # type: ignore[no-untyped-def]
    """The test model with the README's names: input `input`, a layer `middle`, free height and width."""
    import dataclasses

    from hwopt.ir import TensorType, infer_types

    nodes = []
    for node in graph.nodes:
        inputs = tuple("input" if value == "x" else value for value in node.inputs)
        nodes.append(dataclasses.replace(node, inputs=inputs, name="middle" if node.name == "second" else node.name))
    types = {"input": TensorType("float32", ("batch", 3, "height", "width"))}
    fresh = dataclasses.replace(graph, name="model", inputs=("input",), nodes=tuple(nodes), types=types)
    return infer_types(fresh)


def test_every_command_of_the_readme_runs(workplace: Path) -> None:
    if (workplace / "result.npz").exists():
        return
    ours = [line for line in commands() if line.startswith("hwopt ")]
    assert len(ours) >= 10
    for line in ours:
        done = subprocess.run(
            [sys.executable, "-m", *shlex.split(line)], cwd=workplace, capture_output=True, text=True, timeout=300, check=False
        )
        allowed = (0, 1) if line.startswith("hwopt diff") else (0,)
        assert done.returncode in allowed, f"{line}\n{done.stderr}"
    assert (workplace / "result.npz").exists()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_c_example_runs_and_computes_what_python_does(workplace: Path) -> None:
    test_every_command_of_the_readme_runs(workplace)
    (workplace / "main.c").write_text(blocks("c")[0])
    flags = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-Ibuild/model", "-Lbuild/model", "-lmodel"]
    line = ["cc", "main.c", *flags, f"-Wl,-rpath,{workplace}/build/model", "-o", "example"]
    subprocess.run(line, cwd=workplace, check=True)
    done = subprocess.run(["./example"], cwd=workplace, env={}, capture_output=True, text=True, check=True)
    zeros = {"input": np.zeros((1, 3, 32, 32), np.float32)}
    first = next(iter(hwopt.Artifact(workplace / "build/model").run(zeros).values())).ravel()[0]
    assert float(done.stdout) == pytest.approx(float(first), abs=1e-5)


def test_make_targets_of_the_readme_exist() -> None:
    for line in (line for line in commands() if line.startswith("make ")):
        done = subprocess.run([*shlex.split(line), "-n"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_python_example_runs(workplace: Path) -> None:
    example = next(block for block in blocks("python") if "hwopt.compile" in block)
    picture = "import numpy; picture = numpy.load('sample.npz')['input']\n"
    done = subprocess.run([sys.executable, "-c", picture + example], cwd=workplace, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", ["passes/dedupe_weights.py", "targets/systolic_16x16.py"])
def test_shown_files_are_the_real_ones(file: str) -> None:
    assert (ROOT / file).read_text() in blocks("python")


def test_no_other_command_hides_in_the_readme() -> None:
    assert all(line.startswith(("hwopt ", "make ")) for line in commands())
