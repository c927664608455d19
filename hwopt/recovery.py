"""Recovery in a job: plans deeper than the budget are trained, and the fastest one that then keeps it is taken."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hwopt.backends.ort import Session
from hwopt.build import Built
from hwopt.errors import BudgetError, UsageError
from hwopt.evaluate import Comparison, Scorer, compare
from hwopt.ir import Graph
from hwopt.job import Job
from hwopt.plan.attempt import Found, Priced, Search, price
from hwopt.plan.budget import Budget
from hwopt.plan.plan import Plan, Recovery
from hwopt.plan.search import aim, search
from hwopt.plugins import find_passes
from hwopt.recover import Case, Check, Outcome, Recipe, parse_recipe, recovered
from hwopt.recover.data import source_of
from hwopt.recover.knobs import turned
from hwopt.samples import Samples

DEPTHS = (12.0, 4.0, 1.5)  # drops before training, in drops that are allowed after it: the deepest plan first
SHARE = 2 / 3  # of the time that is left for a plan with others behind it
LEAST, MOST = 0.005, 0.5  # the least drop that they are multiples of, the most of any
Option = tuple[Found, "Built | None"]  # a plan with its library, where one is built
Searched = Callable[[Search], Option]


def relaxed(budget: Budget) -> tuple[Budget, ...]:
    """The budget with larger drops: what plans may lose before they are trained."""
    drops = (min(depth * max(budget.max_drop, LEAST), MOST) for depth in DEPTHS)
    return tuple(dataclasses.replace(budget, max_drop=drop) for drop in dict.fromkeys(drops) if drop > budget.max_drop)


def deepened(job: Job, task: Search, baseline: np.ndarray, searched: Searched, faster: Callable[[Option, Option], bool],
             built: Callable[[Found], Option]) -> Option:  # fmt: skip
    """The fastest plan that keeps the budget after training; without any the one that keeps it without, trained if that helps.

    `searched` finds the best plan of a search, `built` makes an option of a trained plan (BudgetError if it breaks a limit).
    """
    quick = dataclasses.replace(task, thorough=False)
    usual, _ = _tried(searched, quick)
    trainer = Trainer(job, task.scorer, baseline)
    budgets = relaxed(job.budget)
    for place, budget in enumerate(budgets):
        deeper, _ = _tried(searched, dataclasses.replace(quick, budget=budget, refine=False))
        if deeper is None or deeper[0].graph is job.graph or (usual and not faster(deeper, usual)) or trainer.over:
            continue
        trained = trainer.train(deeper[0], len(budgets) - place - 1 + (usual is not None))
        if trained is None or not _kept(job, trained.comparison):
            continue
        option, _ = _tried(built, trained)
        if option is not None:
            return option
    usual = usual or _searched(searched, task, trainer)
    trained = None if usual[0].graph is job.graph or trainer.over else trainer.train(usual[0], 0)
    option, _ = (None, None) if trained is None else _tried(built, trained)
    return option or _noted(usual, trainer)


def _searched(searched: Searched, task: Search, trainer: Trainer) -> Option:
    """Without training; the error says what could be met, and what training came to."""
    try:
        return searched(task)
    except BudgetError as error:
        if not trainer.drops:
            raise
        trained = f"no trained plan keeps it either ({len(trainer.drops)} tried, the least drop {min(trainer.drops):+.2%})"
        raise BudgetError(f"{error.message}; {trained}", place=error.place, hint=error.hint) from error


def deepened_unbuilt(job: Job, task: Search, priced: Priced) -> Found:
    """The same by predicted times alone: nothing is compiled."""
    faster = lambda one, other: one[0].plan.seconds_after < other[0].plan.seconds_after  # noqa: E731
    return deepened(job, task, priced.baseline, lambda one: (search(one, priced), None), faster, lambda one: (one, None))[0]


def _noted(usual: Option, trainer: Trainer) -> Option:
    """The plan that was not trained, which says what trainings came to, or that somebody stopped them."""
    found, library = usual
    text = trainer.account()
    plan = dataclasses.replace(found.plan, note="; ".join(filter(None, (found.plan.note, text)))) if text else found.plan
    return dataclasses.replace(found, plan=plan), library


def _tried(work: Callable[[Any], Option], what: Any) -> tuple[Option | None, BudgetError | None]:
    try:
        return work(what), None
    except BudgetError as error:
        return None, error


def _kept(job: Job, comparison: Comparison | None) -> bool:
    """As careful as the search: one standard error inside of the budget."""
    return comparison is None or comparison.drop <= aim(job.budget, comparison)


@dataclass
class Trainer:
    """Trains plans one after the other, in the recipe's minutes together, and scores what comes out against `baseline`."""

    job: Job
    scorer: Scorer | None
    baseline: np.ndarray | None
    spent: float = 0.0
    interrupted: bool = False
    done: dict[str, Found | None] = field(default_factory=dict)  # by the graph that was trained: none is trained twice
    drops: list[float] = field(default_factory=list)  # of all that were trained and scored
    vain: int = 0  # trainings without a state that was better than the first one on the data held out

    def account(self) -> str:
        """Why a plan without training is taken after all; empty where nothing was trained or scored."""
        if self.interrupted:
            return "training was interrupted before a trained plan was better within the budget"
        told = [f"{self.vain} trainings found no better state"] if self.vain else []
        if self.drops:
            least, allowed = f"{min(self.drops):+.2%}", f"{self.job.budget.max_drop:.2%}"
            told.append(f"of {len(self.drops)} trained plans the least drop was {least}, {allowed} is allowed")
        return "; ".join(told)

    @property
    def over(self) -> bool:
        """No time is left, or the user has had enough."""
        recipe = recipe_of(self.job)
        return self.interrupted or bool(recipe.minutes and self.spent + 1 >= 60 * recipe.minutes)

    def train(self, found: Found, others: int) -> Found | None:
        """The plan with its training on record, None if that made nothing better; `others` more may need time, too."""
        if found.graph.digest not in self.done:
            self.done[found.graph.digest] = self._train(found, others)
        return self.done[found.graph.digest]

    def _train(self, found: Found, others: int) -> Found | None:
        recipe, started = recipe_of(self.job), time.perf_counter()
        if recipe.minutes:
            left = max(recipe.minutes - self.spent / 60, 1 / 60)
            recipe = dataclasses.replace(recipe, minutes=left * SHARE if others else left)
        outcome = recovered(case_of(self.job, found.graph, found.plan), recipe)
        seconds = time.perf_counter() - started
        self.spent += seconds
        self.interrupted = outcome.interrupted
        if outcome.interrupted and self.job.training.checkpoints:
            self.job.training.checkpoints.used.clear()  # what is found there goes on
        if outcome.graph is found.graph:
            self.vain += 1
            return None
        return self._recorded(found, outcome, seconds)

    def _recorded(self, found: Found, outcome: Outcome, seconds: float) -> Found | None:
        metric, before, after, comparison = "score on held-out training data", 0.0, 0.0, found.comparison
        if outcome.before and outcome.after:
            before, after = outcome.before.score, outcome.after.score
        if self.scorer is not None and self.baseline is not None:
            scores = [self.scorer(Session(graph).run) for graph in (found.graph, outcome.graph)]
            compared = [compare(self.scorer.metric, self.baseline, one) for one in scores]
            metric, before, after, comparison = compared[0].metric, compared[0].score, compared[1].score, compared[1]
            self.drops.append(comparison.drop)
            if after < before and not (self._faster(found, outcome) < 1 and _kept(self.job, comparison)):
                return None
        digest = source_of(self.job.graph, data_of(self.job)).digest
        plan = dataclasses.replace(
            found.plan, budget=self.job.budget, note="; ".join(filter(None, (found.plan.note, *self._said(outcome)))),
            seconds_after=found.plan.seconds_after * self._faster(found, outcome),
            recovery=Recovery(str(outcome.recipe), metric, before, after, digest),
        )  # fmt: skip
        return Found(plan, outcome.graph, comparison, uniform=found.uniform, training_seconds=seconds)

    def _said(self, outcome: Outcome) -> Iterator[str]:
        """What a reader must know of a training that is taken."""
        if outcome.interrupted:
            yield "training was interrupted: its best state so far"
        data = data_of(self.job)
        if outcome.recipe.hard and isinstance(data, Samples) and data.labels is None:
            yield f"the training data have no labels: {outcome.recipe.name} learned the float model's answers"

    def _faster(self, found: Found, outcome: Outcome) -> float:
        """Predicted seconds of what came out over those of what went in: a schedule may cut further."""
        before = self.job.predicted(found.graph).seconds
        return self.job.predicted(outcome.graph).seconds / before if before else 1.0


def trained_as_stated(job: Job, found: Found, scorer: Scorer | None, baseline: np.ndarray | None) -> Found:
    """A plan that was not searched for, trained if the job has a recipe, the plan has none, and it helps."""
    if job.training.recipe is None or found.plan.recovery or found.graph is job.graph:
        return found
    trainer = Trainer(job, scorer, baseline)
    return trainer.train(found, 0) or _noted((found, None), trainer)[0]


def trial(job: Job, task: Search, knobs: Mapping[str, Any], watch: Callable[[Check, int], None]) -> Found:
    """One whole plan of a search over knobs, trained with a recipe that they turn; nothing is built. `watch` sees all checks."""
    training = dataclasses.replace(job.training, recipe=turned(recipe_of(job), knobs), watch=watch)
    priced = price(task)

    return deepened_unbuilt(dataclasses.replace(job, training=training), task, priced)


def settled(job: Job) -> None:
    """All is done: nothing needs the checkpoints of its trainings any more."""
    if job.training.checkpoints:
        job.training.checkpoints.clear()


def retrained(job: Job, plan: Plan, graph: Graph) -> tuple[Graph, str]:
    """The graph after the training that a plan has on record, and what a reader must know of it."""
    if plan.recovery is None:
        return graph, ""
    data = data_of(job)
    if data is None:
        raise UsageError("the plan trains, and there are no data", place="plan", hint="give --train or --calibrate as it was")
    other = source_of(job.graph, data).digest != plan.recovery.data_digest
    after = recovered(case_of(job, graph, plan), parse_recipe(plan.recovery.recipe)).graph
    return after, "trained on other data than the plan was made with: weights differ" if other else ""


def recipe_of(job: Job) -> Recipe:
    if job.training.recipe is None:
        raise UsageError("no recipe of recovery", place="recover")
    return job.training.recipe


def data_of(job: Job) -> Any:
    return job.ctx.calibration if job.training.data is None else job.training.data


def case_of(job: Job, graph: Graph, plan: Plan) -> Case:
    """What is trained in a job: the model before the plan's changes is the teacher."""
    training = job.training
    depth = sum(one.max_drop > plan.budget.max_drop for one in relaxed(job.budget))
    return Case(
        graph, job.graph, data_of(job), loss=training.loss, progress=job.progress, checkpoints=training.checkpoints, ctx=job.ctx,
        passes=plan.passes(find_passes()), watch=lambda check: training.watch(check, depth),
        answers=training.answers,
    )  # fmt: skip


__all__: Sequence[str] = ["Trainer", "deepened", "relaxed", "retrained", "settled", "trained_as_stated"]
