"""Limits on memory and size: a peak is the largest of many sums, and what can be met is met, in the library too."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from hwopt.analysis.held import held_bytes
from hwopt.analysis.liveness import alive_bytes, peak_activation_bytes
from hwopt.analysis.size import weight_bytes
from hwopt.build import Built, build
from hwopt.decide import _broken, make_task
from hwopt.errors import BudgetError
from hwopt.ir import Graph
from hwopt.job import Job, prepare, quiet
from hwopt.pipeline import PassManager, merged, run_pass
from hwopt.plan.attempt import Search, price
from hwopt.plan.budget import parse_budget
from hwopt.plan.front import front
from hwopt.plan.plan import plan_from_json
from hwopt.plan.search import search
from hwopt.plan.solve import Limits, predicted, solve
from hwopt.plan.store import identity
from hwopt.plugins import find_target
from passes.quantize import Quantize

CLASSES = 8


def equal_peaks() -> ModelProto:
    """A stem and three wide blocks one behind the other: the memory that each of them needs is the same."""
    random = np.random.default_rng(0)
    shapes = {"stem": (16, 3, 3, 3), "out": (16, CLASSES)}
    for number in range(3):
        shapes |= {f"e{number}": (32, 16, 1, 1), f"p{number}": (16, 32, 1, 1)}
    weights = {n: (random.standard_normal(s) / np.sqrt(np.prod(s[1:]))).astype(np.float32) for n, s in shapes.items()}
    nodes, value = [helper.make_node("Conv", ["x", "stem"], ["s"], name="stem", pads=[1, 1, 1, 1])], "s"
    for number in range(3):
        nodes += [
            helper.make_node("Conv", [value, f"e{number}"], [f"e{number}.y"], name=f"e{number}"),
            helper.make_node("Relu", [f"e{number}.y"], [f"r{number}"], name=f"r{number}"),
            helper.make_node("Conv", [f"r{number}", f"p{number}"], [f"p{number}.y"], name=f"p{number}"),
            helper.make_node("Relu", [f"p{number}.y"], [f"b{number}"], name=f"b{number}"),
        ]
        value = f"b{number}"
    nodes += [
        helper.make_node("GlobalAveragePool", [value], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "out"], ["y"], name="out"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 3, 8, 8]), ("y", [1, CLASSES]))]
    arrays = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "peaks", ends[:1], ends[1:], arrays)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def noise(count: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).standard_normal((count, 3, 8, 8)).astype(np.float32)}


def job_for(*limits: str, drop: str = "100%", passes: str = "prune-channels", target: str = "systolic-16x16") -> Job:
    return prepare(
        equal_peaks(), target=target, shapes=None, binds=None, calibrate=noise(16), evaluate=noise(32),
        budget=parse_budget(drop, limits), passes=passes, threads=1, seed=0, progress=quiet,
    )  # fmt: skip


def test_a_peak_that_several_kernels_share_is_lowered_at_all_of_them() -> None:
    job = job_for("memory=9kB")
    peaks = [size for size in alive_bytes(job.graph).values() if size == peak_activation_bytes(job.graph)]
    assert len(peaks) > 3  # no single width lowers it
    task = make_task(job)
    assert task is not None
    found = search(task, price(task))
    assert peak_activation_bytes(found.graph) <= 9000


def test_what_several_changes_do_to_the_peak_is_what_the_graph_says() -> None:
    job = job_for("memory=9kB", passes="prune-channels,quantize")
    task = make_task(job)
    assert task is not None
    priced = price(task)
    dtypes = list({o.group: o for o in priced.options if o.form == "int8"}.values())
    widths = list({o.group: o for o in priced.options if o.prunes}.values())
    for chosen in (dtypes, dtypes[1:], widths, widths[:1] + dtypes[-1:]):
        graph = PassManager(merged(one for option in chosen for one in option.passes)).run(job.graph, job.ctx).graph
        said = predicted(priced.base, chosen, priced.pairs)["peak_bytes"]
        assert said == pytest.approx(peak_activation_bytes(graph), rel=0.05)


def test_the_least_peak_is_found() -> None:
    task = make_task(job_for("memory=9kB"))
    assert task is not None
    priced = price(task)
    found = solve(priced.base, priced.options, priced.pairs, Limits(), aim="peak_bytes")
    assert found is not None
    assert solve(priced.base, priced.options, priced.pairs, Limits(peak_bytes=0.97 * found.peak_bytes)) is None


def test_the_unchanged_model_is_among_the_nearest() -> None:
    job = job_for("energy=1nJ", drop="0%", passes="share-weights")
    task = make_task(job)
    assert task is not None
    start = f"{task.amounts(task.graph).joules * 1e9:.0f}"
    with pytest.raises(BudgetError, match=rf"nearest plans: energy={start[:3]}\d*nJ at a drop of 0.00%"):
        search(task, price(task))


def test_what_nearest_states_is_met_when_it_is_stated() -> None:
    priced = price(task) if (task := make_task(job_for("memory=1kB"))) else None
    assert task is not None and priced is not None
    with pytest.raises(BudgetError) as refused:
        search(task, priced)
    stated = str(refused.value).partition("nearest plans: ")[2].partition(" at a drop")[0]
    found = search(dataclasses.replace(task, budget=parse_budget("100%", (stated,))), priced)
    assert peak_activation_bytes(found.graph) <= found.plan.budget.limits()["peak_bytes"]
    with pytest.raises(BudgetError):  # and it is the least
        below = parse_budget("100%", (f"memory={peak_activation_bytes(found.graph) * 0.97}B",))
        search(dataclasses.replace(task, budget=below), priced)


def test_another_target_of_the_same_name_goes_on_with_no_others_folder() -> None:
    task = make_task(job_for())
    assert task is not None
    slower = dataclasses.replace(task.target, cost=dataclasses.replace(task.target.cost, hertz=1e8))  # type: ignore[type-var]
    assert slower.name == task.target.name
    key = identity(task, "trials")
    assert identity(dataclasses.replace(task, target=slower), "trials") != key
    again = make_task(job_for())
    assert again is not None and identity(again, "trials") == key


def test_plans_of_a_front_state_the_users_limits(tmp_path: Path) -> None:
    front(task := made("quantize"), "energy", 2, tmp_path)
    for file in tmp_path.glob("plan-*.json"):
        assert plan_from_json(file.read_text()).budget == task.budget


def made(passes: str) -> Search:
    task = make_task(job_for(passes=passes))
    assert task is not None
    return task


def convolution(taps: int) -> Graph:
    job = prepare(
        layer(taps), target="host", shapes=None, binds=None, calibrate=(data := {"x": noise(8)["x"].repeat(32, 1)[:, :32]}),
        evaluate=data, budget=parse_budget("100%"), passes="quantize", threads=1, seed=0, progress=quiet,
    )  # fmt: skip
    return run_pass(Quantize(weights=("int4",)), job.graph, job.ctx)


def layer(taps: int) -> ModelProto:
    weight = np.random.default_rng(0).standard_normal((64, 32, taps, taps)).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="c", pads=[taps // 2] * 4)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, c, 8, 8]) for n, c in (("x", 32), ("y", 64))]
    graph = helper.make_graph([node], "layer", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("taps", [1, 3])
def test_what_no_kernel_decodes_counts_as_the_library_holds_it(taps: int, tmp_path: Path) -> None:
    graph = convolution(taps)
    built = build(graph, find_target("host"), 1, tmp_path, compact=True)
    assert held_bytes(graph) == pytest.approx(built.library.weight_bytes, rel=0.2)
    assert (held_bytes(graph) > 1.5 * weight_bytes(graph)) == (taps == 3)


def test_a_limit_on_size_holds_for_the_library() -> None:
    job = dataclasses.replace(job_for(), budget=parse_budget("100%", ("size=40kB",)))
    assert "weights 60 KB of 40 KB" in _broken(job, _built(job.graph, 60_000), 0.0)
    assert not _broken(job, _built(job.graph, 30_000), 0.0)


def _built(graph: Graph, size: int) -> Built:
    library = SimpleNamespace(weight_bytes=size, arena_bytes=0)
    return cast(Built, SimpleNamespace(graph=graph, library=library))


def test_weights_that_a_library_pads_shrink_what_the_next_plan_may_take() -> None:
    task = dataclasses.replace(made("quantize"), weight_scale=1.25, budget=parse_budget("100%", ("size=10kB",)))
    changed = dataclasses.replace(task.graph, name="changed")
    assert task.amounts(changed).bytes == 1.25 * held_bytes(changed)
    assert task.first_limits().bytes == 8000


def test_padding_that_a_plan_s_library_showed_is_not_put_on_the_unchanged_model() -> None:
    task = dataclasses.replace(made("quantize"), weight_scale=1.25)
    assert task.amounts(task.graph).bytes == held_bytes(task.graph)
