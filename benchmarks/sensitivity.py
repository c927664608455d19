"""Suite `sensitivity`: do predicted errors rank changes as they really turn out, on samples that the prediction has not seen?

Two predictions: by gradients (all candidates from one backward pass per sample) and measured (every candidate run alone; errors
of a configuration add up). Judged by rank correlation with the KL of the outputs and with the drop of the accuracy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.accuracy import PICTURES, read_pictures
from benchmarks.layout import Row, higher_is_better, lower_is_better, result
from benchmarks.zoo import ZOO, Missing
from hwopt.analysis.coupling import coupling
from hwopt.analysis.sensitivity import Sensitivity, sensitivity
from hwopt.backends.ort import Session
from hwopt.demo import MODEL, SHAPES, demo_data
from hwopt.errors import UsageError, did_you_mean
from hwopt.evaluate import divergence
from hwopt.io.onnx import load
from hwopt.ir import Graph, of_op
from hwopt.pipeline import Context, Pass, PassManager, Phase, merged, parse, run_pass
from hwopt.plugins import find_passes
from hwopt.samples import Samples

SHARES = (0.05, 0.1, 0.2, 0.4)  # of the places that a configuration changes
CONFIGURATIONS = 40


@dataclass(frozen=True, eq=False)
class Work:
    """A model with calibration samples, and others with labels to judge by; every `step`-th layer is shared and pruned."""

    name: str
    graph: Graph
    calibration: Samples
    judged: Samples
    step: int


def run(models: str | None = None, data: Path | None = None, quick: bool | None = None) -> dict[str, Any]:
    """`models`: only these, joined by commas; `data`: the folder of ImageNet pictures named by their class."""
    rows: list[Row] = []
    summary: dict[str, float] = {}
    notes: list[str] = []
    for name in models.split(",") if models else WORK:
        if name not in WORK:
            raise UsageError(f"unknown model {name!r}", place="--models", hint=did_you_mean(name, WORK))
        try:
            _judge(WORK[name](data or PICTURES, bool(quick)), rows, summary, 8 if quick else CONFIGURATIONS)
        except Missing as error:
            notes.append(f"{name} is left out: {error}")
    return result("sensitivity", rows, summary, notes)


def _demo(_: Path, quick: bool) -> Work:
    calibrate, evaluate = demo_data()
    judged = Samples({"image": evaluate["image"]}, evaluate["labels"].astype(np.int64))
    graph = load(MODEL, shapes=SHAPES)
    return Work("demo", graph, Samples(dict(calibrate)).head(8 if quick else 64), judged.head(40 if quick else 400), 1)


def _efficientnet(folder: Path, quick: bool) -> Work:
    files = sorted(folder.glob("*.jpg"))[:: 50 if quick else 5]
    if not files:
        raise Missing("there are no pictures", place=str(folder), hint="give --data FOLDER with NNNN.jpg by class")
    case = ZOO["efficientnet_lite0"](1)
    pictures, labels = read_pictures(files), np.array([int(file.stem[:4]) for file in files])
    graph = load(case.model, shapes=case.shapes)
    (name,) = graph.inputs
    calibration, judged = Samples({name: pictures[::2]}).head(24), Samples({name: pictures[1::2]}, labels[1::2])
    return Work("efficientnet_lite0", graph, calibration, judged, 4)


WORK: dict[str, Callable[[Path, bool], Work]] = {"demo": _demo, "efficientnet_lite0": _efficientnet}


def candidates(graph: Graph, step: int, ctx: Context) -> dict[Pass, Graph]:
    """Quantization of every layer, codebooks and widths of every `step`-th, with the graphs that they make."""
    layers = [node.name for node in of_op(graph, "Conv", "Gemm")]
    groups = [group.name for group in coupling(graph) if not group.frozen]
    texts = [f"quantize{{site={site}}}" for site in layers]
    texts += [f"share-weights{{site={site},bits={bits}}}" for site in layers[::step] for bits in (2, 3, 4)]
    texts += [f"prune-channels{{site={g},ratio={r},criterion=activation}}" for g in groups[::step] for r in (0.125, 0.25, 0.5)]
    made = {one: run_pass(one, graph, ctx) for one in (parse(text, find_passes()) for text in texts)}
    return {one: changed for one, changed in made.items() if changed is not graph}


def configurations(found: Sequence[Pass], count: int) -> list[tuple[Pass, ...]]:
    """Random whole configurations: one candidate at each of a random share of the places."""
    random = np.random.default_rng(0)
    places: dict[tuple[bool, tuple[str, ...]], list[Pass]] = {}
    for one in found:
        places.setdefault((one.phase == Phase.PRUNE, one.site), []).append(one)
    chosen = []
    for _ in range(count):
        share = random.choice(SHARES)
        chosen.append(tuple(some[random.integers(len(some))] for some in places.values() if random.random() < share))
    return [one for one in chosen if one]


def _judge(work: Work, rows: list[Row], summary: dict[str, float], count: int) -> None:
    ctx = Context(calibration=work.calibration)
    made = candidates(work.graph, work.step, ctx)
    start = time.perf_counter()
    float_outputs = _logits(work.graph, work.calibration)
    alone = {one: divergence(float_outputs, _logits(changed, work.calibration)) for one, changed in made.items()}
    middle = time.perf_counter()
    found = sensitivity(work.graph, made, work.calibration, made.__getitem__)
    seconds = time.perf_counter() - middle, middle - start
    whole = configurations(list(made), count)
    reference = _logits(work.graph, work.judged)
    after = [_logits(PassManager(merged(chosen)).run(work.graph, ctx).graph, work.judged) for chosen in whole]
    kl = [divergence(reference, one) for one in after]
    drops = [_accuracy(reference, work.judged) - _accuracy(one, work.judged) for one in after]
    ways = {way: [_predicted(found, alone, chosen, way) for chosen in whole] for way in ("sum", "pairs", "measured")}
    for name, actual in (("KL", kl), ("drop", drops)):
        ranks = {way: _rank(predicted, actual) for way, predicted in ways.items()}
        metric, peer = f"rank correlation with the {name} of {len(whole)} configurations", {"measured": ranks["measured"]}
        rows.append(higher_is_better(f"{work.name} gradients, summed", metric, "1", ranks["sum"], peer))
        rows.append(higher_is_better(f"{work.name} gradients, pairs", metric, "1", ranks["pairs"], peer))
        summary |= {f"{work.name}_{name.lower()}_{way}": value for way, value in ranks.items()}
    rows.append(lower_is_better(f"{work.name} {len(made)} candidates", "time", "s", seconds[0], {"measured": seconds[1]}))
    summary[f"{work.name}_candidates_rank"] = _rank([found.error(one) for one in made], list(alone.values()))


def _predicted(found: Sensitivity, alone: dict[Pass, float], chosen: tuple[Pass, ...], way: str) -> float:
    if way == "pairs":
        return found.error(*chosen)
    return sum(found.error(one) if way == "sum" else alone[one] for one in chosen)


def _rank(predicted: Sequence[float], actual: Sequence[float]) -> float:
    return float(stats.spearmanr(predicted, actual).statistic)


def _logits(graph: Graph, samples: Samples) -> np.ndarray:
    session = Session(graph)
    return np.concatenate([session.run(feeds)[graph.outputs[0]] for feeds in samples.feeds(graph)])


def _accuracy(logits: np.ndarray, samples: Samples) -> float:
    return float((logits.argmax(1) == samples.labels[: len(logits)]).mean()) if samples.labels is not None else 0.0
