"""The cost model that looks up what was measured, predicts what was not, and says how sure it is."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from hwopt.backends.tvm.learn.features import KINDS, described
from hwopt.backends.tvm.learn.table import Table, load_table, work_key
from hwopt.target import Cost, CostModel, MicroKernel, Workload

DTYPES = ("float32", "int8", "bfloat16")


@dataclass(frozen=True)
class Learned:
    """Costs from the table in `path`; `analytical` gives joules, and everything of kernels that no table knows.

    A kernel is known if a graph made its Workload (it has steps), in a dtype that is measured. Numbers of threads that were
    not measured stay analytical: a mixture would compare what was measured with what was not. Where weights may stay codes,
    the decoding kernel costs as much more as the analytical model says. `more` holds what was measured since, by
    work_key.
    """

    path: Path
    analytical: CostModel
    micros: Mapping[str, MicroKernel]
    more: dict[str, tuple[float, float]] = field(default_factory=dict, compare=False)

    @cached_property
    def table(self) -> Table:
        return load_table(self.path)

    @property
    def origin(self) -> str:
        """For people: where the prices are from."""
        table = self.table
        return f"measured and learned on {table.cpu}, {table.facts.get('date', '')} ({len(table.measured)} kernels)"

    def estimate(self, workload: Workload, threads: int) -> Cost:
        plain = dataclasses.replace(workload, coded=None)
        prior = self.analytical.estimate(plain, threads)
        found = self._plain(plain, threads, prior)
        if workload.coded is None or found.source == "analytical":
            return found if workload.coded is None else self.analytical.estimate(workload, threads)
        return _scaled(found, self.analytical.estimate(workload, threads), prior)

    def _plain(self, work: Workload, threads: int, prior: Cost) -> Cost:
        if not work.steps or work.kind not in KINDS or work.dtype not in DTYPES or threads not in self.table.threads:
            return prior
        key = work_key(work, threads)
        seconds, noise = self.more.get(key) or self.table.measured.get(key) or (0.0, 0.0)
        if seconds:
            return _cost(prior, seconds, seconds, seconds * (1 + noise), "measured")
        return self._predicted(work, threads, prior)

    def _predicted(self, work: Workload, threads: int, prior: Cost) -> Cost:
        base, features = described(work, self.micros, threads)
        mean, half = _predicted(self.table, features)
        seconds = base * math.exp(mean)
        return _cost(prior, seconds, seconds * math.exp(-half), seconds * math.exp(half), "learned")


@functools.lru_cache(maxsize=1 << 16)
def _predicted(table: Table, features: tuple[float, ...]) -> tuple[float, float]:
    mean, half = table.model.predict(np.array([features]))
    return float(mean[0]), float(half[0])


def _cost(prior: Cost, seconds: float, low: float, high: float, source: str) -> Cost:
    return dataclasses.replace(prior, seconds=seconds, low=low, high=high, source=source)


def _scaled(known: Cost, wanted: Cost, instead: Cost) -> Cost:
    """`wanted`, corrected by what is known of `instead`: both are analytical."""
    factor = wanted.seconds / instead.seconds if instead.seconds else 1.0
    low, high = (known.seconds if one is None else one for one in (known.low, known.high))
    return _cost(wanted, known.seconds * factor, low * factor, high * factor, known.source if factor == 1 else "learned")
