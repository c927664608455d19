"""The solver: against brute force, with both methods, with ties, within every limit, and the same every time."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hwopt.plan.problem as problem_module
import hwopt.plan.solve as solver
from hwopt.errors import HwoptError
from hwopt.pipeline import Pass, Phase
from hwopt.plan.lagrange import solve_by_prices
from hwopt.plan.options import Base, Option, Pair
from hwopt.plan.problem import Problem, solve_exactly
from hwopt.plan.solve import Limits, predicted, solve, solve_problem

BASE = Base({}, 10.0, 1000, {"a": 100, "b": 98, "c": 60}, 5.0)
RESOURCES = ("seconds", "bytes", "peak_bytes", "joules")


@dataclass(frozen=True)
class Step(Pass):
    name: ClassVar[str] = "step"
    phase: ClassVar[Phase] = Phase.QUANTIZE
    level: int = 0


def option(group: str, gain: float, error: float, size: int = 0, level: int = 0, **more: float) -> Option:
    alive = {"a": int(more.get("peak", 0)), "b": int(more.get("other", 0))}
    return Option(group, (Step((group,), level),), gain, size, alive, error, more.get("joules", 0.0))


def instance(seed: int, groups: int = 5, chain: bool = False) -> tuple[list[Option], list[Pair]]:
    """Random options and pairs, cycles among them unless it is a chain."""
    random = np.random.default_rng(seed)
    options = [
        option(f"g{g}", random.uniform(-0.2, 1), random.uniform(0, 1), -int(random.integers(0, 100)), level,
               peak=-int(random.integers(0, 10)), other=int(random.integers(-12, 3)), joules=-random.uniform(0, 0.5))
        for g in range(groups) for level in range(random.integers(1, 4))
    ]  # fmt: skip
    pairs = []
    for a, b in itertools.combinations(range(groups), 2):
        if b - a == 1 or (not chain and random.random() < 0.3):
            for one, other in itertools.product(*([o for o in options if o.group == f"g{g}"] for g in (a, b))):
                pairs.append(Pair(one, other, random.uniform(-0.3, 0.3), random.uniform(-0.1, 0.1), random.uniform(-5, 5),
                                  alive={"a": float(random.integers(-3, 3)), "b": float(random.integers(-3, 3))}))  # fmt: skip
    return options, pairs


def brute_force(options: list[Option], pairs: list[Pair], limits: Limits, aim: str) -> float:
    """The least amount of the aim over all choices."""
    groups = list(dict.fromkeys(o.group for o in options))
    menus = [[None, *(o for o in options if o.group == group)] for group in groups]
    best = np.inf
    for choice in itertools.product(*menus):
        figures = predicted(BASE, [o for o in choice if o is not None], pairs)
        if all(figures[name] <= limit + 1e-9 for name, limit in limits.stated().items()):
            best = min(best, figures[aim])
    return float(best)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["", "seconds", "bytes", "peak_bytes", "joules"]))
def test_solver_finds_what_brute_force_finds_under_every_limit(seed: int, limited: str) -> None:
    options, pairs = instance(seed)
    random = np.random.default_rng(seed)
    limits = Limits(float(random.uniform(0.3, 3)))
    if limited:
        share = {limited: BASE.amount(limited) * float(random.uniform(0.75, 1))}
        limits = Limits(limits.error, **share)
    aim = "error" if limited == "seconds" else "seconds"
    expected = brute_force(options, pairs, limits, aim)
    found = solve(BASE, options, pairs, limits)
    if not np.isfinite(expected):
        assert found is None
        return
    assert found is not None
    assert found.amount(aim) == pytest.approx(expected, abs=2e-3)
    assert found.gap < 5e-3
    figures = predicted(BASE, found.options, pairs)
    assert all(figures[name] <= limit + 1e-6 for name, limit in limits.stated().items())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_bound_of_the_prices_is_below_and_their_choice_feasible(seed: int, chain: bool) -> None:
    options, pairs = instance(seed, chain=chain)
    problem = solver.make_problem(solver._menus(options), pairs)
    limits = {"error": 1.0, "bytes": -20.0}
    exact, _ = solve_exactly(problem, {"seconds": 1.0}, limits)
    choice, bound = solve_by_prices(problem, {"seconds": 1.0}, limits)
    if exact is None:
        assert choice is None
        return
    best = problem.amount("seconds", exact)
    assert bound <= best + 1e-6
    if choice is not None:
        assert problem.keeps(choice, limits)
        assert problem.amount("seconds", choice) >= best - 1e-3


def test_without_the_linear_program_the_solver_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem_module, "COLUMNS", 0)
    options, pairs = instance(3, groups=12, chain=True)
    found = solve(BASE, options, pairs, Limits(2.0))
    assert found is not None and found.by == "lagrangian"
    assert found.gap < 0.05
    assert found.error <= 2.0


def test_large_problem_is_proven_to_one_percent() -> None:
    problem = Problem((17,) * 60, *_staircases(60, 16))
    limits = {"error": 6.0}
    choice, bound = solve_exactly(problem, {"seconds": 1.0}, limits)
    assert choice is not None and problem.keeps(choice, limits)
    cost = problem.amount("seconds", choice)
    assert cost - bound <= 0.01 * abs(cost)


def _staircases(groups: int, candidates: int) -> tuple:
    random = np.random.default_rng(0)
    ratios = [np.concatenate([[1.0], np.sort(random.uniform(0.2, 1, candidates))[::-1]]) for _ in range(groups)]
    single = {"seconds": [r - 1 for r in ratios], "error": [(1 - r) * random.lognormal() for r in ratios]}
    pairs = {(g, g + 1): np.outer(1 - ratios[g], 1 - ratios[g + 1]) / 4 for g in range(groups - 1)}
    return single, {"seconds": pairs}


def test_size_limit_is_kept_or_refused() -> None:
    small = option("a", -1.0, 0.5, -600)
    found = solve(BASE, [small], [], Limits(1.0, bytes=500))
    assert found is not None and found.options == (small,)
    assert solve(BASE, [small], [], Limits(1.0, bytes=300)) is None
    assert solve(BASE, [small], [], Limits(0.1, bytes=500)) is None


def test_without_options_only_the_unchanged_model_remains() -> None:
    found = solve(BASE, [], [], Limits(1.0))
    assert found is not None and found.options == () and found.seconds == 10.0
    assert solve(BASE, [], [], Limits(1.0, seconds=9.0)) is None


def test_latency_limit_minimises_the_error() -> None:
    gentle, harsh = option("a", 0.5, 0.1), option("b", 0.9, 0.9)
    found = solve(BASE, [gentle, harsh], [], Limits(10.0, seconds=9.6))
    assert found is not None and found.options == (gentle,)


def test_neighbours_that_save_only_together_are_found() -> None:
    one, other = option("a", -0.1, 0.1), option("b", -0.1, 0.1)
    found = solve(BASE, [one, other], [Pair(one, other, seconds=-0.5)], Limits(1.0))
    assert found is not None and found.options == (one, other)
    assert found.seconds == pytest.approx(10 - 0.3)


def test_isomorphic_groups_are_decided_once_only_where_nothing_is_lost() -> None:
    alike = [option(f"g{g}", 0.5, 0.1) for g in range(6)]
    together = solve(BASE, alike, [], Limits(0.61))
    assert together is not None and together.by == "tied" and len(together.options) == 6
    apart = solve(BASE, alike, [], Limits(0.35))
    assert apart is not None and apart.by != "tied" and len(apart.options) == 3
    untied = solve(BASE, alike, [], Limits(0.61), tie=False)
    assert untied is not None and untied.by != "tied" and untied.seconds == pytest.approx(together.seconds)


def test_same_input_gives_the_same_plan() -> None:
    options, pairs = instance(11, groups=8)
    texts = {tuple(o.text for o in solve(BASE, options, pairs, Limits(1.5)).options) for _ in range(3)}  # type: ignore[union-attr]
    assert len(texts) == 1


def test_an_answer_that_breaks_a_limit_is_an_internal_error(monkeypatch: pytest.MonkeyPatch) -> None:
    harsh = option("a", 0.5, 5.0)
    monkeypatch.setattr(solver, "solve_problem", lambda *_: ((1,), (0.0, "milp")))
    with pytest.raises(HwoptError, match="the solver's choice has error 5 of 1"):
        solve(BASE, [harsh], [], Limits(1.0))


def test_what_the_solver_prints_by_itself_is_not_the_commands_output(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def talks(*_: object, **__: object) -> object:
        ctypes.CDLL(None).puts(b"HiGHS says")  # as C does, into a buffer
        raise ZeroDivisionError

    monkeypatch.setattr(problem_module, "milp", talks)
    problem = Problem((2,), {"seconds": [np.array([0.0, -1.0])]})
    print("before")
    with pytest.raises(ZeroDivisionError):
        solve_exactly(problem, {"seconds": 1.0}, {})
    print("behind", flush=True)
    assert capfd.readouterr().out == "before\nbehind\n"


def test_prices_that_prove_enough_are_not_branched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "solve_exactly", lambda *_: pytest.fail("branched"))
    problem = Problem((2, 2), {"seconds": [np.array([0.0, -1.0]), np.array([0.0, -2.0])]})
    assert solve_problem(problem, {"seconds": 1.0}, {})[0] == (1, 1)
