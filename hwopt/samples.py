"""Calibration and evaluation data: arrays by input name, checked against the model before anything else happens."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np

from hwopt.errors import DataError, did_you_mean
from hwopt.files import replacing
from hwopt.ir import Graph, TensorType, numpy_dtype
from hwopt.ir.graph import param_digest

IGNORED = -100  # label of a place that no class is asked of, as in torch
LABELS, TEXTS, CLASSES = "labels", "texts", "classes"  # names in an .npz beside those of inputs
GOLDEN = (5**0.5 - 1) / 2
Encode = Callable[[list[str]], Mapping[str, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Samples:
    """`arrays[input]` is [samples, ...] where the model's input is [batch, ...]; `labels` is [samples] or absent.

    What a report may show beside them: names of the classes by label, the file of each sample, and the texts that `encode` made
    the arrays of.
    """

    arrays: Mapping[str, np.ndarray]
    labels: np.ndarray | None = None
    source: str = "data"
    classes: tuple[str, ...] = ()
    texts: np.ndarray | None = None  # [samples] of str
    encode: Encode | None = None
    files: np.ndarray | None = None  # [samples] of str

    @cached_property
    def digest(self) -> str:
        """sha256 of the arrays by name; labels do not count."""
        whole = hashlib.sha256()
        for name in sorted(self.arrays):
            whole.update(f"{name}={param_digest(self.arrays[name])};".encode())
        return whole.hexdigest()

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def head(self, count: int) -> Samples:
        """The first `count` samples: the same object each time, since what is remembered of samples is remembered of that."""
        if count not in self._heads:
            self._heads[count] = self.rows(slice(count))
        return self._heads[count]

    @cached_property
    def _heads(self) -> dict[int, Samples]:
        return {}

    def spread(self) -> Samples:
        """In an order in which the first ones, however many, are from all over: data often come sorted by class.

        Places by the golden ratio (a Kronecker sequence): the same for the same number of samples.
        """
        places = np.arange(len(self)) * GOLDEN % 1
        return self.rows(np.argsort(places, kind="stable"))

    def rows(self, rows: slice | np.ndarray) -> Samples:
        labels, texts, files = (None if one is None else one[rows] for one in (self.labels, self.texts, self.files))
        arrays = MappingProxyType({name: array[rows] for name, array in self.arrays.items()})
        return replace(self, arrays=arrays, labels=labels, texts=texts, files=files)

    def feeds(self, graph: Graph) -> Iterator[Mapping[str, np.ndarray]]:
        """Inputs for one run after the other, as many samples each as the graph's batch holds; an incomplete rest is left out."""
        batch = batch_of(graph)
        for start in range(0, len(self) - batch + 1, batch):
            yield {name: self.arrays[name][start : start + batch] for name in graph.inputs}


def batch_of(graph: Graph) -> int:
    """The leading dimension that all inputs share (1 if it is not static)."""
    sizes = {t.shape[0] for t in map(graph.tensor, graph.inputs) if t.shape}
    size = sizes.pop() if len(sizes) == 1 else 1
    return size if isinstance(size, int) else 1


def shared(one: Samples, other: Samples) -> int:
    """How many samples of the first have the inputs of one of the second."""
    known = set(_words(other))
    return sum(word in known for word in _words(one))


def _words(samples: Samples) -> Iterator[bytes]:
    """Each sample's inputs in one word."""
    for place in range(len(samples)):
        inputs = (f"{name}=".encode() + samples.arrays[name][place].tobytes() for name in sorted(samples.arrays))
        yield hashlib.blake2b(b"".join(inputs), digest_size=16).digest()


def load_samples(path: Path | str, graph: Graph) -> Samples:
    """Read an .npz with the inputs by name and optionally `labels`; raises DataError that names what does not fit."""
    return checked(samples_of(read_npz(Path(path)), graph, str(path)), graph)


def samples_of(arrays: Mapping[str, np.ndarray], graph: Graph, source: str = "data", encode: Encode | None = None) -> Samples:
    """Arrays by name as Samples: those called labels, texts and classes are told from inputs. Nothing is checked yet."""
    rest = dict(arrays)
    labels, texts, classes = (rest.pop(name, None) if name not in graph.inputs else None for name in (LABELS, TEXTS, CLASSES))
    if encode is not None and texts is not None and not set(graph.inputs) <= rest.keys():
        rest |= encode([str(text) for text in texts])
    names = () if classes is None else tuple(map(str, classes))
    return Samples(MappingProxyType(rest), labels, source, names, texts, encode)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file; raises DataError if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise DataError("no such file", place=str(path)) from error
    except AttributeError as error:  # a bare .npy array has no names
        raise DataError("holds one array without a name", place=str(path), hint="write it with numpy.savez") from error
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        other = isinstance(error, ValueError) and not zipfile.is_zipfile(path)  # of these numpy speaks as of pickles
        reason = "" if other else f" ({error})"
        raise DataError(f"not a readable .npz{reason}", place=str(path), hint="write it with numpy.savez") from error


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """All arrays by name."""
    with replacing(path) as part, part.open("wb") as file:
        np.savez(file, **dict(arrays))  # type: ignore[arg-type]


def checked(samples: Samples, graph: Graph, *, places: bool = False) -> Samples:
    """The same samples if they fit the graph's inputs; raises DataError otherwise. With `places` labels may also be a class for
    each place of an output, [samples, ...]: what trains can use them, a score per sample cannot.
    """
    place = samples.source
    if not isinstance(samples.arrays, Mapping):
        raise DataError("arrays by input name are needed", place=place)
    for name in graph.inputs:
        if name not in samples.arrays:
            raise DataError(f"lacks input {name!r}", place=place, hint=f"it has {', '.join(samples.arrays) or 'nothing'}")
    for name in samples.arrays:
        if name not in graph.inputs:
            raise DataError(f"the model has no input {name!r}", place=place, hint=did_you_mean(name, graph.inputs))
    check_batch(graph, place)
    counts = {name: len(array) if array.ndim else 0 for name, array in samples.arrays.items()}
    if len(set(counts.values())) > 1:
        raise DataError(f"inputs have different numbers of samples: {counts}", place=place)
    for name in graph.inputs:
        _check_input(samples.arrays[name], graph.tensor(name), f"{place}: input {name!r}")
    batch = batch_of(graph)
    if len(samples) < batch:
        raise DataError(f"{len(samples)} samples, the model needs at least {batch}", place=place)
    if samples.labels is None:
        return samples
    labels = np.asarray(samples.labels)
    many = places and labels.ndim > 1 and labels.shape[1:] != (1,)
    return replace(samples, labels=(_places if many else _labels)(labels, len(samples), place))


def check_batch(graph: Graph, place: str) -> None:
    """Raise DataError that names the first input without a batch axis, or with another one than the first input's."""
    first = next((name for name in graph.inputs if graph.tensor(name).shape), "")
    batch = (graph.tensor(first).shape or (0,))[0]
    for name in graph.inputs:
        kind = graph.tensor(name)
        hint = f"make it a constant (--bind {name}=...), or score with --evaluate module:function, which runs the model itself"
        if not kind.shape:
            reason = f"input {name!r} is {kind}: it has no batch axis to cut samples from"
            raise DataError(reason, place=place, hint=hint)
        if kind.shape[0] != batch:
            reason = f"input {name!r} is {kind}: its first axis is not the batch of {first!r}, {graph.tensor(first)}"
            raise DataError(f"{reason}, so samples cannot be cut from both", place=place, hint=hint)


def _places(labels: np.ndarray, count: int, place: str) -> np.ndarray:
    """Class indices, [samples, ...]; -100 where nothing counts. Raises DataError for anything else."""
    if len(labels) != count or not np.issubdtype(labels.dtype, np.integer) or ((labels < 0) & (labels != IGNORED)).any():
        reason = f"labels are {labels.dtype} {list(labels.shape)} for {count} samples, the least is {labels.min(initial=0)}"
        raise DataError(reason, place=place, hint=f"give class indices, [samples, ...], and {IGNORED} where nothing counts")
    return labels.astype(np.int64)


def _labels(labels: np.ndarray, count: int, place: str) -> np.ndarray:
    """Class indices, [samples]; [samples, 1] is the same. Raises DataError for anything else."""
    labels = np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        hint = "give class indices, [samples]; for one-hot labels their argmax"
        raise DataError(f"labels have shape {list(labels.shape)}", place=place, hint=hint)
    if len(labels) != count:
        raise DataError(
            f"{len(labels)} labels for {count} samples", place=place, hint="give one label for each, in the same order"
        )
    if not np.issubdtype(labels.dtype, np.number):
        raise DataError(f"labels of type {labels.dtype} are no class indices", place=place, hint="give integers from 0 on")
    wrong = np.flatnonzero((labels != np.round(labels)) | (labels < 0))
    if len(wrong):
        reason = f"label {labels[wrong[0]]} of sample {wrong[0]} is no class index ({len(wrong)} of {count} are none)"
        raise DataError(reason, place=place, hint="give integers from 0 on, and leave out samples without a class")
    return labels.astype(np.int64)


def _check_input(array: np.ndarray, kind: TensorType, place: str) -> None:
    wanted = numpy_dtype(kind.dtype)
    if array.dtype != wanted:
        raise DataError(f"is {array.dtype}, the model takes {wanted}", place=place, hint=f"convert it with .astype('{wanted}')")
    shape = kind.shape or ()
    if array.ndim != len(shape):
        raise DataError(f"has {array.ndim} dimensions, the model takes {kind}", place=place)
    for axis, dim in enumerate(shape):
        if axis and isinstance(dim, int) and array.shape[axis] != dim:
            raise DataError(f"has shape {list(array.shape)}, the model takes {kind}", place=place)
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        where = np.argwhere(~np.isfinite(array))[0]
        raise DataError(f"holds {array[tuple(where)]} at {where.tolist()}", place=place, hint="clean the data")
