"""Planning: budgets, and plans as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from hwopt.errors import UsageError
from hwopt.evaluate import compare
from hwopt.pipeline import Pass, Phase, Refusal
from hwopt.plan.budget import Budget, parse_budget
from hwopt.plan.explain import explain
from hwopt.plan.plan import Decision, Plan, Round, plan_from_json
from hwopt.plan.search import aim


@dataclass(frozen=True)
class Step(Pass):
    name: ClassVar[str] = "step"
    phase: ClassVar[Phase] = Phase.QUANTIZE
    level: int = 0


def test_budget_reads_units() -> None:
    budget = parse_budget("1%", ("latency=2ms,size=1.5MB", "memory=64KiB", "energy=3mJ"))
    assert budget == Budget(0.01, 0.002, 1.5e6, 65536, 3e-3)


@pytest.mark.parametrize(
    ("drop", "limit", "message"),
    [
        ("1%", "latency=2", "write a number and one of s, ms, us, ns"),
        ("1%", "speed=2ms", "unknown budget 'speed'"),
        ("1%", "size=-1MB", "cannot read '-1MB'"),
        ("1%", "size=0MB", "must be above zero"),
        ("lots", "size=1MB", "cannot read 'lots'"),
        ("200%", "size=1MB", "not between 0 and 100 %"),
    ],
)
def test_budget_refuses_what_it_cannot_read(drop: str, limit: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_budget(drop, (limit,))


def test_plan_survives_json() -> None:
    decision = Decision(("low-rank{site=fc1,rank=16}",), 1e-3, 9e-4, 100, 50, 0.01, "1 kernel faster")
    plan = Plan("host", 2, "abc", Budget(), 0, (decision,), (Refusal("step", "fc2", "why"),), (Round(1, 2, 3, 4, 5, 6, True),))
    assert plan_from_json(plan.to_json()) == plan
    assert "low-rank{site=fc1,rank=16}: 1 kernel faster" in explain(plan, "fc1")
    assert "step at fc2: why" in explain(plan, "fc2")
    with pytest.raises(UsageError, match="did you mean fc2"):
        explain(plan, "fc3")


def test_many_refusals_are_counted_by_place_and_reason_and_shown_for_a_layer() -> None:
    reasons = [f"step{{site=fc{n // 4},level={n % 4}}}: not faster on this target ({n} us -> {n} us)" for n in range(80)]
    refused = tuple(Refusal("step", f"fc{n // 4}", reason) for n, reason in enumerate(reasons))
    plan = Plan("host", 1, "abc", Budget(), 0, (), refused)
    lines = explain(plan).splitlines()
    assert "  step at fc3: 4 x not faster on this target" in lines and len(lines) < 30
    assert explain(plan, "fc3").count("level=") == 4


@pytest.mark.parametrize("text", ["", "{}", '{"format": 1}', '{"format": 99}', "[]"])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        plan_from_json(text, "plan.json")


def test_the_search_aims_inside_of_the_budget_by_what_the_data_leave_open() -> None:
    budget = Budget(0.02)
    many, few = np.ones(4000), np.ones(8)
    assert aim(budget, compare("accuracy", many, many.copy())) == pytest.approx(0.02, abs=0.001)
    assert aim(budget, compare("accuracy", few, few.copy())) == 0.01
