"""Preprocessing in front of a model: what it computes, what it refuses, and where it is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import hwopt
from hwopt.backends.ort import Session
from hwopt.errors import UsageError
from hwopt.io.onnx import read, save
from hwopt.io.preprocess import Preprocess, folded, parse_preprocess, preprocess_of
from hwopt.ir import Graph
from hwopt.job import clean
from hwopt.pipeline import Context
from tests.random_graphs import Builder
from tests.test_compiler import small_net

TEXT = "mean=0.5,0.4,0.3,std=0.2,0.25,0.3,scale=1/255,layout=nhwc"
PIXELS = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3)).astype(np.uint8)


def by_hand(pixels: np.ndarray) -> np.ndarray:
    values = (pixels.astype(np.float64) / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.3]
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2), np.float32)


def test_text_and_preprocess_are_inverses() -> None:
    found = parse_preprocess(TEXT)
    assert found == Preprocess((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), 1 / 255, "nhwc")
    assert parse_preprocess(str(found)) == found


@pytest.mark.parametrize("cleaned", [False, True])
def test_the_model_takes_pixels_and_computes_the_same(cleaned: bool) -> None:
    graph = small_net()
    changed = folded(graph, parse_preprocess(TEXT))
    changed = clean(changed, Context()) if cleaned else changed
    assert str(changed.tensor("x")) == "uint8[1,16,16,3]"
    wanted = Session(graph).run({"x": by_hand(PIXELS)})["y"]
    np.testing.assert_allclose(Session(changed).run({"x": PIXELS})["y"], wanted, rtol=1e-4, atol=1e-4)


def unpadded() -> Graph:
    build = Builder()
    image = build.input((1, 3, 8, 8), name="x")
    weight = build.param(np.random.default_rng(1).standard_normal((4, 3, 3, 3)).astype(np.float32))
    build.outputs = [build.op("Conv", [image, weight], (1, 4, 6, 6), kernel_shape=(3, 3))]
    return build.graph()


def test_shift_and_factor_disappear_in_an_unpadded_convolution() -> None:
    changed = clean(folded(unpadded(), parse_preprocess(TEXT)), Context())
    assert [node.op for node in changed.nodes] == ["Transpose", "Cast", "Conv"]


def test_a_padded_convolution_takes_the_factor_alone() -> None:
    changed = clean(folded(small_net(), parse_preprocess(TEXT)), Context())
    assert [node.op for node in changed.nodes][:4] == ["Transpose", "Cast", "Sub", "Conv"]


def test_float_pixels_in_the_models_own_layout_need_neither_cast_nor_transpose() -> None:
    changed = folded(small_net(), parse_preprocess("mean=127,std=128,dtype=float32"))
    assert [node.op for node in changed.nodes][:3] == ["Sub", "Mul", "Conv"]
    assert preprocess_of(changed) == Preprocess((127.0,), (128.0,), 1.0, "nchw", "float32", "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mean=1,2", "2 numbers for 3 channels"),
        ("mena=1", "unknown option 'mena'; did you mean mean"),
        ("0.5,mean=1", "unknown option ''"),
        ("mean=a", "'a' is no number"),
        ("std=1/0", "'1/0' is no number"),
        ("std=0", "std or scale of zero"),
        ("mean=1,mean=2", "mean is given twice"),
        ("layout=nwhc", "did you mean nhwc"),
        ("dtype=int8", "pixels of type 'int8'"),
        ("layout=nhwc,nchw", "layout takes one value"),
        ("mean=1,input=y", "input 'y' takes"),
        ("scale=1,dtype=float32", "changes nothing"),
    ],
)
def test_what_means_nothing_is_a_usage_error(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        folded(small_net(), parse_preprocess(text))


def test_it_is_folded_once() -> None:
    with pytest.raises(UsageError, match="preprocesses its input already"):
        folded(folded(small_net(), parse_preprocess("mean=1")), parse_preprocess("mean=1"))


def test_the_shipped_library_takes_pixels_and_says_so(tmp_path: Path) -> None:
    save(small_net(), tmp_path / "net.onnx")
    calibrate = {"x": np.random.default_rng(2).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)}
    artifact = hwopt.compile(
        tmp_path / "net.onnx",
        out=tmp_path / "a",
        preprocess=TEXT,
        calibrate=calibrate,
        passes="quantize{}",
        threads=1,
        measure=False,
    )
    assert [str(one.type) for one in artifact.inputs] == ["uint8[1,16,16,3]"]
    shipped = read(tmp_path / "a" / "model.onnx")
    np.testing.assert_allclose(artifact.run({"x": PIXELS})["y"], Session(shipped).run({"x": PIXELS})["y"], rtol=0.1, atol=0.05)
    wanted = Session(small_net()).run({"x": by_hand(PIXELS)})["y"]
    assert np.corrcoef(artifact.run({"x": PIXELS})["y"].ravel(), wanted.ravel())[0, 1] > 0.99
    assert artifact.manifest["preprocess"] == artifact.report["preprocess"] == shipped.metadata["hwopt.preprocess"]
    assert (
        "the model computes (pixel * 0.00392156863 - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.3]"
        in (tmp_path / "a" / "net.h").read_text()
    )
    original = artifact.manifest["original"]
    assert (original["file"], original["graph_digest"]) == ("net.onnx", artifact.plan["graph_digest"])
