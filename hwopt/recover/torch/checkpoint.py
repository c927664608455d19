"""Unfinished training on disk: written under another name and renamed, so that what is there is whole."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import torch

from hwopt.errors import DataError
from hwopt.files import replacing
from hwopt.recover.case import Case, Checkpoints
from hwopt.recover.data import Arrays, Source, first, source_of
from hwopt.recover.recipe import Recipe
from hwopt.recover.torch.losses import loss_name
from hwopt.samples import Samples


def checkpoint_path(case: Case, recipe: Recipe, data: Source) -> Path | None:
    """The file of this very training, named by models, recipe, data and what the user judges by; None without a folder."""
    if case.checkpoints is None:
        return None
    held_out = None if case.held_out is None else source_of(case.graph, case.held_out)
    judged = [loss_name(one) if one else "" for one in (case.loss, case.score)]
    facts = [case.graph.digest, case.teacher.digest, type(recipe).__name__, str(recipe), _digest(data, recipe)]
    facts += [_digest(held_out, recipe), *judged] if held_out or any(judged) else []
    name = f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:20]}.pt"
    return case.checkpoints.file(name) if isinstance(case.checkpoints, Checkpoints) else case.checkpoints / name


def _digest(data: Source | None, recipe: Recipe) -> str:
    """The data in one word; of a loader, which may be endless, its first batch."""
    if data is None or data.digest:
        return data.digest if data else ""
    parts = [Samples(batch.feeds, batch.labels) for batch in first(data.epoch(0, recipe.batch, recipe.seed), 1)]
    return "".join(Arrays(one).digest for one in parts)


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
