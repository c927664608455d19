"""Calibration and evaluation data: what fits, and one clear message for each way in which it does not."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from hwopt.errors import DataError
from hwopt.ir import Graph
from hwopt.samples import Samples, batch_of, checked, load_samples
from tests.random_graphs import Builder


def graph(batch: int = 2) -> Graph:
    build = Builder()
    image, scale = build.input((batch, 3), name="image"), build.input((batch, 1), name="scale")
    build.outputs = [build.op("Mul", [image, scale], (batch, 3))]
    return build.graph()


def arrays(count: int = 5, **changes: Any) -> dict[str, np.ndarray]:
    image = np.arange(count * 3, dtype=np.float32).reshape(count, 3)
    return {"image": image, "scale": np.ones((count, 1), np.float32), **changes}


def test_the_first_ones_of_sorted_samples_are_of_all_classes_once_spread() -> None:
    labels = np.repeat(np.arange(10), 100)
    samples = Samples({"x": np.arange(1000.0)}, labels).spread()
    assert samples.labels is not None and sorted(samples.arrays["x"]) == list(range(1000))
    assert all(samples.labels[place] == samples.arrays["x"][place] // 100 for place in range(1000))
    for count in (20, 32, 64, 256):
        assert np.bincount(samples.labels[:count], minlength=10).min() >= count // 10 - 1


def save(tmp_path: Path, **values: np.ndarray) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, **values)
    return path


def test_npz_is_read_with_its_labels(tmp_path: Path) -> None:
    samples = load_samples(save(tmp_path, **arrays(labels=np.arange(5))), graph())
    assert len(samples) == 5
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 2, 3, 4]
    assert samples.head(2).labels.tolist() == [0, 1]  # type: ignore[union-attr]
    assert samples.rows(np.array([4, 0])).arrays["image"][:, 0].tolist() == [12, 0]


def test_feeds_hold_a_batch_each_and_leave_out_the_rest() -> None:
    feeds = list(checked(Samples(MappingProxyType(arrays())), graph()).feeds(graph()))
    assert [feed["image"][:, 0].tolist() for feed in feeds] == [[0, 3], [6, 9]]
    assert batch_of(graph(7)) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imag": np.ones((5, 3), np.float32)}, "the model has no input 'imag'; did you mean image?"),
        ({"image": np.ones((5, 3))}, "input 'image': is float64, the model takes float32"),
        ({"image": np.ones((5, 4), np.float32)}, "input 'image': has shape \\[5, 4\\]"),
        ({"image": np.ones(5, np.float32)}, "input 'image': has 1 dimensions"),
        ({"image": np.ones((4, 3), np.float32)}, "different numbers of samples: {'image': 4, 'scale': 5}"),
        ({"image": np.full((5, 3), np.nan, np.float32)}, "input 'image': holds nan at \\[0, 0\\]"),
        ({"scale": np.array([[1], [2], [np.inf], [4], [5]], np.float32)}, "input 'scale': holds inf at \\[2, 0\\]"),
        ({"labels": np.arange(4)}, "4 labels for 5 samples"),
    ],
)
def test_data_that_do_not_fit_say_what_is_wrong(tmp_path: Path, changes: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_samples(save(tmp_path, **arrays(**changes)), graph())
    assert "data.npz" in str(caught.value)


def test_missing_input_and_too_few_samples_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lacks input 'scale'; it has image"):
        load_samples(save(tmp_path, image=arrays()["image"]), graph())
    with pytest.raises(DataError, match="1 samples, the model needs at least 2"):
        load_samples(save(tmp_path, **arrays(1)), graph())
    with pytest.raises(DataError, match="0 samples, the model needs at least 2"):
        load_samples(save(tmp_path, **arrays(0)), graph())


@pytest.mark.parametrize("content", [b"", b"no zip at all", b"PK\x03\x04 cut off"])
def test_file_that_is_no_npz_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="npz"):
        load_samples(path, graph())


def test_truncated_and_pickled_files_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, **arrays())
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="npz"):
        load_samples(path, graph())
    with pytest.raises(DataError, match="npz"):
        load_samples(save(tmp_path, **arrays(image=np.array([{}], object))), graph())


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.npz: no such file"):
        load_samples(tmp_path / "nothing.npz", graph())


def test_input_called_labels_is_an_input(tmp_path: Path) -> None:
    build = Builder()
    build.outputs = [build.same("Relu", build.input((1, 2), name="labels"))]
    samples = load_samples(save(tmp_path, labels=np.ones((3, 2), np.float32)), build.graph())
    assert samples.labels is None
    assert len(samples) == 3


def mixed(kind: tuple[int, ...]) -> Graph:
    build = Builder()
    image, state = build.input((1, 3), name="image"), build.input(kind, name="state")
    build.outputs = [build.op("Relu", [image], (1, 3)), build.op("Relu", [state], kind)]
    return build.graph()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            (2, 1, 4),
            r"'state' is float32\[2,1,4\]: its first axis is not the batch of 'image', float32\[1,3\].*--bind state=",
        ),
        ((), r"input 'state' is float32\[\]: it has no batch axis.*--bind state="),
    ],
)
def test_an_input_without_the_batch_axis_is_named_with_its_shape(kind: tuple[int, ...], message: str) -> None:
    samples = Samples({"image": np.ones((4, 3), np.float32), "state": np.ones((4, *kind[1:]), np.float32)})
    with pytest.raises(DataError, match=message):
        checked(samples, mixed(kind))


def test_the_first_samples_are_the_same_object_each_time() -> None:
    samples = Samples({"x": np.arange(6.0).reshape(6, 1)})
    assert samples.head(2) is samples.head(2) is not samples.head(3)
    assert samples.head(2).arrays["x"].tolist() == [[0.0], [1.0]]
