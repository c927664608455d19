"""A model and everything that decides about it, loaded and checked before any long work starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hwopt.analysis.workload import workloads
from hwopt.backends.tvm.tune.database import Database
from hwopt.emit.products import Form
from hwopt.errors import UsageError
from hwopt.evaluate import check_labels
from hwopt.io.preprocess import Preprocess, folded, parse_preprocess
from hwopt.ir import Graph, descends
from hwopt.pipeline import Context, Pass, PassManager, Phase, parse_list
from hwopt.plan.budget import Budget
from hwopt.plan.doubts import own_prices
from hwopt.plan.options import Progress
from hwopt.plan.plan import Plan, plan_from_json
from hwopt.plugins import find_passes, find_target
from hwopt.recover import Checkpoints, Recipe, Training, parse_recipe, require
from hwopt.recover.data import some_labels, source_of
from hwopt.samples import Samples
from hwopt.sources import is_scoring, samples_from
from hwopt.target import Cost, Target, total

FORM = Form()
Data = Samples | Mapping[str, np.ndarray] | Path | str | Iterable[Any] | Callable[[], Any] | None  # see samples_from


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
    measure: bool = True  # nothing is timed without, and the same inputs give the same bytes
    form: Form = FORM  # of what is delivered
    check: str = "doubtful"  # which changes are left out once, to see what they save: none, doubtful, all
    sensitivity: str = "auto"  # how the errors of changes are found: auto, fisher (gradients), measured
    pairwise: bool = False  # neighbours' errors together, too
    training: Training = field(default_factory=Training)  # after the changes

    def predicted(self, graph: Graph) -> Cost:
        """One run of a graph on this target, by its cost model."""
        return total(self.target.cost.estimate(work, self.threads) for work in workloads(graph))


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
    preprocess: Preprocess | str | None = None,
) -> Job:
    """Load, clean and check everything before any long work starts."""
    from hwopt.io.onnx import load

    hardware = own_prices(find_target(target) if isinstance(target, str) else target)
    if budget is not None and budget.activation_bytes is not None:
        hardware = hardware.cramped()
    families, fixed = choose_families(passes)
    progress("loading", 0, 1)
    graph = clean(preprocessed(load(model, shapes=shapes, binds=binds), preprocess), Context(hardware, seed=seed))
    _check_sites(graph, fixed)
    scorer = evaluate if isinstance(evaluate, str) and is_scoring(evaluate) else None
    evaluation = None if scorer else _samples(evaluate, graph)
    calibration, evaluation = _disjoint(_samples(calibrate, graph), evaluation, scorer)
    if evaluation is not None:
        check_labels(graph, evaluation.labels, evaluation.source)
    ctx = Context(hardware, calibration.spread() if calibration else None, seed)
    return Job(
        graph=graph, ctx=ctx, target=hardware, threads=threads or hardware.cores,
        budget=budget or Budget(), families=families, fixed=fixed, evaluation=evaluation, user_score=scorer, progress=progress,
    )  # fmt: skip


def with_training(
    job: Job,
    recover: str | Recipe | None,
    train: Data = None,
    loss: Callable[..., Any] | None = None,
    checkpoints: Path | str | None = None,
    replay: Plan | None = None,
) -> Job:
    """The job with a recipe of recovery, and data to train on: samples, or a loader as it is. Checked before any long work.

    Raises UsageError for a recipe that means nothing or has no data, ToolchainError without torch, UnsupportedError for operators
    without gradients.
    """
    recipe = None if recover is None else parse_recipe(recover)
    recorded = replay.recovery if replay else None
    if recipe is not None and recorded is not None:
        hint = "leave --recover out, or recovery out of the plan"
        raise UsageError(f"the plan has a training of its own: {recorded.recipe}", place="--recover", hint=hint)
    if recipe is None and recorded is None:
        if train is not None:
            raise UsageError("training data without a recipe", place="train", hint="say how: --recover distill")
        return job
    require()
    from hwopt.backends.torch import refuse_unsupported

    refuse_unsupported(job.graph)
    stored = isinstance(train, (Samples, Mapping, str, Path))
    data = samples_from(train, job.graph, places=True) if stored else train
    if data is None and job.ctx.calibration is None:
        raise UsageError("there are no data to train on", place="--recover", hint="give --train or --calibrate")
    _check_training(job, recipe, job.ctx.calibration if data is None else data, own_loss=loss is not None)
    if recipe is not None and not recipe.seed:
        recipe = replace(recipe, seed=job.ctx.seed)
    if recipe is not None and not recipe.threads and job.target.runs_here and job.threads < job.target.cores:
        recipe = replace(recipe, threads=job.threads)  # who asks for few does not want all of them
    training = Training(recipe, data, loss, None if checkpoints is None else Checkpoints(Path(checkpoints)))
    return replace(job, training=training)


def _check_training(job: Job, recipe: Recipe | None, data: Any, *, own_loss: bool) -> None:
    """Raise UsageError for data that can be read only once, a loss that is not there, and labels that are missing; DataError for
    labels that fit no class, in a loader those of its first batch."""
    from hwopt.recover.torch.losses import user_loss

    source = source_of(job.graph, data)
    if recipe is not None and recipe.loss:
        user_loss(recipe.loss)
    if recipe is not None and recipe.hard and recipe.logits and isinstance(data, Samples) and data.labels is None:
        raise UsageError(f"hard={recipe.hard} needs labels", place=str(recipe), hint="leave hard out, or give data with labels")
    if recipe is not None and recipe.hard and not recipe.loss and not own_loss:
        check_labels(job.graph, some_labels(source), "training data")


def preprocessed(graph: Graph, preprocess: Preprocess | str | None) -> Graph:
    """The graph with this in front of it, if there is something; it then takes pixels."""
    if not preprocess:
        return graph
    return folded(graph, parse_preprocess(preprocess) if isinstance(preprocess, str) else preprocess)


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
    for one in (one for one, exactly in stated if exactly):
        one.check_stated()
    return tuple(type(one) for one, exactly in stated if not exactly), tuple(one for one, exactly in stated if exactly)


def _check_sites(graph: Graph, stated: Iterable[Pass]) -> None:
    """Raise PassError for a site that is no node; parts of one (`fc1:down`) an earlier pass may make yet."""
    for one in stated:
        unknown = tuple(name for name in one.site if not any(descends(name, node.name) for node in graph.nodes))
        if unknown:
            replace(one, site=unknown, **dict.fromkeys(one.each, ())).check_site(graph)


def read_plan(plan: Plan | Path | str) -> Plan:
    """The plan itself or the one in a file; raises UsageError where there is none."""
    if isinstance(plan, Plan):
        return plan
    try:
        return plan_from_json(Path(plan).read_text(), str(plan))
    except FileNotFoundError as error:
        raise UsageError("no such file", place=str(plan), hint="hwopt plan writes one, and it lies in every artifact") from error


def _samples(data: Data, graph: Graph) -> Samples | None:
    return None if data is None else samples_from(data, graph)


def _disjoint(
    calibration: Samples | None, evaluation: Samples | None, scorer: str | None
) -> tuple[Samples | None, Samples | None]:
    """Where only one set is given it is halved: what chooses the numbers must not also judge them."""
    given = calibration or evaluation
    if given is None or (calibration and evaluation) or scorer:
        return calibration, evaluation
    even = np.arange(len(given)) % 2 == 0
    return given.rows(even), given.rows(~even)
