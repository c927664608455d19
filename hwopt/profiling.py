"""Measuring kernels for a cost model: `hwopt profile`."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import shutil
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
    from hwopt.backends.tvm.learn.counted import Counted
    from hwopt.backends.tvm.learn.predictor import Predictor
    from hwopt.backends.tvm.learn.records import Quality, Record
    from hwopt.backends.tvm.learn.stock import Network
    from hwopt.backends.tvm.tune.runner import Runner

FORMS = {"float32": "", "int8": "int8", "bfloat16": "bf16"}  # dtype -> quantize's name of it
START = 48  # networks of every family and dtype before the predictor chooses
POOL = 6  # networks of which the one is compiled that the predictor doubts most
GROWTH = 1.25  # records by which a predictor is trained anew
TURNS, SECONDS = 2, 0.25  # undisturbed visits to each network, and how long one takes
MOST_TURNS = 6  # visits, where others use the same core
GROUP = 6  # networks between two visits to the same one: what disturbs the machine for a while shows
ALONE = 0.45  # share of the networks around which nothing else passes through the caches
HANG = 60.0
UNKNOWN = 0.003  # doubt about families that were not measured: as of 10 us that may be twice as many


@dataclass
class State:
    """What is known so far: records of the templates as they are now; `older` counts those of others, which are left out."""

    records: list[Record]
    began: float
    budget: float
    quality: Quality | None = None
    failures: list[str] = field(default_factory=list)
    failed: set[int] = field(default_factory=set)  # networks that are not tried again
    older: int = 0
    waiting: int = 0  # networks that are compiled and not timed yet

    @property
    def share(self) -> float:
        return min(1.0, (time.monotonic() - self.began) / self.budget) if self.budget else 1.0


@dataclass(frozen=True)
class Bench:
    """What one call of `profile_target` works with; networks that are compiled ahead wait in `stock`."""

    target: Target
    threads: int
    log: Path
    stock: Path
    cores: tuple[int, ...]
    code: str
    state: State


def profile_target(
    target: str | Target, seconds: float, *, prepare: float = 0.0, threads: int = 1, out: Path | None = None,
    cores: Sequence[int] = (), more: bool = True, table: bool = True, watch: Callable[[State], None] = lambda _: None,
    code: str = "",
) -> tuple[Path, State]:  # fmt: skip
    """Measure kernels of random networks for a time and write a table that cost models find.

    Networks are compiled for `prepare` seconds first; those are timed before others (0 seconds: by a later call, when the
    machine is quiet). `more` says whether others follow while there is time, `table` whether to write one at the end.
    Measurements are appended to `out` with the suffix .jsonl, from which the next call goes on; an interrupt keeps them. They
    count while the templates are as they were; `code` is another name for what is measured, for changes that cost no time.
    Raises UnsupportedError for a target that does not run here, UsageError for one that would not read the table.
    """
    from hwopt.backends.tvm.learn.records import read
    from hwopt.backends.tvm.learn.table import path_for
    from hwopt.backends.tvm.tune.task import templates_digest

    hardware = find_target(target) if isinstance(target, str) else target
    if not hardware.runs_here or hardware.kind != "cpu":
        raise UnsupportedError("profiling measures, and this machine is another", place=f"target {hardware.name}")
    if out is None and hardware.name != HOST:
        hint = f"profile the target {HOST}, or name a file: -o FILE"
        raise UsageError("prices of a named target are alike on all machines", place=f"target {hardware.name}", hint=hint)
    path = out or path_for(hardware)
    every, code = read(path.with_suffix(".jsonl")), code or templates_digest()
    records = [one for one in every if one.code == code]
    state = State(records, time.monotonic(), prepare + seconds, older=len(every) - len(records))
    bench = Bench(hardware, threads, path.with_suffix(".jsonl"), path.with_suffix(".networks"), tuple(cores), code, state)
    try:
        for _ in itertools.chain(_preparing(bench, prepare), _measuring(bench, more) if seconds else ()):
            watch(state)
    finally:
        if seconds and table and state.records:
            _finish(bench, path)
    return path, state


def _finish(bench: Bench, path: Path) -> None:
    """The table of everything that was measured."""
    from hwopt.backends.tvm.learn.records import clocked, quality, table_of

    bench.state.quality = quality(clocked(bench.state.records), bench.target)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, table_of(bench.state.records, bench.target, bench.state.quality).to_json())


def _preparing(bench: Bench, seconds: float) -> Iterator[None]:
    """Compile networks for a time."""
    model = _predictor(bench) if seconds else None
    while time.monotonic() - bench.state.began < seconds:
        _compile_one(bench, model)
        yield


def _measuring(bench: Bench, more: bool) -> Iterator[None]:
    """Groups of networks until the time is over: those that wait, then others if `more` of them are wanted."""
    from hwopt.backends.tvm.learn.stock import kept
    from hwopt.backends.tvm.tune.runner import Runner

    model, trained = (_predictor(bench) if more else None), len(bench.state.records)
    with Runner(bench.threads, bench.cores, HANG) as runner:
        while bench.state.share < 1:
            group = list(itertools.islice(kept(bench.stock, bench.threads, bench.code), GROUP))
            if not group and not more:
                return
            if not group:
                if len(bench.state.records) >= GROWTH * trained:
                    model, trained = _predictor(bench), len(bench.state.records)
                for _ in range(GROUP):
                    _compile_one(bench, model)
                continue
            _time_group(bench, runner, group)
            yield


def _time_group(bench: Bench, runner: Runner, group: Sequence[tuple[Path, Network]]) -> None:
    """Visits in turns, more to networks that others disturbed; what was timed waits no longer."""
    from hwopt.backends.tvm.learn.records import append, calm, together

    visits: list[list[list[Record]]] = [[] for _ in group]
    failed: set[int] = set()
    best = min((one.units for one in bench.state.records if one.units), default=math.inf)
    for _ in range(MOST_TURNS):
        wanted = [place for place, found in enumerate(visits) if place not in failed and len(calm(found, best)) < TURNS]
        for place in wanted:
            try:
                visits[place].append(_visit(bench, runner, group[place][1]))
            except HwoptError as error:
                failed.add(place)
                bench.state.failures.append(f"network {group[place][1].seed} {group[place][1].form}: {error}")
        best = min([best, *(turn[0].units for found in visits for turn in found if turn)])
    for place, (folder, _) in enumerate(group):
        if place not in failed and any(visits[place]):
            records = together(visits[place])
            append(bench.log, records)
            bench.state.records.extend(records)
        shutil.rmtree(folder, ignore_errors=True)


def _visit(bench: Bench, runner: Runner, one: Network) -> list[Record]:
    from hwopt.backends.tvm.learn.measure import timed
    from hwopt.backends.tvm.learn.records import records_of

    evict = evicted(one.seed)
    found = timed(one.program, runner, SECONDS, evict)
    return records_of(found, bench.threads, one.seed, one.form, evict, bench.code)


def evicted(seed: int) -> int:
    """Bytes that pass through the caches between two runs of the network: none, or as much as a model of 4 to 96 MB."""
    random = np.random.default_rng([seed, 1])
    return 0 if random.random() < ALONE else int(2 ** random.uniform(22, 26.6)) // 64 * 64


def _compile_one(bench: Bench, model: Predictor | None) -> None:
    """Of some networks the one that the predictor doubts most goes to the stock."""
    from hwopt.backends.tvm.learn.measure import compiled
    from hwopt.backends.tvm.learn.stock import Network, keep, seeds

    known = {one.seed for one in bench.state.records} | seeds(bench.stock) | bench.state.failed
    first = max(known, default=-1) + 1
    pool = range(first, first + (POOL if model else 1))
    number, form, graph = _choice(pool, bench, model)
    if graph is None:
        return
    folder = bench.stock / f"{number:06d}_{form}_{bench.threads}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        program = compiled(graph, bench.target, bench.threads, folder)
    except HwoptError as error:
        bench.state.failures.append(f"network {number} {form}: {error}")
        bench.state.failed.add(number)
        shutil.rmtree(folder)
        return
    keep(Network(number, form, bench.threads, bench.code, program), folder)
    bench.state.waiting = len(seeds(bench.stock))


def _predictor(bench: Bench) -> Predictor | None:
    """Of what was measured, else what the target has; None where neither says much."""
    from hwopt.backends.tvm.learn.model import Learned
    from hwopt.backends.tvm.learn.records import clocked, learned

    kept = clocked(bench.state.records)
    if len({one.seed for one in kept}) >= START:
        return learned(kept, bench.target, members=2)
    cost = bench.target.cost
    return cost.table.model if isinstance(cost, Learned) else None


def _choice(pool: Sequence[int], bench: Bench, model: Predictor | None) -> tuple[int, str, Graph | None]:
    """Of some networks the one whose time the predictor is least sure of, kernel by kernel: long ones count for more."""
    from hwopt.backends.tvm.learn.features import counted

    best: tuple[float, int, str, Graph | None] = (-1.0, pool[0], "", None)
    for number in pool:
        form = form_of(number, bench.target)
        try:
            graph = sample_graph(number, form, bench.target)
        except HwoptError as error:
            bench.state.failures.append(f"network {number} {form}: {error}")
            bench.state.failed.add(number)
            continue
        found = [counted(work, bench.target.microkernels, bench.threads) for work in workloads(graph)] if model else []
        doubt = float(np.mean([doubt_of(model, one, bench.threads) for one in found])) if model and found else 0.0
        best = max(best, (doubt, number, form, graph), key=lambda one: one[0])
    return best[1:]


def doubt_of(model: Predictor, kernel: Counted, threads: int) -> float:
    """The half width of the interval, counted by the root of the time: ten short kernels are as much as a long one."""
    if not model.knows(kernel, threads):
        return UNKNOWN
    mean, half = model.predict(kernel, threads)
    return half * math.exp(mean / 2)


def form_of(seed: int, target: Target) -> str:
    """Every family (they alternate) comes in every dtype that the target multiplies."""
    from hwopt.backends.tvm.learn.networks import FAMILIES

    able = [form for form in FORMS if form == "float32" or form in target.microkernels]
    return able[seed // len(FAMILIES) % len(able)]


def sample_graph(seed: int, form: str, target: Target) -> Graph:
    """A random network, cleaned, with all layers in one dtype, as a compilation would see it."""
    from hwopt.backends.tvm.learn.networks import random_network

    model, data = random_network(seed)
    job = prepare(model, target, None, None, data, data, None, "none", 1, 0, quiet)
    if not FORMS[form]:
        return job.graph
    return PassManager(choose_families(f"quantize{{dtype={FORMS[form]}}}")[1]).run(job.graph, job.ctx).graph


def seconds_of(text: str, least: float = 1e-9) -> float:
    """`90s`, `10m` or `1h` in seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if found is None or float(found[1]) < least:
        raise UsageError(f"cannot read {text!r}", place="--time", hint="write 90s, 10m or 1h")
    return float(found[1]) * {"s": 1.0, "m": 60.0, "h": 3600.0}[found[2]]


def progress_line(state: State) -> str:
    """One line for people: what was measured, how well kernels that training did not see are predicted, what went wrong."""
    text = f"{len(state.records)} kernels measured" + (f", {state.waiting} networks wait" if state.waiting else "")
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
