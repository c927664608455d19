"""Planning: budgets, the solver against brute force, plans as JSON."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwopt.errors import UsageError
from hwopt.evaluate import compare
from hwopt.pipeline import Pass, Phase, Refusal
from hwopt.plan.budget import Budget, parse_budget
from hwopt.plan.explain import explain
from hwopt.plan.options import Base, Option
from hwopt.plan.plan import Decision, Plan, Round, plan_from_json
from hwopt.plan.search import _aim
from hwopt.plan.solve import Edge, Limits, solve


@dataclass(frozen=True)
class Step(Pass):
    name: ClassVar[str] = "step"
    phase: ClassVar[Phase] = Phase.QUANTIZE
    level: int = 0


def option(group: str, seconds: dict[str, float], error: float, size: int = 0, integer: bool = False) -> Option:
    return Option(group, (Step((group,), int(error * 1e6)),), seconds, size, 0, error, integer)


def test_budget_reads_units() -> None:
    budget = parse_budget("1%", ("latency=2ms,size=1.5MB", "memory=64KiB"))
    assert budget == Budget(0.01, 0.002, 1.5e6, 65536)


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


@pytest.mark.parametrize("text", ["", "{}", '{"format": 1}', '{"format": 99}', "[]"])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        plan_from_json(text, "plan.json")


def brute_force(base: Base, options: list[Option], edges: list[Edge], limit: float) -> float:
    """The least time over all choices, by the definitions of the terms."""
    groups = sorted({o.group for o in options})
    menus = [[None, *(o for o in options if o.group == group)] for group in groups]
    best = np.inf
    for choice in itertools.product(*menus):
        chosen = [o for o in choice if o is not None]
        if sum(o.error for o in chosen) > limit + 1e-12:
            continue
        total = sum(base.seconds.values()) - sum(base.gain(o) for o in chosen)
        for a, b in itertools.combinations(chosen, 2):
            both = sum(
                (t - a.seconds[k]) * (t - b.seconds[k]) / t for k, t in base.seconds.items() if k in a.seconds and k in b.seconds
            )
            total += max(both, 0.0)
        integer = {o.group for o in chosen if o.integer}
        total += sum(edge.seconds for edge in edges if (edge.source in integer) != (edge.target in integer))
        best = min(best, total)
    return float(best)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_solver_finds_what_brute_force_finds(seed: int) -> None:
    random = np.random.default_rng(seed)
    names = ["a", "b", "c", "d"]
    base = Base({name: float(random.uniform(1, 10)) for name in names}, 1000, 0)
    options = []
    for name in names:
        for _ in range(random.integers(1, 3)):
            time = base.seconds[name] * random.uniform(0.2, 1.0)
            options.append(option(name, {name: time}, random.uniform(0, 1), -10, bool(random.integers(2))))
    pruned = {name: base.seconds[name] * float(random.uniform(0.3, 0.9)) for name in ("a", "b")}
    options.append(option("channels of a", pruned, random.uniform(0, 1), -100))
    edges = [Edge("", "a", 0.3), Edge("a", "b", 0.2), Edge("b", "c", 0.4), Edge("c", "d", 0.1), Edge("d", "", 0.2)]
    limit = float(random.uniform(0, 2))
    found = solve(base, options, edges, Limits(limit))
    assert found is not None
    assert found.error <= limit + 1e-9
    assert found.seconds == pytest.approx(brute_force(base, options, edges, limit), rel=2e-3)


def test_the_search_aims_inside_of_the_budget_by_what_the_data_leave_open() -> None:
    budget = Budget(0.02)
    many, few = np.ones(4000), np.ones(8)
    assert _aim(budget, compare("accuracy", many, many.copy())) == pytest.approx(0.02, abs=0.001)
    assert _aim(budget, compare("accuracy", few, few.copy())) == 0.01


def test_size_limit_is_kept_or_refused() -> None:
    base = Base({"a": 1.0}, 100, 0)
    small = option("a", {"a": 2.0}, 0.5, -60)
    found = solve(base, [small], [], Limits(1.0, bytes=50))
    assert found is not None and found.options == (small,)
    assert solve(base, [small], [], Limits(1.0, bytes=30)) is None
    assert solve(base, [small], [], Limits(0.1, bytes=50)) is None


def test_latency_limit_minimises_the_error() -> None:
    base = Base({"a": 1.0, "b": 1.0}, 100, 0)
    gentle, harsh = option("a", {"a": 0.5}, 0.1), option("b", {"b": 0.1}, 0.9)
    found = solve(base, [gentle, harsh], [], Limits(10.0, seconds=1.6))
    assert found is not None and found.options == (gentle,)
