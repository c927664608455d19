"""The same choice without a linear program: limits become prices, and what remains is a tree that is solved exactly.

Everett 1963, "Generalized Lagrange multiplier method"; Fisher 1981, "The Lagrangian relaxation method for solving integer
programming problems". Pairs that close a cycle are bounded by their smallest entry. The bound is valid, the gap is reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hwopt.plan.problem import Choice, Pair, Problem

SWEEPS = 3  # over the limits, when there are several
HALVINGS = 24
MOVES = 20  # rounds of single exchanges at the end


def solve_by_prices(problem: Problem, weights: Mapping[str, float], limits: Mapping[str, float]) -> tuple[Choice | None, float]:
    """The best choice found (None if none keeps the limits) and a proven lower bound of the cost of all that keep them."""
    search = _Prices(problem, weights, limits)
    best = search.improve()
    return best, search.bound


class _Prices:
    """Moves one price per limit until the bound is as high as it gets; remembers the best choice that keeps the limits."""

    def __init__(self, problem: Problem, weights: Mapping[str, float], limits: Mapping[str, float]) -> None:
        self.problem, self.weights, self.limits = problem, dict(weights), dict(limits)
        self.cost = problem.weighted(weights)
        self.forest = Forest.of(problem)
        self.prices = dict.fromkeys(limits, 0.0)
        self.best: Choice | None = None
        self.least, self.bound = np.inf, -np.inf

    def improve(self) -> Choice | None:
        span = self.cost.scale("cost")
        for _ in range(SWEEPS if len(self.limits) > 1 else 1):
            self._try()
            for name in self.limits:
                self._halve(name, span / self.problem.scale(name))
        if self.best is not None:
            self.best = self._exchange(self.best)
        return self.best

    def _halve(self, name: str, unit: float) -> None:
        """The price at which the limit is just kept, other prices standing; each trial also gives a bound."""
        low, high = 0.0, self.prices[name] or unit
        self.prices[name] = 0.0
        if self._kept(self._try(), name):
            return
        for _ in range(60):
            self.prices[name] = high
            if self._kept(self._try(), name):
                break
            low, high = high, high * 8
        for _ in range(HALVINGS):
            self.prices[name] = (low + high) / 2
            if self._kept(self._try(), name):
                high = self.prices[name]
            else:
                low = self.prices[name]
        self.prices[name] = high

    def _kept(self, choice: Choice, name: str) -> bool:
        return self.problem.amount(name, choice) <= self.limits[name]

    def _try(self) -> Choice:
        """The cheapest choice at these prices."""
        priced = self.problem.weighted({**self.weights, **self._sum()})
        value, choice = self.forest.cheapest(priced)
        self.bound = max(self.bound, value - sum(price * self.limits[name] for name, price in self.prices.items()))
        if self.problem.keeps(choice, self.limits):
            cost = self.cost.amount("cost", choice)
            if cost < self.least:
                self.best, self.least = choice, cost
        return choice

    def _sum(self) -> dict[str, float]:
        return {name: self.weights.get(name, 0.0) + price for name, price in self.prices.items()}

    def _exchange(self, choice: Choice) -> Choice:
        """Replace one group's choice at a time while that is cheaper and keeps the limits."""
        names = ("cost", *self.limits)
        views = {name: self.cost if name == "cost" else self.problem for name in names}
        current = list(choice)
        room = {name: limit - self.problem.amount(name, choice) for name, limit in self.limits.items()}
        for _ in range(MOVES):
            moved = False
            for g in range(len(current)):
                change = {name: _differences(views[name], name, current, g) for name in names}
                allowed = np.all([change[name] <= max(room[name], 0.0) for name in self.limits], axis=0)
                gain = np.where(allowed, change["cost"], np.inf)
                if gain.min() < -1e-12 * self.cost.scale("cost"):
                    best = int(gain.argmin())
                    room = {name: room[name] - float(change[name][best]) for name in self.limits}
                    current[g], moved = best, True
            if not moved:
                break
        return tuple(current)


def _differences(problem: Problem, resource: str, current: list[int], g: int) -> np.ndarray:
    """What each choice of one group would change, all others standing: [choices of g]."""
    costs = problem.single[resource][g].astype(np.float64)
    for other, table in problem.near[resource][g]:
        costs = costs + table[:, current[other]]
    return costs - costs[current[g]]


@dataclass(frozen=True)
class Forest:
    """A spanning forest of the groups that share a table: `order` from the roots down, `parent` of each group (or -1)."""

    order: tuple[int, ...]
    parent: tuple[int, ...]
    edges: frozenset[Pair]

    @classmethod
    def of(cls, problem: Problem) -> Forest:
        near: dict[int, list[int]] = {g: [] for g in range(len(problem.sizes))}
        for g, h in sorted({key for tables in problem.pairs.values() for key in tables}):
            near[g].append(h)
            near[h].append(g)
        parent, order, edges = [-1] * len(problem.sizes), [], set()
        seen: set[int] = set()
        for root in near:
            waiting = [] if root in seen else [root]
            seen.add(root)
            while waiting:
                one = waiting.pop()
                order.append(one)
                for other in near[one]:
                    if other not in seen:
                        seen.add(other)
                        parent[other] = one
                        edges.add((min(one, other), max(one, other)))
                        waiting.append(other)
        return cls(tuple(order), tuple(parent), frozenset(edges))

    def cheapest(self, priced: Problem) -> tuple[float, Choice]:
        """(a lower bound that is exact on the forest, the forest's cheapest choice); `priced` has the resource `cost`."""
        tables = priced.pairs.get("cost", {})
        value = [costs.astype(np.float64) for costs in priced.single["cost"]]
        back: dict[int, np.ndarray] = {}
        bound = sum(float(table.min()) for key, table in tables.items() if key not in self.edges)
        for g in reversed(self.order):
            up = self.parent[g]
            if up < 0:
                bound += float(value[g].min())
                continue
            table = tables.get((min(g, up), max(g, up)))
            costs = value[g][:, None] if table is None else value[g][:, None] + (table if g < up else table.T)
            back[g] = np.broadcast_to(costs.argmin(0), value[up].shape)
            value[up] = value[up] + costs.min(0)
        choice = [0] * len(value)
        for g in self.order:
            choice[g] = int(value[g].argmin()) if self.parent[g] < 0 else int(back[g][choice[self.parent[g]]])
        return bound, tuple(choice)
