"""Ways of training a compressed model against their naive counterparts, at the same number of steps, with three seeds.

Palettes of 2 and 4 bits without training, with trained entries (distill) and with trained codes too (dkm): size, score and the
measured time of the library. Then distillation against labels alone, quantization-aware training against rounding after as
much training, gradual pruning against pruning at once, lottery rewinding against fine-tuning and against new weights (on a
network that is trained here from nothing, so that its checkpoint is known), and NetAdapt against one uniform cut to the same
predicted latency. A method that does not win is said not to win.

A few steps are timed first: the time that all will take is told, and where it is longer than is allowed, every training gets
fewer steps, methods and counterparts alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from scipy import stats
from threadpoolctl import threadpool_limits

from benchmarks import ways
from benchmarks.findings import FLOAT, Findings, Setting
from benchmarks.layout import higher_is_better, lower_is_better
from benchmarks.recovered import Images, sizes, slug
from benchmarks.ways import FEW, INT4, PIECE, QUICK, THREE_BITS, TRAIN, Bench, Effort, Scores
from hwopt.backends.ort import Session
from hwopt.compiler import compile_model
from hwopt.demo import MODEL, SHAPES
from hwopt.measure import interleaved

SEEDS = (0, 1, 2)
MINUTES = {"palettes": 5.0, "methods": 10.0}  # at most, on as many cores as there are
TIMED = 8  # steps
OVERHEAD, LEAST = 1.3, 0.2  # of a training over its steps: the teacher, checks; the smallest share of the steps


@dataclass(frozen=True)
class Experiment:
    """`steps` in steps of the demo model's own width; `against` names the counterparts of each way."""

    case: str
    work: Callable[[Bench, int], Scores]
    steps: Callable[[Effort], float]
    against: Mapping[str, tuple[str, ...]]


PALETTES = tuple(
    Experiment(
        f"palette {bits} bits", partial(ways.palette, bits=bits), lambda effort: 2.5 * effort.palette,
        {"trained entries": ("not trained",), "dkm": ("not trained", "trained entries")},
    )
    for bits in (2, 4)
)  # fmt: skip
METHODS = (
    *(
        Experiment(
            f"distillation, {images} images", partial(ways.distillation, images=images), lambda effort: effort.distill,
            {"distillation": ("hard labels",)},
        )
        for images in (FEW, TRAIN)
    ),
    *(
        Experiment(
            case, partial(ways.quantization, passes=passes), lambda effort: 2.5 * effort.qat, {"qat": ("ptq", "rounded at once")}
        )
        for case, passes in (("3 bits", THREE_BITS), ("int4", INT4))
    ),
    Experiment("sparse", ways.gradually, lambda effort: 2 * effort.gradual, {"gradual": ("one-shot",)}),
    Experiment(
        "ticket", ways.rewinding, lambda effort: 0.25 * (effort.first + effort.base + 3 * effort.prune),
        {"lottery": ("one-shot", "started anew")},
    ),
    Experiment("faster", ways.netadapt, lambda effort: 4 * effort.adapt, {"netadapt": ("uniform",)}),
)  # fmt: skip


def palettes(findings: Findings, setting: Setting) -> None:
    """Palettes of 2 and 4 bits on the demo model, with and without training: size, score, measured speed."""
    compared(findings, setting, "palettes", PALETTES)
    speeds(findings, setting)


def methods(findings: Findings, setting: Setting) -> None:
    """Distillation, QAT, gradual pruning, lottery rewinding and NetAdapt against naive counterparts at equal cost."""
    compared(findings, setting, "methods", METHODS)


def compared(findings: Findings, setting: Setting, name: str, experiments: tuple[Experiment, ...]) -> None:
    """Every experiment with every seed, as many at once as there are cores."""
    cores = min(setting.threads or psutil.cpu_count() or 1, len(SEEDS) * len(experiments))
    effort = QUICK if setting.quick else affordable(findings, setting, name, experiments, cores)
    scores: dict[str, list[Scores]] = {}
    with ProcessPoolExecutor(cores, get_context("spawn")) as pool:
        runs = {
            pool.submit(one, experiment.work, seed, setting.fashion, effort): (experiment.case, seed)
            for experiment in experiments
            for seed in SEEDS
        }
        for run in as_completed(runs):
            case, seed = runs[run]
            try:
                scores.setdefault(case, []).append(run.result())
                findings.say(f"{case}, seed {seed}: {', '.join(f'{way} {score:.4f}' for way, score in run.result().items())}")
            except Exception as error:  # the other runs go on
                findings.note(f"{case}, seed {seed} failed: {type(error).__name__}: {error}")
                findings.summary[f"{slug(case)}_failed"] = 1
    for experiment in experiments:
        if experiment.case in scores:
            settle(findings, experiment, scores[experiment.case])


def one(work: Callable[[Bench, int], Scores], seed: int, folder: Path, effort: Effort) -> Scores:
    """A run in a process of its own."""
    with threadpool_limits(1):
        return work(Bench(Images(folder), effort), seed)


def affordable(findings: Findings, setting: Setting, name: str, experiments: tuple[Experiment, ...], cores: int) -> Effort:
    """The whole effort, or as much of its steps as takes so long on quiet cores; says which, from what a few steps cost.

    It counts the processor's time, so that others at work on the machine make it no smaller.
    """
    bench, effort = Bench(Images(setting.fashion), Effort()), Effort()
    session, image = Session(bench.model), bench.test["image"][:1]
    short, long = (spent(lambda: bench.trained(bench.model, "distill", steps, 0, checks=1)) for steps in (2, 2 + TIMED))  # noqa: B023
    looking = spent(lambda: [session.run({"image": image}) for _ in range(PIECE)]) / PIECE
    training = OVERHEAD * sum(one.steps(effort) for one in experiments) * max(long - short, 0.01) / TIMED
    scoring = 4 * len(experiments) * effort.tested * looking
    fixed, wanted = (len(SEEDS) * one / cores / 60 for one in (scoring, training))
    share = min(max((MINUTES[name] - fixed) / wanted, LEAST), 1.0)
    said = "all steps" if share == 1 else f"{share:.0%} of the steps, since all would take {fixed + wanted:.0f}"
    findings.say(f"about {fixed + share * wanted:.0f} minutes in {cores} processes on quiet cores: {said}")
    findings.summary[f"{name}_share_of_steps"] = share
    return effort if share == 1 else effort.times(share)


def spent(work: Callable[[], object]) -> float:
    """Seconds of the processor."""
    started = time.process_time()
    work()
    return time.process_time() - started


def settle(findings: Findings, experiment: Experiment, scores: list[Scores]) -> None:
    """The mean of every way with its spread, and how far each method is ahead of its counterparts."""
    case = slug(experiment.case)
    ways = {way: [one[way] for one in scores] for way in scores[0]}
    for way, found in ways.items():
        findings.summary |= {f"{case}_{slug(way)}_score": mean(found), f"{case}_{slug(way)}_spread": spread(found)}
    for way, naive in experiment.against.items():
        peers = {other: mean(ways[other]) for other in naive}
        findings.add(higher_is_better(f"{experiment.case}, {way}", "top-1 accuracy", "1", mean(ways[way]), peers))
        for other in naive:
            gains = [ours - theirs for ours, theirs in zip(ways[way], ways[other], strict=True)]
            low, high = interval(gains)
            figures = {"gain": mean(gains), "gain_spread": spread(gains), "gain_low": low, "gain_high": high}
            findings.summary |= {f"{case}_{slug(way)}_over_{slug(other)}_{key}": value for key, value in figures.items()}
            findings.note(f"{experiment.case}: {way} {verdict(gains)} {other}")


def verdict(gains: list[float]) -> str:
    """`beats` if by more than the spread, or only ahead, with the figures."""
    word = "beats" if mean(gains) > spread(gains) else "is ahead of, within the spread," if mean(gains) > 0 else "does not beat"
    seeds = f"{sum(gain > 0 for gain in gains)} of {len(gains)} seeds"
    return f"({mean(gains):+.4f} +- {spread(gains):.4f} in accuracy, better in {seeds}) {word}"


def mean(values: list[float]) -> float:
    return float(np.mean(values))


def spread(values: list[float]) -> float:
    """Standard deviation over the seeds."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the mean over seeds (Student's t), wide for few of them."""
    half = float(stats.t.ppf(0.975, max(len(values) - 1, 1))) * spread(values) / len(values) ** 0.5
    return mean(values) - half, mean(values) + half


def speeds(findings: Findings, setting: Setting) -> None:
    """The libraries side by side, beside what the plan promises: training changes numbers, no kernels."""
    bench = Bench(Images(setting.fashion), QUICK)
    sets: dict[str, Any] = {
        "calibrate": {"image": bench.train(64)["image"]}, "evaluate": {n: a[:200] for n, a in bench.test.items()},
    }  # fmt: skip
    passes = {FLOAT: "none", **{f"palette {bits} bits": f"share-weights{{bits={bits}}}" for bits in (2, 4)}}
    built = {
        name: compile_model(MODEL, out=setting.scratch / slug(name), shapes=SHAPES, passes=text, threads=1, measure=False, **sets)
        for name, text in passes.items()
    }
    times = interleaved({name: artifact.runner({"image": bench.test["image"][:1]}) for name, artifact in built.items()})
    bytes_of = {name: sizes(artifact) for name, artifact in built.items()}
    for name in list(passes)[1:]:
        for what, count in bytes_of[name].items():
            findings.add(lower_is_better(name, what, "B", count, {FLOAT: bytes_of[FLOAT][what]}))
            findings.summary[f"{slug(name)}_{slug(what)}_times_smaller"] = bytes_of[FLOAT][what] / count
        findings.add(lower_is_better(name, "latency", "s", times[name].median, {FLOAT: times[FLOAT].median}))
        ratio, claimed = times[FLOAT].median / times[name].median, built[name].report["speedup"]
        findings.summary |= {f"{slug(name)}_speedup": ratio, f"{slug(name)}_promised_speedup": claimed}
        findings.note(f"{name}: {ratio:.2f} times as fast as float, the plan promises {claimed:.2f}")
