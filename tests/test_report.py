"""The page for people: charts, layers with their candidates, and nothing that is loaded from elsewhere."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from hwopt.pipeline import Refusal
from hwopt.plan.budget import Budget
from hwopt.plan.options import Pricer
from hwopt.plan.plan import Decision, Offer, Plan, Round
from hwopt.plugins import find_target
from hwopt.report.chart import Axis, Dot, axis, chart, number
from hwopt.report.figures import Figures, hardware, layer_table
from hwopt.report.outcome import _unsteady
from hwopt.report.page import page
from hwopt.report.summary import summary
from hwopt.target import Target
from tests._recover import net
from tests.test_winograd import square_conv

CHOSEN, OTHER = "quantize{site=fc1}", "low-rank{site=fc1,rank=16}"


def figures(seconds: float, source: str) -> dict[str, Any]:
    return {
        "score": 0.9, "latency_seconds": seconds, "latency_spread_seconds": 0.0, "latency_source": source,
        "weight_bytes": 1000, "library_weight_bytes": 1000, "peak_activation_bytes": 100,
    }  # fmt: skip


def layer(name: str, before: float | None, after: float, dtype: str = "int8") -> dict[str, Any]:
    return {
        "name": name, "op": "Gemm", "dtype": dtype, "macs": 1000, "bytes": 100, "weight_bytes": 50,
        "predicted_seconds_before": before, "predicted_seconds": after, "changes": [CHOSEN],
    }  # fmt: skip


@pytest.fixture
def report() -> dict[str, Any]:
    memories = [{"name": "cache", "bytes": 1000, "bytes_per_second": 1e9}]
    return {
        "model": "net<1>", "target": "host", "threads": 1,
        "baseline": figures(2e-3, "measured"), "result": figures(1e-3, "measured"),
        "metric": "top-1", "samples": 10, "score_drop": 0.005, "notes": ["a note"], "machine": {},
        "layers": [layer("fc1", 1e-3, 2e-4), layer("fc1:down", None, 1e-4), layer("fc2", 1e-3, 1e-3, "float32")],
        "hardware": {"kind": "cpu", "peak": {"float32": 1e10, "int8": 4e10}, "memories": memories},
    }  # fmt: skip


@pytest.fixture
def plan() -> Plan:
    decision = Decision((CHOSEN,), 2e-3, 1e-3, 100, 50, 0.01, "why", 7e-4)
    offers = (Offer(CHOSEN, "fc1", 8e-4, 50, 0, 0.01, True), Offer(OTHER, "fc1", 5e-4, 20, 0, 0.1, False))
    refused = (Refusal("low-rank", "fc1", f"{OTHER}: too harsh"), Refusal("quantize", "nowhere", "is a <barrier>"))
    rounds = (Round(0.1, 1, 1e-3, 50, 0.9, 0.005, True, solved_seconds=1.1e-3), Round(0.2, 2, 8e-4, 40, 0.8, 0.1, False))
    return Plan("host", 1, "abc", Budget(0.01), 0, (decision,), refused, rounds, 2e-3, 1e-3, offers=offers)


def test_page_has_charts_layers_candidates_and_reasons(report: dict[str, Any], plan: Plan) -> None:
    text = page(report, plan, [{"seconds": 1.5e-3, "drop": 0.001}])
    assert text.count("<svg") == 4
    assert CHOSEN in text and OTHER in text and "too harsh" in text
    assert "front: 1.5 ms" in text and "chosen: 1 ms, drop 0.50%" in text
    assert re.search(r"1e\+03 → 300", text)  # the part of fc1 counts to fc1
    assert "predicted 1 ms, measured 1 ms" in text


@pytest.mark.parametrize(("spread", "said"), [(3e-4, "varied by 30%"), (5e-5, "")])
def test_times_that_vary_are_noted(spread: float, said: str) -> None:
    values = figures(1e-3, "measured") | {"latency_spread_seconds": spread}
    assert ("".join(_unsteady(Figures(**values))) != "") == bool(said)
    assert said in "".join(_unsteady(Figures(**values)))


def test_predicted_times_have_no_spread() -> None:
    report = {
        "baseline": figures(2e-3, "measured"), "result": figures(1e-3, "predicted"), "model": "net", "target": "host",
        "threads": 1, "peers": {}, "speedup": 2, "compression": 1, "score_drop": None, "paired_flips": None, "notes": [],
    }  # fmt: skip
    lines = summary(report).splitlines()
    assert "2 ms              0 ms" in lines[2]
    assert "1 ms (predicted)          0.9" in lines[3]


def test_page_stands_alone_and_escapes_names(report: dict[str, Any], plan: Plan) -> None:
    text = page(report, plan)
    assert not re.search(r"<script|src=|href=|@import|url\(", text)
    assert "net&lt;1&gt; on host" in text and "net<1>" not in text
    assert "is a &lt;barrier&gt;" in text


def test_page_of_a_plan_that_changed_nothing(report: dict[str, Any], plan: Plan) -> None:
    empty = Plan("host", 1, "abc", Budget(0.01), 0)
    text = page({**report, "score_drop": None, "layers": []}, empty)
    assert "Nothing was searched" in text


def test_axes_have_round_ticks_between_their_ends() -> None:
    assert Axis("x", 0.0, 10.0).ticks() == [0, 2, 4, 6, 8, 10]
    assert Axis("x", 0.9, 1100.0, True).ticks() == [1, 10, 100, 1000]
    assert Axis("x", 0.11, 0.6, True).ticks() == [0.2, 0.5]
    flat = axis("x", [3.0, 3.0])
    assert flat.low < 3 < flat.high and flat.share(3) == pytest.approx(0.5)
    assert axis("x", [], True).low > 0


def test_dots_lie_where_their_values_say() -> None:
    drawn = chart(Axis("x", 0, 10), Axis("y", 0, 10), [Dot(0, 0, "red"), Dot(10, 10, "red"), Dot(99, 5, "red")])
    places = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    assert places[0][0] < places[1][0] and places[0][1] > places[1][1]
    assert places[2][0] == places[1][0]  # outside values stay on the border


def test_numbers_are_short() -> None:
    assert [number(v) for v in (0.0123, 12.3, 1000, 2.5e6, 3e9, 4e12)] == ["0.0123", "12.3", "1k", "2.5M", "3G", "4T"]


def test_times_of_layers_are_in_the_plans_seconds() -> None:
    graph, target = net(), find_target("systolic-16x16")
    whole = Pricer(target, 1).graph(graph).seconds
    plan = Plan(target.name, 1, graph.digest, Budget(), 0, seconds_before=3 * whole, seconds_after=3 * whole, time_scale=3.0)
    rows = layer_table(graph, graph, plan, target, 1)
    for key in ("predicted_seconds", "predicted_seconds_before"):
        assert sum(row[key] for row in rows) == pytest.approx(plan.seconds_after)


class Clocked:
    """A cost model whose table was measured at a clock of its own."""

    def __init__(self, target: Target, clock: float) -> None:
        self.estimate, self.clock = target.cost.estimate, clock


def test_no_kernel_lies_above_the_roof_and_a_measured_clock_says_how_high_it_is() -> None:
    stated = find_target("cortex-a72")
    peak, (near, *_, far) = stated.peak["float32"], stated.memories
    slow, fast = ([layer("fc", 1.0, 2 * 1000 / (share * 2 * peak), "float32")] for share in (0.5, 1.4))
    assert hardware(stated, 2, slow)["peak"]["float32"] == peak
    found = hardware(stated, 2, fast)
    assert found["clock"] == pytest.approx(1.4) and found["peak"]["float32"] == pytest.approx(1.4 * peak)
    assert found["memories"][0]["bytes_per_second"] == pytest.approx(1.4 * near.bytes_per_second)
    assert found["memories"][-1]["bytes_per_second"] == far.bytes_per_second
    table = dataclasses.replace(stated, cost=Clocked(stated, 1.6))
    assert hardware(table, 2, fast)["peak"]["float32"] == pytest.approx(1.6 * peak)


def test_a_convolution_by_winograd_s_algorithm_shows_the_products_that_it_makes() -> None:
    target, graph = find_target("x86-64-v3"), square_conv()
    plan = Plan(target.name, 1, graph.digest, Budget(), 0)
    (row,) = layer_table(graph, graph, plan, target, 1)
    assert row["products"] == row["macs"] * 16 // 36
    (row,) = layer_table(graph, graph, plan, dataclasses.replace(target, spacious=False), 1)
    assert row["products"] == row["macs"]


def test_a_raised_roof_is_said(report: dict[str, Any], plan: Plan) -> None:
    assert "times the clock" not in page(report, plan)
    report["hardware"]["clock"] = 1.46
    assert "at 1.46 times the clock that is stated for it" in page(report, plan)
