"""Training data: arrays that are shuffled by seed and epoch, or the user's own loader as it is."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from hwopt.errors import DataError, UsageError
from hwopt.ir import Graph, numpy_dtype
from hwopt.ir.graph import param_digest
from hwopt.samples import Samples, checked

CHECKED = 2048  # held-out samples at most: a check must not cost more than the training


@dataclass(frozen=True, eq=False)
class Batch:
    """One step's samples. `rows` are their places in the arrays they come from, if they come from arrays."""

    feeds: Mapping[str, np.ndarray]
    labels: np.ndarray | None = None
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(next(iter(self.feeds.values())))


class Source(Protocol):
    """Batches of an epoch, the same ones each time it is asked; `digest` names the data, empty if that is unknown."""

    @property
    def digest(self) -> str: ...

    def steps(self, batch: int) -> int: ...

    def epoch(self, number: int, batch: int, seed: int) -> Iterator[Batch]: ...


@dataclass(frozen=True, eq=False)
class Arrays:
    """Samples in another order each epoch; an incomplete batch at its end is left out."""

    samples: Samples

    @property
    def digest(self) -> str:
        """Of inputs and labels."""
        labels = "" if self.samples.labels is None else param_digest(self.samples.labels)
        return self.samples.digest + labels[:16]

    def steps(self, batch: int) -> int:
        return len(self.samples) // batch

    def epoch(self, number: int, batch: int, seed: int) -> Iterator[Batch]:
        order = np.random.default_rng((seed, number)).permutation(len(self.samples))
        for start in range(0, len(order) - batch + 1, batch):
            yield self.at(order[start : start + batch])

    def at(self, rows: np.ndarray) -> Batch:
        labels = None if self.samples.labels is None else self.samples.labels[rows]
        return Batch({name: array[rows] for name, array in self.samples.arrays.items()}, labels, rows)


@dataclass(frozen=True, eq=False)
class Loader:
    """The user's own loader: any iterable of {input: array}, of (that, labels), or for one input of arrays themselves.

    A function is called with the epoch and returns one. A torch DataLoader draws its order from torch's generator, or from one
    of its own: both are seeded for each epoch; other loaders must be repeatable themselves. Batches have the loader's size.
    """

    graph: Graph
    loader: Any
    digest: str = ""

    def steps(self, _: int) -> int:
        try:
            return len(self.loader)
        except TypeError:
            return sum(1 for _ in self._items(0, 0))

    def epoch(self, number: int, _: int, seed: int) -> Iterator[Batch]:
        for item in self._items(number, seed):
            yield as_batch(self.graph, item)

    def _items(self, number: int, seed: int) -> Iterable[Any]:
        import torch

        whole = seed * 1_000_003 + number
        torch.manual_seed(whole)
        for holder in (self.loader, *(getattr(self.loader, name, None) for name in ("sampler", "batch_sampler"))):
            own = getattr(holder, "generator", None)
            if isinstance(own, torch.Generator):
                own.manual_seed(whole)
        return self.loader if isinstance(self.loader, Iterable) else self.loader(number)


@dataclass(frozen=True, eq=False)
class Rest:
    """What is trained on of a loader whose first batches are held out: the others, without the samples that are held out.

    A loader that shuffles brings those back in later epochs: they are known by their bytes, and other samples of the same batch
    take their places, so that every epoch has as many steps. What a loader changes at random each time is not known again: give
    held-out samples of your own then.
    """

    loader: Loader
    count: int  # of batches that are held out
    held: frozenset[bytes]
    digest: str = ""

    def steps(self, batch: int) -> int:
        return self.loader.steps(batch) - self.count

    def epoch(self, number: int, batch: int, seed: int) -> Iterator[Batch]:
        last, missing = None, 0
        for place, one in enumerate(self.loader.epoch(number, batch, seed)):
            found = self._without(one) if place >= self.count else None
            missing += place >= self.count and found is None
            if found is not None:
                last = found
                yield found
        if last is None:
            hint = "give held_out samples, or holdout=0 in the recipe"
            raise DataError("every sample is among those that are held out", place="training data", hint=hint)
        for _ in range(missing):
            yield last

    def _without(self, batch: Batch) -> Batch | None:
        kept = [row for row, name in enumerate(names_of(batch)) if name not in self.held]
        if not kept:
            return None
        return batch if len(kept) == len(batch) else rows_of(batch, np.resize(kept, len(batch)))


def names_of(batch: Batch) -> Iterator[bytes]:
    """A digest of each sample's inputs."""
    for row in range(len(batch)):
        digest = hashlib.sha256()
        for array in batch.feeds.values():
            digest.update(array[row].tobytes())
        yield digest.digest()


def rows_of(batch: Batch, rows: Any) -> Batch:
    """Some of a batch's samples."""
    labels, places = (None if one is None else one[rows] for one in (batch.labels, batch.rows))
    return Batch({name: array[rows] for name, array in batch.feeds.items()}, labels, places)


def source_of(graph: Graph, data: Any) -> Source:
    """Samples, arrays by input name (with `labels`), or a loader. Raises UsageError for what can be read only once."""
    if isinstance(data, Samples):
        return Arrays(checked(data, graph, places=True))
    if isinstance(data, Mapping):
        arrays = {name: np.asarray(array) for name, array in data.items()}
        labels = arrays.pop("labels", None) if "labels" not in graph.inputs else None
        return Arrays(checked(Samples(arrays, labels), graph, places=True))
    if isinstance(data, Iterator):
        hint = "give a list, a DataLoader or a function of the epoch"
        raise UsageError("can be read only once", place="training data", hint=hint)
    if not isinstance(data, Iterable) and not isinstance(data, Callable):  # type: ignore[arg-type]
        raise UsageError(f"{type(data).__name__} is no training data", hint="give Samples, arrays by name or a loader")
    return Loader(graph, data)


def some_labels(source: Source) -> np.ndarray | None:
    """All labels of arrays, of a loader those of its first batch."""
    if isinstance(source, Arrays):
        return source.samples.labels
    batch = next(iter(source.epoch(0, 1, 0)), None)
    return batch.labels if batch else None


def as_batch(graph: Graph, item: Any) -> Batch:
    """{input: array}, (that, labels), or arrays in the order of the inputs with labels behind. Raises DataError otherwise."""
    parts = list(item) if isinstance(item, (tuple, list)) else [item]
    labels = None
    if isinstance(parts[0], Mapping):
        feeds, rest = dict(parts[0]), parts[1:]
        labels = feeds.pop("labels", None) if "labels" not in graph.inputs else None
    else:
        feeds, rest = dict(zip(graph.inputs, parts, strict=False)), parts[len(graph.inputs) :]
    missing = [name for name in graph.inputs if name not in feeds]
    if missing or len(rest) > 1:
        hint = f"yield {{{graph.inputs[0]!r}: array}}, or (that, labels)"
        raise DataError(f"a batch lacks input {missing[0]!r}" if missing else "a batch has too many parts", hint=hint)
    arrays = {name: _array(feeds[name], graph, name) for name in graph.inputs}
    labels = rest[0] if rest else labels
    return Batch(arrays, None if labels is None else _numbers(np.asarray(labels), len(next(iter(arrays.values())))))


def _numbers(labels: np.ndarray, count: int) -> np.ndarray:
    """Labels as they are, since a loss of the user's may take any; [samples, 1] classes are [samples]."""
    if labels.dtype.kind not in "biuf" or not labels.ndim or len(labels) != count:
        reason = f"labels are {labels.dtype} {list(labels.shape)} for a batch of {count}"
        raise DataError(reason, place="training data", hint="give numbers, one or several for each sample")
    return labels[:, 0] if labels.shape[1:] == (1,) and labels.dtype.kind != "f" else labels


def _array(value: Any, graph: Graph, name: str) -> np.ndarray:
    array, wanted = np.asarray(value), numpy_dtype(graph.tensor(name).dtype)
    shape = graph.tensor(name).shape or ()
    sizes = zip(array.shape[1:], shape[1:], strict=False)
    if array.ndim != len(shape) or any(isinstance(dim, int) and size != dim for size, dim in sizes):
        raise DataError(f"has shape {list(array.shape)}, the model takes {graph.tensor(name)}", place=f"training data: {name!r}")
    if array.dtype.kind != wanted.kind:
        raise DataError(f"is {array.dtype}, the model takes {wanted}", place=f"training data: {name!r}")
    return array.astype(wanted, copy=False)


def pieces(batch: Batch, size: int) -> Iterator[Batch]:
    """The samples so many at once, in their order; all together for 0. Raises DataError for an incomplete rest."""
    if not size or len(batch) == size:
        yield batch
        return
    if len(batch) % size:
        raise DataError(f"{len(batch)} samples for a model with the batch {size}", place="training data")
    for start in range(0, len(batch), size):
        yield rows_of(batch, slice(start, start + size))


def first(batches: Iterable[Batch], count: int) -> list[Batch]:
    """At most so many."""
    return [batch for _, batch in zip(range(count), batches, strict=False)]


def in_order(source: Source, batch: int) -> list[Batch]:
    """All samples once, not shuffled where they are arrays."""
    if not isinstance(source, Arrays):
        return list(source.epoch(0, batch, 0))
    count = len(source.samples)
    return [source.at(np.arange(start, min(start + batch, count))) for start in range(0, count, batch)]


def divided(source: Source, held_out: Source | None, share: float, batch: int, own: int) -> tuple[Source, list[Batch]]:
    """What is trained on, and the batches that are only looked at: held-out ones that are given, else a share of the data.

    Of arrays evenly spread samples are held out, of a loader its first batches, at least one if there are two: the last ones
    would take a pass over everything. They are the same ones whatever the training's seed: a schedule trains with several, and
    what one of them held out no other may see. `own` is the graph's batch.
    """
    if held_out is not None:
        return source, in_order(held_out, batch)
    if isinstance(source, Loader):
        return _beginning(source, share, batch)
    if not isinstance(source, Arrays):
        return source, []
    learned, judged = split(source.samples, share, own)
    return Arrays(learned), in_order(Arrays(judged), batch) if judged is not None else []


def _beginning(loader: Loader, share: float, batch: int) -> tuple[Source, list[Batch]]:
    steps = loader.steps(batch) if share else 0
    judged: list[Batch] = []
    for one in first(loader.epoch(0, batch, 0), min(math.ceil(steps * share), steps - 1)):
        if sum(map(len, judged)) >= CHECKED:
            break
        judged.append(one)
    if not judged:
        return loader, []
    return Rest(loader, len(judged), frozenset(name for one in judged for name in names_of(one)), loader.digest), judged


def split(samples: Samples, share: float, batch: int) -> tuple[Samples, Samples | None]:
    """Training and held-out samples; evenly spread ones are held out, whole batches of the graph, None if there are too few."""
    count = min(round(len(samples) * share), CHECKED) // batch * batch
    if not count or len(samples) - count < batch:
        return samples, None
    chosen = np.zeros(len(samples), bool)
    chosen[(np.arange(count) * len(samples)) // count] = True
    return samples.rows(~chosen), samples.rows(chosen)
