"""Samples out of an iterable: a torch DataLoader, a generator of batches, a list of single samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hwopt.errors import DataError
from hwopt.ir import Graph
from hwopt.samples import LABELS, Samples, samples_of

HINT = "yield {input: array}, or (inputs..., labels)"


def samples_of_items(items: Iterable[Any], graph: Graph, source: str = "data") -> Samples:
    """All items, one after the other. An item is a batch or one sample, a mapping by name, a tuple, or the only input alone."""
    parts: dict[str, list[np.ndarray]] = {}
    for number, item in enumerate(items):
        place = f"{source}, item {number}"
        found = _named(item, graph, place)
        if parts and found.keys() != parts.keys():
            raise DataError(f"has {', '.join(found)}, the first one {', '.join(parts)}", place=place)
        single = _is_single(found, graph)
        for name, array in found.items():
            parts.setdefault(name, []).append(array[None] if single else array)
    if not parts:
        raise DataError("gives nothing", place=source, hint=HINT)
    return samples_of({name: _joined(name, arrays, source) for name, arrays in parts.items()}, graph, source)


def as_array(value: Any) -> np.ndarray:
    """Arrays, torch tensors, pictures and numbers as arrays."""
    if hasattr(value, "detach"):  # a torch tensor; torch itself is not needed for that
        value = value.detach().cpu().numpy()
    return np.asarray(value)


def _named(item: Any, graph: Graph, place: str) -> dict[str, np.ndarray]:
    if isinstance(item, Mapping):
        found = {str(name): as_array(value) for name, value in item.items()}
        if "label" in found and "label" not in graph.inputs:  # as rows of a dataset have it
            found[LABELS] = found.pop("label")
        return found
    if not isinstance(item, Sequence) or isinstance(item, str):
        item = (item,)
    if len(item) == 2 and isinstance(item[0], Mapping):
        return {**_named(item[0], graph, place), LABELS: as_array(item[1])}
    names = (*graph.inputs, LABELS)
    if len(item) not in (len(names) - 1, len(names)):
        raise DataError(f"{len(item)} parts for the inputs {', '.join(graph.inputs)}", place=place, hint=HINT)
    return dict(zip(names, map(as_array, item), strict=False))


def _is_single(found: Mapping[str, np.ndarray], graph: Graph) -> bool:
    """True if the arrays have one dimension less than the model takes."""
    ranks = [(found[name].ndim, len(graph.tensor(name).shape or ())) for name in graph.inputs if name in found]
    return bool(ranks) and all(have == want - 1 for have, want in ranks)


def _joined(name: str, arrays: Sequence[np.ndarray], source: str) -> np.ndarray:
    try:
        return np.concatenate(arrays)
    except ValueError as error:
        shapes = sorted({str(list(array.shape[1:])) for array in arrays})
        raise DataError(f"{name!r} differs from item to item: {', '.join(shapes[:4])}", place=source, hint=HINT) from error
