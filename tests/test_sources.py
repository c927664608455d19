"""Where samples come from: every kind gives the same pictures, and what does not fit is one clear message."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwopt.depends import dependencies
from hwopt.errors import DataError, HwoptError, UsageError
from hwopt.io.preprocess import folded, parse_preprocess
from hwopt.io.proto import to_model
from hwopt.ir import Graph
from hwopt.job import prepare, quiet
from hwopt.sources import files_of, is_scoring, parse_request, samples_from
from tests.random_graphs import Builder

Image = pytest.importorskip("PIL.Image")
PICTURES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
HERE = "tests.test_sources"


def graph(layout: str = "nhwc") -> Graph:
    build = Builder()
    build.outputs = [build.op("Relu", [build.input((1, 3, 8, 8), name="x")], (1, 3, 8, 8))]
    return folded(build.graph(), parse_preprocess(f"mean=127,layout={layout}"))


def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What a DataLoader yields."""
    yield PICTURES[:3], np.array([2, 0, 1])
    yield PICTURES[3:], np.array([2])


def nothing() -> list[object]:
    return []


def score(run: object) -> float:
    return 1.0


def encode(texts: list[str]) -> dict[str, np.ndarray]:
    return {"x": np.array([[[[len(text)] * 3] * 8] * 8 for text in texts], np.uint8)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, name in enumerate(["cat/b.png", "ant/c.png", "bee/a.png", "cat/a.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(PICTURES[index]).save(tmp_path / name)
    return tmp_path


def test_folders_are_classes_in_their_order(folder: Path) -> None:
    found = samples_from(str(folder), graph())
    assert found.classes == ("ant", "bee", "cat")
    assert found.labels is not None and found.labels.tolist() == [0, 1, 2, 2]
    assert found.rows(slice(1, 3)).files.tolist() == ["bee/a.png", "cat/a.png"]  # type: ignore[union-attr]
    np.testing.assert_array_equal(found.arrays["x"], PICTURES[[1, 2, 3, 0]])
    turned = samples_from(str(folder), graph("nchw")).arrays["x"]
    np.testing.assert_array_equal(turned, found.arrays["x"].transpose(0, 3, 1, 2))


def test_a_list_of_all_classes_decides_about_labels(folder: Path) -> None:
    (folder / "all.txt").write_text("ant\ncat\ndog\nbee\n")
    found = samples_from(f"{folder},classes={folder / 'all.txt'},rows=1::2", graph())
    assert found.labels is not None and found.labels.tolist() == [3, 1]
    assert found.classes == ("ant", "cat", "dog", "bee")


def test_folders_called_by_numbers_are_these_classes(tmp_path: Path) -> None:
    for name in ("0002", "0010"):
        (tmp_path / name).mkdir()
        Image.fromarray(PICTURES[0]).save(tmp_path / name / "a.png")
    found = samples_from(tmp_path, graph())
    assert found.labels is not None and found.labels.tolist() == [2, 10]


def test_pictures_in_one_folder_are_labelled_only_where_that_is_asked_for(tmp_path: Path) -> None:
    for place, name in enumerate(("0417.png", "0005_2.png")):
        Image.fromarray(PICTURES[place]).save(tmp_path / name)
    assert samples_from(str(tmp_path), graph()).labels is None
    named = samples_from(f"{tmp_path},labels=names", graph())
    assert named.labels is not None and named.labels.tolist() == [5, 417]
    (tmp_path / "l.csv").write_text("0417.png,1\n0005_2.png,0\n")
    listed = samples_from(f"{tmp_path},labels={tmp_path / 'l.csv'}", graph())
    assert listed.labels is not None and listed.labels.tolist() == [0, 1]


def test_pictures_of_other_sizes_are_fitted_as_stated(tmp_path: Path) -> None:
    Image.fromarray(np.kron(PICTURES[0], np.ones((2, 3, 1), np.uint8))).save(tmp_path / "a.png")  # 24 wide, 16 high
    with pytest.raises(DataError, match=r"is 24 x 16, the model takes 8 x 8; add ,resize=256"):
        samples_from(str(tmp_path), graph())
    cut = samples_from(f"{tmp_path},resize=16", graph()).arrays["x"][0]
    np.testing.assert_array_equal(cut, np.kron(PICTURES[0], np.ones((2, 3, 1), np.uint8))[4:12, 8:16])
    stretched = samples_from(f"{tmp_path},resize=exact,filter=nearest", graph()).arrays["x"][0]
    np.testing.assert_array_equal(stretched, PICTURES[0])


def test_bytes_mean_nothing_to_a_model_that_takes_floats(folder: Path) -> None:
    build = Builder()
    build.outputs = [build.op("Relu", [build.input((1, 3, 8, 8), name="x")], (1, 3, 8, 8))]
    with pytest.raises(DataError, match=r"pictures hold bytes.*--preprocess"):
        samples_from(str(folder), build.graph())


@pytest.mark.parametrize("how", ["batches", "single", "mappings", "rows", "named"])
def test_iterables_give_what_they_hold(how: str) -> None:
    labels = np.array([2, 0, 1, 2])
    given = {
        "batches": batches(),
        "single": list(zip(PICTURES, labels, strict=True)),
        "mappings": [{"x": PICTURES, "labels": labels}],
        "rows": [{"x": picture, "label": label} for picture, label in zip(PICTURES, labels, strict=True)],
        "named": f"{HERE}:batches",
    }[how]
    found = samples_from(given, graph())
    np.testing.assert_array_equal(found.arrays["x"], PICTURES)
    assert found.labels is not None and found.labels.tolist() == labels.tolist()


def test_a_torch_loader_is_an_iterable_like_any_other() -> None:
    torch = pytest.importorskip("torch")
    pairs = torch.utils.data.TensorDataset(torch.from_numpy(PICTURES), torch.tensor([2, 0, 1, 2]))
    found = samples_from(torch.utils.data.DataLoader(pairs, batch_size=3), graph())
    np.testing.assert_array_equal(found.arrays["x"], PICTURES)
    assert found.labels is not None and found.labels.tolist() == [2, 0, 1, 2]


def test_texts_of_an_npz_become_inputs_and_stay_beside_them(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", texts=np.array(["ab", "abcd"]), labels=np.array([0, 1]), classes=np.array(["short", "long"]))
    found = samples_from(f"{tmp_path / 't.npz'},tokenizer={HERE}:encode", graph())
    assert found.arrays["x"][:, 0, 0, 0].tolist() == [2, 4]
    assert found.texts is not None and found.texts.tolist() == ["ab", "abcd"] and found.encode is encode
    assert found.classes == ("short", "long") and found.rows(slice(1)).texts.tolist() == ["ab"]  # type: ignore[union-attr]


def test_functions_score_if_they_take_run_and_give_data_if_not() -> None:
    assert is_scoring(f"{HERE}:score") and not is_scoring(f"{HERE}:batches")
    assert not is_scoring("folder/file.npz") and not is_scoring(None)


def dataset(folder: Path, *, kind: str) -> str:
    """Pictures, labels with names, as `datasets` stores them."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    files = [io.BytesIO() for _ in PICTURES]
    for picture, file in zip(PICTURES, files, strict=True):
        Image.fromarray(picture).save(file, "PNG")
    features = {"img": {"_type": "Image"}, "label": {"names": ["no", "yes"], "_type": "ClassLabel"}}
    images = [{"bytes": file.getvalue(), "path": None} for file in files]
    table = pyarrow.table({"img": images, "label": [0, 1, 1, 0], "sentence": ["a", "bc", "d", "ef"]})
    if kind == "parquet":
        stored = {"huggingface": json.dumps({"info": {"features": features}})}
        parquet.write_table(table.replace_schema_metadata(stored), folder / "test-00000-of-00001.parquet")
        return str(folder)
    for split in ("train", "test"):
        (folder / split).mkdir()
        with ipc.new_stream(str(folder / split / "data-00000-of-00001.arrow"), table.schema) as writer:
            writer.write_table(table if split == "test" else table.slice(0, 1))
        (folder / split / "dataset_info.json").write_text(json.dumps({"features": features}))
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return f"{folder},split=test"


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_datasets_on_disk_give_pictures_with_the_names_of_classes(tmp_path: Path, kind: str) -> None:
    source = dataset(tmp_path, kind=kind)
    found = samples_from(source, graph())
    np.testing.assert_array_equal(found.arrays["x"], PICTURES)
    assert found.labels is not None and found.labels.tolist() == [0, 1, 1, 0] and found.classes == ("no", "yes")
    texts = samples_from(f"{source},tokenizer={HERE}:encode", graph())
    assert texts.arrays["x"][:, 0, 0, 0].tolist() == [1, 2, 1, 2]
    if kind == "arrow":
        with pytest.raises(UsageError, match="holds 2 parts; add ,split= and one of test, train"):
            samples_from(str(tmp_path), graph())


def test_texts_without_a_tokenizer_are_refused_with_the_way_out(tmp_path: Path) -> None:
    build = Builder()
    build.outputs = [build.op("Relu", [build.input((1, 3), name="ids")], (1, 3))]
    with pytest.raises(DataError, match=r"are not the inputs ids: float32\[1,3\].*,tokenizer=module:function"):
        samples_from(dataset(tmp_path, kind="parquet"), build.graph())


def test_datasets_need_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(UsageError, match=r"need pyarrow; pip install 'hwopt\[evaluate\]'"):
        samples_from(tmp_path / "a.parquet", graph())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "nowhere: no such file"),
        ("nowhere,resise=3", "unknown option 'resise'; did you mean resize"),
        ("nowhere,rows=a", "cannot read rows=a"),
        ("nowhere,filter=soft", "unknown filter 'soft'"),
        ("nowhere:data", "cannot import 'nowhere:data'"),
        (3, "a int is no data"),
        ([], "gives nothing"),
        ([(1, 2, 3)], "3 parts for the inputs x"),
        (lambda: 1 / 0, "failed: ZeroDivisionError"),
        (f"{HERE}:nothing", f"{HERE}:nothing: gives nothing"),
    ],
)
def test_what_is_no_source_is_named(source: object, message: str) -> None:
    with pytest.raises(HwoptError, match=message):
        samples_from(source, graph())


def test_a_path_may_hold_commas() -> None:
    assert parse_request("a,b,rows=1:2") == parse_request("a,b,rows=1:2") and parse_request("a,b,rows=1:2").path == "a,b"


def test_every_file_of_a_source_is_named_for_build_systems(folder: Path) -> None:
    names = {path.name for path in files_of(f"{folder},tokenizer={HERE}:encode")}
    assert names == {"a.png", "b.png", "c.png", "test_sources.py"}
    assert [path.name for path in files_of(f"{HERE}:batches")] == ["test_sources.py"]


def test_a_build_depends_on_every_picture(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    found = dependencies(tmp_path / "model.onnx", {"calibrate": Path(f"{folder},rows=:2"), "target": "host"})
    assert {path.name for path in found} >= {"a.png", "b.png", "c.png"}


def test_a_job_takes_every_kind_of_data_for_both_uses(folder: Path) -> None:
    source = graph()
    options: dict[str, Any] = dict.fromkeys(("shapes", "binds", "budget", "passes"))
    options |= {"target": "host", "threads": 1, "seed": 0, "progress": quiet}
    build = Builder()
    build.outputs = [build.op("Relu", [build.input((1, 3, 8, 8), name="x")], (1, 3, 8, 8))]
    model, pixels = to_model(build.graph()), {**options, "preprocess": "mean=127,layout=nhwc"}
    job = prepare(model, calibrate=Path(f"{folder},rows=:3"), evaluate=f"{HERE}:batches", **pixels)
    assert job.ctx.calibration is not None and len(job.ctx.calibration) == 3 and job.user_score is None
    assert job.evaluation is not None and job.evaluation.digest == samples_from(batches(), source).digest
    scored = prepare(model, calibrate=None, evaluate=f"{HERE}:score", **options)
    assert scored.user_score == f"{HERE}:score" and scored.evaluation is None
