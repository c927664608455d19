"""The solver: one option for each group, the best within the limits; prices on the limits prove it, or HiGHS where they do not.

Two options that change the same kernel, or conversions between the same two layers, have a price together: a `Pair`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hwopt.errors import HwoptError
from hwopt.plan.lagrange import solve_by_prices
from hwopt.plan.options import ALIVE, Base, Option, Pair
from hwopt.plan.problem import RESOURCES, Choice, Problem, solve_exactly

GAP = 1e-3  # of the whole model: what deciding groups that look alike together may lose
CLOSE = 1e-4  # what HiGHS, too, is asked for
MANY = 8  # limits, above which prices for all of them take longer than HiGHS
HALVINGS, EVEN = 16, 0.01  # steps towards the least peak, and how near is enough
ROUNDING = 1e-6  # relative, of recomputed sums
NEEDLESS = 0.01  # of the allowed error: what changes are prepared for must be more


@dataclass(frozen=True)
class Limits:
    """Constraints of one solve, of the whole model; None means free."""

    error: float | None = None
    seconds: float | None = None
    bytes: float | None = None
    peak_bytes: float | None = None
    joules: float | None = None

    def stated(self) -> dict[str, float]:
        return {name: limit for name, limit in dataclasses.asdict(self).items() if limit is not None}


@dataclass(frozen=True)
class Solution:
    """The chosen options (groups that stay as they are do not appear) and the model's prediction for them.

    `gap` is (cost - proven bound) / cost of the objective, `by` the solver that found it.
    """

    options: tuple[Option, ...]
    seconds: float
    bytes: int
    peak_bytes: int
    joules: float
    error: float
    gap: float
    by: str = "milp"

    def amount(self, resource: str) -> float:
        return float(getattr(self, resource))


def solve(
    base: Base, options: Sequence[Option], pairs: Sequence[Pair], limits: Limits, aim: str = "", tie: bool = True
) -> Solution | None:
    """The best choice within the limits, or None if there is none.

    Minimises `aim` (an amount): seconds if not stated, or the error where the seconds are limited. A peak is the largest of
    many sums, one for each kernel, and a limit on it one limit on each of them. With `tie`,
    groups that look alike are decided once, if the proven gap says that this loses nothing. Raises HwoptError if a solver's
    answer does not keep the limits when it is computed again.
    """
    aim = aim or ("seconds" if limits.seconds is None else "error")
    found = _solved(base, options, pairs, limits, aim, tie)
    return found if found is None or aim == "error" else _plainer(base, options, pairs, limits, found)


def _plainer(base: Base, options: Sequence[Option], pairs: Sequence[Pair], limits: Limits, found: Solution) -> Solution:
    """The same without preparations that the limits do not need: the plan is to be decided by what matters."""
    plain = {(option.group, option.passes): option for option in options}
    chosen, spare = list(found.options), np.inf if limits.error is None else NEEDLESS * limits.error
    for place in sorted(range(len(chosen)), key=lambda one: -chosen[one].error):
        option = chosen[place]
        other = plain.get((option.group, option.passes[1:])) if option.passes[0].prepares is not None else None
        if other is not None and other.error - option.error <= spare and other.gain >= option.gain:
            chosen[place], spare = other, spare - (other.error - option.error)
    if all(one is other for one, other in zip(chosen, found.options, strict=True)):
        return found
    better = solution_of(base, chosen, pairs, found.gap, found.by)
    kept = all(better.amount(name) <= limit for name, limit in limits.stated().items() if name != "error")
    return better if kept else found


def _solved(base: Base, options: Sequence[Option], pairs: Sequence[Pair], limits: Limits, aim: str, tie: bool) -> Solution | None:
    if not options:
        kept = all(base.amount(name) <= limit for name, limit in limits.stated().items())
        return _checked(base, (), (), (), limits, 0.0, "milp") if kept else None
    if aim == "peak_bytes":
        return _least_peak(base, options, pairs, limits, tie)
    menus, room = _menus(options), _room(base, options, pairs, limits)
    bundles = _tied(menus, pairs) if tie and len(room) <= MANY else []
    names = tuple(dict.fromkeys((*RESOURCES, *room)))
    problem = make_problem(menus, pairs, names)
    weights = _weights(base, problem, aim)
    if bundles:
        few = make_problem(bundles, pairs, names)
        choice, _ = solve_problem(few, weights, room)
        spread = None if choice is None else _untied(menus, bundles, choice)
        bound = solve_by_prices(problem, weights, room)[1] if spread is not None else -np.inf
        if spread is not None and _gap(base, problem, weights, aim, spread, bound) <= GAP:
            return _checked(base, menus, pairs, spread, limits, _gap(base, problem, weights, aim, spread, bound), "tied")
    choice, (bound, by) = solve_problem(problem, weights, room)
    if choice is None:
        return None
    return _checked(base, menus, pairs, choice, limits, _gap(base, problem, weights, aim, choice, bound), by)


def _least_peak(base: Base, options: Sequence[Option], pairs: Sequence[Pair], limits: Limits, tie: bool) -> Solution | None:
    """The choice with the least peak within the other limits, to EVEN of it: halving what is allowed."""
    best = solve(base, options, pairs, dataclasses.replace(limits, peak_bytes=None), "error", tie)
    low = 0.0
    for _ in range(HALVINGS):
        if best is None or best.peak_bytes - low <= EVEN * best.peak_bytes:
            break
        allowed = (low + best.peak_bytes) / 2
        found = solve(base, options, pairs, dataclasses.replace(limits, peak_bytes=allowed), "error", tie)
        best, low = (best, allowed) if found is None else (found, low)
    kept = best is None or limits.peak_bytes is None or best.peak_bytes <= limits.peak_bytes
    return best if kept else None


Menu = list[tuple[Option, ...]]  # each choice of a group: the options it stands for; the first is ()


def _menus(options: Sequence[Option]) -> list[Menu]:
    groups: dict[str, Menu] = {}
    for option in options:
        groups.setdefault(option.group, [()]).append((option,))
    return list(groups.values())


def make_problem(menus: Sequence[Menu], pairs: Sequence[Pair], names: Sequence[str] = RESOURCES) -> Problem:
    """Menus and pair prices as arrays; a pair inside of one (tied) choice counts to that choice."""
    places: dict[int, list[tuple[int, int]]] = {}
    for g, menu in enumerate(menus):
        for c, chosen in enumerate(menu):
            for option in chosen:
                places.setdefault(id(option), []).append((g, c))
    single = {
        name: [np.array([float(sum(option.amount(name) for option in chosen)) for chosen in menu]) for menu in menus]
        for name in names
    }
    tables: dict[str, dict[tuple[int, int], np.ndarray]] = {name: {} for name in names}
    for pair in pairs:
        for g, c in places.get(id(pair.one), ()):
            for h, d in places.get(id(pair.other), ()):
                if g == h and c != d:
                    continue  # two choices of one group are never made together
                for name, extra in pair.amounts():
                    if name not in tables:
                        continue
                    if g == h:
                        single[name][g][c] += extra
                        continue
                    key = (g, h) if g < h else (h, g)
                    table = tables[name].setdefault(key, np.zeros((len(menus[key[0]]), len(menus[key[1]]))))
                    table[(c, d) if g < h else (d, c)] += extra
    return Problem(tuple(map(len, menus)), single, {name: found for name, found in tables.items() if found})


def _weights(base: Base, problem: Problem, aim: str) -> dict[str, float]:
    """The aim, with the other side of the bargain and the bytes as tie breakers; scaled to be near one."""
    sizes = {
        "seconds": base.total_seconds, "error": problem.scale("error"), "bytes": float(base.bytes),
        "joules": base.joules,
    }  # fmt: skip
    breakers = {"error": 1e-5} if aim != "error" else {"seconds": 1e-3}
    parts = {"bytes": 1e-7, **breakers, aim: 1.0}
    return {name: weight / (sizes[name] or 1.0) for name, weight in parts.items()}


def _room(base: Base, options: Sequence[Option], pairs: Sequence[Pair], limits: Limits) -> dict[str, float]:
    """Limits on the differences to the unchanged model; that on the peak for every kernel that may break it."""
    stated = limits.stated()
    peak = stated.pop("peak_bytes", None)
    room = {name: limit - base.amount(name) for name, limit in stated.items()}
    return room if peak is None else room | _room_alive(base, options, pairs, peak)


def _room_alive(base: Base, options: Sequence[Option], pairs: Sequence[Pair], peak: float) -> dict[str, float]:
    """Of kernels that every option and pair changes alike, only the one where most is alive."""
    changes: dict[str, list[tuple[int, float]]] = {place: [] for place in base.alive}
    every: list[Mapping[str, float]] = [*(option.alive for option in options), *(pair.alive for pair in pairs)]
    for number, alive in enumerate(every):
        for place, change in alive.items():
            changes[place].append((number, float(change)))
    fullest: dict[tuple, str] = {}
    for place, found in changes.items():
        if base.alive[place] + sum(max(0.0, change) for _, change in found) > peak:
            key = tuple(found)
            fullest[key] = max(place, fullest.get(key, place), key=lambda one: base.alive[one])
    return {ALIVE + place: peak - base.alive[place] for place in fullest.values()}


def solve_problem(
    problem: Problem, weights: Mapping[str, float], room: Mapping[str, float]
) -> tuple[Choice | None, tuple[float, str]]:
    """(the cheapest choice, (a proven bound, by which solver)). Where prices prove enough nothing is branched on."""
    cost = problem.weighted(weights)
    if len(room) > MANY:
        choice, bound = solve_exactly(problem, weights, room)
        if bound == np.inf or (choice is not None and problem.keeps(choice, room)):
            return choice, (bound, "milp")
    other, second = solve_by_prices(problem, weights, room)
    if other is not None:
        found = cost.amount("cost", other)
        if found - second <= CLOSE * abs(found):
            return other, (second, "lagrangian")
    choice, bound = solve_exactly(problem, weights, room)
    if bound == np.inf:  # proven: nothing keeps the limits
        return None, (bound, "milp")
    kept = [(c, by) for c, by in ((choice, "milp"), (other, "lagrangian")) if c is not None and problem.keeps(c, room)]
    if not kept:
        return None, (max(bound, second), "lagrangian")
    best, by = min(kept, key=lambda one: cost.amount("cost", one[0]))
    return best, (max(bound, second), by)


def _gap(base: Base, problem: Problem, weights: Mapping[str, float], aim: str, choice: Choice, bound: float) -> float:
    """Relative to the cost of the whole model, whose unchanged part is no decision."""
    offset = weights[aim] * base.amount(aim)
    cost = problem.weighted(weights).amount("cost", choice)
    return max(0.0, cost - bound) / max(abs(cost + offset), 1e-12)


def _tied(menus: Sequence[Menu], pairs: Sequence[Pair]) -> list[Menu]:
    """Menus in which groups that look alike choose together; empty if no two do."""
    partners: dict[int, list[float]] = {}
    for pair in pairs:
        for option in (pair.one, pair.other):
            partners.setdefault(id(option), []).append(round(pair.seconds * 1e9, 1))
    alike: dict[tuple, list[Menu]] = {}
    for menu in menus:
        key = tuple((choice[0].likeness, tuple(sorted(partners.get(id(choice[0]), ())))) for choice in menu[1:])
        alike.setdefault(key, []).append(menu)
    if all(len(members) == 1 for members in alike.values()):
        return []
    return [[tuple(option for one in row for option in one) for row in zip(*members, strict=True)] for members in alike.values()]


def _untied(menus: Sequence[Menu], bundles: Sequence[Menu], choice: Choice) -> Choice:
    """The same options as choices of the single groups."""
    chosen = {id(option) for bundle, c in zip(bundles, choice, strict=True) for option in bundle[c]}
    return tuple(next((c for c, one in enumerate(menu) if one and id(one[0]) in chosen), 0) for menu in menus)


def _checked(
    base: Base, menus: Sequence[Menu], pairs: Sequence[Pair], choice: Choice, limits: Limits, gap: float, by: str
) -> Solution:
    """The solution with every figure computed again from the chosen options themselves."""
    chosen = tuple(option for menu, c in zip(menus, choice, strict=True) for option in menu[c])
    figures = predicted(base, chosen, pairs)
    if len({option.group for option in chosen}) < len(chosen):
        raise HwoptError("the solver chose two options of one group", place="plan", hint="this is an error in hwopt")
    for name, limit in limits.stated().items():
        if figures[name] > limit + ROUNDING * (abs(limit) + abs(base.amount(name))):
            hint = "this is an error in hwopt"
            raise HwoptError(f"the solver's choice has {name} {figures[name]:.6g} of {limit:.6g}", place="plan", hint=hint)
    return solution_of(base, chosen, pairs, gap, by)


def solution_of(base: Base, chosen: Sequence[Option], pairs: Sequence[Pair], gap: float, by: str) -> Solution:
    """These options with what the model predicts of them."""
    figures = predicted(base, chosen, pairs)
    return Solution(
        tuple(chosen), figures["seconds"], round(figures["bytes"]), round(figures["peak_bytes"]), figures["joules"],
        figures["error"], gap, by,
    )  # fmt: skip


def predicted(base: Base, chosen: Sequence[Option], pairs: Sequence[Pair]) -> dict[str, float]:
    """Every resource of the whole model with these options, by the definitions of the terms."""
    inside = {id(option) for option in chosen}
    totals = {name: base.amount(name) + sum(option.amount(name) for option in chosen) for name in RESOURCES}
    totals |= {ALIVE + place: float(size) for place, size in base.alive.items()}
    for option in chosen:
        for place, change in option.alive.items():
            totals[ALIVE + place] += change
    for pair in pairs:
        if id(pair.one) in inside and id(pair.other) in inside:
            for name, extra in pair.amounts():
                totals[name] += extra
    return totals | {"peak_bytes": max((totals[ALIVE + place] for place in base.alive), default=0.0)}
