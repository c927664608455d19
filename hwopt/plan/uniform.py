"""Plans that need no search: every layer that has the choice in one precision. Whatever is searched for has to beat them.

They were not picked by their score, so it is no luck: the drop that they show needs no margin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from hwopt.pipeline import Pass, Phase
from hwopt.plan.attempt import Priced
from hwopt.plan.options import Option
from hwopt.plan.solve import Solution, solution_of

UNIFORM = "uniform"  # the solver's name in such a solution


def uniform_solutions(priced: Priced) -> Iterator[Solution]:
    """One for each way to quantize, such as int8 or bfloat16; what cannot take it stays as it is."""
    ways: dict[Pass, dict[str, Option]] = {}
    for option in priced.options:
        one = option.passes[0]
        if option.form and len(option.passes) == 1 and one.phase == Phase.QUANTIZE:
            ways.setdefault(dataclasses.replace(one, site=()), {})[option.group] = option
    for menu in ways.values():
        yield solution_of(priced.base, tuple(menu.values()), priced.pairs, 0.0, UNIFORM)


def behind(priced: Priced, solution: Solution) -> Solution | None:
    """The same with every layer behind what prepares it best; None where nothing does."""
    better: dict[Pass, Option] = {}
    for option in sorted(priced.options, key=lambda one: -one.error):
        if len(option.passes) == 2 and option.passes[0].prepares is not None:
            better[option.passes[-1]] = option
    options = tuple(better.get(option.passes[-1], option) for option in solution.options)
    return None if options == solution.options else solution_of(priced.base, options, priced.pairs, 0.0, UNIFORM)
