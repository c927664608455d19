"""The choice as mathematics: one alternative for each group, costs of single choices and of pairs, limits on sums.

A multiple-choice knapsack with pairwise terms. Choice 0 of every group keeps it as it is and costs nothing.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

RESOURCES = ("seconds", "error", "bytes", "joules")
COLUMNS = 80_000  # above this many the Lagrangian bound is nearly as good and a hundred times faster
NODES = 2_000  # of branch and bound; a limit in seconds would make plans depend on the machine's load
SAFETY_SECONDS = 120.0
Choice = tuple[int, ...]
Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Problem:
    """`single[resource][g]` is [choices of g], `pairs[resource][g, h]` is [choices of g, choices of h] with g < h.

    Amounts are differences to keeping everything. Resources that are absent cost nothing.
    """

    sizes: tuple[int, ...]
    single: Mapping[str, Sequence[np.ndarray]]
    pairs: Mapping[str, Mapping[Pair, np.ndarray]] = field(default_factory=dict)

    @cached_property
    def near(self) -> Mapping[str, list[list[tuple[int, np.ndarray]]]]:
        """For each resource and group: (other group, table [choices of the group, choices of the other])."""
        found: dict[str, list[list[tuple[int, np.ndarray]]]] = {name: [[] for _ in self.sizes] for name in self.single}
        for name, tables in self.pairs.items():
            for (g, h), table in tables.items():
                found[name][g].append((h, table))
                found[name][h].append((g, table.T))
        return found

    def amount(self, resource: str, choice: Choice) -> float:
        """What a choice costs of one resource, by the definition of the terms."""
        total = sum(float(costs[one]) for costs, one in zip(self.single[resource], choice, strict=True))
        return total + sum(float(table[choice[g], choice[h]]) for (g, h), table in self.pairs.get(resource, {}).items())

    def weighted(self, weights: Mapping[str, float]) -> Problem:
        """The same problem with one resource, `cost`: the weighted sum of all."""
        single = [np.sum([w * self.single[r][g] for r, w in weights.items()], axis=0) for g in range(len(self.sizes))]
        pairs: dict[Pair, np.ndarray] = {}
        for resource, weight in weights.items():
            for key, table in self.pairs.get(resource, {}).items():
                pairs[key] = pairs[key] + weight * table if key in pairs else weight * table
        return Problem(self.sizes, {"cost": single}, {"cost": {key: table for key, table in pairs.items() if table.any()}})

    def keeps(self, choice: Choice, limits: Mapping[str, float], slack: float = 1e-9) -> bool:
        """True if no limit is exceeded by more than rounding."""
        return all(self.amount(name, choice) <= limit + slack * self.scale(name) for name, limit in limits.items())

    def scale(self, resource: str) -> float:
        """A typical size of a resource's sums: what rounding is measured against."""
        return sum(float(np.abs(costs).max(initial=0.0)) for costs in self.single[resource]) or 1.0


class _Rows:
    """The rows of the linear program as they are collected."""

    def __init__(self) -> None:
        self.entries: list[tuple[np.ndarray, np.ndarray]] = []  # columns, values
        self.bounds: list[tuple[float, float]] = []

    def add(self, columns: np.ndarray, values: np.ndarray, low: float, high: float) -> None:
        self.entries.append((columns, values))
        self.bounds.append((low, high))

    def constraint(self, columns: int) -> LinearConstraint:
        rows = np.repeat(np.arange(len(self.entries)), [len(c) for c, _ in self.entries])
        where, values = (np.concatenate(part) for part in zip(*self.entries, strict=True))
        low, high = zip(*self.bounds, strict=True)
        return LinearConstraint(coo_array((values, (rows, where)), shape=(len(low), columns)).tocsr(), low, high)


def solve_exactly(problem: Problem, weights: Mapping[str, float], limits: Mapping[str, float]) -> tuple[Choice | None, float]:
    """The cheapest choice by HiGHS and a proven lower bound of the cost; (None, inf) if there is none, (None, -inf) if unknown.

    Pairs enter as tables over both choices with their marginals (the local polytope), which is much tighter than x + y - 1.
    """
    names = tuple(dict.fromkeys((*weights, *limits)))
    classes = {key: _classes(problem, names, key) for key in sorted({k for n in names for k in problem.pairs.get(n, {})})}
    starts = np.cumsum([0, *problem.sizes])
    columns = int(starts[-1]) + sum(len(rows) * len(cols) for (rows, _), (cols, _) in classes.values())
    if columns > COLUMNS:
        return None, -np.inf
    amounts = {name: np.zeros(columns) for name in names}
    for name in names:
        amounts[name][: starts[-1]] = np.concatenate(problem.single[name])
    rows = _Rows()
    for g in range(len(problem.sizes)):
        rows.add(np.arange(starts[g], starts[g + 1]), np.ones(problem.sizes[g]), 1, 1)
    position = int(starts[-1])
    for (g, h), ((first, of_first), (second, of_second)) in classes.items():
        table = position + np.arange(len(first) * len(second)).reshape(len(first), len(second))
        position += table.size
        for name in names:
            found = problem.pairs.get(name, {}).get((g, h))
            amounts[name][table.ravel()] = 0.0 if found is None else found[np.ix_(first, second)].ravel()
        _marginals(rows, table, starts[g], of_first)
        _marginals(rows, table.T, starts[h], of_second)
    for name, limit in limits.items():
        scale = problem.scale(name)
        rows.add(np.arange(columns), amounts[name] / scale, -np.inf, limit / scale)
    cost = sum(weight * amounts[name] for name, weight in weights.items())
    return _highs(problem, np.asarray(cost), rows, int(starts[-1]), starts)


def _classes(problem: Problem, names: Sequence[str], key: Pair) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Choices of both groups that no table tells apart: (representatives, class of each choice) for rows and for columns."""
    tables = [problem.pairs[name][key] for name in names if key in problem.pairs.get(name, {})]
    found = []
    for stacked in (np.concatenate(tables, axis=1), np.concatenate(tables, axis=0).T):
        _, first, inverse = np.unique(stacked, axis=0, return_index=True, return_inverse=True)
        found.append((first, inverse.reshape(-1)))
    return tuple(found)


def _marginals(rows: _Rows, table: np.ndarray, start: int, classes: np.ndarray) -> None:
    """Each row of the table sums to the choices of its class."""
    for number, line in enumerate(table):
        members = start + np.flatnonzero(classes == number)
        rows.add(np.concatenate([line, members]), np.concatenate([np.ones(len(line)), -np.ones(len(members))]), 0, 0)


@contextmanager
def _silent() -> Iterator[None]:
    """HiGHS has lines of its own that no option keeps from the process's standard output: a plan in JSON may be written there."""
    sys.stdout.flush()
    _flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            _flush()
            os.dup2(kept, 1)
            os.close(kept)


def _flush() -> None:
    """What C holds back of its output."""
    ctypes.CDLL(None).fflush(None)


def _highs(problem: Problem, cost: np.ndarray, rows: _Rows, integral: int, starts: np.ndarray) -> tuple[Choice | None, float]:
    largest = float(np.abs(cost).max(initial=0.0)) or 1.0
    integrality = np.zeros(len(cost))
    integrality[:integral] = 1
    options = {"node_limit": NODES, "time_limit": SAFETY_SECONDS, "mip_rel_gap": 1e-4}
    constraints = rows.constraint(len(cost))
    with _silent():
        found = milp(cost / largest, integrality=integrality, bounds=Bounds(0, 1), constraints=constraints, options=options)
    if found.x is None:
        return None, np.inf if found.status == 2 else -np.inf  # 2: proven infeasible
    values = [found.x[starts[g] : starts[g + 1]] for g in range(len(problem.sizes))]
    bound = found.mip_dual_bound if found.mip_dual_bound is not None else found.fun
    return tuple(int(one.argmax()) for one in values), float(bound) * largest
