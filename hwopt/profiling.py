"""Measuring kernels for a cost model: `hwopt profile`."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hwopt.analysis.workload import workloads
from hwopt.errors import HwoptError, UnsupportedError, UsageError
from hwopt.files import write_whole
from hwopt.ir import Graph
from hwopt.job import choose_families, prepare, quiet
from hwopt.pipeline import PassManager
from hwopt.plugins import find_target
from hwopt.target import HOST, Target

if TYPE_CHECKING:  # TVM is imported when something is measured
    from hwopt.backends.tvm.learn.records import Quality, Record
    from hwopt.backends.tvm.learn.trees import Ensemble
    from hwopt.backends.tvm.tune.runner import Runner

FORMS = {"float32": "", "int8": "int8", "bfloat16": "bf16"}  # dtype -> quantize's name of it
START = 48  # networks of every family and dtype before the predictor chooses
POOL = 6  # networks of which the one is measured that the ensemble disagrees about most
GROWTH = 1.25  # records by which a predictor is trained anew
SECONDS = 0.4  # that one network is run
HANG = 60.0
Measure = Callable[[Graph, "Runner"], "list[Record]"]


@dataclass
class State:
    """What is known so far."""

    records: list[Record]
    began: float
    budget: float
    quality: Quality | None = None
    failures: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        return min(1.0, (time.monotonic() - self.began) / self.budget)


def profile_target(
    target: str | Target, seconds: float, *, threads: int = 1, out: Path | None = None, cores: Sequence[int] = (),
    watch: Callable[[State], None] = lambda _: None,
) -> tuple[Path, State]:  # fmt: skip
    """Measure kernels of random networks for a time and write a table that cost models find.

    Measurements are appended to `out` with the suffix .jsonl, from which the next call goes on; an interrupt keeps them.
    Raises UnsupportedError for a target that does not run here, UsageError for one that would not read the table.
    """
    from hwopt.backends.tvm.learn.records import clocked, quality, read, table_of
    from hwopt.backends.tvm.learn.table import path_for

    hardware = find_target(target) if isinstance(target, str) else target
    if not hardware.runs_here or hardware.kind != "cpu":
        raise UnsupportedError("profiling measures, and this machine is another", place=f"target {hardware.name}")
    if out is None and hardware.name != HOST:
        hint = f"profile the target {HOST}, or name a file: -o FILE"
        raise UsageError("prices of a named target are alike on all machines", place=f"target {hardware.name}", hint=hint)
    path = out or path_for(hardware)
    state = State(read(path.with_suffix(".jsonl")), time.monotonic(), seconds)
    try:
        for _ in _measuring(hardware, threads, path.with_suffix(".jsonl"), tuple(cores), state):
            watch(state)
    finally:
        if state.records:
            state.quality = quality(clocked(state.records), hardware)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, table_of(state.records, hardware, state.quality).to_json())
    return path, state


def _measuring(target: Target, threads: int, log: Path, cores: tuple[int, ...], state: State) -> Iterator[None]:
    """One network after the other until the time is over."""
    from hwopt.backends.tvm.learn.measure import profile
    from hwopt.backends.tvm.learn.records import append, clocked, quality, records_of
    from hwopt.backends.tvm.tune.runner import Runner

    known = {(one.seed, one.form) for one in state.records if one.threads == threads}
    model: Ensemble | None = None
    trained = 0
    with Runner(threads, cores, HANG) as runner:
        next_seed = max((seed for seed, _ in known), default=-1) + 1
        while state.share < 1:
            if len(known) >= START and len(state.records) >= GROWTH * max(trained, 1):
                state.quality = quality(clocked(state.records), target)
                model, trained = _model(state, target), len(state.records)
            pool = range(next_seed, next_seed + (POOL if model else 1))
            number, form, graph = _choice(pool, target, threads, model, state)
            next_seed = pool.stop
            if graph is None:
                continue
            known.add((number, form))
            try:
                found = records_of(profile(graph, target, threads, runner, SECONDS), threads, number, form)
            except HwoptError as error:
                state.failures.append(f"network {number} {form}: {error}")
                continue
            append(log, found)
            state.records.extend(found)
            yield


def _model(state: State, target: Target) -> Ensemble | None:
    from hwopt.backends.tvm.learn.records import clocked, fitted

    kept = clocked(state.records)
    return fitted(kept, target, members=3) if len(kept) > START else None


def _choice(
    pool: Sequence[int], target: Target, threads: int, model: Ensemble | None, state: State
) -> tuple[int, str, Graph | None]:
    """Of some networks the one whose kernels the predictor is least sure of."""
    from hwopt.backends.tvm.learn.features import described

    best: tuple[float, int, str, Graph | None] = (-1.0, pool[0], "", None)
    for number in pool:
        form = form_of(number, target)
        try:
            graph = sample_graph(number, form, target)
        except HwoptError as error:
            state.failures.append(f"network {number} {form}: {error}")
            continue
        doubt = 0.0
        if model:
            rows = [described(work, target.microkernels, threads)[1] for work in workloads(graph)]
            doubt = float(np.mean(model.spread(np.array(rows))))
        best = max(best, (doubt, number, form, graph), key=lambda one: one[0])
    return best[1:]


def form_of(seed: int, target: Target) -> str:
    """Every family (they alternate) comes in every dtype that the target multiplies."""
    able = [form for form in FORMS if form == "float32" or form in target.microkernels]
    return able[seed // 8 % len(able)]


def sample_graph(seed: int, form: str, target: Target) -> Graph:
    """A random network, cleaned, with all layers in one dtype, as a compilation would see it."""
    from hwopt.backends.tvm.learn.networks import random_network

    model, data = random_network(seed)
    job = prepare(model, target, None, None, data, data, None, "none", 1, 0, quiet)
    if not FORMS[form]:
        return job.graph
    return PassManager(choose_families(f"quantize{{dtype={FORMS[form]}}}")[1]).run(job.graph, job.ctx).graph


def seconds_of(text: str) -> float:
    """`90s`, `10m` or `1h` in seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"cannot read {text!r}", place="--time", hint="write 90s, 10m or 1h")
    return float(found[1]) * {"s": 1.0, "m": 60.0, "h": 3600.0}[found[2]]


def progress_line(state: State) -> str:
    """One line for people: what was measured, how well kernels that training did not see are predicted, what went wrong."""
    text = f"{len(state.records)} kernels measured"
    if state.quality:
        text += f", {state.quality.within_10:.0%} of {state.quality.kernels} held-out kernels within 10 %"
    return text + (f", {len(state.failures)} networks failed" if state.failures else "")


def report_data(path: Path, state: State) -> dict[str, Any]:
    """What `hwopt profile` prints."""
    quality = dataclasses.asdict(state.quality) if state.quality else {}
    summary = f"{progress_line(state)}; table in {path}"
    return {
        "table": str(path),
        "kernels": len(state.records),
        "held_out": quality,
        "failures": state.failures,
        "summary": summary,
    }
