"""The cost model that looks up what was measured, predicts what was not, and says how sure it is."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from hwopt.backends.tvm.learn.features import KINDS, PRODUCTS, counted
from hwopt.backends.tvm.learn.table import Table, load_table, work_key
from hwopt.target import Cost, CostModel, MicroKernel, Workload

if TYPE_CHECKING:  # measuring imports more than listing targets may
    from hwopt.backends.tvm.learn.measure import Profile

CYCLES = 20_000 * 4  # of the clock's reference (tune/timing.c): a product and a sum in a row take 4 on most processors
DTYPES = ("float32", "int8", "bfloat16")  # of products; other kernels were measured in whichever dtype they have


@dataclass(frozen=True)
class Learned:
    """Costs from the table in `path`; `analytical` gives joules, and everything of kernels that no table knows.

    A kernel is known if a graph made its Workload (it has steps), in a dtype that is measured. Numbers of threads that were
    not measured stay analytical: a mixture would compare what was measured with what was not. Where weights may stay codes,
    the decoding kernel costs as much more as the analytical model says, and so do kernels on several threads whose family was
    measured on one only. `more` holds what was measured since, by work_key.
    """

    path: Path
    analytical: CostModel
    micros: Mapping[str, MicroKernel]
    more: dict[str, tuple[float, float, int]] = field(default_factory=dict, compare=False)
    hertz: float = 0.0  # that the target's peaks are stated at; 0: unknown

    @cached_property
    def table(self) -> Table:
        return load_table(self.path)

    @property
    def origin(self) -> str:
        """For people: where the prices are from."""
        table = self.table
        return f"measured and learned on {table.cpu}, {table.facts.get('date', '')} ({len(table.measured)} kernels)"

    @property
    def clock(self) -> float:
        """The clock that the table was measured at over the stated one; 1 where one of them is unknown."""
        seconds = float(self.table.facts.get("clock_seconds", 0.0))
        return CYCLES / seconds / self.hertz if seconds and self.hertz else 1.0

    @property
    def own(self) -> bool:
        """Whether prices are of this very processor."""
        return True

    def measures(self, threads: int) -> bool:
        """Whether measurements on so many threads are taken."""
        return threads in self.table.threads

    def fresh(self) -> Learned:
        """The same without what was measured since, and with a place of its own for more of it."""
        return dataclasses.replace(self, more={})

    def learn(self, found: Profile, threads: int) -> None:
        """Takes what was measured of kernels, as if the clock had been the table's."""
        clock = float(self.table.facts.get("clock_seconds", found.clock)) / found.clock
        for one in found.samples:
            if one.clean and one.shared == 1:
                self.more[work_key(one.work, threads)] = (one.seconds * clock, one.noise, one.work.footprint)

    def estimate(self, workload: Workload, threads: int) -> Cost:
        plain = dataclasses.replace(workload, coded=None)
        prior = self.analytical.estimate(plain, threads)
        found = self._plain(plain, threads, prior)
        if workload.coded is None or found.source == "analytical":
            return found if workload.coded is None else self.analytical.estimate(workload, threads)
        return scaled(found, self.analytical.estimate(workload, threads), prior)

    def _plain(self, work: Workload, threads: int, prior: Cost) -> Cost:
        if not work.steps or work.kind not in KINDS or threads not in self.table.threads:
            return prior
        if work.kind in PRODUCTS and work.dtype not in DTYPES:
            return prior
        key = work_key(work, threads)
        seconds, noise, around = self.more.get(key) or self.table.measured.get(key) or (0.0, 0.0, 0)
        if seconds:
            seconds *= self._moved(work, around, threads)
            return priced_at(prior, seconds, seconds, seconds * (1 + noise), "measured")
        found = self._predicted(work, threads)
        if found is None and (other := self._counterpart(work, threads)):
            stated = self.analytical.estimate(other, threads)
            return scaled(self._plain(other, threads, stated), prior, stated)
        if found is None:
            return prior if threads == 1 or 1 not in self.table.threads else self._as_alone(work, prior)
        mean, half = found
        return priced_at(prior, math.exp(mean), math.exp(mean - half), math.exp(mean + half), "learned")

    def _counterpart(self, work: Workload, threads: int) -> Workload | None:
        """The same product of integers with larger, or smaller, weights that was learned."""
        if work.kind not in PRODUCTS or work.dtype != "int8":
            return None
        others = (dataclasses.replace(work, narrow=level) for level in (1, 0, 2) if level != work.narrow)
        return next((one for one in others if self._predicted(one, threads) is not None), None)

    def _as_alone(self, work: Workload, prior: Cost) -> Cost:
        """Of a family that was measured on one thread only: as much of that as the analytical model says."""
        alone = self.analytical.estimate(work, 1)
        found = self._plain(work, 1, alone)
        return prior if found.source == "analytical" else scaled(found, prior, alone)

    def _moved(self, work: Workload, footprint: int, threads: int) -> float:
        """How much longer a kernel takes in a model with other weights around it than where it was measured."""
        if footprint == work.footprint or not work.weight_bytes:
            return 1.0
        here, there = (self._predicted(one, threads) for one in (work, dataclasses.replace(work, footprint=footprint)))
        return math.exp(here[0] - there[0]) if here and there else 1.0

    def _predicted(self, work: Workload, threads: int) -> tuple[float, float] | None:
        """(log seconds, half width of the interval); None for a family that was not measured."""
        return _predicted(self.table, work, tuple(sorted(self.micros.items())), threads, work.footprint)


@functools.lru_cache(maxsize=1 << 16)
def _predicted(
    table: Table, work: Workload, micros: tuple[tuple[str, MicroKernel], ...], threads: int, _footprint: int
) -> tuple[float, float] | None:
    """The footprint stands by itself, as workloads that differ in it alone are equal."""
    found = counted(work, dict(micros), threads)
    return table.model.predict(found, threads) if table.model.knows(found, threads) else None


def priced_at(prior: Cost, seconds: float, low: float, high: float, source: str) -> Cost:
    """The same joules and bytes in other seconds."""
    return dataclasses.replace(prior, seconds=seconds, low=low, high=high, source=source)


def scaled(known: Cost, wanted: Cost, instead: Cost) -> Cost:
    """`wanted`, corrected by what is known of `instead`: both are analytical."""
    factor = wanted.seconds / instead.seconds if instead.seconds else 1.0
    low, high = (known.seconds if one is None else one for one in (known.low, known.high))
    return priced_at(wanted, known.seconds * factor, low * factor, high * factor, known.source if factor == 1 else "learned")
