"""--search with --recover: knobs of the training are turned too, bad trials end early, the study goes on where it stood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hwopt.errors import UsageError
from hwopt.explore import job_of, planned
from hwopt.io.onnx import save
from hwopt.plan.attempt import Found
from hwopt.plan.budget import Budget
from hwopt.plan.plan import plan_from_json
from hwopt.recover import parse_recipe
from hwopt.recover.knobs import recovery_knobs, turned
from tests._recover import blobs, trained_net

torch = pytest.importorskip("torch")
optuna = pytest.importorskip("optuna")
RECIPE = "distill{epochs=4,batch=16,lr=0.003,threads=1,checks=3,patience=0}"


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = tmp_path_factory.mktemp("model") / "tiny.onnx"
    save(trained_net(), model)
    sets = {name: {"x0": one.arrays["x0"]} for name, one in (("calibrate", blobs(160, 1)), ("evaluate", blobs(160, 2)))}
    sets["evaluate"]["labels"] = blobs(160, 2).labels
    return {
        "model": model, **sets, "target": "x86-64-v3", "threads": 1, "budget": Budget(0.05), "passes": "prune-channels",
        "recover": RECIPE,
    }  # fmt: skip


def searched(options: dict[str, Any], out: Path, trials: int, method: str = "random") -> list[dict[str, Any]]:
    given = dict(options)
    job = job_of(given.pop("model"), given)
    planned(job, out, method=method, trials=trials, cost=None, points=2, tie=True)
    return list(json.loads((out / "trials.json").read_text())["trials"])


def test_knobs_are_those_that_mean_something_to_the_recipe_and_its_own_values_come_first() -> None:
    known = recovery_knobs(parse_recipe("gradual{lr=0.01}"))
    assert known["recover.lr"] == (0.01, 0.003, 0.03) and known["recover.stages"] == (4, 2)
    assert "recover.temperature" not in recovery_knobs(parse_recipe("qat"))
    assert "recover.epochs" not in recovery_knobs(parse_recipe("distill{steps=5}"))
    one = turned(parse_recipe("dkm"), {"recover.softness": 0.2, "prune-channels.criterion": "l2"})
    assert str(one) == "dkm{softness=0.2}"


def test_a_search_turns_knobs_of_the_training_and_goes_on_where_it_stood(options: dict[str, Any], tmp_path: Path) -> None:
    first = searched(options, tmp_path / "out", 2)
    more = searched(options, tmp_path / "out", 4)
    assert [one["number"] for one in more] == [0, 1, 2, 3] and more[:2] == first
    assert first[0]["knobs"]["recover.lr"] == "0.003" and len({json.dumps(one["knobs"], sort_keys=True) for one in more}) == 4
    values = [one["value"] for one in more if "reason" not in one]
    plan = plan_from_json((tmp_path / "out" / "plan.json").read_text())
    best = min((one for one in more if "reason" not in one), key=lambda one: one["value"])
    assert values and plan.recovery and plan.knobs["prune-channels.criterion"] == best["knobs"]["prune-channels.criterion"]
    recipe = parse_recipe(plan.recovery.recipe)
    assert str(recipe.lr) == best["knobs"]["recover.lr"] and str(recipe.temperature) == best["knobs"]["recover.temperature"]


def test_a_trial_that_is_worse_than_the_others_ends_early(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The median is Optuna's; here every later trial scores worse at each check than those before."""
    import hwopt.explore
    from hwopt.recover.case import Check

    asked: list[int] = []
    found: list[Found] = []
    real = hwopt.explore.trial

    def trial(job: Any, task: Any, knobs: Any, watch: Any) -> Found:
        asked.append(0)
        for step in range(4):
            asked[-1] += 1
            watch(Check(step, 0.0, 1.0 - len(asked)), 0)
        found[:] = found or [real(job, task, knobs, lambda *_: None)]
        return found[0]

    monkeypatch.setattr(hwopt.explore, "trial", trial)
    table = searched(options, tmp_path / "out", 6)
    assert asked == [4, 4, 4, 4, 2, 2] and [one["value"] is None for one in table] == [False] * 4 + [True] * 2
    assert "worse at a check" in table[-1]["reason"]


def test_trials_are_compared_with_those_that_train_as_deep_a_plan(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last trial, and only that one, has a plan as deep that is worse: a shallow one that scores higher says nothing."""
    import hwopt.explore
    from hwopt.recover.case import Check

    real, numbers, found, depths = hwopt.explore.trial, iter(range(7)), [], set()

    def trial(job: Any, task: Any, knobs: Any, watch: Any) -> Found:
        number = next(numbers)
        for step in range(3):
            watch(Check(step, 0.0, {4: 0.4, 5: 0.5, 6: 0.3}.get(number, 0.9)), int(number < 4))
        if not found:
            found.append(real(job, task, knobs, lambda _, depth: depths.add(depth)))
        return found[0]

    monkeypatch.setattr(hwopt.explore, "trial", trial)
    table = searched(options, tmp_path / "out", 7)
    assert [one["value"] is None for one in table] == [False] * 6 + [True]
    assert depths <= {0, 1, 2, 3} and depths


def test_a_search_with_other_labels_or_other_samples_to_judge_by_is_another_search(
    options: dict[str, Any], tmp_path: Path
) -> None:
    searched({**options, "recover": None}, tmp_path / "out", 1)
    labels = options["evaluate"]["labels"]
    for other in ({**options["evaluate"], "labels": 3 - labels}, {**options["calibrate"], "labels": labels}):
        with pytest.raises(UsageError, match="another model, target, budget, data or version"):
            searched({**options, "recover": None, "evaluate": other}, tmp_path / "out", 1)
