"""Unfinished training on disk: written under another name and renamed, so that what is there is whole."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import torch

from hwopt.errors import DataError
from hwopt.files import replacing
from hwopt.recover.case import Case
from hwopt.recover.recipe import Recipe


def checkpoint_path(case: Case, recipe: Recipe, digest: str) -> Path | None:
    """The file of this very training, named by the models, the recipe and the data; None without a folder."""
    if case.checkpoints is None:
        return None
    facts = (case.graph.digest, case.teacher.digest, type(recipe).__name__, str(recipe), digest)
    return case.checkpoints / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:20]}.pt"


def save(path: Path, state: dict[str, Any]) -> None:
    """A state of tensors, numbers and texts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        torch.save(state, part)


def restore(path: Path | None) -> dict[str, Any] | None:
    """The state, or None where there is none yet. Raises DataError for a damaged file; nothing in it is executed."""
    if path is None or not path.exists():
        return None
    try:
        return dict(torch.load(path, weights_only=True))
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise DataError("is no readable checkpoint", place=str(path), hint="remove it to start anew") from error
