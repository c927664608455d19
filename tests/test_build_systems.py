"""hwopt as a build step: CMake with Ninja and Makefiles, Meson, make; the right rebuilds, the same bytes, nothing else needed."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from hwopt.backends.tvm.learn.model import Learned
from hwopt.cache import Cache
from hwopt.cli import main
from hwopt.delivery import compiler_of, deliver
from hwopt.depends import dependencies
from hwopt.io.onnx import load
from hwopt.plan.plan import interrupted
from hwopt.plugins import find_target
from hwopt.samples import write_npz

EXAMPLES = Path(__file__).parent / "build_systems"
ROOT = Path(__file__).parent.parent


def needs(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def environment(folder: Path) -> dict[str, str]:
    """hwopt and the tools beside this Python come first; a cache of the test's own."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "HWOPT_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}


def call(*command: object, folder: Path, **more: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**environment(folder), **more},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def models(folder: Path) -> None:
    """small.onnx, a convolution, with data; other.onnx, a matmul whose weights lie in a file beside it."""
    random = np.random.default_rng(0)
    weights = {"w": random.standard_normal((8, 3, 3, 3)), "v": random.standard_normal((8, 4))}
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "v"], ["classes"]),
    ]
    onnx.save(model(nodes, weights, ("image", [1, 3, 8, 8]), ("classes", [1, 4])), folder / "small.onnx")
    image = random.random((40, 3, 8, 8)).astype(np.float32)
    write_npz(folder / "small.npz", {"image": image, "labels": random.integers(0, 4, 40)})
    other = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": random.standard_normal((6, 2))}, ("x", [1, 6]), ("y", [1, 2])
    )
    onnx.save(other, folder / "other.onnx", save_as_external_data=True, location="other.data", size_threshold=0)


def model(nodes, weights, entry, result):
    ends = [helper.make_tensor_value_info(name, 1, shape) for name, shape in (entry, result)]
    tensors = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "model", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the example's sources and models."""
    folder = tmp_path / "project"
    folder.mkdir()
    models(folder)
    for name in ("main.c", "main.cc"):
        shutil.copy(EXAMPLES / name, folder)
    return folder


def built_at(folder: Path, *names: str) -> dict[str, int]:
    return {name: (folder / name).stat().st_mtime_ns for name in names}


def touch(path: Path) -> None:
    """Newer than everything there is, whatever the clock's grain."""
    newest = max(file.stat().st_mtime_ns for file in path.parent.rglob("*") if file.is_file())
    stamp = max(newest, time.time_ns()) + 1_000_000
    os.utime(path, ns=(stamp, stamp))


def test_meson_builds_the_same_program(project):
    needs("meson", "ninja")
    if os.uname().machine != "x86_64":
        pytest.skip("the example states x86-64-v3")
    shutil.copy(EXAMPLES / "meson/meson.build", project)
    call("meson", "setup", "build", folder=project)
    call("meson", "compile", "-C", "build", folder=project)
    call("meson", "test", "-C", "build", folder=project)
    assert "no work to do" in call("ninja", "-C", "build", folder=project)
    touch(project / "other.data")
    call("ninja", "-C", "build", folder=project)
    assert "no work to do" in call("ninja", "-C", "build", folder=project)


def test_make_and_pkg_config_build_a_program_that_needs_nothing_but_libc(project):
    needs("make", "pkg-config", "ldd")
    if os.uname().machine != "x86_64":
        pytest.skip("the example states x86-64-v3")
    shutil.copy(EXAMPLES / "make/Makefile", project)
    call("make", folder=project)
    assert "up to date" in call("make", folder=project)
    needed = {line.split()[0].rpartition("/")[2] for line in call("ldd", "./app", folder=project).splitlines()}
    assert needed <= {"linux-vdso.so.1", "libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2"}
    shown = subprocess.run(["./app"], cwd=project, env={"PATH": "/nowhere"}, capture_output=True, text=True, check=True).stdout
    y = load(project / "other.onnx").params["w"]
    np.testing.assert_allclose([float(word) for word in shown.split()[4:]], np.arange(6, dtype=np.float32) @ y, rtol=1e-5)


def compiled(project: Path, out: Path, *more: str) -> dict[str, bytes]:
    call(
        sys.executable, "-m", "hwopt", "compile", project / "small.onnx", "--name", "small", "-o", out, "--no-measure",
        "--emit", "shared,static,object,source,pc", "--calibrate", project / "small.npz", "--evaluate", project / "small.npz",
        "--max-drop", "50%", *more, folder=project,
    )  # fmt: skip
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_two_builds_in_two_folders_and_processes_give_the_same_bytes(project, tmp_path):
    first = compiled(project, tmp_path / "here" / "one")
    shutil.rmtree(project / "cache")
    moved = tmp_path / "elsewhere"
    project.rename(moved)
    second = compiled(moved, tmp_path / "there" / "two")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert not any(str(tmp_path).encode() in data for data in first.values())


BUILDS = """
import sys
import time
from pathlib import Path
from hwopt.cache import Cache
from hwopt.delivery import deliver
from hwopt.plan.budget import Budget
project, out, first = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
for number in range(first, first + 4):
    deliver(project / "small.onnx", out / str(number), cache=Cache(project / "cache"), measure=False, seed=number % 2)
"""


def test_sixteen_parallel_builds_share_one_cache(project, tmp_path):
    command = [sys.executable, "-c", BUILDS, project, tmp_path]
    running = [subprocess.Popen([*command, str(first)], env=environment(project)) for first in range(0, 16, 4)]
    assert [process.wait() for process in running] == [0] * 4
    found = [{path.name: path.read_bytes() for path in (tmp_path / str(number)).iterdir()} for number in range(16)]
    assert all(one == found[number % 2] for number, one in enumerate(found))
    assert len(list((project / "cache/artifacts").iterdir())) == 2


def test_what_was_interrupted_is_built_again_and_not_kept(project, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    cache, data = Cache(project / "cache"), project / "small.npz"
    options = {"cache": cache, "measure": False, "calibrate": data, "evaluate": data, "target": "x86-64-v3"}
    with monkeypatch.context() as patched:
        patched.setattr("hwopt.plan.search._polish", stopped)
        first, _ = deliver(project / "small.onnx", tmp_path / "first", **options)
    assert interrupted(first.plan["note"])
    second, cached = deliver(project / "small.onnx", tmp_path / "second", **options)
    assert not cached and not interrupted(second.plan["note"])
    assert deliver(project / "small.onnx", tmp_path / "third", **options)[1]


def test_a_damaged_entry_of_the_cache_is_built_again(project, tmp_path, monkeypatch, capsys):
    first = compiled(project, tmp_path / "first")
    (entry,) = (project / "cache/artifacts").iterdir()
    (entry / "libsmall.so").write_bytes(b"half")
    assert compiled(project, tmp_path / "second") == first
    monkeypatch.setenv("HWOPT_CACHE_DIR", str(project / "cache"))
    with pytest.raises(SystemExit):
        main(["cache", "--prune"])
    assert not list((project / "cache/artifacts").iterdir())


def test_the_cmake_package_states_the_version_of_the_project():
    version = re.search(r'^version = ("[^"]+")$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert version in (ROOT / "hwopt/cmake/hwoptConfigVersion.cmake").read_text()


@pytest.mark.parametrize("text", ["", "pc", "statik", "shared,dll"])
def test_unknown_products_are_refused_before_any_work(text, project):
    with pytest.raises(SystemExit) as stopped:
        main(["compile", str(project / "small.onnx"), "-o", str(project / "out"), "--emit", text])
    assert stopped.value.code == 2
    assert not (project / "out").exists()


def test_what_prices_are_read_from_is_an_input_too(project, tmp_path):
    table = tmp_path / "table.json"
    table.write_text("{}")
    target = find_target("x86-64-v2")
    priced = dataclasses.replace(target, cost=Learned(table, target.cost, target.microkernels))
    assert table in dependencies(project / "small.onnx", {"target": priced})
    assert table not in dependencies(project / "small.onnx", {"target": target})


def test_another_cross_compiler_is_another_key(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = []
    for version in ("12.2", "13.1"):
        for compiler in ("aarch64-linux-gnu-gcc", "cc"):
            (tmp_path / compiler).write_text(f"#!/bin/sh\necho {compiler} {version}\n")
            (tmp_path / compiler).chmod(0o755)
        found.append(compiler_of("cortex-a72"))
    assert found == ["aarch64-linux-gnu-gcc aarch64-linux-gnu-gcc 12.2", "aarch64-linux-gnu-gcc aarch64-linux-gnu-gcc 13.1"]
