"""Scores: how good a model is on evaluation data, and how a changed model compares with the original, sample by sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import stats

from hwopt.errors import DataError
from hwopt.ir import Graph
from hwopt.named import named_function
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
    interval: tuple[float, float] | None  # 95 %, of the drop; unknown for a single number
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
    interval = (drop - 1.96 * error, drop + 1.96 * error) if count > 1 else None
    if lost is not None and gained is not None and changed is not baseline:
        interval = _flip_interval(lost, gained, count)
    return Comparison(metric, float(baseline.mean()), float(changed.mean()), drop, interval, lost, gained, p, count)


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
        """Raises DataError for labels that the model has no output for."""
        labels = self.samples.labels
        if labels is None:
            raise DataError("top-1 accuracy needs labels", place=self.samples.source)
        found = first_output(self.graph, self.samples, run, self.workers)
        check_range(labels, found.reshape(len(found), -1).shape[1], self.samples.source)
        return (found.reshape(len(found), -1).argmax(1) == labels[: len(found)]).astype(np.float64)


def check_labels(graph: Graph, labels: np.ndarray | None, source: str) -> None:
    """Raise DataError for labels that the first output has no class for, before anything is run; sizes must be known. Labels of
    tokens or pixels choose from one axis of it, which the loss finds and looks at.
    """
    shape = graph.tensor(graph.outputs[0]).shape or ()
    if labels is not None and labels.ndim == 1 and len(shape) > 1 and all(isinstance(dim, int) for dim in shape[1:]):
        check_range(labels, math.prod(dim for dim in shape[1:] if isinstance(dim, int)), source)


def check_range(labels: np.ndarray, classes: int, source: str) -> None:
    wrong = np.unique(labels[(labels < 0) | (labels >= classes)])
    if len(wrong):
        more = f" and {len(wrong) - 1} others" if len(wrong) > 1 else ""
        hint = f"labels are places in the first output, 0 to {classes - 1}"
        raise DataError(f"label {wrong[-1]}{more} for a model with {classes} classes", place=source, hint=hint)


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
    """Without labels, for whatever is no classifier: cosine similarity of a sample's outputs with the original's.

    With several outputs their mean; `references` are those of the floating-point ones.
    """

    graph: Graph
    samples: Samples
    references: tuple[np.ndarray, ...]
    workers: int = 1
    metric: str = "cosine similarity"

    def __call__(self, run: Run) -> np.ndarray:
        found = floating_outputs(self.graph, self.samples, run, self.workers)
        return np.mean([_cosine(got, wanted) for got, wanted in zip(found, self.references, strict=True)], axis=0)


def _cosine(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """One number per row; rows that are zero on both sides are equal."""
    found, wanted = (rows.reshape(len(rows), -1).astype(np.float64) for rows in (found, wanted))
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    same = (found == wanted).all(1).astype(np.float64)
    return np.divide((found * wanted).sum(1), norms, out=same, where=norms > 0)


@dataclass(frozen=True, eq=False)
class UserScore:
    """A function of the user's, given a callable that runs the model on {input: array}; returns a number or one per sample."""

    function: Callable[[Run], float | np.ndarray]
    metric: str

    def __call__(self, run: Run) -> np.ndarray:
        """Raises DataError if the function fails or returns no finite number."""
        try:
            scores = np.atleast_1d(np.asarray(self.function(run), np.float64))
        except Exception as error:  # whatever the user's function raises must name it
            raise DataError(f"failed: {type(error).__name__}: {error}", place=f"scoring function {self.metric}") from error
        if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
            hint = "return one number, or one per sample, higher is better"
            raise DataError("returned no finite score", place=f"scoring function {self.metric}", hint=hint)
        return scores


def first_output(graph: Graph, samples: Samples, run: Run, workers: int = 1) -> np.ndarray:
    """The model's first output over all samples, [samples, ...]; `workers` runs at once."""
    return _outputs(graph, graph.outputs[:1], samples, run, workers)[0]


def floating_outputs(graph: Graph, samples: Samples, run: Run, workers: int = 1) -> tuple[np.ndarray, ...]:
    """Every floating-point output over all samples, each [samples, ...]."""
    names = [name for name in graph.outputs if "float" in graph.tensor(name).dtype] or list(graph.outputs[:1])
    return _outputs(graph, names, samples, run, workers)


def _outputs(graph: Graph, names: Sequence[str], samples: Samples, run: Run, workers: int) -> tuple[np.ndarray, ...]:
    with ThreadPoolExecutor(workers) as pool:
        runs = list(pool.map(lambda feeds: _picked(run(feeds), names), samples.feeds(graph)))
    return tuple(_joined(name, [found[name] for found in runs], batch_of(graph), samples) for name in names)


def _picked(found: Outputs, names: Sequence[str]) -> Outputs:
    return {name: found[name] for name in names}


def _joined(name: str, parts: Sequence[np.ndarray], batch: int, samples: Samples) -> np.ndarray:
    whole = np.concatenate([part if part.ndim and len(part) == batch else part[None] for part in parts])
    if np.issubdtype(whole.dtype, np.floating) and not np.isfinite(whole).all():
        raise DataError(f"output {name!r} is not finite", place=samples.source, hint="check the data and the model")
    return whole


def make_scorer(graph: Graph, samples: Samples, run: Run, workers: int = 1) -> Scorer:
    """The scorer that fits the data: accuracy where labels are given, agreement or similarity with `run` elsewhere.

    Classifiers that name one class for all samples are held to similarity: agreement would hardly show a change.
    """
    if samples.labels is not None:
        return TopOne(graph, samples, workers)
    references = floating_outputs(graph, samples, run, workers)
    if len(references) == 1 and is_classifier(references[0]) and len(np.unique(references[0].argmax(1))) > 1:
        return Agreement(graph, samples, references[0], workers)
    return Cosine(graph, samples, references, workers)


def is_classifier(output: np.ndarray) -> bool:
    """A float [samples, classes] output with at least two classes whose rows do not look like unit-length embeddings."""
    if output.ndim != 2 or output.shape[1] < 2 or not np.issubdtype(output.dtype, np.floating):
        return False
    norms = np.linalg.norm(output.astype(np.float64), axis=1)
    return not (np.allclose(norms, 1, atol=1e-3) and output.min() < 0)


def user_scorer(text: str) -> UserScore:
    """`module:function` as a scorer; raises UsageError if there is no such function."""
    use = "module:function; it is called with run({input: array}) -> {output: array}"
    return UserScore(named_function(text, use), text.partition(":")[2])


def divergence(reference: np.ndarray, found: np.ndarray) -> float:
    """Error of outputs in one currency: mean KL of the softmax for classifiers, else squared error over signal power."""
    if is_classifier(reference):
        return float(divergences(reference, found).mean())
    wanted, got = reference.astype(np.float64), found.astype(np.float64)
    return float(((wanted - got) ** 2).sum() / max(float((wanted**2).sum()), 1e-30))


def divergences(reference: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Each sample's KL of the softmax, [samples], for outputs [samples, classes]; the reference says what both are."""
    chances = are_chances(reference)
    return np.maximum(_kl(log_softmax(reference, chances), log_softmax(found, chances)), 0)


def are_chances(output: np.ndarray) -> bool:
    """True for rows of probabilities."""
    return bool(output.min() >= 0 and np.allclose(output.astype(np.float64).sum(1), 1, atol=1e-3))


def log_softmax(output: np.ndarray, chances: bool) -> np.ndarray:
    """Row-wise; outputs that are probabilities already, if coarse ones, are only logged."""
    values = output.astype(np.float64)
    if chances:
        return np.log(np.maximum(values, 1e-12))
    values = values - values.max(1, keepdims=True)
    return values - np.log(np.exp(values).sum(1, keepdims=True))


def _kl(reference: np.ndarray, found: np.ndarray) -> np.ndarray:
    return (np.exp(reference) * (reference - found)).sum(1)
