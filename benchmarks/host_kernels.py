"""Learned prices against the clock: the zoo's kernels, timed inside of their compiled models, which training never saw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.models import quantized
from benchmarks.zoo import ZOO, Missing
from hwopt.analysis.workload import workloads
from hwopt.backends.tvm.learn.measure import profile
from hwopt.backends.tvm.learn.records import SHORT
from hwopt.backends.tvm.tune.runner import Runner
from hwopt.ir import Graph
from hwopt.job import prepare, quiet
from hwopt.plugins import find_target
from hwopt.target import Target, total

HANG = 60.0
SECONDS = 1.0  # that each model is run
FORMS = {"f32": "float32", "int8": "int8", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Compared:
    """One model in one dtype: seconds predicted and measured, and (predicted, measured, source) of each kernel from 1 us on."""

    name: str
    predicted: float
    measured: float
    covered: bool  # by the stated interval
    kernels: tuple[tuple[float, float, str], ...]


def compared(target: str = "host", threads: int = 1) -> Iterator[Compared]:
    """Every model of the zoo that can be had, in every dtype that the target multiplies."""
    hardware = find_target(target)
    with Runner(threads, hang=HANG) as runner:
        for name, make in ZOO.items():
            try:
                case = make(1)
            except Missing:
                continue
            job = prepare(case.model, hardware, case.shapes, None, dict(case.calibrate), None, None, None, threads, 0, quiet)
            for form, dtype in FORMS.items():
                if form == "f32" or dtype in hardware.microkernels:
                    graph = job.graph if form == "f32" else quantized(job, form)
                    yield _compared(f"{name} {form}", graph, hardware, threads, runner)


def _compared(name: str, graph: Graph, target: Target, threads: int, runner: Runner) -> Compared:
    found = profile(graph, target, threads, runner, SECONDS)
    whole = total(target.cost.estimate(work, threads) for work in workloads(graph))
    kernels = []
    for one in found.samples:
        cost = target.cost.estimate(one.work, threads)
        if one.clean and one.shared == 1 and one.seconds >= SHORT:
            kernels.append((cost.seconds, one.seconds, cost.source))
    covered = whole.low is not None and whole.high is not None and whole.low <= found.seconds <= whole.high
    return Compared(name, whole.seconds, found.seconds, covered, tuple(kernels))
