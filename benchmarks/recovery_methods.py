"""Suite `recovery-methods`: ways of training a compressed model against their naive counterparts, at the same number of steps.

Palettes of 2 and 4 bits without training, with trained entries (distill) and with trained codes too (dkm): size, score and the
measured time of the library. Then distillation against labels alone, quantization-aware training against rounding, and, on a
network that is trained here from nothing so that its checkpoint is known, gradual pruning and lottery rewinding against
pruning at once and fine-tuning. Fashion-MNIST, demo model; every method with three seeds, scores on test images that nothing
else sees. A method that does not win is said not to win.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.layout import Row, higher_is_better, lower_is_better, result
from benchmarks.recover import IMAGES, Images
from hwopt.analysis.size import weight_bytes
from hwopt.backends.ort import Session
from hwopt.compiler import compile_model
from hwopt.demo import MODEL, SHAPES
from hwopt.io.onnx import load, save
from hwopt.ir import Graph
from hwopt.job import clean
from hwopt.measure import interleaved
from hwopt.pipeline import Context, PassManager, parse_list
from hwopt.plugins import find_passes, find_target
from hwopt.recover import Case, recovered
from hwopt.recover.case import Run
from hwopt.samples import LABELS, Samples

SEEDS = (0, 1, 2)
CALIBRATE, TRAIN = 256, 20000  # training images
PIECE = 250  # held-out images at once
SPARSE = "sparsify{ratio=0.8}"  # of the network that is trained here; with 0.95 it is dead however it is trained
HALF, QUARTER = "prune-channels{ratio=0.5}", "prune-channels{ratio=0.75}"  # of the demo model's widths go


@dataclass(frozen=True)
class Effort:
    """Steps of 64 images, and test images."""

    palette: int = 300
    distill: int = 400
    qat: int = 200
    first: int = 200  # until the checkpoint that is gone back to
    base: int = 1500  # from there to the trained network
    prune: int = 600
    tested: int = 10000
    held_out: int = 1000
    checks: int = 4


QUICK = Effort(palette=40, distill=80, qat=40, first=60, base=300, prune=150, tested=2000, held_out=500, checks=2)


def run(threads: int | None = None, data: Path | None = None, quick: bool = False) -> dict[str, Any]:
    """`data` is the folder of the four gzipped IDX files; torch trains on so many threads."""
    bench = Bench(Images(data or IMAGES), threads or 1, QUICK if quick else Effort())
    for work in (palettes, distillation, quantization, pruning):
        work(bench)
    return result("recovery-methods", bench.rows, bench.summary, bench.notes)


@dataclass
class Bench:
    """The data, the model, and what was found."""

    images: Images
    threads: int
    effort: Effort
    rows: list[Row] = field(default_factory=list)
    summary: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def model(self) -> Graph:
        return clean(load(MODEL, shapes=SHAPES), Context())

    @cached_property
    def ctx(self) -> Context:
        return Context(find_target("host"), Samples(self.images.part("train", slice(0, CALIBRATE), labels=False)))

    @cached_property
    def train(self) -> dict[str, np.ndarray]:
        return self.images.part("train", slice(CALIBRATE, CALIBRATE + TRAIN))

    @cached_property
    def held_out(self) -> dict[str, np.ndarray]:
        return self.images.part("train", slice(60000 - self.effort.held_out, 60000))

    @cached_property
    def test(self) -> dict[str, np.ndarray]:
        return self.images.part("t10k", slice(0, self.effort.tested))

    def changed(self, passes: str, graph: Graph | None = None) -> Graph:
        chosen = tuple(one for one, _ in parse_list(passes, find_passes()))
        return PassManager(chosen).run(graph or self.model, self.ctx).graph

    def trained(self, graph: Graph, kind: str, steps: int, seed: int, teacher: Graph | None = None, **options: Any) -> Graph:
        """So many steps; the state with the best accuracy on held-out images, whatever the loss."""
        usual = {"steps": steps, "seed": seed, "threads": self.threads, "checks": self.effort.checks, "patience": 0}
        usual |= options
        text = f"{kind}{{{','.join(f'{name}={value}' for name, value in usual.items())}}}"
        case = Case(graph, teacher or self.model, self.train, held_out=self.held_out, score=self.accuracy, ctx=self.ctx)
        return recovered(case, text).graph

    def accuracy(self, run: Run) -> float:
        images, labels = self.held_out["image"], self.held_out[LABELS]
        found = [run({"image": images[row : row + PIECE]})["logits"].argmax(1) for row in range(0, len(images), PIECE)]
        return float((np.concatenate(found) == labels).mean())

    def score(self, graph: Graph) -> float:
        """Accuracy on test images, by ONNX Runtime."""
        session, images = Session(graph), self.test["image"]
        found = [session.run({"image": images[row : row + 1]})["logits"].argmax() for row in range(len(images))]
        return float((np.array(found) == self.test[LABELS]).mean())

    def compare(self, case: str, ours: list[float], naive: Mapping[str, list[float]]) -> None:
        """A row, and for each counterpart how much better in which seeds."""
        self.rows.append(higher_is_better(case, "top-1 accuracy", "1", mean(ours), {name: mean(v) for name, v in naive.items()}))
        self.summary |= {f"{case}: score": mean(ours), f"{case}: spread": spread(ours)}
        for name, values in naive.items():
            gains = [one - other for one, other in zip(ours, values, strict=True)]
            figures = {"score": mean(values), "spread": spread(values), "gain": mean(gains), "gain spread": spread(gains)}
            self.summary |= {f"{case} / {name}: {key}": value for key, value in figures.items()}
            won = mean(gains) > spread(gains)
            verdict = "beats" if won else "does not beat" if mean(gains) <= 0 else "is ahead of, within the spread,"
            seeds = f"{sum(gain > 0 for gain in gains)} of {len(gains)} seeds"
            gained = f"{mean(gains):+.4f} +- {spread(gains):.4f} in accuracy, better in {seeds}"
            self.notes.append(f"{case} {verdict} {name}: {gained}")


def mean(values: list[float]) -> float:
    return float(np.mean(values))


def spread(values: list[float]) -> float:
    """Standard deviation over the seeds."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def palettes(bench: Bench) -> None:
    """Codes in 2 and 4 bits: what training gives back, and what the library's time is."""
    base, size = bench.score(bench.model), weight_bytes(bench.model)
    bench.summary["float: score"] = base
    for bits in (2, 4):
        name, steps = f"palette {bits} bits", bench.effort.palette
        graph = bench.changed(f"share-weights{{bits={bits}}}")
        plain = bench.score(graph)
        rate = {"lr": 0.001 if bits == 2 else 0.0003}
        entries = [bench.score(bench.trained(graph, "distill", steps, seed, **rate)) for seed in SEEDS]
        codes = [bench.score(bench.trained(graph, "dkm", steps, seed, **rate)) for seed in SEEDS]
        bench.rows.append(lower_is_better(name, "weights", "B", weight_bytes(graph), {"float": size}))
        bench.compare(f"{name}, dkm", codes, {"not trained": [plain] * len(SEEDS), "trained entries": entries})
        bench.compare(f"{name}, trained entries", entries, {"not trained": [plain] * len(SEEDS)})
    speeds(bench)


def speeds(bench: Bench) -> None:
    """The libraries side by side: training changes numbers, no kernels."""
    sets: dict[str, Any] = {
        "calibrate": {"image": bench.train["image"][:64]},
        "evaluate": {n: a[:200] for n, a in bench.test.items()},
    }
    with tempfile.TemporaryDirectory() as folder:
        passes = {"float": "none", **{f"palette {bits} bits": f"share-weights{{bits={bits}}}" for bits in (2, 4)}}
        built = {
            name: compile_model(MODEL, out=Path(folder) / str(i), shapes=SHAPES, passes=text, threads=1, measure=False, **sets)
            for i, (name, text) in enumerate(passes.items())
        }
        feeds = {"image": bench.test["image"][:1]}
        times = interleaved({name: one.runner(feeds) for name, one in built.items()})
    for name in list(passes)[1:]:
        bench.rows.append(lower_is_better(name, "latency", "s", times[name].median, {"float": times["float"].median}))
        ratio = times["float"].median / times[name].median
        bench.summary[f"{name}: speedup"] = ratio
        bench.notes.append(f"{name}: {ratio:.2f} times as fast as float; share-weights itself only claims bytes")


def distillation(bench: Bench) -> None:
    """Half of the demo model's widths left: the float model's outputs against labels alone."""
    graph, steps = bench.changed(HALF), bench.effort.distill
    soft = [bench.score(bench.trained(graph, "distill", steps, seed, lr=0.003)) for seed in SEEDS]
    hard = [bench.score(bench.trained(graph, "distill", steps, seed, lr=0.003, logits=0, hard=1)) for seed in SEEDS]
    bench.compare("distillation", soft, {"hard labels": hard})
    bench.summary["distillation: not trained"] = bench.score(graph)


def quantization(bench: Bench) -> None:
    """Weights in 4 bits: training through the rounding, against as much training in float and rounding then.

    Of the demo model itself, which loses next to nothing, and of half of its widths.
    """
    rounding = "quantize{weights=int4}"
    for name, base in (("int4", bench.model), ("int4, half the widths", bench.changed(HALF))):
        learned, rounded = [], []
        for seed in SEEDS:
            start = base
            if base is not bench.model:
                start = bench.trained(base, "distill", bench.effort.distill, 100 + seed, lr=0.003)
            options = {"steps": bench.effort.qat, "seed": seed, "lr": 0.0003, "logits": 1}
            learned.append(bench.score(bench.trained(bench.changed(rounding, start), "qat", **options)))
            rounded.append(bench.score(bench.changed(rounding, bench.trained(start, "qat", **options))))
        bench.compare(f"qat {name}", learned, {f"ptq {name}": rounded})


def pruning(bench: Bench) -> None:
    """A network from nothing to its checkpoint and on; then 80 % of its weights go, in four ways that train as long."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            early = bench.trained(fresh(bench.changed(QUARTER), seed), "qat", bench.effort.first, seed, lr=0.003)
            save(early, Path(folder) / "early.onnx")
            base = bench.trained(early, "qat", bench.effort.base, 100 + seed, lr=0.003)
            for name, score in pruned(bench, base, Path(folder) / "early.onnx", seed).items():
                found.setdefault(name, []).append(score)
    naive = {name: found[name] for name in ("fine-tuned", "started anew")}
    bench.summary |= {f"network of its own, {name}: score": mean(found[name]) for name in ("whole", "not trained")}
    bench.compare("gradual pruning", found["gradual"], {"fine-tuned": naive["fine-tuned"]})
    bench.compare("lottery rewinding", found["lottery"], naive)


def pruned(bench: Bench, base: Graph, early: Path, seed: int) -> dict[str, float]:
    steps, sparse = bench.effort.prune, bench.changed(SPARSE, base)
    options = {"lr": 0.003, "logits": 0, "hard": 1}
    stated: dict[str, Any] = {**options, "passes": f'"{SPARSE}"'}
    anew = fresh(sparse, 10 + seed)
    ways: dict[str, Callable[[], Graph]] = {
        "whole": lambda: base,
        "not trained": lambda: sparse,
        "fine-tuned": lambda: bench.trained(sparse, "distill", steps, seed, base, **options),
        "started anew": lambda: bench.trained(anew, "distill", steps, seed, base, **options),
        "gradual": lambda: bench.trained(base, "gradual", steps, seed, base, stages=3, **stated),
        "lottery": lambda: bench.trained(base, "lottery", steps, seed, base, checkpoint=f'"{early}"', **stated),
    }
    return {name: bench.score(way()) for name, way in ways.items()}


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
