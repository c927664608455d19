"""A budget that cannot be met is answered with the nearest ones that can."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from hwopt.plan.attempt import Attempt, Priced, Search, measured, tightened
from hwopt.plan.solve import Limits, solve

UNITS = {
    "seconds": ("latency", 1e3, "ms"), "bytes": ("size", 1e-6, "MB"), "peak_bytes": ("memory", 1e-6, "MB"),
    "joules": ("energy", 1e3, "mJ"),
}  # fmt: skip
TRIES = 4  # with limits tightened by what the real graph overshot
MARGIN = 1.02  # what a user may state and expect to be met


def nearest(task: Search, priced: Priced, attempts: Sequence[Attempt], unchanged: str) -> str:
    """One sentence: what is broken, and for each limit alone how far it would have to be relaxed."""
    limits = task.first_limits()
    allowed = max((a.round.allowed_error for a in attempts if a.comparison.drop <= task.budget.max_drop), default=0.0)
    found = [*_relaxed_limits(task, priced, limits, allowed), *_relaxed_drop(task, priced, limits, attempts)]
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
        kind, factor, unit = UNITS[name]
        if attempt.comparison.drop <= task.budget.max_drop:
            reached = getattr(attempt.amounts, name) * factor * MARGIN
            yield f"{kind}={reached:.4g}{unit} at a drop of {attempt.comparison.drop:.2%}"


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
