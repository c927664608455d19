"""The main job: a trained model in, a measured artifact out. The data has one way through:

load -> clean passes -> plan -> the plan's passes -> TVM -> library -> artifact -> measurement
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import psutil
from threadpoolctl import threadpool_limits

from hwopt.analysis.size import weight_bytes
from hwopt.analysis.workload import workloads
from hwopt.artifact import Artifact, check_destination
from hwopt.backends.ort import Session
from hwopt.backends.tvm.support import refuse_unsupported
from hwopt.build import Built, build
from hwopt.errors import UnsupportedError, UsageError
from hwopt.evaluate import Scorer, compare, make_scorer, user_scorer
from hwopt.ir import Graph
from hwopt.measure import Timing, interleaved, onnxruntime_runner
from hwopt.pipeline import Context, Pass, PassManager, Phase, Refusal, parse_list
from hwopt.plan.budget import Budget
from hwopt.plan.options import Progress
from hwopt.plan.plan import Decision, Plan, apply_plan, plan_from_json
from hwopt.plan.search import Found, Search, search, versions
from hwopt.plugins import find_passes, find_target
from hwopt.report import Figures, layer_table, make_report
from hwopt.samples import Samples, checked, load_samples
from hwopt.target import Target, total
from hwopt.tuning import open_database, tune_graph

if TYPE_CHECKING:  # TVM is imported when something is compiled
    from hwopt.backends.tvm.tune.database import Database
    from hwopt.backends.tvm.tune.session import Effort, State

CORES = psutil.cpu_count() or 1
F = TypeVar("F", bound=Callable[..., Any])
Data = Samples | Mapping[str, np.ndarray] | Path | str | None


def one_blas_thread(function: F) -> F:
    """Planning runs one candidate per core itself; BLAS threads that spin beside it double the processor time."""
    return threadpool_limits.wrap(limits=1, user_api="blas")(function)


def quiet(stage: str, done: int, total: int) -> None:
    """The progress of nobody who looks."""


@dataclass(frozen=True, eq=False)
class Job:
    """A loaded and cleaned model with everything that decides about it."""

    graph: Graph
    ctx: Context
    target: Target
    threads: int
    budget: Budget
    families: tuple[type[Pass], ...]
    fixed: tuple[Pass, ...]
    evaluation: Samples | None
    user_score: str | None
    progress: Progress
    database: Database | None = None  # of tuned schedules


@one_blas_thread
def compile_model(
    model: Any,
    *,
    out: Path | str,
    target: str | Target = "host",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    binds: Mapping[str, Any] | None = None,
    calibrate: Data = None,
    evaluate: Data = None,
    budget: Budget | None = None,
    passes: str | None = None,
    plan: Plan | Path | str | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress = quiet,
    tuning_db: Path | str | None = None,
    tune: Effort | None = None,
) -> Artifact:
    """Optimize a model (an ONNX file, a torch module or an ExportedProgram) for a target and write the artifact to `out`.

    `calibrate` and `evaluate` are an .npz file, arrays by input name (with `labels`), or for `evaluate` the text
    `module:function`. Without data nothing lossy is done. `tuning_db` is the database of tuned schedules (the user's own if
    not given), `tune` how long to search for better ones before the result is compiled. Raises HwoptError with the reason
    and the next step.
    """
    check_destination(out)
    replay = None if plan is None else read_plan(plan)
    job = prepare(model, target, shapes, binds, calibrate, evaluate, budget, passes, threads, seed, progress)
    _refuse_foreign(job.target)
    refuse_unsupported(job.graph)
    database = open_database(tuning_db, job.target)
    job = dataclasses.replace(job, database=database)
    with tempfile.TemporaryDirectory(prefix="hwopt-") as scratch:
        baseline = _build(job.graph, job, Path(scratch) / "baseline")
        found = _decide(job, replay, _scale(job, baseline))
        if tune is not None:
            tune_graph(found.graph, job.target, job.threads, database, tune, seed=seed, watch=_watching(progress))
        same = found.graph is job.graph and tune is None
        result = baseline if same else _build(found.graph, job, Path(scratch) / "result")
        if result is not baseline and searched(job, replay) and not job.budget.limited:
            found, result = _worth_it(job, found, baseline, result)
        report = measured_report(job, found, baseline, result)
        return result.write(out, found.plan, report)


@one_blas_thread
def plan_model(model: Any, **options: Any) -> Found:
    """The decisions only, with the score of the graph they make; nothing is compiled. Takes compile_model's arguments."""
    return _decide(_job(model, options), None, 1.0)


@one_blas_thread
def apply_model(model: Any, *, plan: Plan | Path | str | None = None, **options: Any) -> tuple[Graph, list[Refusal]]:
    """The graph that a plan, or passes given as text, make of a model, and what they declined to do."""
    job = _job(model, options)
    if plan is not None:
        return apply_plan(job.graph, read_plan(plan), job.ctx, find_passes()).graph, job.ctx.refused
    if options.get("passes") is None:
        raise UsageError("nothing to apply", hint="give --plan plan.json or --passes name{option=value}")
    named = tuple(one for one, _ in parse_list(options["passes"], find_passes()))
    return PassManager(named).run(job.graph, job.ctx).graph, job.ctx.refused


def _job(model: Any, options: Mapping[str, Any]) -> Job:
    names = ("target", "shapes", "binds", "calibrate", "evaluate", "budget", "passes", "threads", "seed", "progress")
    defaults = {"target": "host", "seed": 0, "progress": quiet}
    return prepare(model, **{name: options.get(name, defaults.get(name)) for name in names})


def prepare(
    model: Any,
    target: str | Target,
    shapes: Mapping[str, tuple[int, ...]] | None,
    binds: Mapping[str, Any] | None,
    calibrate: Data,
    evaluate: Data,
    budget: Budget | None,
    passes: str | None,
    threads: int | None,
    seed: int,
    progress: Progress,
) -> Job:
    """Load, clean and check everything before any long work starts."""
    from hwopt.io.onnx import load

    hardware = find_target(target) if isinstance(target, str) else target
    families, fixed = choose_families(passes)
    progress("loading", 0, 1)
    graph = clean(load(model, shapes=shapes, binds=binds), Context(hardware, seed=seed))
    scorer = evaluate if isinstance(evaluate, str) and re.fullmatch(r"[\w.]+:\w+", evaluate) else None
    evaluation = None if scorer else _samples(evaluate, graph)
    calibration, evaluation = _disjoint(_samples(calibrate, graph), evaluation, scorer)
    return Job(
        graph=graph, ctx=Context(hardware, calibration, seed), target=hardware, threads=threads or hardware.cores,
        budget=budget or Budget(), families=families, fixed=fixed, evaluation=evaluation, user_score=scorer, progress=progress,
    )  # fmt: skip


def clean(graph: Graph, ctx: Context) -> Graph:
    """All exact passes of the clean-up phase, until nothing changes (two rounds are enough for nearly everything)."""
    exact = tuple(kind() for kind in find_passes().values() if kind.phase == Phase.CLEAN and kind.exact)
    for _ in range(4):
        before = graph
        graph = PassManager(exact).run(graph, ctx).graph
        if graph is before:
            break
    return graph


def choose_families(text: str | None) -> tuple[tuple[type[Pass], ...], tuple[Pass, ...]]:
    """The families to plan with, and passes stated with braces, which are applied as they are. None: every family."""
    known = find_passes()
    if text is None:
        return tuple(kind for kind in known.values() if kind.phase != Phase.CLEAN), ()
    stated = parse_list(text, known) if text != "none" else []
    return tuple(type(one) for one, exactly in stated if not exactly), tuple(one for one, exactly in stated if exactly)


def read_plan(plan: Plan | Path | str) -> Plan:
    if isinstance(plan, Plan):
        return plan
    try:
        return plan_from_json(Path(plan).read_text(), str(plan))
    except FileNotFoundError as error:
        raise UsageError("no such file", place=str(plan)) from error


def _samples(data: Data, graph: Graph) -> Samples | None:
    if data is None or isinstance(data, Samples):
        return None if data is None else checked(data, graph)
    if isinstance(data, Mapping):
        arrays = dict(data)
        labels = arrays.pop("labels", None) if "labels" not in graph.inputs else None
        return checked(Samples(arrays, labels), graph)
    return load_samples(data, graph)


def _disjoint(
    calibration: Samples | None, evaluation: Samples | None, scorer: str | None
) -> tuple[Samples | None, Samples | None]:
    """Where only one set is given it is halved: what chooses the numbers must not also judge them."""
    given = calibration or evaluation
    if given is None or (calibration and evaluation) or scorer:
        return calibration, evaluation
    even = np.arange(len(given)) % 2 == 0
    return given.rows(even), given.rows(~even)


def _refuse_foreign(target: Target) -> None:
    if target.kind != "cpu":
        hint = "hwopt plan and hwopt apply work for it"
        raise UnsupportedError(
            f"there is no code generator for {target.kind} targets yet", place=f"target {target.name}", hint=hint
        )


def _build(graph: Graph, job: Job, folder: Path) -> Built:
    job.progress(f"compiling {folder.name}", 0, 1)
    return build(graph, job.target, job.threads, folder, job.database)


def _watching(progress: Progress) -> Callable[[State], None]:
    return lambda state: progress("tuning", int(100 * state.share), 100)


def _scale(job: Job, baseline: Built) -> float:
    """Measured over predicted time of the unchanged model: budgets are in measured seconds."""
    predicted = total(job.target.cost.estimate(work, job.threads) for work in workloads(job.graph)).seconds
    if not job.target.runs_here or not predicted:
        return 1.0
    return interleaved({"baseline": baseline.artifact.runner(_feeds(job, baseline))})["baseline"].median / predicted


def _decide(job: Job, replay: Plan | None, scale: float) -> Found:
    """A replayed plan, the passes that were stated, or a search."""
    if replay is not None:
        return _applied(job, replay)
    if job.fixed:
        return _applied(job, _plan_of(job, [(str(one), "stated by the user") for one in job.fixed], ()))
    scorer = _scorer(job, CORES)
    if not job.families or job.ctx.calibration is None or scorer is None:
        reason = "nothing was asked for" if not job.families else "there are no data to choose and to judge by"
        refused = tuple(Refusal(kind.name, job.graph.name, reason) for kind in job.families)
        return Found(_plan_of(job, (), refused), job.graph, None)
    task = Search(
        graph=job.graph, ctx=job.ctx, target=job.target, passes=job.families, scorer=scorer, budget=job.budget,
        threads=job.threads, workers=CORES, progress=job.progress, scale=scale,
    )  # fmt: skip
    return search(task)


def searched(job: Job, replay: Plan | None) -> bool:
    """True if hwopt chose the changes itself, not the user."""
    return replay is None and not job.fixed


def _worth_it(job: Job, found: Found, baseline: Built, result: Built) -> tuple[Found, Built]:
    """The result, or the unchanged model if the measurement does not confirm what the cost model promised."""
    feeds = _feeds(job, baseline)
    times = interleaved({"baseline": baseline.artifact.runner(feeds), "result": result.artifact.runner(feeds)})
    before, after = times["baseline"].median, times["result"].median
    if after < before:
        return found, result
    reason = f"measured: {before * 1e3:.4g} ms before and {after * 1e3:.4g} ms after all changes together"
    refused = tuple(Refusal(one.by.partition("{")[0], one.by, reason) for one in found.plan.decisions)
    plan = dataclasses.replace(found.plan, decisions=(), refused=(*found.plan.refused, *refused), seconds_after=before)
    return Found(plan, job.graph, None), baseline


def _plan_of(job: Job, stated: Sequence[tuple[str, str]], refused: tuple[Refusal, ...]) -> Plan:
    """A plan that was not searched for."""
    decisions = tuple(Decision(by, 0.0, 0.0, 0, 0, 0.0, reason) for by, reason in stated)
    return Plan(
        target=job.target.name, threads=job.threads, graph_digest=job.graph.digest, budget=job.budget, seed=job.ctx.seed,
        decisions=decisions, refused=refused, versions=versions(),
    )  # fmt: skip


def _applied(job: Job, plan: Plan) -> Found:
    """Do what a plan says and score it; what the passes declined goes into the plan."""
    graph = apply_plan(job.graph, plan, job.ctx, find_passes()).graph
    scorer = _scorer(job, CORES)
    compared = None
    if scorer is not None:
        before, after = (scorer(Session(one).run) for one in (job.graph, graph))
        compared = compare(scorer.metric, before, after)
    refused = tuple(dict.fromkeys((*plan.refused, *job.ctx.refused)))
    return Found(dataclasses.replace(plan, refused=refused), graph, compared)


def _scorer(job: Job, workers: int) -> Scorer | None:
    if job.user_score:
        return user_scorer(job.user_score)
    return make_scorer(job.graph, job.evaluation, Session(job.graph).run, workers) if job.evaluation else None


def measured_report(job: Job, found: Found, baseline: Built, result: Built) -> dict[str, Any]:
    """Score and time the libraries that ship, side by side with ONNX Runtime on the original."""
    job.progress("measuring", 0, 1)
    scorer = _scorer(job, 1)  # the libraries bring their own threads
    compared = None
    if scorer is not None:
        before = scorer(baseline.artifact.run)
        compared = compare(scorer.metric, before, before if result is baseline else scorer(result.artifact.run))
    feeds = _feeds(job, baseline)
    runners = {"baseline": baseline.artifact.runner(feeds), "onnxruntime": onnxruntime_runner(job.graph, feeds, job.threads)}
    if result is not baseline:
        runners["result"] = result.artifact.runner(feeds)
    times = interleaved(runners)
    times.setdefault("result", times["baseline"])
    scores = (compared.baseline, compared.score) if compared else (None, None)
    return make_report(
        name=job.graph.name, target=job.target, threads=job.threads,
        baseline=_figures(baseline, times["baseline"], scores[0]), result=_figures(result, times["result"], scores[1]),
        comparison=compared, layers=layer_table(job.graph, found.graph, found.plan, job.target, job.threads),
        peers={"onnxruntime": times["onnxruntime"].median}, notes=_notes(result),
    )  # fmt: skip


def _figures(built: Built, timing: Timing, score: float | None) -> Figures:
    return Figures(
        score=score, latency_seconds=timing.median, latency_spread_seconds=timing.spread, latency_source="measured",
        weight_bytes=weight_bytes(built.graph), library_weight_bytes=built.library.weight_bytes,
        peak_activation_bytes=built.library.arena_bytes,
    )  # fmt: skip


def _notes(result: Built) -> list[str]:
    notes = [f"runs in TVM's virtual machine: {result.reason}"] if result.kind == "vm" else []
    notes += [result.tuning] if result.tuning else []
    if any(node.op == "Gather" and "share-weights" in "".join(node.history) for node in result.graph.nodes):
        notes.append("shared weights are small in model.onnx; the library holds them looked up")
    return notes


def _feeds(job: Job, baseline: Built) -> Mapping[str, np.ndarray]:
    """One batch of real data where there is some."""
    samples = job.evaluation or job.ctx.calibration
    return next(iter(samples.feeds(job.graph))) if samples else baseline.artifact.random_inputs(job.ctx.seed)
