"""A budget that nothing has met yet is answered with the plan that does, or with the nearest ones that can be met."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from hwopt.plan.attempt import Attempt, Priced, Search, measured, tightened
from hwopt.plan.budget import digits, unit_of
from hwopt.plan.solve import Limits, Solution, solve

TRIES = 4  # with limits tightened by what the real graph overshot
MARGIN = 1.02  # what a user may state and expect to be met


def widened(task: Search, priced: Priced, attempts: Sequence[Attempt]) -> list[Attempt]:
    """The attempts, judged by this budget, with those that relax one limit after the other, and the unchanged model."""
    known = [measured(task, priced, one.solution, one.round.allowed_error) for one in attempts]
    allowed = max((one.round.allowed_error for one in known if one.comparison.drop <= task.budget.max_drop), default=0.0)
    unchanged = solve(priced.base, (), (), Limits())
    solutions = [*([unchanged] if unchanged else ()), *_relaxed(task, priced, allowed)]
    known += [measured(task, priced, solution, solution.error) for solution in solutions]
    return known if any(not task.exceeded(one.amounts) for one in known) else [*known, *_relaxed_drop(task, priced)]


def _relaxed(task: Search, priced: Priced, allowed: float) -> Iterator[Solution]:
    """Each limit in turn as low as it gets: while the others and the drop are kept, and whatever that costs."""
    for name in task.budget.limits():
        rest = dataclasses.replace(task.first_limits(), error=allowed, **{name: None})
        for bounds in ([rest] if allowed else []) + [Limits()]:
            if solution := solve(priced.base, priced.options, priced.pairs, bounds, aim=name, tie=task.tie):
                yield solution


def _relaxed_drop(task: Search, priced: Priced) -> Iterator[Attempt]:
    """All limits kept, with as small an error as that takes."""
    limits = task.first_limits()
    for _ in range(TRIES):
        solution = solve(priced.base, priced.options, priced.pairs, limits, aim="error", tie=task.tie)
        if solution is None:
            return
        attempt = measured(task, priced, solution, solution.error)
        yield attempt
        if not task.exceeded(attempt.amounts):
            return
        limits = tightened(task, limits, attempt)


def nearest(task: Search, attempts: Sequence[Attempt], unchanged: str) -> str:
    """One sentence: what is broken, and for each limit alone how far it would have to be relaxed."""
    limits = task.budget.limits()
    found = [text for name in limits if (text := _alone(task, attempts, name))]
    kept = [attempt.comparison.drop for attempt in attempts if not task.exceeded(attempt.amounts)]
    if kept:
        found.append(f"--max-drop {math.ceil(1e4 * max(min(kept), 0.0) - 1e-6) / 1e4:.2%} with all limits kept")
    else:
        least = (_least(task, attempts, name) for name in limits)
        found += [f"{text}, the least that was found" for text in least if text not in found]
    whole = f"no combination of changes meets the budget ({unchanged} unchanged)"
    return f"{whole}; nearest plans: {'; or '.join(found)}"


def _alone(task: Search, attempts: Sequence[Attempt], name: str) -> str:
    """How low a limit gets while the others and the drop are kept; "" if these cannot be kept."""
    others = {other: limit for other, limit in task.budget.limits().items() if other != name}
    kept = [
        attempt for attempt in attempts
        if attempt.comparison.drop <= task.budget.max_drop
        and all(getattr(attempt.amounts, other) <= limit for other, limit in others.items())
    ]  # fmt: skip
    return _least(task, kept, name) if kept else ""


def _least(task: Search, attempts: Sequence[Attempt], name: str) -> str:
    """What to state to get the plan that has least of it, in the unit of the limit."""
    best = min(attempts, key=lambda attempt: getattr(attempt.amounts, name))
    kind, one, unit = unit_of(name, task.budget.limits()[name])
    found, start = (getattr(amounts, name) / one for amounts in (best.amounts, task.amounts(task.graph)))
    stated = min(found * MARGIN, start) if found <= start else found * MARGIN
    return f"{kind}={digits(_rounded_up(stated))}{unit} at a drop of {best.comparison.drop:.2%}"


def _rounded_up(value: float) -> float:
    """To four digits, as it is shown: what is stated must be no less than what was found."""
    step = 10.0 ** (math.floor(math.log10(value)) - 3) if 0 < value < 1e4 else 1.0
    return math.ceil(value / step - 1e-6) * step
