"""The two models that are compared: the library of an artifact, and the float model that it was compiled from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from hwopt.artifact import Artifact
from hwopt.backends.ort import Session
from hwopt.demo import MODEL as DEMO
from hwopt.errors import UsageError
from hwopt.evaluate import Run
from hwopt.io.onnx import load, read
from hwopt.io.preprocess import KEY, Preprocess, folded, parse_preprocess, preprocess_of
from hwopt.ir import Graph, Node
from hwopt.job import clean, preprocessed
from hwopt.original import digest_of
from hwopt.pipeline import Context


@dataclass(frozen=True, eq=False)
class Subject:
    """Both models with the same inputs and outputs by name. The graphs are for gradients and types, `runs` for results."""

    artifact: Artifact
    original: Graph
    compressed: Graph
    run_original: Run
    run_compressed: Run  # the library that ships
    notes: tuple[str, ...] = ()

    @property
    def preprocess(self) -> str:
        """What happens to pixels, inside of the library or before it; empty if nothing does."""
        return self.original.metadata.get(KEY, "")


def subject_of(
    artifact: Artifact, model: Any, shapes: Mapping[str, tuple[int, ...]], binds: Mapping[str, Any], preprocess: str
) -> Subject:
    """Load both. `preprocess` is done outside of a library that does not do it itself. Raises HwoptError with the next step."""
    inside = str(artifact.manifest.get("preprocess", ""))
    if inside and preprocess:
        hint = f"its library takes pixels: {inside}"
        raise UsageError("the artifact preprocesses its input itself", place=str(artifact.path), hint=hint)
    known = dict(artifact.manifest.get("original") or {})
    given = _found(artifact, known) if model is None else model
    original = clean(preprocessed(_loaded(given, artifact, known, shapes, binds), inside), Context())
    _check_ends(original, artifact)
    compressed = read(artifact.path / "model.onnx")
    notes = []
    if artifact.plan.get("graph_digest") != original.digest:
        notes.append("the float model is not the graph that the artifact was compiled from: another file, or another hwopt")
    if not preprocess:
        return Subject(artifact, original, compressed, Session(original).run, artifact.run, tuple(notes))
    raw, small = (folded(graph, parse_preprocess(preprocess)) for graph in (original, compressed))
    prepared = _preparing(original, preprocess_of(raw))
    return Subject(artifact, raw, small, Session(raw).run, lambda feeds: artifact.run(prepared(feeds)), tuple(notes))


def _preparing(original: Graph, preprocess: Preprocess | None) -> Run:
    """Pixels as what a library takes that does no preprocessing: by the very nodes that would be in it."""
    if preprocess is None:
        return dict
    name, taken = preprocess.input, f"{preprocess.input}_taken"
    types = MappingProxyType({name: original.tensor(name), taken: original.tensor(name)})
    passing = (Node("Identity", (name,), (taken,), "taken"),)
    front = Graph("preprocess", (name,), (taken,), passing, types, MappingProxyType({}), original.opsets)
    session = Session(folded(front, preprocess))
    return lambda feeds: {**feeds, name: session.run({name: feeds[name]})[taken]}


def _found(artifact: Artifact, known: Mapping[str, Any]) -> Path:
    """The file that the artifact was compiled from, where one of that name has its contents."""
    name = str(known.get("file", ""))
    folders = (Path(), artifact.path.parent, artifact.path.parent.parent, DEMO.parent)
    for folder in folders if name else ():
        if (folder / name).is_file() and digest_of(folder / name) == known.get("sha256"):
            return folder / name
    what = f"{name} is not here, or was changed since" if name else "the artifact does not say what it was compiled from"
    raise UsageError(f"no float model to compare with: {what}", place=str(artifact.path), hint="give --model float.onnx")


def _loaded(
    model: Any, artifact: Artifact, known: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], binds: Mapping[str, Any]
) -> Graph:
    """The float model frozen as it was, or as is stated."""
    if isinstance(model, Graph):
        return model
    recorded = {name: tuple(shape) for name, shape in known.get("shapes", {}).items()}
    constants = {name: np.asarray(value) for name, value in known.get("binds", {}).items() if value is not None}
    if not recorded and not artifact.manifest.get("preprocess"):
        recorded = {one.name: one.type.dims for one in artifact.inputs if one.type.static}
    return load(model, shapes={**recorded, **shapes}, binds={**constants, **binds})


def _check_ends(original: Graph, artifact: Artifact) -> None:
    """Raise UsageError unless inputs and outputs are the artifact's."""
    ends = {one.name: str(one.type) for one in (*artifact.inputs, *artifact.outputs)}
    own = {name: str(original.tensor(name)) for name in (*original.inputs, *original.outputs)}
    if ends != own:
        shown = (", ".join(f"{name}: {kind}" for name, kind in one.items()) for one in (own, ends))
        reason = "the float model takes and gives {}, the artifact {}".format(*shown)
        raise UsageError(reason, place=str(artifact.path), hint="give the model that was compiled: --model, --shape, --bind")
