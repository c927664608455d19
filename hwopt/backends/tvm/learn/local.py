"""Prices for a processor that no table knows: of a relative's table or the analytical model, moved by what is measured here."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hwopt.backends.tvm.learn.features import PRODUCTS
from hwopt.backends.tvm.learn.model import CYCLES, Learned, priced_at, scaled
from hwopt.backends.tvm.learn.table import work_key
from hwopt.target import Cost, CostModel, Workload

if TYPE_CHECKING:  # measuring imports more than listing targets may
    from hwopt.backends.tvm.learn.measure import Profile

SHORT = 1e-6  # shorter kernels say little: a clock reads to some 30 ns
NOISE = 0.3  # of what is believed: more than where a table is known, which is as good as such a measurement
LEAST = 3  # kernels from which a class has a factor of its own
UNKNOWN, ROUGH, SURE = 0.4, 0.3, 0.1  # half widths in log seconds: nothing measured, other classes only, at the least

Class = tuple[str, str, str, int]  # source of the price, kind, dtype, threads


@dataclass(frozen=True)
class Moved:
    """What kernels took here over their prices, in logarithms, by class."""

    found: dict[Class, list[float]] = field(default_factory=dict)

    def add(self, kind: Class, log: float) -> None:
        self.found.setdefault(kind, []).append(log)

    def of(self, kind: Class) -> tuple[float, float]:
        """(log factor, half width): of the class; else of what else this source prices; else none."""
        own = self.found.get(kind, [])
        if len(own) >= LEAST:
            middle = float(np.median(own))
            return middle, max(SURE, 2 * float(np.median(np.abs(np.array(own) - middle))))
        others = [one for other, logs in self.found.items() if (other[0], other[3]) == (kind[0], kind[3]) for one in logs]
        return (float(np.median(others)), ROUGH) if others else (0.0, UNKNOWN)


@dataclass(frozen=True)
class Local:
    """Costs on this processor before anybody profiled it.

    `relative` was learned on another processor, and prices products of the dtypes in `shared`, whose instructions are the same
    here, and everything without products; the rest is `analytical`. Kernels that were timed here (`more`, by work_key) cost
    what they took, and others of their class as much more or less (`moved`). `hertz` is the clock that peaks are stated at.
    """

    analytical: CostModel
    relative: Learned | None = None
    shared: frozenset[str] = frozenset()
    hertz: float = 0.0
    more: dict[str, tuple[float, float]] = field(default_factory=dict, compare=False)
    moved: Moved = field(default_factory=Moved, compare=False)
    clocks: list[float] = field(default_factory=list, compare=False)  # of the reference, in each measurement

    @property
    def origin(self) -> str:
        """For people: where the prices are from."""
        stated = "analytical" if self.relative is None else f"{self.relative.origin}, and scaled by the clock"
        return f"{stated}; corrected by {len(self.more)} kernels that were measured here" if self.more else stated

    @property
    def path(self) -> Path | None:
        return None if self.relative is None else self.relative.path

    @property
    def clock(self) -> float:
        """The clock that was measured here over the stated one; 1 where one of them is unknown."""
        return CYCLES / self.clocks[0] / self.hertz if self.clocks and self.hertz else 1.0

    @property
    def own(self) -> bool:
        """Whether prices are of this very processor."""
        return False

    def measures(self, threads: int) -> bool:
        """Whether measurements on so many threads are taken."""
        return threads > 0

    def fresh(self) -> Local:
        """The same with nothing measured."""
        return dataclasses.replace(self, more={}, moved=Moved(), clocks=[])

    def learn(self, found: Profile, threads: int) -> None:
        """Takes what was measured of kernels, as if the clock had been that of the first measurement."""
        self.clocks.append(found.clock)
        for one in found.samples:
            if one.shared != 1 or one.noise > NOISE or (key := work_key(one.work, threads)) in self.more:
                continue
            seconds = one.seconds * self.clocks[0] / found.clock
            self.more[key] = (seconds, one.noise)
            price = self._stated(dataclasses.replace(one.work, coded=None), threads)
            if seconds >= SHORT:
                self.moved.add(_class(one.work, price, threads), math.log(seconds / price.seconds))

    def estimate(self, workload: Workload, threads: int) -> Cost:
        plain = dataclasses.replace(workload, coded=None)
        found = self._here(plain, threads)
        if workload.coded is None:
            return found
        return scaled(found, *(self.analytical.estimate(one, threads) for one in (workload, plain)))

    def _here(self, work: Workload, threads: int) -> Cost:
        price = self._stated(work, threads)
        seconds, noise = self.more.get(work_key(work, threads), (0.0, 0.0))
        if seconds:
            return priced_at(price, seconds, seconds, seconds * (1 + noise), "measured")
        log, half = self.moved.of(_class(work, price, threads))
        low, middle, high = (price.seconds * math.exp(log + width) for width in (-half, 0.0, half))
        return priced_at(price, middle, low, high, price.source)

    def _stated(self, work: Workload, threads: int) -> Cost:
        """Without what was measured here; on several threads as much of the relative's one as the analytical model says."""
        prior = self.analytical.estimate(work, threads)
        if self.relative is None or (work.kind in PRODUCTS and work.dtype not in self.shared):
            return prior
        alone = self.relative.estimate(work, 1)
        if alone.source == "analytical":
            return prior
        seconds = alone.seconds * self.relative.clock * prior.seconds / self.analytical.estimate(work, 1).seconds
        return priced_at(prior, seconds, seconds, seconds, "learned")


def _class(work: Workload, price: Cost, threads: int) -> Class:
    return price.source, work.kind, work.dtype, threads
