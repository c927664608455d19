"""Loading and saving: ONNX files and their faults, torch modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from hwopt.backends import ort
from hwopt.errors import ModelError, UsageError
from hwopt.io.onnx import load, read, save
from tests._io import assert_same_outputs, relu
from tests.mutations import convolutions
from tests.node_cases import same

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("external", [False, True])
def test_a_saved_model_gives_the_same_bits(tmp_path: Path, external: bool) -> None:
    model = convolutions(21)
    model.graph.initializer.add().CopyFrom(onnx.numpy_helper.from_array(RNG.standard_normal((40, 40)), "unread"))
    onnx.helper.set_model_props(model, {"charset": "abc"})
    path = tmp_path / "m.onnx"
    save(read(model), path, external=external)
    again = read(path)
    assert again.digest == read(model).digest
    assert dict(again.metadata) == {"charset": "abc"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"][: 1 + external]
    value = RNG.standard_normal((1, 3, 8, 8)).astype(np.float32)
    session = ort.onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    original = ort.onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert same(original.run(None, {"x": value}), session.run(None, {"x": value}))


def test_above_protobufs_limit_the_weights_go_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hwopt.io.files.LARGEST_PROTO", 400)  # the kernel alone has 432 bytes
    monkeypatch.setattr("hwopt.io.files.INLINE_BYTES", 100)
    save(read(convolutions(21)), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").stat().st_size >= 432
    assert read(tmp_path / "m.onnx").digest == read(convolutions(21)).digest
    x = np.ones((1, 3, 8, 8), np.float32)
    assert_same_outputs(convolutions(21), read(tmp_path / "m.onnx"), x)  # the session goes through a file, too


def test_external_weights_of_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save_model(convolutions(21), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert read(path).digest == read(convolutions(21)).digest


def test_truncated_external_data_name_file_and_weight(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save_model(convolutions(21), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "w.bin").write_bytes((tmp_path / "w.bin").read_bytes()[:100])
    with pytest.raises(ModelError, match=r"m\.onnx: w\.bin is cut short: w ends at byte 432, the file at 100; copy"):
        load(path)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelError, match=r"external data of w are missing: no file w\.bin"):
        load(path)


@pytest.mark.parametrize("place", ["../secret", "/etc/passwd", ""])
def test_external_data_outside_the_folder_are_refused(tmp_path: Path, place: str) -> None:
    model = convolutions(21)
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], place)
    (tmp_path / "secret").write_bytes(bytes(1000))
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="points outside the model's folder"):
        load(path)


def test_unreadable_files_are_named_with_the_reason(tmp_path: Path) -> None:
    faults = {"absent.onnx": "no such file", ".": "is a directory", "empty.onnx": "is empty", "text.onnx": "not an ONNX model"}
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "text.onnx").write_text("this is no model " * 20)
    for name, reason in faults.items():
        with pytest.raises(ModelError, match=reason) as caught:
            load(tmp_path / name)
        assert caught.value.place == str(tmp_path / name)
        assert caught.value.hint


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(convolutions(21).SerializeToString()[:-40])
    with pytest.raises(ModelError, match="cut short"):
        load(path)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ModelError, match="No space left on device"):
        save(read(relu(2)), path)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_bytes() == b"old"


def test_saving_into_a_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be written: No such file"):
        save(read(relu(2)), tmp_path / "absent" / "m.onnx")


def test_a_torch_module_and_its_exported_program_load(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.SiLU(), torch.nn.Dropout()
    )
    module.train()
    module[0].eval()
    x = torch.randn(1, 3, 8, 8)
    graph = load(module, inputs=(x,))
    assert module.training
    assert not module[0].training
    expected = module.eval()(x).detach().numpy()
    np.testing.assert_allclose(ort.run(graph, {graph.inputs[0]: x.numpy()})[graph.outputs[0]], expected, rtol=1e-4, atol=1e-6)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "m.pt2")
    again = load(tmp_path / "m.pt2")
    np.testing.assert_allclose(ort.run(again, {again.inputs[0]: x.numpy()})[again.outputs[0]], expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(UsageError, match="needs example inputs"):
        load(module)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    with pytest.raises(UsageError, match="int is no model"):
        load(3)
    (tmp_path / "m.pt2").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="not a torch program"):
        load(tmp_path / "m.pt2")


def test_onnx_files_load_without_torch_and_its_absence_is_told(tmp_path: Path) -> None:
    save(read(convolutions(21)), tmp_path / "m.onnx")
    code = f"""
import sys
sys.modules["torch"] = None
from hwopt.io.onnx import load
from hwopt.errors import UsageError
assert load({str(tmp_path / "m.onnx")!r}).nodes
try:
    load({str(tmp_path / "m.pt2")!r})
except UsageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install hwopt[torch]" in done.stdout
