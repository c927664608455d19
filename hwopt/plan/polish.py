"""The last percent: exchanges of a solution, each priced on the graph that it makes, not by sums and pairs.

Sums are wrong by about a percent where dtypes mix: who pays for a conversion that three layers share is no matter of pairs. So
the solver's choice competes with its choices in one dtype, and the best of them is exchanged step by step: single groups, and
neighbours that change their dtype together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from hwopt.ir import Graph
from hwopt.pipeline import Context, merged
from hwopt.plan.attempt import Priced
from hwopt.plan.options import Option, Pricer
from hwopt.plan.solve import Limits, Solution, predicted, solution_of, solve

TRIES = 64  # graphs that are made and priced
DOUBT = 0.02  # exchanges are worth a look if the sums say that they cost less than this share of the whole
Chosen = Mapping[str, Option]  # by group
Move = Mapping[str, Option | None]  # what becomes of some groups; None keeps one as it was in the model


def polished(
    graph: Graph, ctx: Context, priced: Priced, solution: Solution, allowed: float, pricer: Pricer, tries: int = TRIES
) -> Solution:
    """The solution, or a faster one whose summed error is within `allowed`.

    It ends where no exchange helps any more, or after `tries` of them, the likeliest first.
    """
    prices = _Prices(graph, ctx, pricer)
    starts = [solution, *one_dtype(priced, allowed)]
    start = min(starts, key=lambda one: prices.seconds(one.options))  # the first of equal ones
    chosen, best = _by_group(start.options), prices.seconds(start.options)
    moved = True
    while moved and prices.asked < tries:
        moved = False
        for move in _moves(priced, chosen, allowed):
            other = _after(chosen, move)
            if prices.asked >= tries or sum(one.error for one in other.values()) > allowed:
                continue
            seconds = prices.seconds(tuple(other.values()))
            if seconds < best * (1 - 1e-6):
                chosen, best, moved = other, seconds, True
    options = tuple(option for option in priced.options if chosen.get(option.group) is option)
    if {id(one) for one in options} == {id(one) for one in solution.options}:
        return solution
    return solution_of(priced.base, options, priced.pairs, solution.gap, "polished")


class _Prices:
    """Seconds of graphs by the options that make them, each made once; data play no part in it, so one batch calibrates."""

    def __init__(self, graph: Graph, ctx: Context, pricer: Pricer) -> None:
        self.graph, self.ctx, self.pricer = graph, ctx.roughly(graph), pricer
        self._known: dict[frozenset[int], float] = {}

    @property
    def asked(self) -> int:
        return len(self._known)

    def seconds(self, options: Sequence[Option]) -> float:
        key = frozenset(map(id, options))
        if key not in self._known:
            passes = merged(one for option in options for one in option.passes)
            self._known[key] = self.pricer.changed(self.graph, passes, self.ctx).seconds
        return self._known[key]


def one_dtype(priced: Priced, allowed: float) -> Iterator[Solution]:
    """The solver's choice for each dtype, if all layers that change theirs take that one."""
    for form in priced.forms if len(priced.forms) > 1 else ():
        if found := solve(priced.base, priced.in_form(form).options, priced.pairs, Limits(allowed)):
            yield found


def _moves(priced: Priced, chosen: Chosen, allowed: float) -> Iterator[Move]:
    """Exchanges within `allowed`, by what the sums say of them, least cost first."""
    now = predicted(priced.base, tuple(chosen.values()), priced.pairs)["seconds"]
    found: list[tuple[float, int, Move]] = []
    for place, move in enumerate((*_singles(priced, chosen), *_doubles(priced, chosen))):
        figures = predicted(priced.base, tuple(_after(chosen, move).values()), priced.pairs)
        if figures["error"] <= allowed and figures["seconds"] <= now * (1 + DOUBT):
            found.append((figures["seconds"], place, move))
    return (move for _, _, move in sorted(found, key=lambda one: one[:2]))


def _singles(priced: Priced, chosen: Chosen) -> Iterator[Move]:
    for option in priced.options:
        if chosen.get(option.group) is not option:
            yield {option.group: option}
    for group in chosen:
        yield {group: None}


def _doubles(priced: Priced, chosen: Chosen) -> Iterator[Move]:
    """Neighbours that take the same dtype where one of them had another: the conversion between them costs until both have."""
    for pair in priced.pairs:
        both = (pair.one, pair.other)
        if pair.one.form and pair.one.form == pair.other.form and all(_changes_dtype(chosen.get(o.group), o) for o in both):
            yield {pair.one.group: pair.one, pair.other.group: pair.other}


def _changes_dtype(before: Option | None, after: Option) -> bool:
    """True if only the dtype changes: whatever else the group does stays."""
    if before is None:
        return len(after.passes) == 1
    rest, now = (tuple(one for one in option.passes if one.phase != after.passes[-1].phase) for option in (before, after))
    return before.form != after.form and rest == now


def _after(chosen: Chosen, move: Move) -> dict[str, Option]:
    return {group: option for group, option in {**chosen, **move}.items() if option is not None}


def _by_group(options: Sequence[Option]) -> dict[str, Option]:
    return {option.group: option for option in options}
