"""samples_from: one way in for every kind of data."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hwopt.errors import DataError
from hwopt.ir import Graph
from hwopt.named import is_named, named_function
from hwopt.samples import Samples, check_batch, checked, read_npz, samples_of
from hwopt.sources.items import samples_of_items
from hwopt.sources.pictures import is_picture_folder, read_pictures
from hwopt.sources.request import Request, class_names, parse_request
from hwopt.sources.tables import is_table, read_table

KINDS = "an .npz, a folder of pictures, a dataset on disk (arrow, parquet), or module:function"


def samples_from(source: Any, graph: Graph, place: str = "data", *, places: bool = False) -> Samples:
    """Samples that fit the graph's inputs. Raises DataError that names what does not, UsageError for options that mean nothing.

    `source` is Samples, arrays by name, a path (with options, see Request), `module:function`, a function that takes nothing,
    or an iterable of batches or single samples: mappings by input name, or tuples of the inputs and maybe the labels. `place` is
    what errors and reports call data that have no name of their own; `places` allows labels for each place of an output.
    """
    if isinstance(source, Samples):
        return checked(source, graph, places=places)
    if isinstance(source, Mapping):
        return checked(samples_of(source, graph, place), graph, places=places)
    if isinstance(source, (str, Path)):
        request = parse_request(str(source))
        found = _read(request, graph, places)
        return checked(found.rows(request.sliced()) if request.rows else found, graph, places=places)
    if callable(source) and not isinstance(source, Iterable):
        return _called(source, getattr(source, "__name__", "data"), graph, places)
    if isinstance(source, Iterable):
        return checked(samples_of_items(source, graph, place), graph, places=places)
    raise DataError(f"a {type(source).__name__} is no data", hint=f"give {KINDS}, arrays by name, or an iterable")


def _called(function: Callable[[], Any], name: str, graph: Graph, places: bool) -> Samples:
    try:
        given = function()
    except Exception as error:  # whatever the user's function raises must name it
        raise DataError(f"failed: {type(error).__name__}: {error}", place=name) from error
    return samples_from(given, graph, name, places=places)


def _read(request: Request, graph: Graph, places: bool) -> Samples:
    if is_named(request.path) and not request.file.exists():
        return _called(named_function(request.path, "module:function"), request.path, graph, places)
    if not request.file.exists():
        raise DataError("no such file", place=request.path, hint=f"give {KINDS}")
    check_batch(graph, request.path)
    if request.file.suffix == ".npz":
        return _classified(samples_of(read_npz(request.file), graph, request.path, request.encode()), request)
    if is_table(request.file):
        return _classified(read_table(request, graph), request)
    if is_picture_folder(request.file):
        return _classified(read_pictures(request, graph), request)
    if request.file.is_dir():
        raise DataError("holds neither pictures nor a dataset", place=request.path, hint=f"give {KINDS}")
    return samples_of(read_npz(request.file), graph, request.path, request.encode())


def _classified(samples: Samples, request: Request) -> Samples:
    """With the names of the classes that a file lists."""
    if not request.classes:
        return samples
    return dataclasses.replace(samples, classes=class_names(Path(request.classes)))


def files_of(source: object) -> Iterator[Path]:
    """The files that a source on the command line names: for build systems and the cache."""
    if not isinstance(source, (str, Path)):
        return
    request = parse_request(str(source))
    for text in (request.path, request.tokenizer):
        if is_named(text) and not Path(text).exists():
            module = importlib.import_module(text.partition(":")[0])
            yield from (Path(file) for file in (module.__file__,) if file)
    if request.file.is_dir():
        yield from sorted(path for path in request.file.rglob("*") if path.is_file())
    elif request.file.is_file():
        yield request.file
    yield from (Path(name) for name in (request.classes, request.labels) if name and Path(name).is_file())
