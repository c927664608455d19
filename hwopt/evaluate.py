"""Scores: how good a model is on evaluation data, and how a changed model compares with the original, sample by sample."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import stats

from hwopt.errors import DataError, UsageError
from hwopt.ir import Graph
from hwopt.samples import Samples, batch_of

Outputs = Mapping[str, np.ndarray]
Run = Callable[[Mapping[str, np.ndarray]], Outputs]


class Scorer(Protocol):
    """Turns a way to run a model into one number per sample, higher is better; the score is their mean."""

    @property
    def metric(self) -> str: ...

    def __call__(self, run: Run) -> np.ndarray: ...


@dataclass(frozen=True)
class Comparison:
    """A changed model against the original on the same samples. Positive `drop` means that the changed one is worse."""

    metric: str
    baseline: float
    score: float
    drop: float
    interval: tuple[float, float]  # 95 %, of the drop
    standard_error: float
    right_to_wrong: int | None  # paired flips, for metrics that are right or wrong
    wrong_to_right: int | None
    mcnemar_p: float | None
    samples: int


def compare(metric: str, baseline: np.ndarray, changed: np.ndarray) -> Comparison:
    """Paired comparison; McNemar's test is exact. The interval is the normal approximation on paired differences; for answers
    that are right or wrong, Bonett and Price's ("Adjusted Wald intervals for a difference of proportions based on matched
    pairs", 2012), since few samples without a flip do not prove that there are none. The same array twice has no drop.
    """
    differences = baseline.astype(np.float64) - changed
    count = len(differences)
    error = float(differences.std(ddof=1) / math.sqrt(count)) if count > 1 else 0.0
    drop = float(differences.mean())
    lost = gained = p = None
    if set(np.unique(baseline)) | set(np.unique(changed)) <= {0.0, 1.0}:
        lost, gained = int((differences > 0).sum()), int((differences < 0).sum())
        p = float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    interval = (drop - 1.96 * error, drop + 1.96 * error)
    if lost is not None and gained is not None and changed is not baseline:
        interval = _flip_interval(lost, gained, count)
    return Comparison(metric, float(baseline.mean()), float(changed.mean()), drop, interval, error, lost, gained, p, count)


def _flip_interval(lost: int, gained: int, count: int) -> tuple[float, float]:
    """95 % interval of (lost - gained) / count, from counts with one more sample lost and one more gained."""
    losing, gaining = (lost + 1) / (count + 2), (gained + 1) / (count + 2)
    middle = losing - gaining
    half = 1.96 * math.sqrt((losing + gaining - middle**2) / (count + 2))
    return middle - half, middle + half


@dataclass(frozen=True, eq=False)
class TopOne:
    """1 for every sample whose largest output is the label."""

    graph: Graph
    samples: Samples
    workers: int = 1
    metric: str = "top-1 accuracy"

    def __call__(self, run: Run) -> np.ndarray:
        labels = self.samples.labels
        if labels is None:
            raise DataError("top-1 accuracy needs labels", place=self.samples.source)
        found = first_output(self.graph, self.samples, run, self.workers)
        return (found.reshape(len(found), -1).argmax(1) == labels[: len(found)]).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Agreement:
    """Without labels: 1 for every sample on which a classifier names the same class as the original model did."""

    graph: Graph
    samples: Samples
    reference: np.ndarray
    workers: int = 1
    metric: str = "top-1 agreement"

    def __call__(self, run: Run) -> np.ndarray:
        found = first_output(self.graph, self.samples, run, self.workers)
        return (found.argmax(-1) == self.reference.argmax(-1)).reshape(len(found), -1).mean(1)


@dataclass(frozen=True, eq=False)
class Cosine:
    """Without labels, for whatever is no classifier: cosine similarity of a sample's outputs with the original's."""

    graph: Graph
    samples: Samples
    reference: np.ndarray
    workers: int = 1
    metric: str = "cosine similarity"

    def __call__(self, run: Run) -> np.ndarray:
        found = first_output(self.graph, self.samples, run, self.workers).reshape(len(self.reference), -1).astype(np.float64)
        wanted = self.reference.reshape(len(found), -1).astype(np.float64)
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
        return np.divide((found * wanted).sum(1), norms, out=np.ones(len(found)), where=norms > 0)


@dataclass(frozen=True, eq=False)
class UserScore:
    """A function of the user's, given a callable that runs the model on {input: array}; returns a number or one per sample."""

    function: Callable[[Run], float | np.ndarray]
    metric: str

    def __call__(self, run: Run) -> np.ndarray:
        return np.atleast_1d(np.asarray(self.function(run), np.float64))


def first_output(graph: Graph, samples: Samples, run: Run, workers: int = 1) -> np.ndarray:
    """The model's first output over all samples, [samples, ...]; `workers` runs at once."""
    name = graph.outputs[0]
    with ThreadPoolExecutor(workers) as pool:
        parts = list(pool.map(lambda feeds: run(feeds)[name], samples.feeds(graph)))
    batch = batch_of(graph)
    whole = np.concatenate([part if part.ndim and len(part) == batch else part[None] for part in parts])
    if np.issubdtype(whole.dtype, np.floating) and not np.isfinite(whole).all():
        raise DataError(f"output {name!r} is not finite", place=samples.source, hint="check the data and the model")
    return whole


def make_scorer(graph: Graph, samples: Samples, run: Run, workers: int = 1) -> Scorer:
    """The scorer that fits the data: accuracy where labels are given, agreement or similarity with `run` elsewhere."""
    if samples.labels is not None:
        return TopOne(graph, samples, workers)
    reference = first_output(graph, samples, run, workers)
    kind = Agreement if is_classifier(reference) else Cosine
    return kind(graph, samples, reference, workers)


def is_classifier(output: np.ndarray) -> bool:
    """A float [samples, classes] output with at least two classes whose rows do not look like unit-length embeddings."""
    if output.ndim != 2 or output.shape[1] < 2 or not np.issubdtype(output.dtype, np.floating):
        return False
    norms = np.linalg.norm(output.astype(np.float64), axis=1)
    return not (np.allclose(norms, 1, atol=1e-3) and output.min() < 0)


def user_scorer(text: str) -> UserScore:
    """`module:function` as a scorer; raises UsageError if there is no such function."""
    module, _, name = text.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"cannot import {text!r} ({error})", hint="write --evaluate module:function") from error
    return UserScore(function, name)


def divergence(reference: np.ndarray, found: np.ndarray) -> float:
    """Error of outputs in one currency: mean KL of the softmax for classifiers, else squared error over signal power."""
    if is_classifier(reference):
        return float(np.maximum(_kl(_log_softmax(reference), _log_softmax(found)), 0).mean())
    wanted, got = reference.astype(np.float64), found.astype(np.float64)
    return float(((wanted - got) ** 2).sum() / max(float((wanted**2).sum()), 1e-30))


def _log_softmax(output: np.ndarray) -> np.ndarray:
    """Row-wise; outputs that are probabilities already are only logged."""
    values = output.astype(np.float64)
    if values.min() >= 0 and np.allclose(values.sum(1), 1, atol=1e-3):
        return np.log(np.maximum(values, 1e-12))
    values = values - values.max(1, keepdims=True)
    return values - np.log(np.exp(values).sum(1, keepdims=True))


def _kl(reference: np.ndarray, found: np.ndarray) -> np.ndarray:
    return (np.exp(reference) * (reference - found)).sum(1)
