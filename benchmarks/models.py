"""Suite `models`: whole models against other runtimes at the same precision, with default and with tuned schedules.

Every model and number of threads has a process of its own, on as many processors as it has threads; there the runtimes take
turns. A peer or a model that is missing is a note; a result that is wrong, or a crash of ours, is a failure.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import layer_shares
from benchmarks.layout import Row, lower_is_better, result
from benchmarks.zoo import ZOO, Case, Missing
from hwopt.errors import HwoptError, UsageError, did_you_mean

MODELS = tuple(name for name in ZOO if name != "demo")  # what the summary's geometric means are over
BATCHES, DTYPES = (1, 8), ("f32", "bf16", "int8")
FLOAT_ERRORS = {"f32": 1e-3, "bf16": 1e-2}  # of the largest output
STEPS = 4.0  # of 255 over the range of the outputs
ROUNDS, QUICK_ROUNDS, SETTLE = 40, 5, 0.004
BUSY_SECONDS = 0.05
ENOUGH = 0.8  # of the processors: less, and others had them
OURS, TUNED = "hwopt", "hwopt tuned"
SCHEDULES = {"latency": "default", "latency_tuned": "tuned"}  # which ones a row's metric is about
SHARES = ("f32", "int8")  # precisions whose large convolutions are held against the peak
PEAK = layer_shares.KINDS


@dataclass
class Findings:
    """What one process brings home."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        self.rows += other.rows
        self.notes += other.notes
        self.failures += other.failures


@dataclass(frozen=True)
class Options:
    batches: tuple[int, ...] = BATCHES
    dtypes: tuple[str, ...] = DTYPES
    quick: bool = False
    tune: str = ""  # how long, as `hwopt tune --time` takes it; nothing is tuned without
    database: str = ""  # what tuning finds is kept here from model to model
    peaks: Mapping[str, float] = field(default_factory=dict)


def run(
    threads: int | None = None,
    models: str | None = None,
    batches: str | None = None,
    dtypes: str | None = None,
    quick: bool = False,
    tune: str | None = None,
    plot: Path | None = None,
) -> dict[str, Any]:
    """`models`, `batches` and `dtypes` are lists with commas; `quick` measures few turns and leaves out torch.compile."""
    chosen = chosen_names(models, ZOO) or tuple(ZOO)
    sizes = tuple(int(size) for size in batches.split(",")) if batches else (BATCHES[:1] if quick else BATCHES)
    peak = alone(machine_peaks, (), 1)
    kinds = chosen_names(dtypes, PEAK) or DTYPES
    found = Findings(notes=[f"peak: {peak}"] if isinstance(peak, str) else [])
    with tempfile.TemporaryDirectory(prefix="hwopt-bench-") as folder:
        peaks = peak if isinstance(peak, Mapping) else {}
        options = Options(sizes, kinds, quick, tune or "", str(Path(folder) / "tuning.jsonl"), peaks)
        for name, count in itertools.product(chosen, (threads,) if threads else (1, 2)):
            if count > (psutil.cpu_count() or 1):
                found.notes.append(f"{name} {count}t: this machine has fewer processors")
                continue
            one = alone(measure, (name, count, options), count)
            found.add(Findings(failures=[f"{name} {count}t: {one}"]) if isinstance(one, str) else one)
    if plot is not None:
        draw(found.rows, plot)
    figures = summary(found)
    if "int8" in kinds and "amx_peak_share" not in figures:
        found.notes.append(f"amx_peak_share: {absent(figures)}")
    return result("models", [*_peak_rows(options.peaks), *found.rows], figures, notes=[*found.notes, *found.failures])


def absent(figures: Mapping[str, float]) -> str:
    """Why there is no share of the peak of AMX."""
    unit = layer_shares.units("int8")
    if unit == "amx":
        return "no model that was measured with one thread has 3 x 3 convolutions of 128 and more channels"
    share = figures.get(f"{unit}_peak_share")
    return "this processor has no AMX" + (f"; {unit}_peak_share is {share:.2f}" if share else "")


def chosen_names(text: str | None, known: Iterable[str]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",")) if text else ()
    for name in names:
        if name not in known:
            raise UsageError(f"unknown name {name!r}", hint=did_you_mean(name, known))
    return names


def alone(work: Callable[..., Any], arguments: Sequence[Any], threads: int) -> Any:
    """The result of `work` in a process of its own on `threads` processors; a text that says why if it died."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_settle_down, initargs=(threads,)) as pool:
        try:
            return pool.submit(work, *arguments).result()
        except BrokenProcessPool:
            return "the process died"
        except (HwoptError, OSError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"


def _settle_down(threads: int) -> None:
    """Before any runtime is loaded: the last `threads` processors, for all threads to come."""
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):
        process.cpu_affinity(process.cpu_affinity()[-threads:])


def machine_peaks() -> dict[str, float]:
    from benchmarks.peak import peaks
    from hwopt.plugins import find_target

    return peaks(find_target("host"))


def measure(name: str, threads: int, options: Options) -> Findings:
    """All batch sizes and precisions of one model."""
    found = Findings()
    for batch in options.batches:
        try:
            case = ZOO[name](batch)
        except Missing as error:
            return Findings(notes=[f"{name}: skipped: {error}"])
        found.add(measure_case(case, threads, options))
    return found


def measure_case(case: Case, threads: int, options: Options) -> Findings:
    from hwopt.io.onnx import load
    from hwopt.io.proto import to_model
    from hwopt.job import prepare, quiet

    model = to_model(load(case.model, shapes=case.shapes)).SerializeToString()
    found = Findings()
    data = dict(case.calibrate)
    job = prepare(case.model, "host", case.shapes, None, data, data, None, "none", threads, 0, quiet)
    for dtype in options.dtypes:
        label = f"{case.name} b{case.batch} {dtype} {threads}t"
        try:
            if dtype == "bf16" and "bfloat16" not in job.target.microkernels:
                found.notes.append(f"{label}: this processor does not multiply bfloat16")
                continue
            graph = job.graph if dtype == "f32" else quantized(job, dtype)
            found.add(_measure_precision(case, model, graph, label, dtype, threads, options, job))
        except HwoptError as error:
            found.failures.append(f"{label}: {error}")
    return found


def quantized(job: Any, dtype: str = "int8") -> Any:
    """All layers in int8, calibrated on the case's data, or in bf16."""
    from hwopt.job import choose_families
    from hwopt.pipeline import PassManager

    _, stated = choose_families(f"quantize{{dtype={dtype}}}")
    return PassManager(stated).run(job.graph, job.ctx).graph


def _measure_precision(
    case: Case, model: bytes, graph: Any, label: str, dtype: str, threads: int, options: Options, job: Any
) -> Findings:
    from hwopt.backends.ort import Session
    from hwopt.build import build
    from hwopt.measure import interleaved

    with tempfile.TemporaryDirectory(prefix="hwopt-bench-") as folder:
        made = {OURS: build(graph, job.target, threads, Path(folder) / "default").artifact}
        database = _tuned(graph, job, threads, options) if options.tune else None
        if database is not None:
            made[TUNED] = build(graph, job.target, threads, Path(folder) / "tuned", database).artifact
        oracle, exact = (Session(one).run(case.feeds) for one in (graph, job.graph))
        rows: list[Row] = []
        for artifact in made.values():
            rows, wrong = compared(label, dtype, artifact.run(case.feeds), oracle, exact)
            if wrong:
                return Findings(rows, failures=[f"{label}: {wrong}"])
        if threads == 1 and case.batch == 1 and dtype in SHARES:
            rows += layer_shares.rows_of(label, graph, job.target, options.peaks.get(PEAK[dtype]))
        runners, notes = _peers(case, model, dtype, threads, label, not options.quick)
        ours = {name: artifact.runner(case.feeds) for name, artifact in made.items()}
        times = interleaved({**ours, **runners}, _rounds(options), SETTLE)
        if options.tune and database is None:
            times[TUNED] = times[OURS]  # the same code
        rows.append(busy := processors(label, {OURS: ours[OURS], **runners}))
        notes += disturbed(busy, threads)
    return Findings([*_timed(label, times), *rows, *_share(label, dtype, graph, times[OURS].median, threads, options)], notes)


def _tuned(graph: Any, job: Any, threads: int, options: Options) -> Any:
    """The database after a search for this graph's kernels; None where no schedule beats a default one."""
    from hwopt.tuning import open_database, parse_effort, tune_graph

    database = open_database(options.database, job.target)
    return database if tune_graph(graph, job.target, threads, database, parse_effort(options.tune)).gained else None


def _rounds(options: Options) -> int:
    return QUICK_ROUNDS if options.quick else ROUNDS


def _peers(case: Case, model: bytes, dtype: str, threads: int, label: str, slow: bool) -> tuple[dict[str, Callable], list[str]]:
    """Those that can run here, having run once, and why the others cannot."""
    from benchmarks.peers import peers_of
    from hwopt.emit.cpu import host_features

    runners: dict[str, Callable[[], object]] = {}
    notes: list[str] = []
    for name, make in peers_of(dtype, frozenset(host_features()), slow).items():
        try:
            runners[name] = make(case, model, threads)
            runners[name]()
        except Exception as error:  # every runtime raises kinds of its own
            runners.pop(name, None)
            notes.append(f"{label}: {name}: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")
    return runners, notes


def processors(label: str, runners: Mapping[str, Callable[[], object]]) -> Row:
    """How many of them each runtime keeps busy: its threads' seconds over those of the clock (on a busy machine fewer)."""
    used: dict[str, float] = {}
    for name, run in runners.items():
        time.sleep(SETTLE)
        run()
        started, before = time.perf_counter(), time.process_time()
        while time.perf_counter() - started < BUSY_SECONDS:
            run()
        used[name] = (time.process_time() - before) / (time.perf_counter() - started)
    return Row(label, "processors", "1", used.pop(OURS), used, None)


def disturbed(busy: Row, threads: int) -> list[str]:
    """A note where others had the processors while we measured."""
    most = max(busy.ours, *busy.peers.values(), 0.0)
    told = f"{busy.case}: the machine is busy: of {threads} processors no runtime got more than {most:.2f}, times are too long"
    return [] if most >= ENOUGH * threads else [told]


Outputs = Mapping[str, np.ndarray]


def compared(label: str, dtype: str, ours: Outputs, oracle: Outputs, exact: Outputs | None = None) -> tuple[list[Row], str]:
    """Rows about the difference from ONNX Runtime on the same graph, and what is wrong with it, or nothing.

    In int8 a value between two steps may be rounded either way, and deep networks amplify that: ONNX Runtime with and without its
    optimizations differs as much. So more than STEPS are wrong only if they are more than what quantization itself costs, the
    oracle's distance from `exact`, the float model's outputs. Without `exact`, one layer, more than one step is wrong.
    """
    left, right = _flat(ours), _flat(oracle)
    if left.shape != right.shape or not np.isfinite(left).all():
        return [], "outputs of another shape, or not finite"
    worst = float(np.abs(left - right).max())
    if dtype != "int8":
        error = worst / max(float(np.abs(right).max()), 1e-30)
        wrong = "" if error <= FLOAT_ERRORS[dtype] else f"differs from ONNX Runtime by {error:.2g} of the largest output"
        return [Row(label, "error", "1", error, {}, None)], wrong
    integers = all(np.issubdtype(value.dtype, np.integer) for value in oracle.values())
    steps = worst / (1.0 if integers else max(float(np.ptp(right)) / 255, 1e-30))
    cosine = float(left @ right / max(float(np.linalg.norm(left) * np.linalg.norm(right)), 1e-30))
    rows = [Row(label, "error", "steps", steps, {}, None), Row(label, "cosine", "1", cosine, {}, None)]
    said = f"differs from ONNX Runtime by {steps:.3g} steps of 255, cosine {cosine:.6f}"
    if exact is None:
        return rows, "" if steps <= 1 else said
    far, noise = (float(np.linalg.norm(one - right)) for one in (left, _flat(exact)))
    rows.append(Row(label, "error / quantization error", "1", far / max(noise, 1e-30), {}, None))
    return rows, "" if steps <= STEPS or far <= noise else said


def _flat(outputs: Outputs) -> np.ndarray:
    return np.concatenate([value.astype(np.float64).ravel() for value in outputs.values()])


def _timed(label: str, times: Mapping[str, Any]) -> list[Row]:
    """Medians; first quartiles, which say more on a busy machine; interquartile ranges."""
    peers = {name: timing for name, timing in times.items() if name not in (OURS, TUNED)}
    medians = {name: timing.median for name, timing in peers.items()}
    rows = [
        lower_is_better(label, "latency", "s", times[OURS].median, medians),
        lower_is_better(label, "latency_low", "s", times[OURS].low, {name: timing.low for name, timing in peers.items()}),
        Row(label, "spread", "s", times[OURS].spread, {name: timing.spread for name, timing in peers.items()}, None),
    ]
    return [*rows, lower_is_better(label, "latency_tuned", "s", times[TUNED].median, medians)] if TUNED in times else rows


def _share(label: str, dtype: str, graph: Any, seconds: float, threads: int, options: Options) -> list[Row]:
    """Of what the processors could do at most in that time."""
    from hwopt.analysis.workload import workloads

    peak = options.peaks.get(PEAK[dtype])
    macs = sum(work.macs for work in workloads(graph))
    return [Row(label, "peak_share", "1", 2 * macs / seconds / (peak * threads), {}, None)] if peak else []


def _peak_rows(peaks: Mapping[str, float]) -> list[Row]:
    return [
        Row("machine", f"peak {name}", "B/s" if name == "bytes_per_second" else "op/s", value, {}, None)
        for name, value in peaks.items()
    ]


def summary(found: Findings) -> dict[str, float]:
    """Geometric means and least of the ratios to the best peer over the models, and how much failed."""
    groups: dict[str, list[float]] = {}
    for row in found.rows:
        name, _, rest = row.case.partition(" ")
        if name not in MODELS or row.metric not in SCHEDULES or row.ratio is None:
            continue
        batch, dtype, threads = rest.split(" ")
        group = f"{dtype}_{SCHEDULES[row.metric]}_{threads}" + ("" if batch == "b1" else f"_{batch}")
        groups.setdefault(group, []).append(row.ratio)
    made: dict[str, float] = {"failures": len(found.failures)}
    for group, values in groups.items():
        made |= {group: geometric_mean(values), f"{group}_worst": min(values), f"{group}_models": len(values)}
    made |= layer_shares.summary(found.rows, {dtype: layer_shares.units(dtype) for dtype in SHARES})
    for row in found.rows:  # tuned where something was tuned: those rows come last
        if row.metric in SCHEDULES and row.case == "resnet18 b1 int8 1t" and "openvino int8" in row.peers:
            made["resnet18_int8_vs_openvino"] = row.peers["openvino int8"] / row.ours
    return made


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bars of the ratio to the best peer, one thread and batch 1, as a PNG."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.metric == "latency" and row.ratio and " b1 " in row.case and row.case.endswith(" 1t")]
    names = list(dict.fromkeys(row.case.split()[0] for row in shown))
    kinds = list(dict.fromkeys(row.case.split()[2] for row in shown))
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for index, kind in enumerate(kinds):
        bars = {row.case.split()[0]: row.ratio or 0.0 for row in shown if row.case.split()[2] == kind}
        places = [names.index(name) + (index - (len(kinds) - 1) / 2) * 0.8 / len(kinds) for name in bars]
        axes.bar(places, list(bars.values()), 0.8 / len(kinds), label=kind)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), names, rotation=20)
    axes.set_ylabel("speed / best peer's")
    axes.legend(frameon=False)
    figure.savefig(path, format="png", dpi=150)
