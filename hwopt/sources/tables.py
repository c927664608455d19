"""Hugging Face-style datasets on disk: what `save_to_disk` writes (arrow files in a folder), or parquet files.

pyarrow reads both; the package `datasets` is not needed. Columns of pictures hold their files, those of class labels their names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from hwopt.errors import DataError, UsageError, did_you_mean
from hwopt.io.preprocess import channel_axis
from hwopt.ir import Graph, numpy_dtype
from hwopt.samples import Samples
from hwopt.sources.pictures import picture, picture_input
from hwopt.sources.request import Request

SUFFIXES = (".arrow", ".parquet")
LABEL_NAMES, TEXT_NAMES, IMAGE_NAMES = ("label", "labels"), ("text", "sentence"), ("image", "img")


def is_table(path: Path) -> bool:
    """An arrow or parquet file, or a folder with such files."""
    if path.is_dir():
        return (path / "dataset_dict.json").exists() or any(_files(path)) or any(_files(one) for one in _folders(path))
    return path.suffix in SUFFIXES


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and not path.name.startswith("cache-"))


def _folders(path: Path) -> list[Path]:
    return sorted(one for one in path.iterdir() if one.is_dir() and not one.name.startswith("."))


def read_table(request: Request, graph: Graph) -> Samples:
    """Columns as inputs by name; a column of pictures as the only picture input; a column of texts through the tokenizer."""
    table, features = _table(request)
    columns = {name: table.column(name) for name in table.column_names}
    encode = request.encode()
    label = _column(request.label, LABEL_NAMES, columns, request, graph)
    labels = np.asarray(columns[label].to_pylist()) if label else None
    classes = tuple(features.get(label, {}).get("names", ()))
    texts = None
    if all(name in columns for name in graph.inputs):
        arrays = {name: _array(columns[name], name, graph, request) for name in graph.inputs}
    elif encode is not None:
        text = _column(request.text, TEXT_NAMES, columns, request, graph)
        if not text:
            raise _lacks("text", columns, request)
        texts = np.array([str(one) for one in columns[text].to_pylist()])
        arrays = dict(encode([str(one) for one in texts]))
    else:
        arrays = _pictures(columns, features, request, graph)
    return Samples(MappingProxyType(arrays), labels, request.path, classes, texts, encode)


def _table(request: Request) -> tuple[Any, Mapping[str, Any]]:
    """The whole table and what is said of its columns. Raises UsageError without pyarrow, DataError for damaged files."""
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise UsageError("datasets on disk need pyarrow", place=request.path, hint="pip install 'hwopt[evaluate]'") from error
    folder, files = _split(request)
    try:
        parts = [_read_arrow(ipc, file) if file.suffix == ".arrow" else parquet.read_table(file) for file in files]
        table = pyarrow.concat_tables(parts)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"is no readable dataset ({error})", place=str(folder)) from error
    return table, _features(folder, table)


def _read_arrow(ipc: Any, file: Path) -> Any:
    """`datasets` writes streams, other tools files."""
    with file.open("rb") as source:
        is_file = source.read(6) == b"ARROW1"
    with file.open("rb") as source:
        return (ipc.open_file if is_file else ipc.open_stream)(source).read_all()


def _split(request: Request) -> tuple[Path, list[Path]]:
    """The folder with the files, and the files: of a dataset with several parts, those of the named one."""
    path = request.file
    if path.is_file():
        return path.parent, [path]
    files = _files(path)
    if files:
        kept = [file for file in files if not request.split or file.name.startswith(request.split)]
        parts = {file.name.partition("-")[0] for file in files}
        several = len(parts) > 1 and not request.split
        if kept and not several:
            return path, kept
        raise UsageError(f"which part of {', '.join(sorted(parts))}?", place=str(path), hint="add ,split=NAME")
    folders = [one for one in _folders(path) if _files(one)]
    names = [one.name for one in folders]
    if len(folders) == 1 and not request.split:
        return folders[0], _files(folders[0])
    if request.split not in names:
        hint = f"add ,split= and one of {', '.join(names)}"
        raise UsageError(f"holds {len(names)} parts", place=str(path), hint=hint)
    chosen = folders[names.index(request.split)]
    return chosen, _files(chosen)


def _features(folder: Path, table: Any) -> Mapping[str, Any]:
    """What `datasets` wrote of the columns: beside the files or in them."""
    info = folder / "dataset_info.json"
    if info.is_file():
        return dict(json.loads(info.read_text()).get("features") or {})
    stored = (table.schema.metadata or {}).get(b"huggingface")
    return dict(json.loads(stored)["info"]["features"]) if stored else {}


def _column(stated: str, usual: Sequence[str], columns: Mapping[str, Any], request: Request, graph: Graph) -> str:
    if stated and stated not in columns:
        raise UsageError(f"has no column {stated!r}", place=request.path, hint=did_you_mean(stated, columns))
    return stated or next((name for name in usual if name in columns and name not in graph.inputs), "")


def _lacks(what: str, columns: Mapping[str, Any], request: Request) -> UsageError:
    return UsageError(f"which column is the {what}?", place=request.path, hint=f"add ,{what}= and one of {', '.join(columns)}")


def _array(column: Any, name: str, graph: Graph, request: Request) -> np.ndarray:
    """A column of numbers or nested lists in the input's element type, if that loses nothing."""
    kind = graph.tensor(name)
    try:
        found = np.asarray(column.to_pylist())
        array = found.astype(numpy_dtype(kind.dtype))
    except (ValueError, TypeError) as error:
        raise DataError(f"column {name!r} is no {kind} ({error})", place=request.path) from error
    if np.issubdtype(array.dtype, np.integer) and not np.array_equal(found, array):
        raise DataError(f"column {name!r} holds numbers that {kind} cannot", place=request.path)
    return array


def _pictures(columns: Mapping[str, Any], features: Mapping[str, Any], request: Request, graph: Graph) -> dict[str, np.ndarray]:
    """The column of pictures: files as bytes, or beside the dataset by name."""
    if all(channel_axis(graph.tensor(name)) is None for name in graph.inputs):
        kinds = ", ".join(f"{name}: {graph.tensor(name)}" for name in graph.inputs)
        hint = "call columns as the inputs are, or add ,tokenizer=module:function for a column of texts"
        raise DataError(f"the columns {', '.join(columns)} are not the inputs {kinds}", place=request.path, hint=hint)
    name = picture_input(graph, request.path)
    found = [name for name, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == "Image"]
    usual = [name for name in IMAGE_NAMES if name in columns]
    stated = _column(request.image, (), columns, request, graph)
    column = stated or (found[0] if len(found) == 1 else "") or (usual[0] if usual else "")
    if not column:
        raise _lacks("image", columns, request)
    rows = [_file(one, request) for one in columns[column].to_pylist()]
    pixels = np.empty((len(rows), *graph.tensor(name).dims[1:]), numpy_dtype(graph.tensor(name).dtype))
    for place, row in enumerate(rows):
        pixels[place] = picture(row, graph, name, request.resize, request.filter)
    return {name: pixels}


def _file(cell: Any, request: Request) -> Path | bytes:
    """A picture as `datasets` stores it: {bytes, path}, bytes, or a path."""
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if isinstance(cell, str):
        return request.file / cell if request.file.is_dir() else request.file.parent / cell
    raise DataError(f"a {type(cell).__name__} is no picture", place=request.path, hint="name the column: ,image=NAME")
