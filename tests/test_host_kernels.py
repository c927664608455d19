"""The benchmark of the host's prices: which visits and which kernels it judges by."""

from __future__ import annotations

import dataclasses

from benchmarks.host_kernels import _compared
from hwopt.backends.tvm.learn.measure import NOISE, Compiled, Profile, Sample
from hwopt.backends.tvm.learn.records import DRIFT, SHORT
from hwopt.backends.tvm.learn.stock import Network
from hwopt.plugins import find_target
from hwopt.target import Cost, Workload

WORK = Workload("one", "conv", "float32", m=64, n=64, k=64)
TRUTH = 10e-6


class Exact:
    """Prices every kernel at what an undisturbed visit takes."""

    def estimate(self, workload: Workload, threads: int) -> Cost:
        return Cost(TRUTH, source="learned", low=TRUTH * 0.9, high=TRUTH * 1.1)


def compared(*turns: Profile):
    target = dataclasses.replace(find_target("host"), cost=Exact())
    return _compared(Network(-1, "model f32 host", 1, "", Compiled((WORK,), ((),), (), {})), turns, target)


def visit(seconds: float, units: float = 1.0, noise: float = 0.0, shared: int = 1) -> Profile:
    return Profile((Sample(WORK, seconds, noise, shared),), seconds, 0.0, 1.0, units)


def test_a_disturbed_visit_is_left_out_even_if_it_looks_faster() -> None:
    found = compared(visit(TRUTH), visit(TRUTH / 2, units=DRIFT * 1.01))
    assert found.measured == TRUTH and found.near and found.covered
    assert [one.measured for one in found.kernels] == [TRUTH]


def test_of_the_calm_visits_the_fastest_counts() -> None:
    assert compared(visit(1.5 * TRUTH), visit(TRUTH, units=DRIFT * 0.99)).kernels[0].near
    assert not compared(visit(1.5 * TRUTH), visit(1.5 * TRUTH)).near


def test_kernels_that_were_not_timed_well_are_not_judged() -> None:
    assert compared(visit(TRUTH, noise=NOISE)).kernels
    for poor in (visit(TRUTH, noise=NOISE * 1.01), visit(TRUTH, shared=2), visit(SHORT * 0.99)):
        assert not compared(poor).kernels
