"""Search over the knobs that one solve does not see: criteria, calibrators, group sizes, and those of recovery. Each trial is
a whole plan; one that is trained ends early if it is worse at a check than half of the others were.

Optuna proposes, the planner decides, the study is a file in the output folder: whoever goes on later goes on from there.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwopt.errors import BudgetError, HwoptError, UsageError, did_you_mean
from hwopt.files import write_whole
from hwopt.plan.attempt import Found, Search, price
from hwopt.plan.plan import Plan, interrupted, plan_from_json
from hwopt.plan.search import search
from hwopt.plan.store import PLAN, identity, keep_plan, open_folder

if TYPE_CHECKING:
    import optuna

STARTUP = 4  # trials before any is ended early
CHECKS = 10_000  # more than there are at one depth
METHODS = ("bayesian", "random", "grid")
TRIALS, JOURNAL = "trials.json", "trials.journal"


Report = Callable[[float, int], None]  # of the score at a check, and how deep the plan is (0: most); raises what ends the trial


@dataclass(frozen=True, eq=False)
class Trained:
    """Trials that are trained: `what` names the recipe and its data, `knobs` are the recipe's, `plan` makes one trial's plan."""

    what: str
    knobs: Mapping[str, tuple[Any, ...]]
    plan: Callable[[Search, Mapping[str, Any], Report], Found]


def knobs_of(task: Search) -> dict[str, tuple[Any, ...]]:
    """`family.field` -> values, the usual one first, of all families that the search may use."""
    return {f"{kind.name}.{name}": tuple(values) for kind in task.passes for name, values in kind.knobs.items()}


def search_knobs(task: Search, method: str, trials: int, folder: Path, trained: Trained | None = None) -> Plan:
    """The best plan of `trials` searches in all, those of earlier runs included; it is in `folder` as soon as it is known.

    Raises UsageError for an unknown method or if Optuna is missing, BudgetError if no trial met the budget.
    """
    if method not in METHODS:
        raise UsageError(f"unknown search {method!r}", place="--search", hint=did_you_mean(method, METHODS))
    space = {**knobs_of(task), **(trained.knobs if trained else {})}
    if not space:
        raise UsageError("the families have no knobs to turn", place="--search", hint="name more families with --passes")
    key = identity(task, f"trials {trained.what}" if trained else "trials")
    known = open_folder(folder, TRIALS, key)
    write_whole(folder / TRIALS, json.dumps({"search": key, **known}, indent=1) + "\n")
    study = _study(method, space, folder, key, task.ctx.seed)

    def after(study: optuna.Study, _: object) -> None:
        write_whole(folder / TRIALS, json.dumps({"search": key, "trials": _table(study)}, indent=1) + "\n")

    left = trials - len(_finished(study))
    if left > 0:
        study.optimize(lambda trial: _result(task, trial, space, folder, study, trained), n_trials=left, callbacks=[after])
    if not (folder / PLAN).exists():
        reasons = [trial.user_attrs.get("reason", "") for trial in _finished(study)]
        raise BudgetError(reasons[-1] if reasons else "no trial was made", place="--search", hint="relax the budget")
    return plan_from_json((folder / PLAN).read_text(), str(folder / PLAN))


def _study(method: str, space: Mapping[str, tuple], folder: Path, key: str, seed: int) -> optuna.Study:
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise UsageError("needs the package optuna", place="--search", hint="pip install 'hwopt[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    study = optuna.create_study(storage=storage, study_name=key, direction="minimize", load_if_exists=True)
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=1)
    later = seed + len(study.trials)  # a search that goes on must not draw the same again; a grid's order hangs on its seed
    names = {name: list(range(len(values))) for name, values in space.items()}
    study.sampler = {
        "bayesian": lambda: optuna.samplers.TPESampler(seed=later, n_startup_trials=5),
        "random": lambda: optuna.samplers.RandomSampler(seed=later),
        "grid": lambda: optuna.samplers.GridSampler(names, seed=seed),
    }[method]()
    if not study.trials and method != "grid":
        study.enqueue_trial(dict.fromkeys(space, 0))  # what a plain search does comes first
    return study


def _result(
    task: Search, trial: optuna.Trial, space: Mapping[str, tuple], folder: Path, study: optuna.Study, trained: Trained | None
) -> float:
    """What one trial is worth; its plan is kept if it is the best."""
    import optuna

    task.progress(f"trial {trial.number + 1}", 0, 1)
    turned = {name: values[trial.suggest_categorical(name, list(range(len(values))))] for name, values in space.items()}
    trial.set_user_attr("knobs", {name: str(value) for name, value in turned.items()})
    one = dataclasses.replace(task, knobs={name: turned[name] for name in knobs_of(task)})
    try:
        found = trained.plan(one, turned, _reporting(trial)) if trained else search(one, price(one))
    except HwoptError as error:  # the budget cannot be met, or a value needs what is not installed
        trial.set_user_attr("reason", error.message)
        raise optuna.TrialPruned from error
    if interrupted(found.plan.note):  # in the middle: this trial will be made again
        raise KeyboardInterrupt
    value = worth(found) if trained is None else trained_worth(found)
    trial.set_user_attr("drop", found.comparison.drop if found.comparison else 0.0)
    trial.set_user_attr("seconds", found.plan.seconds_after)
    best = min((known for t in _finished(study) if (known := _value(t)) is not None), default=math.inf)
    if value < best or not (folder / PLAN).exists():
        keep_plan(folder, found.plan)
    return value


def worth(found: Found) -> float:
    """Less is better: predicted seconds, or the drop of the score where the seconds are limited and kept anyway."""
    limited = found.plan.budget.latency_seconds is not None
    return found.comparison.drop if limited and found.comparison else found.plan.seconds_after


def trained_worth(found: Found) -> float:
    """Of equally fast plans the one that scores higher."""
    return worth(found) * (1 + found.comparison.drop) if found.comparison else worth(found)


def _reporting(trial: optuna.Trial) -> Report:
    """Tells Optuna the score of each check; ends a trial that is worse than half of the others were there.

    There: at that check of a plan that is as deep. Deeper ones come first in each trial, and not every trial has all.
    """
    import optuna

    checks: dict[int, Iterator[int]] = {}

    def report(score: float, depth: int) -> None:
        trial.report(-score, next(checks.setdefault(depth, itertools.count(depth * CHECKS))))
        if trial.should_prune():
            trial.set_user_attr("reason", "worse at a check than half of the other trials")
            raise optuna.TrialPruned

    return report


def _finished(study: optuna.Study) -> list[Any]:
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _table(study: optuna.Study) -> list[dict[str, Any]]:
    return [{"number": t.number, "value": _value(t), **t.user_attrs} for t in _finished(study)]


def _value(trial: Any) -> float | None:
    """What a whole trial is worth; Optuna gives one that was ended early its last check's score for a value."""
    return trial.value if trial.state.name == "COMPLETE" else None
