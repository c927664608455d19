"""Schedules: each does again what it did, bit for bit, goes on after an interrupt, and never gives back something worse."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hwopt.analysis.constant import constant
from hwopt.analysis.coupling import coupling
from hwopt.analysis.workload import workloads
from hwopt.compiler import apply_model, plan_model
from hwopt.errors import DataError, UsageError
from hwopt.io.onnx import save
from hwopt.ir import Graph, of_op
from hwopt.pipeline import Context, run_pass
from hwopt.plugins import find_target
from hwopt.recover import Case, Outcome, Recipe, parse_recipe, recovered
from hwopt.recover.rewind import follow, rewound
from hwopt.recover.schedules import Run, Schedule
from hwopt.recover.stages import cubic, geometric, stages_of
from hwopt.target import Cost, total
from passes.prune_channels import PruneChannels
from passes.quantize import Quantize
from passes.sparsify import Sparsify
from tests._recover import blobs, trained_net

torch = pytest.importorskip("torch")
EFFORT = "epochs=3,batch=16,lr=0.003,threads=1,checks=2"
HALF = 'passes="prune-channels{ratio=0.5}"'
RECIPES = {
    "gradual": f"gradual{{{EFFORT},{HALF},stages=3}}",
    "gradual sparse": f'gradual{{{EFFORT},passes="sparsify{{ratio=0.9}}",stages=2}}',
    "lottery": f"lottery{{{EFFORT.replace('epochs=3', 'epochs=12')},{HALF},stages=2}}",  # what is refitted is hard to beat
    "netadapt": f"netadapt{{{EFFORT},latency=0.5,share=0.2,short=1,drop=0.1}}",
}


@pytest.fixture(scope="module")
def case() -> Case:
    teacher, data = trained_net(), blobs(240, 1)
    return Case(teacher, teacher, data, ctx=Context(find_target("x86-64-v3"), data.head(32)))


def sizes(graph: Graph) -> list[int]:
    return [group.size for group in coupling(graph) if not group.frozen]


def priced(graph: Graph) -> Cost:
    target = find_target("x86-64-v3")
    return total(target.cost.estimate(work, target.cores) for work in workloads(graph))


@pytest.mark.parametrize("name", RECIPES)
def test_a_schedule_prints_what_makes_the_same_graph_again_and_another_seed_makes_another(case: Case, name: str) -> None:
    found = recovered(case, RECIPES[name])
    looked: list[Any] = []
    replayed = recovered(dataclasses.replace(case, watch=looked.append), str(found.recipe))
    other = recovered(case, RECIPES[name].replace("lr", "seed=7,lr"))
    assert found.graph is not case.graph and replayed.graph.digest == found.graph.digest != other.graph.digest
    assert not looked and found.recipe.usual().threads == 0 and not getattr(found.recipe.usual(), "stops", ())


@pytest.mark.parametrize("name", RECIPES)
def test_a_schedule_goes_on_where_it_was_killed(case: Case, name: str, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    seen: list[Any] = []

    def kill(check: Any) -> None:
        seen.append(check)
        if len(seen) == 5:
            raise Killed

    kept = dataclasses.replace(case, checkpoints=tmp_path)
    with pytest.raises(Killed):
        recovered(dataclasses.replace(kept, watch=kill), RECIPES[name])
    again: list[Any] = []
    found = recovered(dataclasses.replace(kept, watch=again.append), RECIPES[name])
    whole: list[Any] = []
    undisturbed = recovered(dataclasses.replace(case, watch=whole.append), RECIPES[name])
    assert found.graph.digest == undisturbed.graph.digest and len(again) == len(whole) - 5


@pytest.mark.parametrize("name", ["gradual", "lottery", "netadapt"])
def test_a_schedule_that_makes_everything_worse_gives_back_what_it_was_given(case: Case, name: str) -> None:
    wild = RECIPES[name].replace("lr=0.003", "lr=30,warmup=0,patience=0").replace("drop=0.1", "drop=0")
    stated = _spoiled(wild)
    found = recovered(case, stated)
    if name == "netadapt":  # a cut alone may do no harm
        assert found.before and found.after and (found.after.score or 0) >= (found.before.score or 0)
    else:
        whole = run_pass(PruneChannels(ratio=0.5), case.graph, case.ctx)
        before = _value(case, whole)
        assert found.after and found.after.value <= before
        assert recovered(case, str(found.recipe)).graph.digest == found.graph.digest


def test_what_training_made_worse_is_not_taken_and_that_is_on_record(case: Case) -> None:
    recipe = parse_recipe(RECIPES["gradual"])
    assert isinstance(recipe, Schedule)
    worse = run_pass(PruneChannels(ratio=0.5), case.graph, case.ctx)
    found = Run(case, recipe, stops=["3/9"]).better(case.graph, worse)
    assert found.graph is case.graph and found.after == found.before and "stops=untrained" in str(found.recipe)
    assert Run(case, recipe, stops=["3/9"]).better(worse, case.graph).graph is case.graph
    assert recovered(case, str(found.recipe)).graph.digest == worse.digest


def _spoiled(text: str) -> Recipe:
    """Without checks but the last one, so that a training takes what it ends with."""
    return dataclasses.replace(parse_recipe(text), checks=1)


def _value(case: Case, graph: Graph) -> float:
    from hwopt.recover.torch.train import look

    return look(case.on(graph), parse_recipe(f"distill{{{EFFORT}}}")).value


def test_an_interrupted_schedule_still_reaches_the_widths_it_was_for(case: Case) -> None:
    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    found = recovered(dataclasses.replace(case, watch=stop), RECIPES["gradual"])
    wanted = sizes(run_pass(PruneChannels(ratio=0.5), case.graph, case.ctx))
    assert found.interrupted and sizes(found.graph) == wanted
    assert recovered(case, str(found.recipe)).graph.digest == found.graph.digest


@pytest.mark.parametrize("name", ["gradual", "netadapt"])
def test_an_interrupt_between_trainings_keeps_what_was_trained(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hwopt.recover.torch import train

    usual, looks = train.look, []

    def look(*arguments: Any) -> Any:
        looks.append(1)
        if len(looks) == 2:
            raise KeyboardInterrupt
        return usual(*arguments)

    monkeypatch.setattr(train, "look", look)
    found = recovered(case, RECIPES[name])
    assert found.interrupted and len(looks) >= 2


def test_stages_reach_the_widths_of_the_passes_along_a_cubic_and_do_the_rest_at_the_end(case: Case) -> None:
    passes = (Quantize(), PruneChannels(ratio=0.5))
    stages, graph, seen = stages_of(case.graph, passes, case.ctx), case.graph, []
    for stage in (1, 3):
        graph = stages.at(graph, stage / 3, cubic)
        seen.append(sizes(graph))
    first, last = sizes(case.graph), sizes(stages.whole)
    assert [len(set(one)) for one in zip(*seen, strict=True)] == [2] * len(first) and seen[-1] == last
    assert seen[0] == [round(b + (a - b) * (2 / 3) ** 3) for a, b in zip(first, last, strict=True)]
    assert not list(of_op(graph, "QuantizeLinear")) and list(of_op(stages.finish(graph), "QuantizeLinear"))
    assert geometric(64, 16, 0.5) == pytest.approx(32)


def test_sparsity_comes_by_and_by_as_zeros_that_stay(case: Case) -> None:
    stages = stages_of(case.graph, (Sparsify(ratio=0.9),), case.ctx)
    half = stages.at(case.graph, 0.5, cubic)
    name = next(of_op(half, "Conv")).inputs[1]
    zeros = float((half.params[name] == 0).mean())
    assert zeros == pytest.approx(0.9 * (1 - 0.5**3), abs=0.01)
    found = recovered(case, RECIPES["gradual sparse"]).graph
    weights = constant(found, next(of_op(found, "Conv")).inputs[1])
    assert weights is not None and float((weights == 0).mean()) == pytest.approx(0.9, abs=0.01)


def test_a_plans_own_passes_are_done_step_by_step_and_give_the_plans_structure(case: Case) -> None:
    passes = (PruneChannels(ratio=0.5), Quantize())
    graph = case.graph
    for one in passes:
        graph = run_pass(one, graph, case.ctx)
    planned = dataclasses.replace(case.on(graph), passes=passes)
    for recipe in (f"gradual{{{EFFORT},stages=2}}", f"lottery{{{EFFORT}}}"):
        found = recovered(planned, recipe)
        assert found.after and found.before and found.after.value < found.before.value
        assert sizes(found.graph) == sizes(graph) and [n.op for n in found.graph.nodes] == [n.op for n in graph.nodes]
    with pytest.raises(UsageError, match="nothing to do step by step"):
        recovered(case, "gradual")


def test_a_plan_without_pruning_is_trained_once(case: Case) -> None:
    graph = run_pass(Quantize(weights=("int4",)), case.graph, case.ctx)
    planned = dataclasses.replace(case.on(graph), passes=(Quantize(weights=("int4",)),))
    found = recovered(planned, f"gradual{{{EFFORT},stages=3}}".replace("lr=0.003", "lr=0.001"))
    assert isinstance(found.recipe, Schedule) and len(found.recipe.stops) == 1 and found.after and found.before
    assert found.after.value <= found.before.value


@pytest.mark.parametrize("recipe", [f"gradual{{{EFFORT},stages=2}}", RECIPES["netadapt"].replace("drop=0.1", "drop=0")])
def test_a_plan_has_the_schedule_on_record_and_replays_it(case: Case, recipe: str, tmp_path: Path) -> None:
    save(case.graph, tmp_path / "model.onnx")
    evaluate = {"x0": blobs(120, 2).arrays["x0"], "labels": blobs(120, 2).labels}
    calibrate = {"x0": case.data.arrays["x0"]}
    stated: dict[str, Any] = {"calibrate": calibrate, "evaluate": evaluate, "target": "x86-64-v3", "threads": 1}
    found = plan_model(tmp_path / "model.onnx", passes="prune-channels{ratio=0.5},quantize{}", recover=recipe, **stated)
    assert found.plan.recovery and found.plan.recovery.recipe.startswith(recipe.partition("{")[0])
    assert found.plan.recovery.score_after >= found.plan.recovery.score_before
    replayed, _ = apply_model(tmp_path / "model.onnx", plan=found.plan, **stated)
    assert replayed.digest == found.graph.digest


def test_rewinding_finds_the_survivors_of_a_cut_by_their_numbers(case: Case) -> None:
    """Weights that say where they come from are cut as the graph was."""
    pruned = run_pass(PruneChannels(ratio=0.5, criterion="random", refit=False), case.graph, case.ctx)
    again = follow(case.graph, pruned, case.graph.params)
    assert {n for n in case.graph.params if n in pruned.params} == set(again) and sizes(pruned) != sizes(case.graph)
    for name, array in again.items():
        np.testing.assert_array_equal(array, pruned.params[name])
    doubled = {name: 2 * array for name, array in case.graph.params.items() if array.dtype == np.float32}
    back = rewound(pruned, follow(case.graph, pruned, doubled), "test")
    for name in doubled:
        np.testing.assert_array_equal(back.params[name], 2 * pruned.params[name])


def test_zeros_survive_a_rewinding(case: Case) -> None:
    sparse = stages_of(case.graph, (Sparsify(ratio=0.9),), case.ctx).at(case.graph, 1.0, cubic)
    name = next(of_op(sparse, "Conv")).inputs[1]
    back = rewound(sparse, {name: np.ones_like(sparse.params[name])}, "test")
    np.testing.assert_array_equal(back.params[name], (sparse.params[name] != 0).astype(np.float32))


def test_the_checkpoint_of_a_lottery_is_a_file_of_the_same_network(case: Case, tmp_path: Path) -> None:
    edit = case.graph.edit()
    for name, array in case.graph.params.items():
        if array.dtype == np.float32:
            edit.set_param(name, array * np.float32(0.5))
    for node in case.graph.nodes:
        edit.replace(node)
    save(edit.finish("half"), tmp_path / "early.onnx")
    stated = f'checkpoint="{tmp_path / "early.onnx"}",lr'
    early, own = (recovered(case, RECIPES["lottery"].replace("lr", text)) for text in (stated, "lr"))
    assert early.graph.digest != own.graph.digest
    save(run_pass(PruneChannels(ratio=0.5), case.graph, case.ctx), tmp_path / "other.onnx")
    with pytest.raises(DataError, match="shape"):
        recovered(case, RECIPES["lottery"].replace("lr", f'checkpoint="{tmp_path / "other.onnx"}",lr'))


def test_netadapt_reaches_the_latency_by_cuts_on_the_targets_granule(case: Case) -> None:
    found: Outcome = recovered(case, RECIPES["netadapt"])
    assert priced(found.graph).seconds <= 0.8 * priced(case.graph).seconds
    assert found.after and found.before and found.after.score >= found.before.score - 0.1
    assert all(size % 8 == 0 for size in sizes(found.graph))
    with pytest.raises(UsageError, match=r"cost model.*Context\(find_target"):
        recovered(dataclasses.replace(case, ctx=Context()), RECIPES["netadapt"])


def test_netadapt_cuts_no_more_when_half_of_its_minutes_are_over(case: Case) -> None:
    hasty = RECIPES["netadapt"].replace("drop=0.1", "drop=1,minutes=0.0001").replace("latency=0.8", "latency=0.3")
    assert len(recovered(case, hasty).recipe.cuts) == 1


NONSENSE = ("gradual{stages=0}", "netadapt{latency=2}", "netadapt{tries=0}", "lottery{stops=3}", "dkm{softness=0}")


@pytest.mark.parametrize("text", NONSENSE)
def test_a_schedule_that_means_nothing_is_refused(case: Case, text: str) -> None:
    with pytest.raises(UsageError):
        recovered(dataclasses.replace(case, passes=(PruneChannels(ratio=0.5),)), text)


def test_a_schedule_without_passes_says_how_to_write_them(case: Case) -> None:
    with pytest.raises(UsageError, match="nothing to do step by step") as refused:
        recovered(case, "gradual")
    stated = str(refused.value.hint).removeprefix("give ").partition(", with")[0]
    assert isinstance(parse_recipe(f"gradual{{{stated}}}"), Schedule)
