"""Loading models into Graphs and saving them: `load` normalises, `read` and `save` are exact inverses."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner

from hwopt.analysis.fold import fold_constants
from hwopt.errors import ModelError, VerifyError
from hwopt.io.branches import inline_branches
from hwopt.io.check import check_finite, check_operators
from hwopt.io.files import damage_reported, graph_of, read_file, write_file
from hwopt.io.freeze import bind, freeze
from hwopt.io.normalize import constants_to_params, drop_identities, resolve_auto_pad
from hwopt.io.opset import to_pinned
from hwopt.ir import Graph, verify
from hwopt.ir.graph import in_order

PathLike = str | os.PathLike[str]


def load(
    model: Any,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    binds: Mapping[str, Any] | None = None,
    inputs: Any = None,
    allow_nan: bool = False,
) -> Graph:
    """The normalised Graph of a model: static inputs, constants folded, one opset, one spelling.

    `model` is the path of an ONNX file (or of a torch program, .pt2), a ModelProto, a torch ExportedProgram, or a
    torch module together with example `inputs` (a tensor, a tuple of them, or a mapping by argument name). `shapes` fixes
    input sizes, `binds` turns inputs into constants.
    Raises ModelError for what is wrong with the model, UsageError for sizes that are missing or do not fit.
    """
    graph = read(model, inputs=inputs)
    with damage_reported(graph.name):
        graph = dataclasses.replace(graph, nodes=tuple(in_order(graph.nodes, graph.outputs)))
    try:
        verify(graph)
    except VerifyError as error:
        raise ModelError(error.message, place=f"{graph.name}, {error.place}", hint="the model breaks ONNX's rules") from error
    with damage_reported(graph.name):
        graph = constants_to_params(graph)
        if not allow_nan:
            check_finite(graph)
        graph = freeze(bind(graph, binds or {}), shapes or {})
        graph = normalize(graph)
    verify(graph)
    return graph


def normalize(graph: Graph) -> Graph:
    """Fold, take decided branches, convert to the pinned opset, drop Identity, resolve auto_pad. Exact."""
    graph = _simplified(graph)
    graph = _simplified(to_pinned(graph))
    return resolve_auto_pad(drop_identities(graph))


def _simplified(graph: Graph) -> Graph:
    """Folding decides branches, and a taken branch gives more to fold."""
    while True:
        after = inline_branches(fold_constants(constants_to_params(graph), by="import"))
        if after is graph:
            return graph
        graph = after


def read(model: Any, *, inputs: Any = None) -> Graph:
    """The Graph of a model exactly as it stands (local functions inlined, sparse weights written out). Raises ModelError."""
    if isinstance(model, onnx.ModelProto):
        return _graph(model, None, model.graph.name or "model")
    if isinstance(model, (str, os.PathLike)):
        path = Path(model)
        if path.suffix != ".pt2":
            return _graph(read_file(path), path.parent, str(path))
    from hwopt.io.torch import to_onnx  # torch only where a model needs it

    return _graph(to_onnx(model, inputs), None, "the exported torch program")


def _graph(model: onnx.ModelProto, folder: Path | None, place: str) -> Graph:
    with damage_reported(place):
        check_operators(model, place)
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
    return graph_of(model, folder, place)


def save(graph: Graph, path: PathLike, *, external: bool | None = None) -> None:
    """Write a Graph as an ONNX file, all of it or nothing; `external` puts the weights into `<path>.data` beside it.

    Above 2 GB the weights go there by themselves. Raises ModelError if the disk refuses.
    """
    write_file(graph, Path(path), external)
