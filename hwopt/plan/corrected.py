"""Solve -> apply -> time -> correct: kernels of the plan that was found are timed, and the search is made again at those prices.

Learned prices are off by some percent to either side, and a search takes what seems cheapest: kernels whose price is too low. So
those that it takes are timed, until it takes none that is not.
"""

from __future__ import annotations

import contextlib
import dataclasses

from hwopt.errors import BudgetError
from hwopt.ir import Graph
from hwopt.plan.attempt import Found, Priced, Search
from hwopt.plan.doubts import SECONDS
from hwopt.plan.options import base_of, repriced, useful
from hwopt.plan.pairs import pairs_of
from hwopt.plan.search import search

TURNS = 3  # plans whose kernels are timed


def search_timed(task: Search, priced: Priced) -> tuple[Found, Priced]:
    """The best plan, and the prices it was chosen by; the others that were found on the way are among its `others`.

    Who interrupts it gets the best plan so far, with a note. Raises BudgetError as `search` does.
    """
    coarse = dataclasses.replace(task, refine=False)
    found, note = [search(coarse, priced)], ""
    try:
        for _ in range(TURNS):
            better = None if found[-1].plan.note else corrected(task, priced, found[-1].graph)
            if better is None:
                break
            priced = better
            try:
                found.append(search(coarse, priced))
            except BudgetError:  # a measurement of the library decides
                break
        if task.refine and not found[-1].plan.note:  # once, as it takes long: finding the plans again costs little
            with contextlib.suppress(BudgetError):
                found.append(search(task, priced))
    except KeyboardInterrupt:  # between two searches, or before one of them had tried anything
        note = "interrupted: the best plan so far"
    current = [_repriced(task, one) for one in {one.graph.digest: one for one in found}.values()]
    best = min(current, key=lambda one: _order(task, one))
    noted = dataclasses.replace(best.plan, note=best.plan.note or found[-1].plan.note or note)
    return dataclasses.replace(best, plan=noted, others=(*(one for one in current if one is not best), *best.others)), priced


def corrected(task: Search, priced: Priced, graph: Graph) -> Priced | None:
    """The same options at prices that the kernels of one graph correct; None if nothing new could be timed."""
    measuring = task.measuring
    if measuring is None:
        return None
    timed, measuring.left = measuring.graphs, max(measuring.left, SECONDS)
    if not measuring.learn(graph) or measuring.graphs == timed:
        return None
    task.pricer.forget()
    base, refused = base_of(task.graph, task.pricer), list(priced.refused)
    now = {id(option): repriced(option, base, task.pricer) for option in priced.options}
    options = tuple(useful(now.values(), base, task.pricer, task.budget, refused))
    kept = set(map(id, options))
    pairs = [*pairs_of(task.graph, task.ctx, base, options, task.pricer)]
    for pair in priced.pairs:  # errors together are no prices
        one, other = now[id(pair.one)], now[id(pair.other)]
        if pair.error and id(one) in kept and id(other) in kept:
            pairs.append(dataclasses.replace(pair, one=one, other=other, seconds=0.0, joules=0.0, bytes=0.0))
    return dataclasses.replace(priced, base=base, options=options, pairs=tuple(pairs), refused=tuple(dict.fromkeys(refused)))


def _repriced(task: Search, found: Found) -> Found:
    """With the seconds of now."""
    seconds = task.amounts(found.graph).seconds
    return dataclasses.replace(found, plan=dataclasses.replace(found.plan, seconds_after=seconds))


def _order(task: Search, found: Found) -> tuple[bool, float, float]:
    """What keeps the limits first; then the fastest, or the best score where time is limited."""
    drop, seconds = found.comparison.drop if found.comparison else 0.0, found.plan.seconds_after
    broken = bool(task.exceeded(task.amounts(found.graph)))
    return (broken, drop, seconds) if task.budget.latency_seconds is not None else (broken, seconds, drop)
