"""Weights of 4 bits in plans: layer by layer where bytes are short, rounded with care in the plan that is chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from hwopt.analysis.held import held_bytes
from hwopt.decide import make_task
from hwopt.errors import PassError
from hwopt.io.onnx import save
from hwopt.ir import Graph
from hwopt.job import Job, prepare, quiet
from hwopt.pipeline import Context, Pass, Refusal, merged, parse, run_pass
from hwopt.plan.attempt import Priced, Search, measured, price
from hwopt.plan.budget import Budget
from hwopt.plan.finer import refined
from hwopt.plan.search import make_plan, search
from hwopt.plan.solve import Solution, predicted
from hwopt.plugins import find_passes, find_target
from passes.quantize import Quantize
from passes.quantize_weights import QuantizeWeights
from tests._recover import blobs, trained_net

FORMS = (",weights=int4", "", "")
TARGET = "systolic-16x16"  # whose prices depend on no machine


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "net.onnx"
    save(trained_net(), path)
    return path


def pictures(count: int, seed: int) -> dict[str, np.ndarray]:
    """Large spots of one colour: what lies side by side is alike, which is what careful rounding makes use of."""
    ((name, array),) = blobs(count, seed).arrays.items()
    return {name: np.ascontiguousarray(array[:, :, ::3, ::3].repeat(3, 2).repeat(3, 3))}


def job_for(path: Path, size: float | None = None, passes: str = "quantize", drop: float = 0.5) -> Job:
    return prepare(
        path, target=TARGET, shapes=None, binds=None, calibrate=pictures(300, 1), budget=Budget(drop, weight_bytes=size),
        evaluate={**pictures(200, 2), "labels": blobs(200, 2).labels}, passes=passes, threads=1, seed=0, progress=quiet,
    )  # fmt: skip


def task_for(path: Path, **options: object) -> Search:
    task = make_task(job_for(path, **options))  # type: ignore[arg-type]
    assert task is not None
    return task


def layers(path: Path) -> list[str]:
    return [node.name for node in job_for(path).graph.nodes if node.op in ("Conv", "Gemm")]


def stored(graph: Graph, name: str) -> np.ndarray:
    """The integer weights of a layer."""
    return graph.params[graph.producer[graph.node[name].inputs[1]].inputs[0]]


def candidates(path: Path) -> list[Pass]:
    job = job_for(path)
    return [one for one in Quantize.candidates(job.graph, job.target) if not isinstance(one, Refusal)]


def test_each_layer_is_offered_in_4_bits_and_products_of_matrices_by_rows(network: Path) -> None:
    found, names = candidates(network), layers(network)
    assert [one.site for one in found if one.weights == ("int4",)] == [(name,) for name in names]  # type: ignore[attr-defined]
    assert [one.site for one in found if one.apart] == [(names[-1],)]


def test_4_bits_are_no_option_where_only_time_is_short(network: Path) -> None:
    priced = price(task_for(network))
    assert not [option for option in priced.options if "int4" in option.text]
    assert [one for one in priced.refused if "int4" in one.reason and "is not faster" in one.reason]


def test_what_hands_floats_to_its_neighbours_shares_no_conversions_with_them(network: Path) -> None:
    priced = price(task_for(network, size=1e5))
    rows = [option for option in priced.options if "dynamic" in option.text]
    assert rows and all(not option.form for option in rows)
    assert not [pair for pair in priced.pairs if {id(pair.one), id(pair.other)} & set(map(id, rows))]
    assert not [option for option in rows if len(option.passes) > 1]


def test_a_plan_has_4_bits_where_bytes_ask_for_them_and_rounds_them_with_care(network: Path) -> None:
    job = job_for(network)
    eight, four = (held_bytes(run_pass(Quantize(weights=(bits,)), job.graph, job.ctx)) for bits in ("int8", "int4"))
    task = task_for(network, size=(eight + four) / 2)
    found = search(task, price(task))
    (whole,) = found.plan.passes(find_passes())
    assert isinstance(whole, Quantize)
    assert "int4" in whole.weights
    assert (whole.rounding == "adaround") == any("with more care" in one.reason for one in found.plan.decisions)
    assert whole.rounding == "adaround" or any("not worth it" in one.reason for one in found.plan.refused)
    assert held_bytes(found.graph) <= (eight + four) / 2


def solution_of(task: Search, *texts: str) -> Solution:
    return _chosen(price(task), texts)


def _chosen(priced: Priced, texts: Sequence[str]) -> Solution:
    options = tuple(option for option in priced.options if option.text in texts)
    assert len(options) == len(texts)
    figures = predicted(priced.base, options, ())
    return Solution(options, figures["seconds"], 0, 0, figures["joules"], figures["error"], 0.0, "stated")


def test_care_is_taken_where_outputs_err_less_and_else_it_is_refused(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, names = task_for(network, size=1e5), layers(network)
    plain = solution_of(task, *(f"quantize{{site={name},weights=int4}}" for name in names))
    better, refused = refined(task, plain)
    assert not refused
    assert {one.rounding for option in better.options for one in option.passes} == {"adaround"}  # type: ignore[attr-defined]
    monkeypatch.setattr("hwopt.plan.finer.WORTH", 0.0)
    same, refused = refined(task, plain)
    assert same is plain
    assert "not worth it" in refused[0].reason


def test_what_is_done_with_more_care_is_what_was_chosen(network: Path) -> None:
    task, names = task_for(network, size=1e5), layers(network)
    priced = price(task)
    texts = [f"quantize{{site={name},weights=int4}}" for name in names]
    better, _ = refined(task, _chosen(priced, texts))
    plan = make_plan(task, priced, measured(task, priced, better, 1.0), (), task.amounts(task.graph))
    assert [offer.text for offer in plan.offers if offer.chosen] == [one.by[0] for one in plan.decisions]
    assert all("rounding=adaround" in one.by[0] for one in plan.decisions) and len(plan.decisions) == len(names)
    assert not [one for one in plan.refused if one.reason.startswith(tuple(f"{text}:" for text in texts))]


def test_what_is_trained_anyway_is_not_rounded_with_care(network: Path) -> None:
    job = job_for(network)
    four = held_bytes(run_pass(Quantize(weights=("int4",)), job.graph, job.ctx))
    task = dataclasses.replace(task_for(network, size=1.01 * four), refine=False)
    found = search(task, price(task))
    assert "weights=int4" in str(found.plan.decisions) and "rounding" not in str(found.plan.decisions)


def test_what_is_not_coarse_stays_as_it_is(network: Path) -> None:
    task, names = task_for(network, size=1e5), layers(network)
    plain = solution_of(task, f"quantize{{site={names[0]}}}")
    assert refined(task, plain) == (plain, ())
    assert list(QuantizeWeights().finer()) == []
    assert [str(one) for one in QuantizeWeights(bits=4).finer()] == ["quantize-weights{bits=4,method=gptq,act_order=true}"]


def test_one_pass_holds_layers_of_4_and_of_8_bits(network: Path) -> None:
    graph, names = job_for(network).graph, layers(network)
    (whole,) = merged(parse(f"quantize{{site={name}{rest}}}", find_passes()) for name, rest in zip(names, FORMS, strict=True))
    assert str(whole) == f"quantize{{site={'+'.join(names)},weights=int4+int8+int8}}"
    after = whole.run(graph, Context(find_target(TARGET), blobs(32, 0)))
    widths = [str(stored(after, name).dtype) for name in names]
    assert widths == ["int4", "int8", "int8"]
    (plain,) = merged(Quantize((name,)) for name in names)
    assert str(plain) == f"quantize{{site={'+'.join(names)}}}"
    with pytest.raises(PassError, match="2 forms of weights for 3 layers"):
        dataclasses.replace(whole, weights=("int4", "int8")).run(graph, Context())


def test_only_the_coarse_weights_of_a_mixed_pass_are_rounded_with_care(network: Path) -> None:
    graph, names, ctx = job_for(network).graph, layers(network), Context(find_target(TARGET), blobs(64, 0))
    mixed = Quantize(tuple(names), weights=("int4", "int8", "int4"))
    before, after = (run_pass(one, graph, ctx) for one in (mixed, dataclasses.replace(mixed, rounding="adaround")))
    assert [name for name in names if not np.array_equal(stored(before, name), stored(after, name))] == names[::2]
