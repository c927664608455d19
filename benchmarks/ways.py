"""Experiments with trainings of the demo model on Fashion-MNIST: each gives, for one seed, the test score of a method and of its
naive counterparts after the same number of steps.

States are chosen on held-out training images, scores are those of test images that nothing else sees.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.recovered import Images
from hwopt.analysis.workload import workloads
from hwopt.backends.ort import Session
from hwopt.demo import MODEL, SHAPES
from hwopt.io.onnx import load, save
from hwopt.ir import Graph
from hwopt.job import clean
from hwopt.pipeline import Context, PassManager, parse_list
from hwopt.plugins import find_passes, find_target
from hwopt.recover import Case, recovered
from hwopt.recover.case import Outcome, Run
from hwopt.recover.netadapt import NetAdapt
from hwopt.samples import LABELS, Samples
from hwopt.target import total

CALIBRATE, TRAIN, FEW = 256, 20000, 2000  # training images: to calibrate, to train on, and where there are few
PIECE = 250  # held-out images at once
SPARSE, TICKET = "sparsify{ratio=0.9}", "sparsify{ratio=0.8}"  # of the demo model, and of the small one that is trained here
HALF, QUARTER = "prune-channels{ratio=0.5}", "prune-channels{ratio=0.75}"  # of the demo model's widths go
THREE_BITS, INT4 = "quantize-weights{bits=3}", "quantize{weights=int4}"
HARD: Mapping[str, Any] = {"logits": 0, "hard": 1}
SOFT: Mapping[str, Any] = {"temperature": 4}  # Hinton et al. and most of those who followed


@dataclass(frozen=True)
class Effort:
    """Steps of 64 images, and test images."""

    palette: int = 150
    distill: int = 300
    qat: int = 150
    gradual: int = 240
    first: int = 200  # until the checkpoint that is gone back to
    base: int = 1200  # from there to the trained network
    prune: int = 400
    adapt: int = 200
    tested: int = 10000
    held_out: int = 1000
    checks: int = 4

    def times(self, share: float) -> Effort:
        steps = ("palette", "distill", "qat", "gradual", "first", "base", "prune", "adapt")
        return dataclasses.replace(self, **{name: max(round(getattr(self, name) * share), 20) for name in steps})


QUICK = dataclasses.replace(Effort().times(0.2), tested=2000, held_out=500, checks=2)


@dataclass
class Bench:
    """The data and the model; each process has one of its own, and each training one thread."""

    images: Images
    effort: Effort

    @cached_property
    def model(self) -> Graph:
        return clean(load(MODEL, shapes=SHAPES), Context())

    @cached_property
    def ctx(self) -> Context:
        return Context(find_target("host"), Samples(self.images.part("train", slice(0, CALIBRATE), labels=False)))

    @cached_property
    def held_out(self) -> dict[str, np.ndarray]:
        return self.images.part("train", slice(60000 - self.effort.held_out, 60000))

    @cached_property
    def test(self) -> dict[str, np.ndarray]:
        return self.images.part("t10k", slice(0, self.effort.tested))

    def train(self, count: int) -> dict[str, np.ndarray]:
        return self.images.part("train", slice(CALIBRATE, CALIBRATE + count))

    def changed(self, passes: str, graph: Graph | None = None) -> Graph:
        chosen = tuple(one for one, _ in parse_list(passes, find_passes()))
        return PassManager(chosen).run(graph or self.model, self.ctx).graph

    def outcome(
        self, graph: Graph, kind: str, steps: int, seed: int, teacher: Graph | None = None, images: int = TRAIN, **options: Any
    ) -> Outcome:
        """So many steps; the state with the best accuracy on held-out images, whatever the loss."""
        usual = {"steps": steps, "seed": seed, "threads": 1, "checks": self.effort.checks, "patience": 0} | options
        text = f"{kind}{{{','.join(f'{name}={value}' for name, value in usual.items())}}}"
        case = Case(graph, teacher or self.model, self.train(images), held_out=self.held_out, score=self.accuracy, ctx=self.ctx)
        return recovered(case, text)

    def trained(self, *args: Any, **options: Any) -> Graph:
        return self.outcome(*args, **options).graph

    def accuracy(self, run: Run) -> float:
        images, labels = self.held_out["image"], self.held_out[LABELS]
        found = [run({"image": images[row : row + PIECE]})["logits"].argmax(1) for row in range(0, len(images), PIECE)]
        return float((np.concatenate(found) == labels).mean())

    def score(self, graph: Graph) -> float:
        """Accuracy on test images, by ONNX Runtime."""
        session, images = Session(graph), self.test["image"]
        found = [session.run({"image": images[row : row + 1]})["logits"].argmax() for row in range(len(images))]
        return float((np.array(found) == self.test[LABELS]).mean())

    def seconds(self, graph: Graph) -> float:
        """Of one run, as the cost model of this machine predicts it, on one thread."""
        target = find_target("host")
        return total(target.cost.estimate(work, 1) for work in workloads(graph)).seconds


Scores = Mapping[str, float]


# One experiment with one seed: the score of each way.


def palette(bench: Bench, seed: int, bits: int) -> Scores:
    """Codes of the demo model's weights: entries trained, codes trained too."""
    graph, rate = bench.changed(f"share-weights{{bits={bits}}}"), {"lr": 0.001 if bits == 2 else 0.0003}
    steps = bench.effort.palette
    return {
        "not trained": bench.score(graph),
        "trained entries": bench.score(bench.trained(graph, "distill", steps, seed, **rate)),
        "dkm": bench.score(bench.trained(graph, "dkm", steps, seed, **rate)),
    }


def distillation(bench: Bench, seed: int, images: int) -> Scores:
    """Half of the demo model's widths left: the float model's outputs against labels alone."""
    graph, options = bench.changed(HALF), {"steps": bench.effort.distill, "seed": seed, "images": images, "lr": 0.003}
    return {
        "not trained": bench.score(graph),
        "distillation": bench.score(bench.trained(graph, "distill", **options, **SOFT)),
        "hard labels": bench.score(bench.trained(graph, "distill", **options, **HARD)),
    }


def quantization(bench: Bench, seed: int, passes: str) -> Scores:
    """The demo model with few bits: trained through the rounding, or as much before it."""
    options = {"steps": bench.effort.qat, "seed": seed, "lr": 0.001, "logits": 1, **SOFT}
    rounded = bench.changed(passes)
    return {
        "rounded at once": bench.score(rounded),
        "ptq": bench.score(bench.changed(passes, bench.trained(bench.model, "qat", **options))),
        "qat": bench.score(bench.trained(rounded, "qat", **options)),
    }


def gradually(bench: Bench, seed: int) -> Scores:
    """Most of the demo model's weights go: by and by, or at once, distilled as long."""
    options = {"steps": bench.effort.gradual, "seed": seed, "lr": 0.001, **SOFT}
    sparse = bench.changed(SPARSE)
    return {
        "not trained": bench.score(sparse),
        "one-shot": bench.score(bench.trained(sparse, "distill", **options)),
        "gradual": bench.score(bench.trained(bench.model, "gradual", **options, stages=4, passes=f'"{SPARSE}"')),
    }


def rewinding(bench: Bench, seed: int) -> Scores:
    """A network from nothing to its checkpoint and on; then most of its weights go, in ways that train as long."""
    effort = bench.effort
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "early.onnx"
        early = bench.trained(fresh(bench.changed(QUARTER), seed), "qat", effort.first, seed, lr=0.003)
        save(early, checkpoint)
        base = bench.trained(early, "qat", effort.base, 100 + seed, lr=0.003)
        sparse = bench.changed(TICKET, base)
        options = {"steps": effort.prune, "seed": seed, "teacher": base, "lr": 0.003, **HARD}
        stated = {**options, "passes": f'"{TICKET}"'}
        ways: dict[str, Graph] = {
            "whole": base,
            "not trained": sparse,
            "one-shot": bench.trained(sparse, "distill", **options),
            "started anew": bench.trained(fresh(sparse, 10 + seed), "distill", **options),
            "lottery": bench.trained(base, "lottery", **stated, checkpoint=f'"{checkpoint}"'),
        }
    return {name: bench.score(graph) for name, graph in ways.items()}


def netadapt(bench: Bench, seed: int) -> Scores:
    """Predicted latency to 60 %, round by round; against the narrowest uniform cut that is as fast, trained for as many steps."""
    usual = {"lr": 0.003, **SOFT}
    rounds = {"latency": 0.6, "share": 0.15, "short": 0.05, "drop": 0.5, "cores": 1}
    found = bench.outcome(bench.model, "netadapt", bench.effort.adapt, seed, **usual, **rounds)
    recipe = found.recipe
    if not isinstance(recipe, NetAdapt) or found.graph is bench.model:
        raise ValueError("netadapt found nothing to cut")
    taken = [int(stop.partition("/")[2]) for stop in recipe.stops]
    steps, wanted = recipe.tries * sum(taken[:-1]) + taken[-1], bench.seconds(found.graph)
    uniform = next(graph for graph in uniformly(bench) if bench.seconds(graph) <= wanted)
    return {
        "float": bench.score(bench.model),
        "netadapt": bench.score(found.graph),
        "uniform": bench.score(bench.trained(uniform, "distill", steps, seed, **usual)),
    }


def uniformly(bench: Bench) -> Iterator[Graph]:
    """The demo model with ever more of all its widths gone."""
    for percent in range(4, 100, 4):
        yield bench.changed(f"prune-channels{{ratio={percent / 100}}}")


def fresh(graph: Graph, seed: int) -> Graph:
    """Random weights with the deviation of those that are there (He et al. 2015 for 2 and more axes), biases zero."""
    random, edit = np.random.default_rng(seed), graph.edit()
    for name, array in graph.params.items():
        if array.dtype != np.float32 or array.size < 2:
            continue
        fan = int(np.prod(array.shape[1:])) if array.ndim > 1 else 0
        weights = array.ndim > 1 or not any(name in node.inputs[2:] for node in graph.users[name])
        deviation = np.sqrt(2 / fan) if fan else float(array.std()) * weights
        edit.set_param(name, (deviation * random.standard_normal(array.shape)).astype(np.float32))
    for node in graph.nodes:
        edit.replace(node)
    return edit.finish("fresh")
