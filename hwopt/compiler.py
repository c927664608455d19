"""The main job: a trained model in, a measured artifact out. The data has one way through:

load -> clean passes -> plan -> the plan's passes -> TVM -> library -> artifact -> measurement
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from threadpoolctl import threadpool_limits

from hwopt.artifact import Artifact, check_destination
from hwopt.backends.tvm.support import refuse_unsupported
from hwopt.build import Built, build
from hwopt.decide import decided, decided_and_built
from hwopt.emit.driver import check_name
from hwopt.emit.products import Form, check_form
from hwopt.errors import UnsupportedError, UsageError, did_you_mean
from hwopt.io.preprocess import KEY, Preprocess
from hwopt.ir import Graph
from hwopt.job import FORM, Data, Job, prepare, quiet, read_plan, with_training
from hwopt.original import original_of
from hwopt.pipeline import PassManager, Refusal, parse_list
from hwopt.plan.backend import CUDA, generated, generates
from hwopt.plan.budget import Budget
from hwopt.plan.options import Progress
from hwopt.plan.plan import Plan, apply_plan
from hwopt.plan.search import Found
from hwopt.plugins import find_passes
from hwopt.prove import CHECKS
from hwopt.recover import Recipe
from hwopt.recovery import retrained, settled
from hwopt.report.outcome import estimated_report, measured_report
from hwopt.target import Target
from hwopt.tuning import builders, open_database, progress_line, read_database, tune_graph

if TYPE_CHECKING:  # TVM is imported when something is compiled
    from hwopt.backends.tvm.tune.database import Database
    from hwopt.backends.tvm.tune.session import Effort, State

F = TypeVar("F", bound=Callable[..., Any])


def one_blas_thread(function: F) -> F:
    """Planning runs one candidate per core itself; BLAS threads that spin beside it double the processor time."""
    return threadpool_limits.wrap(limits=1, user_api="blas")(function)


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
    name: str | None = None,
    progress: Progress = quiet,
    tuning_db: Path | str | None = None,
    tune: Effort | None = None,
    workers: str | None = None,
    measure: bool = True,
    form: Form = FORM,
    check: str = "doubtful",
    preprocess: Preprocess | str | None = None,
    recover: str | Recipe | None = None,
    train: Data = None,
    loss: Callable[..., Any] | None = None,
    checkpoints: Path | str | None = None,
) -> Artifact:
    """Optimize a model (an ONNX file, a torch module or an ExportedProgram) for a target and write the artifact to `out`.

    `calibrate` and `evaluate` are an .npz file, arrays by input name (with `labels`), or for `evaluate` the text
    `module:function`. Without data nothing lossy is done. `name` begins the names of
    the C functions (the model file's if not given). `tuning_db` is a database of tuned schedules (see hwopt tune; none
    is read unless it is named), `tune` how long to search for better ones before each result is compiled (a plan that is
    corrected by measurements is compiled again, and its search goes on from the database); the Dask cluster at the address
    `workers`, or local processes, build the candidates. Without `measure` nothing is timed: the cost model alone
    decides, and the same inputs give the same bytes, as build systems want it. `form` says which libraries, objects or sources
    are delivered. `check` says which changes are left out once, and stay out if the model is faster without them: all, the
    doubtful ones or none. `preprocess` (`mean=..,std=..,layout=nhwc`) becomes the first part of
    the model, which then takes pixels, as do the data. `recover` trains the changed model (`distill{epochs=3}`, see
    hwopt.recover) on `train`: data as above (those of calibration if not given) or a loader, with a `loss` of yours if given;
    unfinished training is kept in the folder `checkpoints` until the artifact is there. Raises HwoptError with the reason and
    the next step.
    """
    _check_options(tune is not None, workers, measure, check)
    check_form(form)
    check_name(name)
    check_destination(out)
    if workers:
        with builders(workers):  # a wrong address shows before anything else takes its time
            pass
    replay = None if plan is None else read_plan(plan)
    job = prepare(model, target, shapes, binds, calibrate, evaluate, budget, passes, threads, seed, progress, preprocess)
    job = _generated(job, form)
    refuse_unsupported(job.graph)
    job = dataclasses.replace(job, graph=dataclasses.replace(job.graph, name=name or _name(model, job.graph)))
    database = _database(tuning_db, tune is not None, measure, job.target)
    job = dataclasses.replace(job, database=database, measure=measure, form=form, check=check)
    job = with_training(job, recover, train, loss, checkpoints, replay)
    origin = {"original": original_of(model, shapes, binds, job.graph.digest), "preprocess": job.graph.metadata.get(KEY, "")}
    with tempfile.TemporaryDirectory(prefix="hwopt-") as scratch:
        make = _measured if measure else _estimated
        plan_made, result, report = make(job, replay, Path(scratch), Tuning(tune, workers) if tune else None)
        return _written(job, result, out, plan_made, report | origin)


Outcome = tuple[Plan, Built, dict[str, Any]]  # the report last


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How long schedules are searched, and the address of the Dask cluster that builds them; local processes if None."""

    effort: Effort
    workers: str | None


def _estimated(job: Job, replay: Plan | None, folder: Path, _: Tuning | None) -> Outcome:
    """Decided by the cost model alone; nothing is timed."""
    found = decided(job, replay)
    result = _build(found.graph, job, folder / "result", job.form)
    return found.plan, result, estimated_report(job, found, result)


def _measured(job: Job, replay: Plan | None, folder: Path, tuning: Tuning | None) -> Outcome:
    """Decided by the cost model and by measurements against the model as it came."""
    baseline = _build(job.graph, job, folder / "baseline")

    def built(found: Found) -> Built:
        _search_schedules(found.graph, job, tuning)
        same = found.graph is job.graph and tuning is None
        return baseline if same else _build(found.graph, job, Path(tempfile.mkdtemp(prefix="result", dir=folder)))

    found, result = decided_and_built(job, replay, baseline, built)
    report = measured_report(job, found, baseline, result)
    delivered = result if job.form == FORM else _build(found.graph, job, folder / "delivered", job.form)
    return found.plan, delivered, report


def _search_schedules(graph: Graph, job: Job, tuning: Tuning | None) -> None:
    """Tune the graph's kernels where that was asked for; what is found lands in the job's database."""
    if tuning is None or job.database is None:
        return
    watch, compact = _watching(job.progress), job.budget.weight_bytes is not None
    with builders(tuning.workers) as executor:
        tune_graph(
            graph, job.target, job.threads, job.database, tuning.effort, executor=executor, seed=job.ctx.seed, watch=watch,
            compact=compact,
        )  # fmt: skip


def _written(job: Job, built: Built, out: Path | str, plan: Plan, report: dict[str, Any]) -> Artifact:
    artifact = built.write(out, plan, report)
    settled(job)
    return artifact


def _database(path: Path | str | None, tuned: bool, measure: bool, target: Target) -> Database | None:
    """The user's own only where something is added to it: the same inputs give the same bytes."""
    if path is not None and not measure:
        return read_database(path, target)
    return open_database(path, target) if path is not None or tuned else None


def _check_options(tuned: bool, workers: str | None, measure: bool, check: str) -> None:
    if workers and not tuned:
        raise UsageError("there is nothing to build", place="workers", hint="say how long to tune, too")
    if tuned and not measure:
        raise UsageError("tuning measures", place="measure=False", hint="tune first, and give the database (tuning_db)")
    if check not in CHECKS:
        raise UsageError(f"unknown check {check!r}", place="check", hint=did_you_mean(check, CHECKS))


def _name(model: Any, graph: Graph) -> str:
    """What the artifact is called: exporters name every graph alike, files have names of their own."""
    return Path(model).stem if isinstance(model, (str, Path)) else graph.name


def _build(graph: Graph, job: Job, folder: Path, form: Form = FORM) -> Built:
    job.progress("compiling", 0, 1)
    return build(graph, job.target, job.threads, folder, job.database, form, job.budget.weight_bytes is not None)


def _watching(progress: Progress) -> Callable[[State], None]:
    return lambda state: progress(f"tuning: {progress_line(state)}", int(100 * state.share), 100)


@one_blas_thread
def plan_model(model: Any, **options: Any) -> Found:
    """The decisions only, with the score of the graph they make; nothing is compiled. Takes compile_model's arguments."""
    training = [options.get(name) for name in ("recover", "train", "loss", "checkpoints")]
    job = with_training(_job(model, options), *training)
    found = decided(job, None)
    settled(job)
    return found


@one_blas_thread
def apply_model(model: Any, *, plan: Plan | Path | str | None = None, **options: Any) -> tuple[Graph, list[Refusal]]:
    """The graph that a plan, or passes given as text, make of a model, and what they declined to do."""
    job = _job(model, options)
    if plan is not None:
        stated = read_plan(plan)
        job = with_training(job, None, options.get("train"), options.get("loss"), options.get("checkpoints"), stated)
        graph, _ = retrained(job, stated, apply_plan(job.graph, stated, job.ctx, find_passes()).graph)
        settled(job)
        return graph, job.ctx.refused
    if options.get("passes") is None:
        raise UsageError("nothing to apply", hint="give --plan plan.json or --passes name{option=value}")
    named = tuple(one for one, _ in parse_list(options["passes"], find_passes()))
    return PassManager(named).run(job.graph, job.ctx).graph, job.ctx.refused


def _job(model: Any, options: Mapping[str, Any]) -> Job:
    data = ("calibrate", "evaluate", "preprocess")
    names = ("target", "shapes", "binds", *data, "budget", "passes", "threads", "seed", "progress")
    defaults = {"target": "host", "seed": 0, "progress": quiet}
    return prepare(model, **{name: options.get(name, defaults.get(name)) for name in names})


def _generated(job: Job, form: Form) -> Job:
    """The job with the families that code can be generated for; raises UnsupportedError where none can for the target.

    Without a heap, what is measured takes as little workspace as what is delivered.
    """
    target = job.target if form.heap else job.target.cramped()
    if not generates(target):
        hint, place = "hwopt plan and hwopt apply work for it", f"target {target.name}"
        raise UnsupportedError(f"there is no code generator for {target.kind} targets of its kind", place=place, hint=hint)
    if target.tvm["kind"] == CUDA and "shared" in form.emit:
        raise UsageError("a library for CUDA is linked with libcuda where it runs", place="emit", hint="--emit static,source")
    ctx = dataclasses.replace(job.ctx, target=target)
    return dataclasses.replace(job, target=target, ctx=ctx, families=generated(target, job.families))
