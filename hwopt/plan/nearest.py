"""A budget that cannot be met is answered with the nearest ones that can."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from hwopt.plan.attempt import Attempt, Priced, Search, measured, tightened
from hwopt.plan.budget import digits, unit_of
from hwopt.plan.solve import Limits, solve

TRIES = 4  # with limits tightened by what the real graph overshot
MARGIN = 1.02  # what a user may state and expect to be met


def nearest(task: Search, priced: Priced, attempts: Sequence[Attempt], unchanged: str) -> str:
    """One sentence: what is broken, and for each limit alone how far it would have to be relaxed."""
    limits = task.first_limits()
    allowed = max((a.round.allowed_error for a in attempts if a.comparison.drop <= task.budget.max_drop), default=0.0)
    relaxed = list(_relaxed_drop(task, priced, limits, attempts))
    found = [*_relaxed_limits(task, priced, limits, allowed), *(relaxed or _least(task, priced))]
    whole = f"no combination of changes meets the budget ({unchanged} unchanged)"
    return f"{whole}; nearest plans: {'; or '.join(found)}" if found else whole


def _relaxed_limits(task: Search, priced: Priced, limits: Limits, allowed: float) -> Iterator[str]:
    """Each limit in turn as low as it gets while the others and the drop are kept."""
    for name in limits.stated() if allowed else ():
        if name == "error":
            continue
        rest = dataclasses.replace(limits, error=allowed, **{name: None})
        solution = solve(priced.base, priced.options, priced.pairs, rest, aim=name, tie=task.tie)
        if solution is None:
            continue
        attempt = measured(task, priced, solution, allowed)
        if attempt.comparison.drop <= task.budget.max_drop:
            yield _reached(task, attempt, name)


def _reached(task: Search, attempt: Attempt, name: str) -> str:
    """What to state to get this plan, in the unit of the limit."""
    kind, one, unit = unit_of(name, task.budget.limits()[name])
    return f"{kind}={digits(getattr(attempt.amounts, name) / one * MARGIN)}{unit} at a drop of {attempt.comparison.drop:.2%}"


def _least(task: Search, priced: Priced) -> Iterator[str]:
    """Each limit as low as any plan gets, whatever it costs."""
    for name in task.budget.limits():
        solution = solve(priced.base, priced.options, priced.pairs, Limits(), aim=name, tie=task.tie)
        if solution is not None:
            yield _reached(task, measured(task, priced, solution, solution.error), name) + ", the least that there is"


def _relaxed_drop(task: Search, priced: Priced, limits: Limits, attempts: Sequence[Attempt]) -> Iterator[str]:
    """All limits kept, with as small a drop as that takes."""
    kept = [attempt for attempt in attempts if not task.exceeded(attempt.amounts)]
    for _ in range(0 if kept else TRIES):
        solution = solve(priced.base, priced.options, priced.pairs, limits, aim="error", tie=task.tie)
        if solution is None:
            return
        attempt = measured(task, priced, solution, solution.error)
        if not task.exceeded(attempt.amounts):
            kept = [attempt]
            break
        limits = tightened(task, limits, attempt)
    if kept:
        best = min(kept, key=lambda attempt: attempt.comparison.drop)
        yield f"--max-drop {max(best.comparison.drop, 0.0):.2%} with all limits kept"
