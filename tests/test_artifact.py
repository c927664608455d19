"""The artifact: written whole or not at all, refused when damaged or foreign, run as it ships."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hwopt.artifact import Artifact, check_destination, write_artifact
from hwopt.emit import Library, build_library
from hwopt.emit.cpu import host_features, host_machine
from hwopt.emit.engine import aligned_empty
from hwopt.errors import ArtifactError, DataError, UsageError
from tests._kernels import constant, program

X = np.arange(40, dtype=np.float32)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Library:
    made = program(("add", "x", "w", "t"), ("tasks", "t", "u"), ("add", "t", "u", "y"), buffers={"w": constant("w", X + 1)})
    return build_library(made, tmp_path_factory.mktemp("built") / "library", threads=2)


@pytest.fixture
def write(library) -> Callable:
    def written(folder: Path, **options) -> Artifact:
        told = {"target": "host", "model": b"onnx", "plan": {"decisions": []}, "report": {"speedup": 2.0}, "graph": "graph m"}
        return write_artifact(folder, options.pop("library", library), **{**told, **options})

    return written


def edited(folder: Path, **fields) -> None:
    """The same artifact with other words in its manifest."""
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# ----------------------------------------------------------------------------------------------------------------- running


def test_what_was_written_is_read_and_runs(write, tmp_path):
    write(tmp_path / "a")
    artifact = Artifact(tmp_path / "a")
    np.testing.assert_array_equal(artifact.run({"x": X})["y"], X * 2 + 1 + 2)
    assert (artifact.kind, artifact.plan, artifact.report) == ("c", {"decisions": []}, {"speedup": 2.0})
    assert (artifact.path / "model.onnx").read_bytes() == b"onnx" and (artifact.path / "graph.txt").read_text() == "graph m"
    assert str(artifact.inputs[0].type) == "float32[40]"
    assert repr(artifact) == "Artifact(m, host, x: float32[40] -> y: float32[40])"


def test_the_manifest_says_what_the_library_is_and_needs(write, tmp_path, library):
    manifest = write(tmp_path / "a", kind="c", reason="").manifest
    assert manifest["machine"] == host_machine() and manifest["threads"] == 2 and manifest["features"] == []
    assert (manifest["peak_activation_bytes"], manifest["weight_bytes"]) == (library.arena_bytes, 160)
    assert set(manifest["versions"]) >= {"hwopt", "apache-tvm", "numpy"}
    present = {p.relative_to(tmp_path / "a").as_posix() for p in (tmp_path / "a").rglob("*")}
    assert set(manifest["files"]) == present - {"manifest.json"} >= {"m.h", "m.c", "m_weights.bin", "plan.json", "report.json"}


def test_arrays_of_any_memory_layout_give_the_same_outputs(write, tmp_path):
    artifact = write(tmp_path / "a")
    odd = aligned_empty((41,), np.dtype("float32"))[1:]
    odd[:] = X
    for array in (odd, np.repeat(X, 2)[::2], np.asfortranarray(X)):
        np.testing.assert_array_equal(artifact.run({"x": array})["y"], X * 2 + 3)


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({}, r"m: missing input x: float32\[40\]"),
        ({"x": X, "z": X}, "the model has no input 'z'; did you mean x|known: x"),
        ({"x": X[:39]}, r"x: input has the shape \[39\], the model takes float32\[40\]"),
        ({"x": X.reshape(1, 40)}, r"the shape \[1, 40\]"),
        (
            {"x": X.astype(np.float64)},
            r"x: input is float64, the model takes float32\[40\]; convert it with .astype\('float32'\)",
        ),
        ({"x": X.astype(">f4")}, "input is >f4"),
        ({"x": list(range(40))}, "input is int64"),
    ],
)
def test_inputs_that_are_not_the_models_are_refused(inputs, text, write, tmp_path):
    with pytest.raises(DataError, match=text):
        write(tmp_path / "a").run(inputs)


def test_threads_share_one_artifact(write, tmp_path):
    artifact, wrong = write(tmp_path / "a"), []

    def work(start: int) -> None:
        for _ in range(100):
            found = artifact.run({"x": X + start})["y"] - start
            if not set(np.unique(found - X * 2)) <= {2.0, 3.0}:  # 1 + the number of tasks: busy workers leave one task
                wrong.append(found)

    workers = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_model_compiled_again_to_the_same_folder_is_not_mistaken_for_the_old_one(write, tmp_path, library):
    folder = tmp_path / "a"
    first = write(folder)
    assert first.run({"x": X})["y"][0] == 3
    other = build_library(program(("double", "x", "y")), tmp_path / "other")
    second = write(folder, library=other)
    np.testing.assert_array_equal(second.run({"x": X})["y"], X * 2)
    assert first.run({"x": X})["y"][0] == 3  # the old one goes on with the library it has loaded


def test_bench_reports_seconds_and_uses_the_threads_asked_for(write, tmp_path):
    artifact = write(tmp_path / "a")
    found = artifact.bench(runs=5, warmup=1, threads=1)
    assert 0 < found["min_seconds"] <= found["median_seconds"] and found["iqr_seconds"] >= 0
    assert (found["runs"], found["threads"]) == (5, 1)
    assert artifact.bench({"x": X}, runs=2)["threads"] == 2
    for options in ({"runs": 0}, {"warmup": -1}, {"threads": 1000}):
        with pytest.raises(UsageError):
            artifact.bench(**options)


def test_a_runner_holds_its_arrays_and_checks_them_once(write, tmp_path):
    artifact = write(tmp_path / "a")
    run = artifact.runner({"x": X[::-1]})  # a copy that nobody else holds
    for _ in range(3):
        run()
    with pytest.raises(DataError):
        artifact.runner({})


# ----------------------------------------------------------------------------------------------------------------- refusals


def test_a_changed_or_missing_file_is_named(write, tmp_path):
    for name in ("libm.so", "plan.json", "m_weights.bin"):
        folder = tmp_path / name
        write(folder)
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)
        with pytest.raises(ArtifactError, match=rf"{name}: damaged: its SHA-256 is not the manifest's"):
            Artifact(folder)
        (folder / name).unlink()
        with pytest.raises(ArtifactError, match=rf"{name}: damaged: the file is missing"):
            Artifact(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": "other"}', b"\xff\xfe", b"null"])
def test_a_broken_manifest_is_refused(content, write, tmp_path):
    write(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"manifest.json: (damaged|not an artifact)"):
        Artifact(tmp_path / "a")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"version": 99}, "artifact format 99; this hwopt reads version 1"),
        ({"files": {"../secret": ""}}, "names a file outside of it: ../secret"),
        ({"files": {"/etc/passwd": ""}}, "outside of it: /etc/passwd"),
        ({"library": "other.so"}, "outside of it: other.so"),
        ({"inputs": 3}, "damaged: inputs is missing or no list"),
        ({"inputs": [{"name": "x"}]}, "damaged: inputs and outputs"),
        ({"outputs": [{"name": "x", "dtype": "float33", "shape": [1]}]}, "damaged: inputs and outputs"),
        ({"outputs": [{"name": "x", "dtype": "int8", "shape": 4}]}, "damaged: inputs and outputs"),
        ({"features": ["a_feature_of_2040"]}, "needs a_feature_of_2040, which this processor lacks; .*target host"),
        ({"machine": "pdp11"}, "is for pdp11, this machine is"),
    ],
)
def test_a_foreign_artifact_is_refused_with_the_reason(fields, text, write, tmp_path):
    write(tmp_path / "a")
    edited(tmp_path / "a", **fields)
    with pytest.raises(ArtifactError, match=text):
        Artifact(tmp_path / "a")


def test_the_report_of_an_artifact_for_another_machine_can_be_read_but_it_does_not_run(write, tmp_path):
    write(tmp_path / "a")
    edited(tmp_path / "a", machine="pdp11")
    artifact = Artifact(tmp_path / "a", foreign=True)
    assert artifact.report == {"speedup": 2.0}
    with pytest.raises(ArtifactError, match="is for pdp11"):
        artifact.run({"x": X})


def test_what_is_no_artifact_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="nowhere: no such artifact"):
        Artifact(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="file: no such artifact"):
        Artifact(tmp_path / "file")
    with pytest.raises(ArtifactError, match="not an artifact: it has no manifest"):
        Artifact(tmp_path)


# ------------------------------------------------------------------------------------------------------------------ writing


def test_an_older_artifact_is_replaced_and_nothing_else_is_left(write, tmp_path):
    write(tmp_path / "a", report={"old": 1}, files={"extra/notes.txt": b"notes"})
    assert write(tmp_path / "a").report == {"speedup": 2.0}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert not (tmp_path / "a" / "extra").exists()


def test_a_folder_that_holds_anything_else_is_left_alone(write, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    write(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, text in (("home", "thesis.tex"), ("a", "notes.txt"), ("file", "is a file")):
        with pytest.raises(ArtifactError, match=text):
            check_destination(tmp_path / name)
        with pytest.raises(ArtifactError, match=text):
            write(tmp_path / name)
    assert (tmp_path / "home" / "thesis.tex").exists() and (tmp_path / "a" / "notes.txt").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"home", "a", "file"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt("Ctrl-C")])
def test_an_interrupted_write_leaves_the_old_artifact_and_no_litter(error, write, tmp_path, monkeypatch):
    write(tmp_path / "a", report={"old": 1})
    plain, calls = shutil.copyfile, []

    def failing(source, destination):
        calls.append(source)
        if len(calls) == 3:
            raise error
        return plain(source, destination)

    monkeypatch.setattr(shutil, "copyfile", failing)
    with pytest.raises(
        (ArtifactError, KeyboardInterrupt), match="No space left on device" if isinstance(error, OSError) else None
    ):
        write(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert Artifact(tmp_path / "a").report == {"old": 1}


def test_a_swap_that_fails_half_way_puts_the_old_artifact_back(write, tmp_path, monkeypatch):
    write(tmp_path / "a", report={"old": 1})
    plain, calls = Path.rename, []

    def failing(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return plain(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ArtifactError, match="Input/output error"):
        write(tmp_path / "a")
    assert Artifact(tmp_path / "a").report == {"old": 1}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_an_error_with_its_name(write, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ArtifactError, match="cannot be written: Permission denied"):
        write(tmp_path / "a")


def test_publish_writes_the_same_library_with_a_later_report(write, tmp_path):
    first = write(tmp_path / "a", report={})
    second = first.publish(tmp_path / "b", report={"speedup": 3.0})
    assert second.report == {"speedup": 3.0} and second.plan == first.plan
    assert Artifact(tmp_path / "b").run({"x": X})["y"][0] == 3
    first.publish(tmp_path / "a", plan={"decisions": [1]})  # onto itself
    assert Artifact(tmp_path / "a").plan == {"decisions": [1]}


def test_two_artifacts_of_the_same_model_have_the_same_bytes(write, tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()


# ------------------------------------------------------------------------------------------------- TVM's virtual machine


@pytest.fixture(scope="module")
def machine_library(tmp_path_factory) -> Library:
    """y = x + x for any number of rows, and the rows sorted: neither is for plain C."""
    tvm = pytest.importorskip("tvm")
    from tvm import relax

    from hwopt.emit import Tensor
    from hwopt.ir import TensorType

    builder, rows = relax.BlockBuilder(), tvm.tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType((rows, 4), "float32"))
    with builder.function("main", [x]):
        y, z = builder.emit(relax.op.add(x, x)), builder.emit(relax.op.sort(x, 1))
        builder.emit_func_output(relax.Tuple([y, z]))
    target = tvm.target.Target({"kind": "llvm", "mtriple": f"{host_machine()}-linux-gnu"})
    folder = tmp_path_factory.mktemp("vm")
    relax.build(builder.get(), target).export_library(str(folder / "sum.so"))
    kind = TensorType("float32", ("n", 4))
    return Library(
        name="sum", folder=folder, files=("sum.so",), shared="sum.so", machine=host_machine(), features=(), threads=1,
        inputs=(Tensor("x", kind),), outputs=(Tensor("y", kind), Tensor("z", kind)),
        arena_bytes=0, workspace_bytes=0, weight_bytes=0,
    )  # fmt: skip


def test_an_artifact_for_the_virtual_machine_runs_by_the_same_call(write, tmp_path, machine_library):
    artifact = write(tmp_path / "a", library=machine_library, kind="vm", reason="dynamic shapes")
    assert (artifact.kind, artifact.manifest["reason"]) == ("vm", "dynamic shapes")
    for rows in (2, 5):
        x = np.random.default_rng(rows).standard_normal((rows, 4), np.float32)
        found = artifact.run({"x": x})
        np.testing.assert_array_equal(found["y"], x + x)
        np.testing.assert_array_equal(found["z"], np.sort(x, 1))
    assert artifact.bench(runs=2, warmup=0)["median_seconds"] > 0
    with pytest.raises(DataError, match="the shape"):
        artifact.run({"x": np.zeros((2, 5), np.float32)})
    with pytest.raises(UsageError, match="TVM_NUM_THREADS"):
        artifact.bench(runs=1, threads=7)


def test_the_features_of_this_machine_are_known():
    assert len(host_features()) > 3


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("processor : 0\nflags\t\t: fpu avx2\nprocessor : 1\nflags : fpu\n", "fpu avx2"),
        ("processor : 0\nFeatures : half neon vfpv4\n", "half neon vfpv4"),
        ("hart : 0\nisa : rv64imafdc_zicsr_zba\nmmu : sv39\n", "i m a f d c"),
        ("nothing", ""),
    ],
)
def test_the_features_of_other_machines_are_read(tmp_path, text, wanted):
    (tmp_path / "cpuinfo").write_text(text)
    assert host_features(tmp_path / "cpuinfo") == frozenset(wanted.split())
