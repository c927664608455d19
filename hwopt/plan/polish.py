"""The last percent: single exchanges of a solution, each priced on the graph that it makes, not by sums and pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from hwopt.ir import Graph
from hwopt.pipeline import Context, PassManager, merged
from hwopt.plan.attempt import Priced
from hwopt.plan.options import Option, Pricer
from hwopt.plan.solve import Solution, predicted

TRIES = 48  # graphs that are made and priced
DOUBT = 0.05  # exchanges are worth a look if the sums say that they cost less than this share of the whole


def polished(graph: Graph, ctx: Context, priced: Priced, solution: Solution, allowed: float, pricer: Pricer) -> Solution:
    """The solution, or a faster one whose summed error is within `allowed`: at most TRIES exchanges, the likeliest first.

    Exact where sums and pairs are not: three changes that meet in one kernel, conversions of values with several readers.
    """
    quiet = dataclasses.replace(ctx, refused=[])
    chosen = {option.group: option for option in solution.options}
    best = _seconds(graph, quiet, list(chosen.values()), pricer)
    tries = list(_exchanges(priced, solution, allowed))[:TRIES]
    for group, option in tries:
        other = {key: value for key, value in chosen.items() if key != group}
        if option is not None:
            other[group] = option
        if sum(one.error for one in other.values()) > allowed:
            continue
        seconds = _seconds(graph, quiet, list(other.values()), pricer)
        if seconds < best * (1 - 1e-6):
            chosen, best = other, seconds
    options = tuple(option for option in priced.options if chosen.get(option.group) is option)
    if {id(one) for one in options} == {id(one) for one in solution.options}:
        return solution
    figures = predicted(priced.base, options, priced.pairs)
    return Solution(
        options, figures["seconds"], round(figures["bytes"]), round(figures["peak_bytes"]), figures["joules"], figures["error"],
        solution.gap, "polished",
    )  # fmt: skip


def _exchanges(priced: Priced, solution: Solution, allowed: float) -> Iterator[tuple[str, Option | None]]:
    """(group, another option or None to keep it), by what the sums say of it, least cost first."""
    now = {option.group: option for option in solution.options}
    found: list[tuple[float, int, str, Option | None]] = []
    alternatives: Sequence[Option | None] = (*priced.options, *[None] * len(now))
    groups = [*(option.group for option in priced.options), *now]
    for place, (group, option) in enumerate(zip(groups, alternatives, strict=True)):
        if option is now.get(group):
            continue
        other = [one for key, one in now.items() if key != group] + ([option] if option is not None else [])
        figures = predicted(priced.base, other, priced.pairs)
        if figures["error"] <= allowed and figures["seconds"] <= solution.seconds + DOUBT * abs(solution.seconds):
            found.append((figures["seconds"], place, group, option))
    for _, _, group, option in sorted(found, key=lambda one: one[:2]):
        yield group, option


def _seconds(graph: Graph, ctx: Context, options: Sequence[Option], pricer: Pricer) -> float:
    passes = merged(one for option in options for one in option.passes)
    return pricer.graph(PassManager(passes).run(graph, ctx).graph).seconds
