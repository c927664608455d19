"""Search beyond one solve: pairs of changes, rounds, nearest budgets, trials over knobs, fronts, leaving one out."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import hwopt.plan.attempt as attempt
import hwopt.prove as prove
from hwopt.backends.ort import Session
from hwopt.cli import main
from hwopt.decide import make_task
from hwopt.errors import BudgetError, UsageError
from hwopt.evaluate import Run, Scorer
from hwopt.explore import plan_front, plan_once, plan_trials
from hwopt.io.onnx import read
from hwopt.ir import Graph
from hwopt.job import Job, prepare, quiet
from hwopt.measure import difference
from hwopt.pipeline import Context, PassManager, merged
from hwopt.plan.attempt import measured, price
from hwopt.plan.budget import Amounts, Budget, exceeded, parse_budget
from hwopt.plan.explain import explain
from hwopt.plan.options import Pricer
from hwopt.plan.plan import plan_from_json
from hwopt.plan.polish import polished
from hwopt.plan.search import _next, aim, make_plan, ranking, search
from hwopt.plan.solve import Solution, predicted
from hwopt.plan.trials import knobs_of
from hwopt.plan.uniform import uniform_solutions
from hwopt.prove import Effect
from hwopt.samples import Samples, shared
from passes.quantize import Quantize

CLASSES = 8
TARGET = "systolic-16x16"  # int8 and widths matter much, and energy has a price


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three convolutions and a classifier with random weights."""
    random = np.random.default_rng(0)
    shapes = {"a": (32, 3, 3, 3), "b": (64, 32, 3, 3), "c": (64, 64, 3, 3), "fc": (CLASSES, 64)}
    weights = {n: (random.standard_normal(s) / np.sqrt(np.prod(s[1:]))).astype(np.float32) for n, s in shapes.items()}
    nodes, value = [], "x"
    for name in "abc":
        nodes.append(helper.make_node("Conv", [value, f"{name}.w"], [f"{name}.y"], name=name, pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"{name}.y"], [f"{name}.r"], name=f"{name}.relu"))
        value = f"{name}.r"
    nodes.append(helper.make_node("GlobalAveragePool", [value], ["p"], name="pool"))
    nodes.append(helper.make_node("Flatten", ["p"], ["f"], name="flat"))
    nodes.append(helper.make_node("Gemm", ["f", "fc.w"], ["y"], name="fc", transB=1))
    graph = helper.make_graph(
        nodes, "three",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, CLASSES])],
        [numpy_helper.from_array(array, f"{name}.w") for name, array in weights.items()],
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model") / "three.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    some = random.standard_normal((64, 3, 12, 12)).astype(np.float32)
    session = Session(read(model))
    bias = -np.mean([session.run({"x": one[None]})["y"][0] for one in some], axis=0)
    model.graph.initializer.append(numpy_helper.from_array(bias, "fc.b"))  # or all pictures would be of one class
    model.graph.node[-1].input.append("fc.b")
    path.write_bytes(model.SerializeToString())
    return path


def job_for(path: Path, drop: str = "20%", *limits: str, passes: str | None = "prune-channels,low-rank,quantize") -> Job:
    random = np.random.default_rng(1)
    calibrate, evaluate = ({"x": random.standard_normal((n, 3, 12, 12)).astype(np.float32)} for n in (16, 64))
    return prepare(
        path, target=TARGET, shapes=None, binds=None, calibrate=calibrate, evaluate=evaluate,
        budget=parse_budget(drop, limits), passes=passes, threads=1, seed=0, progress=quiet,
    )  # fmt: skip


def noise(count: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).standard_normal((count, 3, 12, 12)).astype(np.float32)}


def pooled() -> ModelProto:
    """Two convolutions, a pool of their results, a classifier."""
    random = np.random.default_rng(0)
    shapes = {"a": (32, 3, 3, 3), "b": (256, 32, 3, 3), "fc": (CLASSES, 256)}
    weights = {n: (random.standard_normal(s) / np.sqrt(np.prod(s[1:]))).astype(np.float32) for n, s in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["a.y"], name="a", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a.y"], ["a.r"], name="a.relu"),
        helper.make_node("Conv", ["a.r", "b"], ["b.y"], name="b", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["b.y"], ["b.r"], name="b.relu"),
        helper.make_node("GlobalAveragePool", ["b.r"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "fc"], ["y"], name="fc", transB=1),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 3, 12, 12]), ("y", [1, CLASSES]))]
    arrays = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "pooled", ends[:1], ends[1:], arrays)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_pairs_price_what_two_changes_cost_together(network: Path) -> None:
    job = job_for(network)
    task = make_task(job)
    assert task is not None
    priced = price(task)
    pricer = Pricer(job.target, 1)

    def really(*options: object) -> float:
        passes = merged(one for option in options for one in option.passes)  # type: ignore[attr-defined]
        return pricer.graph(PassManager(passes).run(job.graph, job.ctx).graph).seconds

    widths = [o for o in priced.options if o.prunes]
    dtypes = [o for o in priced.options if o.form == "int8" and len(o.passes) == 1]
    a, b = next(o for o in widths if o.group.endswith(" a")), next(o for o in widths if o.group.endswith(" b"))
    for chosen in ((a, b), (a, next(o for o in dtypes if o.group == "b")), tuple(dtypes)):
        assert predicted(priced.base, chosen, priced.pairs)["seconds"] == pytest.approx(really(*chosen), rel=0.02)
        alone = priced.base.total_seconds - sum(o.gain for o in chosen)
        assert abs(alone - really(*chosen)) > 0.02 * really(*chosen)  # the sum without pairs is wrong


def test_widths_and_a_dtype_that_kernels_without_weights_follow_are_priced_together() -> None:
    """In float the pool costs much on this target; int8 layers around it make it cheap, and then fewer channels save little."""
    job = prepare(
        pooled(), target="ethos-u55", shapes=None, binds=None, calibrate=(data := noise(16)), evaluate=data,
        budget=parse_budget("20%"), passes="prune-channels,quantize", threads=1, seed=0, progress=quiet,
    )  # fmt: skip
    task = make_task(job)
    assert task is not None
    priced = price(task)
    dtypes = [o for o in priced.options if o.form == "int8"]
    widths = {o.group: o for o in priced.options if o.prunes}.values()
    assert dtypes and widths
    for width in widths:
        passes = merged(one for option in (*dtypes, width) for one in option.passes)
        really = Pricer(job.target, 1).graph(PassManager(passes).run(job.graph, job.ctx).graph).seconds
        assert predicted(priced.base, (*dtypes, width), priced.pairs)["seconds"] == pytest.approx(really, rel=0.03)


def test_polishing_finds_exchanges_that_are_faster_on_the_graph(network: Path) -> None:
    job = job_for(network)
    task = make_task(job)
    assert task is not None
    priced = price(task)
    nothing = Solution((), priced.base.total_seconds, priced.base.bytes, 0, 0.0, 0.0, 0.0)
    allowed = 2 * min(option.error for option in priced.options if option.gain > 0)
    found = polished(job.graph, job.ctx, priced, nothing, allowed, task.pricer)
    changed = PassManager(merged(one for o in found.options for one in o.passes)).run(job.graph, job.ctx).graph
    assert found.options and found.error <= allowed
    assert task.pricer.graph(changed).seconds < priced.base.total_seconds
    assert polished(job.graph, job.ctx, priced, nothing, 0.0, task.pricer) is nothing
    again = polished(job.graph, job.ctx, priced, found, allowed, task.pricer)
    assert again is found  # where it ends, no exchange helps any more


class Coarse:
    """Few samples: whatever is not all int8 (or unchanged) has `other` of 64 answers wrong, all int8 has `plain`."""

    metric = "coarse"

    def __init__(self, job: Job, plain: int, other: int) -> None:
        random = np.random.default_rng(3)
        self.feeds, self.plain, self.other = {"x": random.standard_normal((1, 3, 12, 12)).astype(np.float32)}, plain, other
        int8 = PassManager((Quantize(),)).run(job.graph, job.ctx).graph
        self.answers = [Session(graph).run(self.feeds)["y"] for graph in (job.graph, int8)]

    def __call__(self, run: Run) -> np.ndarray:
        same = [np.array_equal(run(self.feeds)["y"], answer) for answer in self.answers]
        wrong = 0 if same[0] else self.plain if same[1] else self.other
        return (np.arange(64) >= wrong).astype(np.float64)


class Counting:
    """Scores as another, and counts how often."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.metric, self.calls = scorer, scorer.metric, 0

    def __call__(self, run: Run) -> np.ndarray:
        self.calls += 1
        return self.scorer(run)


def test_a_plan_is_applied_and_scored_once_by_all_searches_over_the_same_prices(network: Path) -> None:
    task = make_task(job_for(network))
    assert task is not None
    task = dataclasses.replace(task, scorer=Counting(task.scorer))
    priced = price(task)
    first = search(task, priced)
    calls = task.scorer.calls  # type: ignore[attr-defined]
    again = search(task, priced)
    assert task.scorer.calls == calls > 2 and again.plan == first.plan  # type: ignore[attr-defined]
    search(task, priced.only("low-rank"))  # other choices
    assert task.scorer.calls > calls  # type: ignore[attr-defined]


def test_an_impossible_size_is_told_beside_the_unchanged_model_s_own(network: Path) -> None:
    """What the layouts of one plan's library add to its weights says nothing about the unchanged model."""
    task = make_task(job_for(network, "100%"))
    assert task is not None
    size = task.amounts(task.graph).bytes
    scarce = dataclasses.replace(task, budget=Budget(1.0, weight_bytes=1.0), weight_scale=3.0)
    with pytest.raises(BudgetError, match=re.escape(f"weights {size:.0f} B")):
        search(scarce, price(task))


def test_no_time_goes_into_the_nearest_budget_where_nobody_asks_for_it(network: Path) -> None:
    task = make_task(job_for(network, "100%"))
    assert task is not None
    priced, least = price(task), task.amounts(task.graph).seconds
    hopeless, easy = (dataclasses.replace(task, budget=Budget(1.0, latency_seconds=least * share)) for share in (1e-3, 0.9))
    with pytest.raises(BudgetError, match="nothing that was tried"):
        search(dataclasses.replace(hopeless, thorough=False), priced)
    with pytest.raises(BudgetError, match="nearest plans"):
        search(hopeless, priced)
    found = search(dataclasses.replace(easy, thorough=False), priced)
    assert found.plan.seconds_after <= 0.9 * least and found.plan == search(easy, priced).plan


def test_no_search_ends_slower_than_one_precision_for_all_that_keeps_the_drop(network: Path) -> None:
    job = job_for(network)
    task = make_task(job)
    assert task is not None
    priced = price(task)
    unlucky = dataclasses.replace(task, scorer=Coarse(job, plain=0, other=8), budget=Budget(1e-6))
    found = search(unlucky, priced)
    int8 = next(iter(uniform_solutions(priced)))
    assert found.uniform and {option.text for option in int8.options} == {text for d in found.plan.decisions for text in d.by}
    assert found.comparison is not None and found.comparison.drop == 0.0


def test_within_a_latency_the_best_score_wins_and_one_precision_for_all_competes(network: Path) -> None:
    job = job_for(network)
    task = make_task(job)
    assert task is not None
    priced = price(task)
    int8 = next(iter(uniform_solutions(priced)))
    changed = PassManager(merged(one for option in int8.options for one in option.passes)).run(job.graph, job.ctx).graph
    limit = task.amounts(changed).seconds
    limited = dataclasses.replace(task, scorer=Coarse(job, plain=1, other=32), budget=Budget(0.9, latency_seconds=limit))
    found = search(limited, priced)
    assert found.uniform and found.comparison is not None and found.comparison.drop == pytest.approx(1 / 64)
    assert found.plan.seconds_after <= limit


def test_all_times_that_people_read_are_in_measured_time(network: Path) -> None:
    task = make_task(job_for(network, passes="quantize,quantize-weights"))
    assert task is not None
    texts = []
    for one in (task, dataclasses.replace(task, scale=10.0)):
        found = search(one, price(one)).plan
        times = re.findall(r"not faster on this target \(([\d.]+) us", " ".join(refused.reason for refused in found.refused))
        texts.append((float(times[0]), found.seconds_before, "multiplied by 10" in explain(found)))
    (once, before, unsaid), (tenfold, later, said) = texts
    assert tenfold == pytest.approx(10 * once, rel=0.05) and later == pytest.approx(10 * before) and said and not unsaid


def test_one_precision_for_all_needs_no_margin_below_the_allowed_drop(network: Path) -> None:
    job = job_for(network, passes="quantize")
    task = make_task(job)
    assert task is not None
    close = dataclasses.replace(task, scorer=Coarse(job, plain=1, other=0), budget=Budget(0.02))
    found = search(close, price(task))
    assert found.uniform and found.comparison is not None and found.comparison.drop == pytest.approx(1 / 64)
    assert found.comparison.drop > aim(close.budget, found.comparison)
    over = dataclasses.replace(close, budget=Budget(0.01))
    assert not search(over, price(task)).uniform


def test_a_faster_plan_that_lost_says_why(network: Path) -> None:
    job = job_for(network, passes="quantize")
    task = make_task(job)
    assert task is not None
    close = dataclasses.replace(task, scorer=Coarse(job, plain=1, other=0), budget=Budget(0.02))
    priced = price(close)
    (uniform, *_) = uniform_solutions(priced)
    best = measured(close, priced, uniform, uniform.error)
    amounts = dataclasses.replace(best.amounts, seconds=best.amounts.seconds / 2)
    lost = dataclasses.replace(best, solution=dataclasses.replace(uniform, by="milp"), amounts=amounts)
    start = close.amounts(close.graph)
    assert ranking(close, [best, lost], start) == [best]
    first, second = explain(make_plan(close, priced, best, [best, lost], start)).split("round 2")
    assert "passed over" not in first and "passed over: a drop above" in second


def test_allowances_shrink_by_what_the_drop_was_too_large_and_grow_in_steps() -> None:
    assert _next(0.0, np.inf, 1.0, 1.0) == 0.0 and _next(0.1, np.inf, 1.0, 1.0) == pytest.approx(0.4)
    assert _next(0.4, np.inf, 1.0, 1.0) == 1.0  # all options together have no more
    assert _next(0.0, 0.8, 1.0, 0.5) == pytest.approx(0.4)
    assert _next(0.0, 0.8, 1.0, 0.99) == pytest.approx(0.64)  # far enough to be another plan
    assert _next(0.1, 0.4, 1.0, 0.5) == pytest.approx(0.2)


def test_equal_seeds_give_equal_plans_that_keep_the_drop(network: Path) -> None:
    plans = [plan_once(job_for(network)) for _ in range(2)]
    assert plans[0].plan.to_json() == plans[1].plan.to_json()
    assert plans[0].plan.decisions and plans[0].plan.seconds_after < plans[0].plan.seconds_before
    comparison = plans[0].comparison
    assert comparison is not None and comparison.drop <= 0.2
    assert aim(plans[0].plan.budget, comparison) <= 0.2
    assert {offer.text for offer in plans[0].plan.offers if offer.chosen} == {" + ".join(d.by) for d in plans[0].plan.decisions}


@pytest.mark.parametrize("limit", ["latency", "size", "memory", "energy"])
def test_each_limit_is_kept_alone(network: Path, limit: str) -> None:
    job = job_for(network, "100%")
    task = make_task(job)
    assert task is not None
    start = task.amounts(job.graph)
    wanted = {
        "latency": f"latency={start.seconds * 0.5e6}us", "size": f"size={start.bytes * 0.4}B",
        "memory": f"memory={start.peak_bytes * 0.6}B", "energy": f"energy={start.joules * 0.5e9}nJ",
    }[limit]  # fmt: skip
    found = plan_once(job_for(network, "100%", wanted))
    kept = task.amounts(found.graph)
    assert dataclasses.replace(task, budget=parse_budget("100%", (wanted,))).exceeded(kept) == ""
    assert task.amounts(found.graph) != start


def test_budget_that_cannot_be_met_is_answered_with_the_nearest(network: Path) -> None:
    task = make_task(job_for(network))
    assert task is not None
    start = task.amounts(task.graph)
    with pytest.raises(BudgetError, match=r"nearest plans: latency=[\d.e+]+[mun]s at a drop of"):
        plan_once(job_for(network, "20%", f"latency={start.seconds * 0.01e6}us"))
    with pytest.raises(BudgetError, match=r"nearest plans: size=\d+B at a drop of"):
        plan_once(job_for(network, "0%", "size=10B"))
    fastest = plan_once(job_for(network, "100%"))
    with pytest.raises(BudgetError, match=r"--max-drop [\d.]+% with all limits kept"):
        plan_once(job_for(network, "0%", f"latency={fastest.plan.seconds_after * 1.02e6}us"))


def test_errors_are_measured_on_samples_that_the_changes_were_not_fitted_to(
    network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Samples, Samples]] = []
    real = attempt.measure_errors

    def noted(graph: Graph, ctx: Context, options: list, samples: Samples, *rest: object) -> list:
        assert ctx.calibration is not None
        seen.append((ctx.calibration, samples))
        return real(graph, ctx, options, samples, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(attempt, "measure_errors", noted)
    for judged, fitted in ((8, 8), (9, 16)):  # of 16: enough for both, or not
        monkeypatch.setattr(attempt, "SENSITIVITY_SAMPLES", judged)
        task = make_task(job_for(network, passes="low-rank"))
        assert task is not None
        price(task)
        assert [len(one) for one in seen[-1]] == [fitted, judged]
    assert shared(*seen[0]) == 0 < shared(*seen[1])


@pytest.mark.parametrize("method", ["random", "bayesian"])
def test_trials_go_on_where_they_stopped_and_keep_the_best(network: Path, tmp_path: Path, method: str) -> None:
    job, folder = job_for(network), tmp_path / "study"
    first = plan_trials(job, method, 1, folder)
    usual = plan_once(job)
    assert first.plan.seconds_after == usual.plan.seconds_after
    found = plan_trials(job, method, 3, folder)
    trials = json.loads((folder / "trials.json").read_text())["trials"]
    assert len(trials) == 3
    best = min(one["value"] for one in trials if one["value"] is not None)
    assert found.plan.seconds_after == pytest.approx(best)
    assert plan_from_json((folder / "plan.json").read_text()).decisions == found.plan.decisions
    plan_trials(job, method, 3, folder)
    assert len(json.loads((folder / "trials.json").read_text())["trials"]) == 3


def test_trials_turn_the_knobs_of_the_families(network: Path, tmp_path: Path) -> None:
    job = job_for(network, passes="quantize")
    task = make_task(job)
    assert task is not None
    assert knobs_of(task)["quantize.calibrator"][0] == "minmax"
    found = plan_trials(job, "grid", 4, tmp_path)
    turned = [one["knobs"]["quantize.calibrator"] for one in json.loads((tmp_path / "trials.json").read_text())["trials"]]
    assert len(set(turned)) == 4
    plan_trials(job, "grid", 2, tmp_path / "again")
    plan_trials(job, "grid", 4, tmp_path / "again")  # goes on with the values that are left
    again = json.loads((tmp_path / "again" / "trials.json").read_text())["trials"]
    assert [one["knobs"]["quantize.calibrator"] for one in again] == turned
    best = found.plan.knobs["quantize.calibrator"]
    assert all(f"calibrator={best}" in text or best == "minmax" for decision in found.plan.decisions for text in decision.by)


def test_a_folder_of_another_search_is_refused(network: Path, tmp_path: Path) -> None:
    plan_front(job_for(network), "latency", 2, tmp_path)
    with pytest.raises(UsageError, match="another model, target, budget, data or version"):
        plan_front(job_for(network, "10%"), "latency", 2, tmp_path)
    with pytest.raises(UsageError, match="did you mean size"):
        plan_front(job_for(network), "siz", 2, tmp_path)


def test_front_is_resumed_and_its_best_point_is_on_disk(network: Path, tmp_path: Path) -> None:
    job = job_for(network)
    points, found = plan_front(job, "size", 4, tmp_path)
    assert [one.plan for one in points] == ["", "plan-1.json", "plan-2.json", "plan-3.json", "plan-4.json"]
    assert points[-1].bytes < points[0].bytes
    good = [one for one in points[1:] if one.drop <= 0.2]
    best = min(good, key=lambda one: one.bytes)
    on_disk = plan_from_json((tmp_path / "plan.json").read_text())
    assert on_disk == plan_from_json((tmp_path / best.plan).read_text())
    assert found is not None and found.plan.decisions == on_disk.decisions
    stored = json.loads((tmp_path / "front.json").read_text())
    stored["points"] = stored["points"][:3]  # as if it had been interrupted
    (tmp_path / "front.json").write_text(json.dumps(stored))
    again, _ = plan_front(job, "size", 4, tmp_path)
    assert again == points


def test_a_value_that_cannot_be_used_is_a_trial_without_a_plan(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_for(network, passes="quantize")
    monkeypatch.setattr(Quantize, "knobs", {"calibrator": ("minmax", "nonsense")})
    plan_trials(job, "grid", 2, tmp_path)
    trials = json.loads((tmp_path / "trials.json").read_text())["trials"]
    assert sorted(one["value"] is None for one in trials) == [False, True]
    assert any("nonsense" in one.get("reason", "") for one in trials)


def test_command_line_writes_folder_and_page(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, x=np.random.default_rng(2).standard_normal((64, 3, 12, 12)).astype(np.float32))
    out, html = tmp_path / "study", tmp_path / "page.html"
    given = ["--target", TARGET, "--calibrate", str(data), "--max-drop", "20%", "--passes", "low-rank,quantize", "--threads", "1"]
    command = ["plan", str(network), "-o", str(out), *given]
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--pareto", "latency", "--points", "2", "--report", str(html)])
    assert {one.name for one in out.iterdir()} == {"front.json", "plan-1.json", "plan-2.json", "plan.json"}
    assert "</html>" in html.read_text()
    printed = capsys.readouterr().out
    assert f"wrote {out / 'plan.json'}" in printed
    assert [line.split()[0] for line in printed.splitlines()[1:4]] == ["unchanged", "plan-1.json", "plan-2.json"]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--pareto", "latency", "--search", "grid"])
    assert "one after the other" in capsys.readouterr().err


def test_changes_that_cost_what_they_should_save_are_taken_out(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = dataclasses.replace(job_for(network), check="all")
    found = plan_once(job)
    assert len(found.plan.decisions) > 1
    guilty = found.plan.decisions[0]

    class Library:
        def __init__(self, decisions: tuple) -> None:
            self.artifact, self.decisions = self, decisions

        def runner(self, feeds: object) -> tuple:
            return self.decisions

    def timed(runners: dict, rounds: int) -> dict:
        """Every change saves a millisecond but the guilty one, which costs one."""

        def seconds(decisions: tuple) -> float:
            return 1.0 - 1e-3 * len(decisions) + (2e-3 if any(d.by == guilty.by for d in decisions) else 0.0)

        return {name: np.full(rounds, seconds(d)) for name, d in runners.items()}

    monkeypatch.setattr(prove, "side_by_side", timed)
    state = prove.proved(
        job,
        found,
        Library(found.plan.decisions),
        lambda one: Library(one.plan.decisions),
        {},
        lambda _: True,  # type: ignore[arg-type, return-value]
    )
    left = state.found.plan.decisions
    assert [d.by for d in left] == [d.by for d in found.plan.decisions if d.by != guilty.by]
    assert all(d.measured_seconds == pytest.approx(1e-3) for d in left)
    assert "1000.00 us faster without it" in state.found.plan.refused[-1].reason
    assert state.found.graph.digest != found.graph.digest
    needed = prove.proved(
        job,
        found,
        Library(found.plan.decisions),
        lambda one: Library(one.plan.decisions),
        {},
        lambda _: False,  # type: ignore[arg-type, return-value]
    )
    assert len(needed.found.plan.decisions) == len(found.plan.decisions)


def test_a_change_stays_if_its_saving_is_above_the_error_of_its_timing() -> None:
    noise = np.array([-1.0, 1.0] * 8)
    saved, error = difference(100 + 3 * noise, 99 + noise)
    assert saved == pytest.approx(1.0) and error == pytest.approx(1.2533 * 4 / 1.349 / 4, rel=1e-3)
    assert not Effect(saved, error, 0.0, 1.0).worth_it and "within the timing's error" in Effect(saved, error, 0.0, 1.0).text
    assert Effect(saved, error / 2, 0.0, 1.0).worth_it
    assert Effect(saved, error, 3.0, 1.0).worth_it  # many small ones were taken out: now it shows
    assert not Effect(-saved, error, 3.0, 1.0).worth_it


def test_only_doubtful_changes_are_built_without(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_for(network)
    found = plan_once(job)
    monkeypatch.setattr(prove, "DOUBT", 0.0)
    assert not list(prove._doubtful(job, found))  # all are predicted to save something
    monkeypatch.setattr(prove, "DOUBT", 10.0)
    assert len(list(prove._doubtful(job, found))) == len(found.plan.decisions)


def test_where_no_drop_would_do_the_smallest_plan_is_named(network: Path) -> None:
    job = job_for(network)
    task = make_task(job)
    assert task is not None
    unlucky = dataclasses.replace(task, scorer=Coarse(job, plain=8, other=8), budget=Budget(1e-6, weight_bytes=2e3))
    with pytest.raises(BudgetError, match=r"nearest.*; or size=[\d.]+KB at a drop of 12.50%, the least that was found"):
        search(unlucky, price(task))


def test_limits_are_shown_in_the_unit_that_they_were_written_in() -> None:
    limits = ("size=40kB", "latency=2us", "memory=3B")
    shown = [exceeded(parse_budget("1%", (text,)), Amounts(1.0, 50_000, 10**9)) for text in limits]
    assert shown == ["weights 50 KB of 40 KB", "latency 1000000 us of 2 us", "memory 1000000000 B of 3 B"]
