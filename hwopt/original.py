"""Which model an artifact was compiled from: enough to recognise it, and to load it in the same way once more."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hwopt.depends import external_files

LARGEST_BIND = 256  # elements; larger constants are named, not kept


def original_of(
    model: Any, shapes: Mapping[str, tuple[int, ...]] | None, binds: Mapping[str, Any] | None, graph_digest: str
) -> dict[str, Any]:
    """What manifest and report say of the float model: the file by name and contents, how it was frozen, the cleaned graph.

    A model that is no file has no name and no contents.
    """
    path = Path(model) if isinstance(model, (str, Path)) else None
    constants = {name: np.asarray(value) for name, value in (binds or {}).items()}
    return {
        "file": path.name if path else "",
        "sha256": digest_of(path) if path else "",
        "graph_digest": graph_digest,
        "shapes": {name: list(shape) for name, shape in (shapes or {}).items()},
        "binds": {name: array.tolist() if array.size <= LARGEST_BIND else None for name, array in constants.items()},
    }


def digest_of(model: Path) -> str:
    """sha256 of a model file, and of the weights beside it."""
    whole = hashlib.sha256()
    for path in (model, *external_files(model)):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                whole.update(chunk)
    return whole.hexdigest()
