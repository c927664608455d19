"""Prices on a processor that nobody profiled: a relative's or analytical ones, moved by what was measured there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hwopt.backends.tvm.learn.local import LEAST, Local
from hwopt.backends.tvm.learn.measure import Profile, Sample
from hwopt.backends.tvm.learn.model import Learned
from hwopt.backends.tvm.learn.records import table_of
from hwopt.plan.doubts import SECONDS, STRANGE, measuring_on
from hwopt.plugins import find_target
from hwopt.target import Coded, Workload, origin
from targets._learned import related
from tests.test_learned import ANALYTICAL, MICRO, layer, synthetic

CLOCK = 1e-5  # as in the records
INTEGER = dataclasses.replace(MICRO, dtype="int8", depth=4, intrinsic="dot")


@pytest.fixture
def relative(tmp_path: Path) -> Learned:
    target = dataclasses.replace(find_target("x86-64-v2"), microkernels={"float32": MICRO})
    path = tmp_path / "cpu_other_12345678.json"
    path.write_text(table_of(synthetic(), target, None, "2026-01-01").to_json())
    return Learned(path, ANALYTICAL, {"float32": MICRO}, hertz=8e9)


@pytest.fixture
def local(relative: Learned) -> Local:
    return Local(ANALYTICAL, relative, frozenset({"float32"}), 8e9)


def measured(cost: Local, works: list[Workload], factor: float, clock: float = CLOCK) -> Profile:
    """Everything took `factor` times its price."""
    samples = tuple(Sample(one, cost.estimate(one, 1).seconds * factor * clock / CLOCK, 0.01) for one in works)
    return Profile(samples, sum(one.seconds for one in samples), 0.0, clock)


def some_layers(count: int = LEAST) -> list[Workload]:
    return [layer(40 + 8 * index, 64, 16) for index in range(count)]


def test_a_relative_is_the_table_that_multiplies_with_the_same_instructions(relative: Learned) -> None:
    folder = relative.path.parent
    assert related({"float32": MICRO, "int8": INTEGER}, folder) == (relative.path, {"float32"})
    assert related({"float32": dataclasses.replace(MICRO, lanes=4)}, folder) == (None, frozenset())


def test_what_a_relative_does_not_multiply_alike_is_analytical(local: Local) -> None:
    work = dataclasses.replace(layer(), dtype="int8")
    assert local.estimate(work, 1).seconds == ANALYTICAL.estimate(work, 1).seconds
    assert local.estimate(layer(), 1).source == "learned"
    assert local.estimate(layer(), 1).seconds == pytest.approx(local.relative.estimate(layer(), 1).seconds, rel=1e-6)


def test_a_slower_clock_makes_a_relatives_prices_longer(local: Local) -> None:
    slow = dataclasses.replace(local, relative=dataclasses.replace(local.relative, hertz=4e9))
    assert slow.estimate(layer(), 1).seconds == pytest.approx(2 * local.estimate(layer(), 1).seconds)


def test_on_several_threads_a_relative_gains_what_the_analytical_model_says(local: Local) -> None:
    gain = ANALYTICAL.estimate(layer(), 1).seconds / ANALYTICAL.estimate(layer(), 4).seconds
    assert local.estimate(layer(), 1).seconds / local.estimate(layer(), 4).seconds == pytest.approx(gain)


def test_what_was_measured_here_is_the_price_and_moves_its_class(local: Local) -> None:
    before, known = local.estimate(layer(200), 1), some_layers()
    truth = local.estimate(known[0], 1).seconds * 3
    local.learn(measured(local, known, 3.0), 1)
    here, after = local.estimate(known[0], 1), local.estimate(layer(200), 1)
    assert (here.source, here.seconds) == ("measured", pytest.approx(truth))
    assert after.seconds == pytest.approx(3 * before.seconds)
    assert after.low <= 3 * before.seconds <= after.high
    assert after.high / after.low < before.high / before.low


def test_classes_of_which_nothing_was_measured_follow_the_others(local: Local) -> None:
    pooled = dataclasses.replace(layer(), kind="elementwise", m=0, n=0, k=0, elements=100_000, steps=("Relu",))
    before = dataclasses.replace(local, relative=None).estimate(pooled, 1).seconds
    analytical = dataclasses.replace(local, relative=None)
    analytical.learn(measured(analytical, some_layers(), 2.0), 1)
    assert analytical.estimate(pooled, 1).seconds == pytest.approx(2 * before)


def test_a_slower_clock_while_measuring_is_taken_out(local: Local) -> None:
    local.learn(measured(local, some_layers(), 1.0), 1)
    price = local.estimate(layer(200), 1).seconds
    local.learn(measured(local, [layer(200)], 1.0, clock=2 * CLOCK), 1)
    assert local.estimate(layer(200), 1).seconds == pytest.approx(price)


def test_weights_as_codes_follow_what_was_measured(local: Local) -> None:
    coded = dataclasses.replace(layer(), coded=Coded(1000, 4, looked_up=True))
    before = local.estimate(coded, 1).seconds / local.estimate(layer(), 1).seconds
    local.learn(measured(local, some_layers(), 3.0), 1)
    assert local.estimate(coded, 1).seconds / local.estimate(layer(), 1).seconds == pytest.approx(before)


def test_prices_say_where_they_are_from_and_every_job_measures_its_own(local: Local) -> None:
    local.learn(measured(local, some_layers(), 2.0), 1)
    assert "corrected by 3 kernels that were measured here" in origin(local)
    assert "corrected" not in origin(local.fresh())
    assert local.fresh().estimate(layer(200), 1).seconds == pytest.approx(local.estimate(layer(200), 1).seconds / 2)


def test_more_time_is_given_where_no_table_knows_the_processor(local: Local, relative: Learned) -> None:
    here = dataclasses.replace(find_target("x86-64-v2"), runs_here=True)
    assert measuring_on(dataclasses.replace(here, cost=local), 4).left == STRANGE
    assert measuring_on(dataclasses.replace(here, cost=relative), 1).left == SECONDS
    assert measuring_on(dataclasses.replace(here, cost=relative), 4) is None
    assert measuring_on(dataclasses.replace(here, cost=ANALYTICAL), 1) is None
    assert measuring_on(dataclasses.replace(here, cost=local, runs_here=False), 1) is None
