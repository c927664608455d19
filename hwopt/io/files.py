"""ONNX files: reading and writing ModelProtos, weights beside the model (external data) included."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import google.protobuf.message
import numpy as np
import onnx

from hwopt.errors import HwoptError, ModelError
from hwopt.io.guard import check_inference
from hwopt.io.proto import stated_graph, to_model
from hwopt.ir import Graph, infer_types, type_of

LARGEST_PROTO = 2_000_000_000  # bytes; protobuf stops at 2^31 - 1, and the nodes need room too
INLINE_BYTES = 1024  # weights up to here stay in the model: shape inference reads them
PAGE = 4096  # weights start on a page, so that a reader can map them

_NOT_ONNX = "hwopt reads ONNX files (.onnx) and exported torch programs (.pt2)"


def read_file(path: Path) -> onnx.ModelProto:
    """The model in a file, external weights not loaded. Raises ModelError that names the file and the reason."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ModelError("no such file", place=str(path), hint="check the path") from error
    except IsADirectoryError as error:
        hint = "name the .onnx file in it (an artifact opens with hwopt.Artifact)"
        raise ModelError("is a directory", place=str(path), hint=hint) from error
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", place=str(path), hint="check its permissions") from error
    if not data:
        raise ModelError("the file is empty", place=str(path), hint="export or download it again")
    try:
        model = onnx.ModelProto.FromString(data)
    except google.protobuf.message.DecodeError as error:
        raise ModelError("not an ONNX model, or one cut short", place=str(path), hint=_NOT_ONNX) from error
    if not model.HasField("graph") or not (model.graph.node or model.graph.output):
        raise ModelError("not an ONNX model: it holds no graph", place=str(path), hint=_NOT_ONNX)
    return model


def graph_of(model: onnx.ModelProto, folder: Path | None, place: str) -> Graph:
    """The Graph of a model as it stands, with the weights that lie in `folder`. Raises ModelError."""
    for tensor in model.graph.initializer:
        _check_external(tensor, folder, place)
    for inner in _subgraphs(model.graph):
        _open_negative_sizes(inner)
        for tensor in _tensors(inner):
            _check_external(tensor, folder, place)
            if onnx.external_data_helper.uses_external_data(tensor):
                onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder))
    with damage_reported(place):
        graph = stated_graph(model, str(folder) if folder else "")
        check_inference(graph, place)
        return infer_types(graph)


@contextlib.contextmanager
def damage_reported(place: str) -> Iterator[None]:
    """Whatever the onnx package raises on a damaged model becomes one ModelError."""
    try:
        yield
    except HwoptError:
        raise
    except Exception as error:  # parser, checker, inference and converter each raise kinds of their own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"the model is damaged: {reason[0]}", place=place, hint="export or download it again") from error


def _check_external(tensor: onnx.TensorProto, folder: Path | None, place: str) -> None:
    """Raise ModelError, naming both files, unless all bytes of an external tensor are there."""
    if not onnx.external_data_helper.uses_external_data(tensor):
        return
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if folder is None:
        raise ModelError(f"the weights of {tensor.name} lie in {location}", place=place, hint="load the model by its path")
    file = folder / location
    if not location or not file.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"{tensor.name} points outside the model's folder: {location!r}", place=place)
    if not file.is_file():
        hint = "keep it beside the model"
        raise ModelError(f"the external data of {tensor.name} are missing: no file {location}", place=place, hint=hint)
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or _bytes_of(tensor))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{tensor.name} states no valid place in {location}: {error}", place=place) from error
    size = file.stat().st_size
    if offset < 0 or length < 0 or offset + length > size:
        hint = "copy or download it again"
        reason = f"{location} is cut short: {tensor.name} ends at byte {offset + length:,}, the file at {size:,}"
        raise ModelError(reason, place=place, hint=hint)


def _bytes_of(tensor: onnx.TensorProto) -> int:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return int(np.prod(tensor.dims, dtype=object)) * dtype.itemsize if tensor.dims else dtype.itemsize


def _subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.ByteSize():
                    yield inner
                    yield from _subgraphs(inner)


def _open_negative_sizes(graph: onnx.GraphProto) -> None:
    """Some exporters write -1 for an open size; shape inference aborts the whole process on some of them."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value < 0:
                dim.Clear()


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from (attribute.t for node in graph.node for attribute in node.attribute if attribute.HasField("t"))


def write_file(graph: Graph, path: Path, external: bool | None = None) -> None:
    """Write a Graph as an ONNX file: all of it or nothing. `external` puts the weights into `<path>.data`.

    Left at None, they go there only if protobuf's 2 GB make it necessary. Raises ModelError if the disk refuses.
    """
    data = path.with_name(path.name + ".data")
    if external or (external is None and above_limit(graph)):
        weights: list[onnx.TensorProto] = []
        atomically(data, lambda file: weights.extend(_write_weights(graph, file, data.name)))
        model = to_model(graph, weights)
    else:
        model = to_model(graph)
    atomically(path, lambda file: file.write(model.SerializeToString()))


def above_limit(graph: Graph) -> bool:
    """True if one protobuf cannot hold the weights."""
    return sum(_stored_bytes(array) for array in graph.params.values()) > LARGEST_PROTO


def _stored_bytes(array: np.ndarray) -> int:
    return array.nbytes if array.dtype == object else type_of(array).bytes


def _write_weights(graph: Graph, file: IO[bytes], location: str) -> Iterator[onnx.TensorProto]:
    for name, array in graph.params.items():
        tensor = onnx.numpy_helper.from_array(np.asarray(array), name)
        if len(tensor.raw_data) > INLINE_BYTES:
            file.write(bytes(-file.tell() % PAGE))
            offset = file.tell()
            file.write(tensor.raw_data)
            onnx.external_data_helper.set_external_data(tensor, location, offset, len(tensor.raw_data))
            tensor.ClearField("raw_data")
        yield tensor


def atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file under a temporary name beside its place and rename it; on any failure nothing is left."""
    temporary = ""
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            write(file)
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except OSError as error:
        hint = "check the folder's permissions and the free space"
        raise ModelError(f"cannot be written: {error.strerror}", place=str(path), hint=hint) from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
