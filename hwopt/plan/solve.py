"""The solver: one option for each group, fastest within an error allowance, as a mixed-integer linear program (HiGHS).

Multiple-choice knapsack with pairwise terms: two options that speed up the same kernel save less together than apart, and a
value between an integer and a float layer pays for its conversion.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from hwopt.plan.options import Base, Option

SECONDS_LIMIT = 10.0
GAP = 1e-3


@dataclass(frozen=True)
class Edge:
    """A value from one layer to another; `seconds` for quantizing or dequantizing it. "" is the outside world, in float."""

    source: str
    target: str
    seconds: float


@dataclass(frozen=True)
class Limits:
    """Constraints of one solve; None means free."""

    error: float
    seconds: float | None = None
    bytes: float | None = None
    peak_bytes: float | None = None


@dataclass(frozen=True)
class Solution:
    """The chosen options (groups that stay as they are do not appear) and the model's prediction for them."""

    options: tuple[Option, ...]
    seconds: float
    bytes: int
    error: float
    gap: float


class _Program:
    """Columns and rows of the linear program as they are collected."""

    def __init__(self) -> None:
        self.objective: list[float] = []
        self.integral: list[int] = []
        self.rows: list[tuple[dict[int, float], float, float]] = []

    def column(self, *, integral: bool) -> int:
        self.objective.append(0.0)
        self.integral.append(int(integral))
        return len(self.objective) - 1

    def row(self, terms: Mapping[int, float], low: float, high: float) -> None:
        self.rows.append((dict(terms), low, high))

    def solve(self) -> tuple[np.ndarray, float] | None:
        entries = [(r, c, value) for r, (terms, _, _) in enumerate(self.rows) for c, value in terms.items()]
        rows, columns, values = zip(*entries, strict=True) if entries else ((), (), ())
        matrix = coo_array((values, (rows, columns)), shape=(len(self.rows), len(self.objective))).tocsr()
        constraint = LinearConstraint(matrix, [low for _, low, _ in self.rows], [high for _, _, high in self.rows])
        limits = {"time_limit": SECONDS_LIMIT, "mip_rel_gap": GAP}
        found = milp(self.objective, integrality=self.integral, bounds=Bounds(0, 1), constraints=constraint, options=limits)
        return None if found.x is None else (found.x, float(found.mip_gap or 0.0))


def solve(base: Base, options: Sequence[Option], edges: Sequence[Edge], limits: Limits) -> Solution | None:
    """The best choice within the limits, or None if there is none.

    Minimises seconds; if seconds are limited, minimises error instead. Constraints are checked again on the choice.
    """
    if not options:
        empty = Solution((), float(sum(base.seconds.values())), base.bytes, 0.0, 0.0)
        return empty if not _broken(empty, base, limits) else None
    program = _Program()
    column = [program.column(integral=True) for _ in options]
    groups: dict[str, list[int]] = {}
    for index, option in enumerate(options):
        groups.setdefault(option.group, []).append(index)
    for members in groups.values():
        program.row({column[i]: 1.0 for i in members}, 0, 1)
    seconds: dict[int, float] = {column[i]: -base.gain(option) for i, option in enumerate(options)}
    _overlaps(program, base, options, column, seconds)
    _conversions(program, options, edges, column, seconds)
    _objective(program, base, options, column, seconds, limits)
    start = sum(base.seconds.values())
    program.row({column[i]: option.error for i, option in enumerate(options)}, -np.inf, limits.error)
    if limits.seconds is not None:
        program.row(seconds, -np.inf, limits.seconds - start)
    if limits.bytes is not None:
        program.row({column[i]: float(option.bytes) for i, option in enumerate(options)}, -np.inf, limits.bytes - base.bytes)
    if limits.peak_bytes is not None:
        peaks = {column[i]: float(option.peak_bytes) for i, option in enumerate(options)}
        program.row(peaks, -np.inf, limits.peak_bytes - base.peak_bytes)
    found = program.solve()
    return None if found is None else _checked(found, base, options, edges, column, limits)


def _overlaps(program: _Program, base: Base, options: Sequence[Option], column: list[int], seconds: dict[int, float]) -> None:
    """Times on one kernel multiply: t(a and b) = t(a) t(b) / t; the sum of the two gains is too large by gain(a) gain(b) / t."""
    touching: dict[str, list[int]] = {}
    for index, option in enumerate(options):
        for kernel in option.seconds:
            if base.seconds.get(kernel, 0.0) > 0:
                touching.setdefault(kernel, []).append(index)
    excess: dict[tuple[int, int], float] = {}
    for kernel, indices in touching.items():
        time = base.seconds[kernel]
        for a, b in itertools.combinations(indices, 2):
            if options[a].group != options[b].group:
                both = (time - options[a].seconds[kernel]) * (time - options[b].seconds[kernel]) / time
                excess[a, b] = excess.get((a, b), 0.0) + both
    for (a, b), amount in excess.items():
        if amount > 0:  # a negative excess only makes the estimate careful
            both = program.column(integral=False)
            seconds[both] = amount
            program.row({both: 1.0, column[a]: -1.0, column[b]: -1.0}, -1, np.inf)


def _conversions(
    program: _Program, options: Sequence[Option], edges: Sequence[Edge], column: list[int], seconds: dict[int, float]
) -> None:
    integer: dict[str, list[int]] = {}
    for index, option in enumerate(options):
        if option.integer:
            integer.setdefault(option.group, []).append(column[index])
    for edge in edges:
        ends = [integer.get(end, []) for end in (edge.source, edge.target)]
        if not any(ends):
            continue
        differs = program.column(integral=False)
        seconds[differs] = edge.seconds
        for plus, minus in (ends, ends[::-1]):
            program.row({differs: 1.0, **dict.fromkeys(plus, -1.0), **dict.fromkeys(minus, 1.0)}, 0, np.inf)


def _objective(
    program: _Program, base: Base, options: Sequence[Option], column: list[int], seconds: dict[int, float], limits: Limits
) -> None:
    """Seconds (or error), the other as a tie breaker; scaled to be near one."""
    total = max(sum(base.seconds.values()), 1e-12)
    worst = max((option.error for option in options), default=1.0) or 1.0
    time_weight, error_weight = (1e-3, 1.0) if limits.seconds is not None else (1.0, 1e-4)
    for index, amount in seconds.items():
        program.objective[index] += time_weight * amount / total
    for index, option in enumerate(options):
        program.objective[column[index]] += error_weight * option.error / worst
        program.objective[column[index]] += 1e-6 * option.bytes / max(base.bytes, 1)


def _checked(
    found: tuple[np.ndarray, float],
    base: Base,
    options: Sequence[Option],
    edges: Sequence[Edge],
    column: list[int],
    limits: Limits,
) -> Solution | None:
    """The solution with every figure computed again from the choice itself; None if it breaks a constraint."""
    values, gap = found
    chosen = tuple(option for option, index in zip(options, column, strict=True) if values[index] > 0.5)
    if len({option.group for option in chosen}) < len(chosen):
        return None
    size = base.bytes + sum(option.bytes for option in chosen)
    solution = Solution(chosen, predicted(base, chosen, edges), size, sum(option.error for option in chosen), gap)
    return None if _broken(solution, base, limits) else solution


def predicted(base: Base, chosen: Sequence[Option], edges: Sequence[Edge]) -> float:
    """Seconds of the whole model with these options, by the definitions of the terms."""
    seconds = sum(base.seconds.values()) - sum(base.gain(option) for option in chosen)
    for one, other in itertools.combinations(chosen, 2):
        shared = [kernel for kernel in one.seconds if kernel in other.seconds and base.seconds.get(kernel, 0.0) > 0]
        times = [(base.seconds[kernel], one.seconds[kernel], other.seconds[kernel]) for kernel in shared]
        seconds += max(sum((time - first) * (time - second) / time for time, first, second in times), 0.0)
    integer = {option.group for option in chosen if option.integer}
    return float(seconds + sum(edge.seconds for edge in edges if (edge.source in integer) != (edge.target in integer)))


def _broken(solution: Solution, base: Base, limits: Limits) -> bool:
    """True if a limit is exceeded by more than rounding."""
    slack = 1 + 1e-6
    peak = base.peak_bytes + sum(option.peak_bytes for option in solution.options)
    found = (
        (solution.error, limits.error + 1e-12),
        (solution.seconds, limits.seconds),
        (solution.bytes, limits.bytes),
        (peak, limits.peak_bytes),
    )
    return any(limit is not None and value > limit * slack for value, limit in found)
