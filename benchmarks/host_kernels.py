"""Suite `fidelity-host`: learned prices against the clock, on the zoo's kernels inside of their compiled models.

Training never saw them. A processor that nobody profiled is profiled first, as `hwopt profile --target host --time 10m` does it.
Everything is compiled before anything is timed, and kept (in the cache of the zoo) until code changes: a
second call only times. Models are visited in turns, so that a machine that slows down for a while does so to none alone.
"""

from __future__ import annotations

import hashlib
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hwopt
from benchmarks.layout import Row, result
from benchmarks.models import quantized
from benchmarks.zoo import ZOO, Missing, cache
from hwopt.backends.tvm.learn.measure import Profile, compiled, timed
from hwopt.backends.tvm.learn.records import DRIFT, SHORT
from hwopt.backends.tvm.learn.stock import Network, keep, kept
from hwopt.backends.tvm.learn.table import load_table
from hwopt.backends.tvm.tune.runner import Runner
from hwopt.job import prepare, quiet
from hwopt.plugins import find_target, find_targets
from hwopt.profiling import profile_target, progress_line
from hwopt.target import HOST, Target, Workload, origin, table_of, total
from targets.host import TARGET as host_target

HANG = 60.0
PROFILING = 600.0  # seconds
TURNS, SECONDS = 6, 0.5  # visits to each model, and how long it is run each time
FORMS = {"f32": "float32", "int8": "int8", "bf16": "bfloat16"}
WITHIN = 0.1


@dataclass(frozen=True)
class Kernel:
    """One kernel: seconds predicted and measured, where the price is from, and what kind of kernel it is."""

    predicted: float
    measured: float
    source: str
    family: str

    @property
    def near(self) -> bool:
        return abs(self.predicted / self.measured - 1) <= WITHIN


@dataclass(frozen=True)
class Compared:
    """One model in one dtype: seconds predicted and measured, and its kernels from 1 us on that were measured by themselves."""

    name: str
    predicted: float
    measured: float
    covered: bool  # by the stated interval
    kernels: tuple[Kernel, ...]

    @property
    def near(self) -> bool:
        return abs(self.predicted / self.measured - 1) <= WITHIN


def run(models: str | None = None, threads: int | None = None, dtypes: str | None = None) -> dict[str, Any]:
    """The zoo, or some models of it joined by commas, on one thread if nothing else is said."""
    rows, summary, notes = part(names_of(models), threads or 1, dtypes.split(",") if dtypes else tuple(FORMS))
    return result("fidelity-host", rows, summary, notes)


def learn_prices(threads: int) -> None:
    """Measure a table for this processor if there is none."""
    if getattr(find_target(HOST).cost, "own", False):
        return
    print(f"no table of kernels for this processor: {PROFILING:.0f} s of hwopt profile first", file=sys.stderr, flush=True)
    _, state = profile_target(HOST, PROFILING, threads=threads)
    print(progress_line(state), file=sys.stderr, flush=True)
    host_target.cache_clear()
    find_targets.cache_clear()


def names_of(models: str | None) -> tuple[str, ...]:
    return tuple(models.split(",")) if models else tuple(ZOO)


def part(models: Sequence[str] = tuple(ZOO), threads: int = 1, forms: Sequence[str] = tuple(FORMS)) -> tuple[list, dict, list]:
    """Rows by model, the shares within 10 %, and notes: accuracy by family."""
    learn_prices(threads)
    found = list(compared(HOST, threads, models, forms))
    kernels = [one for model in found for one in model.kernels if one.source != "measured"]
    rows = [
        Row(one.name, "predicted", "ms", one.predicted * 1e3, {"measured": one.measured * 1e3}, one.predicted / one.measured)
        for one in found
    ]
    summary = {
        "host_kernels_within_10": statistics.fmean(one.near for one in kernels),
        "host_models_within_10": statistics.fmean(one.near for one in found),
        "host_models_in_interval": statistics.fmean(one.covered for one in found),
        "host_kernels": float(len(kernels)),
    }
    by_family: dict[str, list[bool]] = {}
    for one in kernels:
        by_family.setdefault(one.family, []).append(one.near)
    families = ", ".join(f"{name} {statistics.fmean(near):.0%} of {len(near)}" for name, near in sorted(by_family.items()))
    cost = find_target(HOST).cost
    table = table_of(cost) if getattr(cost, "own", False) else None
    facts = load_table(table).facts if table else {}
    held = {"kernels": "held_out_within_10", "networks": "held_out_networks_within_10"}  # of the random networks behind the table
    summary |= {f"host_table_{name}_within_10": facts[key] for name, key in held.items() if facts.get(key) is not None}
    note = f"host: {origin(cost)}, {table.name if table else 'no table'}; kernels of 1 us and more that no table holds"
    return rows, summary, [note, f"host, kernels within 10 %: {families}"]


def compared(target: str, threads: int, models: Sequence[str], forms: Sequence[str]) -> Iterator[Compared]:
    """Every model that can be had, in every dtype that the target multiplies."""
    hardware, code = find_target(target), sources_digest()
    stock = cache() / "compiled"
    wanted = [(name, form) for name in models for form in forms if form == "f32" or FORMS[form] in hardware.microkernels]
    known = {one.form for _, one in kept(stock, threads, code)}
    for name in models:
        missing = [form for one, form in wanted if one == name and f"{name} {form} {target}" not in known]
        _compile(name, missing, hardware, threads, code, stock)
    ready = {one.form: one for _, one in kept(stock, threads, code)}
    chosen = [one for name, form in wanted if (one := ready.get(f"{name} {form} {target}"))]
    with Runner(threads, hang=HANG) as runner:
        visits = [[timed(one.program, runner, SECONDS) for one in chosen] for _ in range(TURNS)]
    for one, *turns in zip(chosen, *visits, strict=True):
        yield _compared(one, turns, hardware)


def sources_digest() -> str:
    """Of all code that decides what a model is compiled to."""
    folder, whole = Path(hwopt.__file__).parents[1], hashlib.sha256()
    for path in sorted((*folder.glob("hwopt/**/*.py"), *folder.glob("passes/*.py"))):
        whole.update(path.read_bytes())
    return whole.hexdigest()[:16]


def _compile(name: str, forms: Sequence[str], target: Target, threads: int, code: str, stock: Path) -> None:
    """Put a model into the stock in some precisions; nothing where it cannot be had."""
    if not forms:
        return
    try:
        case = ZOO[name](1)
    except Missing:
        return
    job = prepare(case.model, target, case.shapes, None, dict(case.calibrate), None, None, None, threads, 0, quiet)
    for form in forms:
        folder = stock / f"{name}_{form}_{target.name}_{threads}"
        folder.mkdir(parents=True, exist_ok=True)
        program = compiled(job.graph if form == "f32" else quantized(job, form), target, threads, folder)
        keep(Network(-1, f"{name} {form} {target.name}", threads, code, program), folder)


def _compared(one: Network, turns: Sequence[Profile], target: Target) -> Compared:
    """The best of the undisturbed visits to a model; of its kernels those that were timed well in one of them."""
    quickest = min(turn.units for turn in turns)
    turns = [turn for turn in turns if turn.units <= DRIFT * quickest]  # nobody else used the same core
    best = min(turns, key=lambda turn: turn.seconds)
    costs = {work: target.cost.estimate(work, one.threads) for work in one.program.work}
    whole = total(costs[work] for work in one.program.work)
    kernels = []
    for same in zip(*(turn.samples for turn in turns), strict=True):
        sample = min(same, key=lambda sample: sample.seconds)
        if any(visit.clean for visit in same) and sample.shared == 1 and sample.seconds >= SHORT:
            cost = costs[sample.work]
            kernels.append(Kernel(cost.seconds, sample.seconds, cost.source, _family(sample.work)))
    covered = whole.low is not None and whole.high is not None and whole.low <= best.seconds <= whole.high
    return Compared(one.form.removesuffix(f" {target.name}"), whole.seconds, best.seconds, covered, tuple(kernels))


def _family(work: Workload) -> str:
    return f"{work.kind} {work.dtype}"
