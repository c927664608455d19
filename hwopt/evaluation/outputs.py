"""What both models answer on the same samples, and how it differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from hwopt.errors import DataError
from hwopt.evaluate import (
    Agreement,
    Comparison,
    Cosine,
    Run,
    Scorer,
    TopOne,
    compare,
    divergences,
    floating_outputs,
    is_classifier,
)
from hwopt.evaluation.subject import Subject
from hwopt.ir import Graph
from hwopt.samples import Samples, batch_of

Watch = Callable[[int, int], None]


def unwatched(done: int, total: int) -> None:
    """The progress of nobody who looks."""


@dataclass(frozen=True, eq=False)
class Pair:
    """The floating-point outputs of both models over the same samples, each [samples, ...]; the first one is the answer."""

    samples: Samples
    original: tuple[np.ndarray, ...]
    compressed: tuple[np.ndarray, ...]

    @property
    def logits(self) -> tuple[np.ndarray, np.ndarray] | None:
        """[samples, classes] of both models, if they are classifiers."""
        found = tuple(one[0].reshape(len(one[0]), -1) for one in (self.original, self.compressed))
        labelled = self.samples.labels is not None
        if found[0].shape[1] < 2 or not (labelled or (len(self.original) == 1 and is_classifier(self.original[0]))):
            return None
        return found[0], found[1]

    @property
    def divergence(self) -> np.ndarray:
        """One number per sample: KL of the softmax for classifiers, else the squared error over the mean power of the float's."""
        if self.logits is not None:
            return divergences(*self.logits)
        return np.mean([_relative(*both) for both in zip(self.original, self.compressed, strict=True)], axis=0)


def _relative(wanted: np.ndarray, got: np.ndarray) -> np.ndarray:
    wanted, got = (rows.reshape(len(rows), -1).astype(np.float64) for rows in (wanted, got))
    power = max(float((wanted**2).sum(1).mean()), 1e-30)
    return ((wanted - got) ** 2).sum(1) / power


def pair_of(subject: Subject, samples: Samples, watch: Watch = unwatched) -> Pair:
    """Run both models over the samples, as many as fill whole batches. Raises DataError for outputs that are not finite."""
    graph = subject.original
    count = len(samples) // batch_of(graph) * batch_of(graph)
    if "float" not in graph.tensor(graph.outputs[0]).dtype:
        reason = f"its first output {graph.outputs[0]!r} is {graph.tensor(graph.outputs[0])}: no scores of classes, no features"
        raise DataError(reason, place=graph.name, hint="let a function score it: --data module:function that takes run")
    samples = samples.head(count)
    both = (subject.run_original, subject.run_compressed)
    runs = [watched(run, graph, samples, watch, place) for place, run in enumerate(both)]
    original, compressed = (floating_outputs(graph, samples, run) for run in runs)
    return Pair(samples, original, compressed)


def watched(run: Run, graph: Graph, samples: Samples, watch: Watch, turn: int) -> Run:
    """The same that tells how far it is, as one of two turns."""
    total = max(len(samples) // batch_of(graph), 1)
    done = [0]

    def told(feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        done[0] += 1
        watch(turn * total + done[0], 2 * total)
        return run(feeds)

    return told


def scorer_of(graph: Graph, pair: Pair) -> Scorer:
    """Accuracy where there are labels, else agreement or similarity with the float model."""
    if pair.samples.labels is not None:
        return TopOne(graph, pair.samples)
    if pair.logits is not None:
        return Agreement(graph, pair.samples, pair.original[0])
    return Cosine(graph, pair.samples, pair.original)


def scores_of(graph: Graph, pair: Pair) -> tuple[Comparison, np.ndarray, np.ndarray]:
    """The comparison and both models' scores per sample, from outputs that are known: nothing is run again."""
    scorer = scorer_of(graph, pair)
    before, after = (scorer(replayed(graph, one)) for one in (pair.original, pair.compressed))
    return compare(scorer.metric, before, after), before, after


def replayed(graph: Graph, outputs: Sequence[np.ndarray]) -> Run:
    """A run that gives the known outputs, batch after batch."""
    names = [name for name in graph.outputs if "float" in graph.tensor(name).dtype]
    batch, place = batch_of(graph), [0]

    def next_batch(_: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        start, place[0] = place[0], place[0] + batch
        return {name: rows[start : start + batch] for name, rows in zip(names, outputs, strict=True)}

    return next_batch


def interval_of(scores: np.ndarray) -> tuple[float, float] | None:
    """95 % of the mean: Wilson's for answers that are right or wrong, else the normal approximation; None for one number."""
    if len(scores) < 2:
        return None
    if set(np.unique(scores)) <= {0.0, 1.0}:
        found = stats.binomtest(int(scores.sum()), len(scores)).proportion_ci(method="wilson")
        return float(found.low), float(found.high)
    half = 1.96 * float(scores.std(ddof=1)) / len(scores) ** 0.5
    return float(scores.mean()) - half, float(scores.mean()) + half


def comparison_data(found: Comparison, before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """A comparison for report.json."""
    flips = None
    if found.right_to_wrong is not None:
        flips = {"right_to_wrong": found.right_to_wrong, "wrong_to_right": found.wrong_to_right, "mcnemar_p": found.mcnemar_p}
    return {
        "metric": found.metric,
        "samples": found.samples,
        "float": {"score": found.baseline, "interval": interval_of(before)},
        "compressed": {"score": found.score, "interval": interval_of(after)},
        "drop": found.drop,
        "drop_interval": found.interval,
        "paired_flips": flips,
    }


def difference_data(pair: Pair) -> dict[str, Any]:
    """How far the outputs are apart: KL and flips for classifiers, the relative error elsewhere."""
    each = pair.divergence
    name = "kl" if pair.logits is not None else "relative_squared_error"
    told: dict[str, Any] = {
        "measure": name,
        "mean": float(each.mean()),
        "median": float(np.median(each)),
        "percentile_95": float(np.percentile(each, 95)),
        "largest": float(each.max()),
    }
    if pair.logits is not None:
        flips = (pair.logits[0].argmax(1) != pair.logits[1].argmax(1)).astype(np.float64)
        told |= {"flips": int(flips.sum()), "flip_rate": float(flips.mean()), "flip_rate_interval": interval_of(flips)}
    return told
