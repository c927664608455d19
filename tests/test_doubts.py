"""Prices in doubt are measured while planning: which ones, for how long, and what becomes of a wrong one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from hwopt.analysis.workload import workloads
from hwopt.backends.tvm.learn import measure
from hwopt.backends.tvm.learn.model import Learned
from hwopt.backends.tvm.learn.records import Record, table_of
from hwopt.decide import make_task
from hwopt.ir import Graph
from hwopt.job import Job, prepare, quiet
from hwopt.plan.attempt import Priced, Search, price
from hwopt.plan.budget import parse_budget
from hwopt.plan.corrected import search_timed
from hwopt.plan.doubts import Measuring, measuring_on, own_prices
from hwopt.plan.search import search
from hwopt.plugins import find_target
from hwopt.target import Cost, Target, Workload

TRUTH = {"float32": 4e-6, "int8": 1e-6}  # seconds of a product


@dataclasses.dataclass(frozen=True)
class Wrong:
    """Believes int8 to be ten times slower than it is; `half` says how far it believes to be off, as a share."""

    half: float
    more: dict[Workload, float] = dataclasses.field(default_factory=dict)

    def estimate(self, workload: Workload, threads: int) -> Cost:
        if (known := self.more.get(dataclasses.replace(workload, name=""))) is not None:
            return Cost(known, source="measured")
        seconds = truth(workload) * (10 if workload.dtype == "int8" else 1)
        return Cost(seconds, source="learned", low=seconds * (1 - self.half), high=seconds * (1 + self.half))


def truth(work: Workload) -> float:
    return TRUTH.get(work.dtype, 4e-6) if work.macs else 1e-8


class Timed(Measuring):
    """Finds the truth, and takes a second for each graph."""

    def _time(self, graph: Graph) -> None:
        self.left -= 1.0
        self.target.cost.more.update({dataclasses.replace(one, name=""): truth(one) for one in workloads(graph)})  # type: ignore[attr-defined]


def network() -> ModelProto:
    """Four matmuls in a row."""
    random = np.random.default_rng(0)
    weights = {f"w{i}": (random.standard_normal((64, 64)) / 8).astype(np.float32) for i in range(4)}
    nodes = [helper.make_node("MatMul", ["x" if i == 0 else f"v{i}", f"w{i}"], [f"v{i + 1}"], name=f"m{i}") for i in range(4)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [8, 64]) for name in ("x", "v4")]
    arrays = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "row", ends[:1], ends[1:], arrays)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.fixture(scope="module")
def job() -> Job:
    data = {"x": np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)}
    host = find_target("host")
    kernels = {name: host.microkernels[name] for name in ("float32", "int8")}
    target = dataclasses.replace(host, microkernels=kernels, cost=Wrong(0.0))
    return prepare(network(), target, None, None, data, data, parse_budget("50%", ()), "quantize", 1, 0, quiet)


def priced(job: Job, half: float, seconds: float) -> tuple[Priced, Timed]:
    target = dataclasses.replace(job.target, cost=Wrong(half))
    task = make_task(dataclasses.replace(job, target=target))
    assert isinstance(task, Search)
    measuring = Timed(target, 1, seconds)
    return price(dataclasses.replace(task, measuring=measuring)), measuring


def test_a_wrong_price_in_doubt_is_corrected_by_measuring(job: Job) -> None:
    """int8 seems slower than float32, so it would be refused; the interval reaches below, so it is measured and offered."""
    found, measuring = priced(job, 0.95, 60.0)
    static = [option for option in found.options if not option.passes[0].apart]
    assert measuring.graphs and {option.form for option in static} == {"int8"}
    assert all(option.gain == pytest.approx(3e-6, rel=0.05) for option in static)
    assert found.base.total_seconds == pytest.approx(4 * 4e-6, rel=0.01)


def test_a_price_that_is_sure_is_not_measured(job: Job) -> None:
    found, measuring = priced(job, 0.01, 60.0)
    assert found.options == () and measuring.graphs == 1  # the unchanged model alone
    assert all("not faster" in refusal.reason for refusal in found.refused if "int8" in refusal.reason)


def test_measuring_ends_when_its_time_is_over(job: Job) -> None:
    _, measuring = priced(job, 0.95, 1.5)
    assert (measuring.graphs, measuring.left) == (1, pytest.approx(0.5, abs=0.1))
    assert priced(job, 0.95, 0.0)[1].graphs == 0


@dataclasses.dataclass(frozen=True)
class Hopeful(Wrong):
    """Believes int8 to be fast, without a doubt."""

    def estimate(self, workload: Workload, threads: int) -> Cost:
        seconds = self.more.get(dataclasses.replace(workload, name=""), truth(workload))
        return Cost(seconds, source="learned", low=seconds, high=seconds)


class Sobering(Measuring):
    """Finds that products in int8 take twice as long as in float32."""

    def _time(self, graph: Graph) -> None:
        found = {one: 8e-6 if one.macs and one.dtype == "int8" else truth(one) for one in workloads(graph)}
        self.target.cost.more.update({dataclasses.replace(one, name=""): seconds for one, seconds in found.items()})  # type: ignore[attr-defined]


def test_kernels_of_a_plan_are_timed_and_what_seemed_fast_is_given_up(job: Job) -> None:
    target = dataclasses.replace(job.target, cost=Hopeful(0.0))
    task = make_task(dataclasses.replace(job, target=target))
    assert isinstance(task, Search)
    first = search(task, price(task)).plan
    assert len(first.decisions) == 4 and first.seconds_after < first.seconds_before / 2
    task = dataclasses.replace(task, measuring=Sobering(target, 1))
    found, priced = search_timed(task, price(task))
    assert found.plan.decisions == () and found.graph is task.graph
    assert priced.options == () and any("not faster" in one.reason for one in priced.refused)
    worse = next(one.plan for one in found.others if one.plan.decisions)
    assert worse.seconds_after > 4 * 8e-6 > worse.seconds_before  # the plan that was given up, at the prices of now


def test_an_interrupted_search_times_nothing_more_and_says_so(job: Job) -> None:
    def impatient(stage: str, done: int, total: int) -> None:
        if stage == "solving and measuring" and done == 0:
            raise KeyboardInterrupt

    target = dataclasses.replace(job.target, cost=Hopeful(0.0))
    task = make_task(dataclasses.replace(job, target=target))
    assert isinstance(task, Search)
    measuring = Sobering(target, 1)
    before = price(dataclasses.replace(task, measuring=measuring))
    timed = measuring.graphs
    found, _ = search_timed(dataclasses.replace(task, measuring=measuring, progress=impatient), before)
    assert found.plan.note.startswith("interrupted") and measuring.graphs == timed


def test_an_interrupted_measurement_keeps_the_plan_that_was_found(job: Job) -> None:
    class Stopped(Sobering):
        def learn(self, graph: Graph) -> bool:
            raise KeyboardInterrupt

    target = dataclasses.replace(job.target, cost=Hopeful(0.0))
    task = make_task(dataclasses.replace(job, target=target))
    assert isinstance(task, Search)
    found, _ = search_timed(dataclasses.replace(task, measuring=Stopped(target, 1)), price(task))
    assert found.plan.decisions and found.plan.note.startswith("interrupted")


def test_a_plan_without_anything_to_time_is_searched_for_once(job: Job) -> None:
    task = make_task(dataclasses.replace(job, target=dataclasses.replace(job.target, cost=Hopeful(0.0))))
    assert isinstance(task, Search) and task.measuring is None
    before = price(task)
    found, after = search_timed(task, before)
    assert after is before and found.graph.digest == search(task, before).graph.digest and found.plan.decisions


def test_without_measuring_the_same_prices_come_out_every_time(job: Job) -> None:
    task = make_task(job)
    assert task is not None and task.measuring is None
    assert price(task).base.total_seconds == price(task).base.total_seconds == pytest.approx(16e-6, rel=0.01)


@pytest.fixture
def host(tmp_path: Path) -> Target:
    """This machine with a table of made-up matmuls."""
    found, random = find_target("host"), np.random.default_rng(0)
    works = [Workload("m", "matmul", "float32", *random.integers(4, 99, 3).tolist(), steps=("MatMul",)) for _ in range(60)]
    records = [Record(work, 1e-6 + work.macs / 4e10, 0.01, 1e-5, 1, 0, "") for work in works]
    path = tmp_path / "table.json"
    path.write_text(table_of(records, found, None).to_json())
    return dataclasses.replace(found, cost=Learned(path, Wrong(0.0), found.microkernels))


def test_kernels_are_really_timed_for_this_call_alone(job: Job, host: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "NOISE", 1e9)  # on a busy machine all times vary
    own = own_prices(host)
    measuring = measuring_on(own, 1)
    assert measuring is not None and own.cost is not host.cost
    graph = job.graph
    sources = {own.cost.estimate(work, 1).source for work in workloads(graph)}
    assert measuring.learn(graph) and 0 < measuring.left < 20
    known = {own.cost.estimate(work, 1).source for work in workloads(graph)}
    assert sources == {"learned"} and known == {"measured"}
    assert {host.cost.estimate(work, 1).source for work in workloads(graph)} == {"learned"}
    assert own.cost.fresh().more == {}


def test_nothing_is_measured_where_the_target_is_another_machine_or_has_no_table(job: Job, host: Target) -> None:
    assert measuring_on(find_target("cortex-a53"), 1) is None
    assert measuring_on(job.target, 1) is None
    assert measuring_on(host, 2) is None
    assert measuring_on(dataclasses.replace(host, runs_here=False), 1) is None
