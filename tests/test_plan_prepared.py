"""What the planner finds by itself: moved ranges in front of quantization, 3 bits, and ranks above the noise."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

import numpy as np
import pytest

from hwopt.analysis.held import held_bytes
from hwopt.analysis.rows import activation_rows
from hwopt.backends.ort import run
from hwopt.decide import make_task
from hwopt.io.proto import to_model
from hwopt.ir import Graph, Node, TensorType, frozen, infer_types
from hwopt.job import prepare, quiet
from hwopt.pipeline import Context, Refusal, merged, parse, run_pass
from hwopt.plan.attempt import Found, Search, price
from hwopt.plan.budget import Budget
from hwopt.plan.explain import MANY, explain
from hwopt.plan.plan import Plan, apply_plan, plan_from_json
from hwopt.plan.search import search
from hwopt.plan.solve import Limits, solve
from hwopt.plan.uniform import behind, uniform_solutions
from hwopt.plugins import find_passes, find_target
from hwopt.samples import Samples
from passes.low_rank import LowRank
from passes.quantize_weights import QuantizeWeights
from passes.smooth import Smooth

TARGET = "cortex-a76"  # whose prices depend on no machine
WIDTH = 64
PASSES = find_passes()


def make(nodes: list[Node], shape: tuple[int, ...], outputs: tuple[str, ...] = ("y",), **params: np.ndarray) -> Graph:
    held = {name: frozen(np.ascontiguousarray(array, np.float32)) for name, array in params.items()}
    types = MappingProxyType({"x": TensorType("float32", shape)})
    return infer_types(Graph("g", ("x",), outputs, tuple(nodes), types, MappingProxyType(held), {"": 21}))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape)


def attention(read_elsewhere: bool = False) -> Graph:
    """A norm with outlier channels, read by q, k and v; their sum, and a layer behind it."""
    scale = np.where(np.arange(WIDTH) % 11 == 3, 60.0, 0.5)
    nodes = [
        Node("LayerNormalization", ("x", "g", "b"), ("n",), "norm"),
        *(Node("MatMul", ("n", f"w{name}"), (f"n{name}",), name) for name in "qkv"),
        Node("Add", ("nq", "nk"), ("s",), "qk"), Node("Add", ("s", "nv"), ("sum",), "qkv"),
        Node("Relu", ("sum",), ("r",), "relu"), Node("MatMul", ("r", "wo"), ("y",), "out"),
    ]  # fmt: skip
    weights = {f"w{name}": normal(WIDTH, WIDTH, seed=place) / scale[:, None] ** 0.8 for place, name in enumerate("qkv")}
    outputs = ("y", "n") if read_elsewhere else ("y",)
    return make(nodes, (16, WIDTH), outputs, g=scale, b=normal(WIDTH), wo=normal(WIDTH, WIDTH, seed=9) / 8, **weights)


def convolutions() -> Graph:
    """Two 1 x 1 convolutions whose channels in between are of very different sizes."""
    sizes = np.geomspace(1, 300, WIDTH)
    nodes = [
        Node("Conv", ("x", "a"), ("h",), "one"), Node("Relu", ("h",), ("r",), "act"), Node("Conv", ("r", "b"), ("y",), "two"),
    ]  # fmt: skip
    first, second = normal(2, WIDTH, WIDTH)
    constants = {"a": first * sizes[:, None], "b": second / sizes}
    return make(nodes, (1, WIDTH, 8, 8), **{name: array.reshape(WIDTH, WIDTH, 1, 1) for name, array in constants.items()})


def task_for(graph: Graph, passes: str, drop: float = 0.3, size: float | None = None) -> Search:
    (shape,) = (graph.tensor(name).dims for name in graph.inputs)
    calibrate, evaluate = ({"x": normal(count * shape[0], *shape[1:], seed=count).astype(np.float32)} for count in (24, 20))
    job = prepare(
        to_model(graph), target=TARGET, shapes=None, binds=None, calibrate=calibrate, evaluate=evaluate,
        budget=Budget(drop, weight_bytes=size), passes=passes, threads=1, seed=0, progress=quiet,
    )  # fmt: skip
    task = make_task(job)
    assert task is not None
    return task


def chosen(found: Found) -> set[str]:
    """The families of each decision."""
    return {" + ".join(text.partition("{")[0] for text in decision.by) for decision in found.plan.decisions}


def error(graph: Graph, found: Found) -> float:
    """Of the outputs on data that nobody saw, relative."""
    feeds = {"x": normal(*graph.tensor("x").dims, seed=77).astype(np.float32)}
    want, got = (run(one, feeds)["y"] for one in (graph, found.graph))
    return float(np.square(want - got).sum() / np.square(want).sum())


def planned(graph: Graph, passes: str, **options: float) -> tuple[Search, Found]:
    task = task_for(graph, passes, **options)
    return task, search(task, price(task))


def test_a_plan_smooths_what_q_k_and_v_read_where_their_measured_error_gets_smaller() -> None:
    graph = attention()
    (_, without), (task, found) = (planned(graph, passes, drop=0.9) for passes in ("quantize", "smooth,quantize"))
    assert "smooth + quantize" in chosen(found)
    taken = next(one for one in found.plan.decisions if "smooth" in one.by[0])
    assert parse(taken.by[0], PASSES).site == ("q", "k", "v")
    assert "smooth in front of it: error" in taken.reason
    assert not [node for node in found.graph.nodes if node.op == "Mul"]  # the norm takes the factors
    assert found.plan.seconds_after == without.plan.seconds_after
    assert error(graph, found) < 0.5 * error(graph, without)
    assert taken.by[0] in explain(found.plan, "q")
    again = apply_plan(task.graph, plan_from_json(found.plan.to_json()), task.ctx, PASSES).graph
    assert again.digest == found.graph.digest


def test_a_plan_equalizes_channels_of_different_sizes_between_two_layers() -> None:
    graph = convolutions()
    (_, without), (task, found) = (planned(graph, passes) for passes in ("quantize", "equalize,quantize"))
    assert "equalize + quantize" in chosen(found)
    assert error(graph, found) < 0.5 * error(graph, without)
    again = apply_plan(task.graph, plan_from_json(found.plan.to_json()), task.ctx, PASSES).graph
    assert again.digest == found.graph.digest


def test_factors_that_nothing_in_front_takes_cost_their_time() -> None:
    priced = price(task_for(attention(read_elsewhere=True), "smooth,quantize"))
    plain, behind_it = (one for one in priced.options if one.text.endswith("quantize{site=q}"))
    assert behind_it.error < plain.error
    assert behind_it.gain < plain.gain


def test_what_is_not_prepared_is_refused_with_the_reason() -> None:
    priced = price(task_for(attention(), "smooth,equalize,quantize"))
    reasons = {(one.by, one.site): one.reason for one in priced.refused}
    assert reasons["equalize", "q"] == "n is read elsewhere"
    assert "small beside that of other layers" in reasons["smooth", "out"]
    tanh = [Node("Tanh", ("x",), ("t",), "tanh"), Node("MatMul", ("t", "w"), ("y",), "fc")]
    alike = price(task_for(make(tanh, (16, WIDTH), w=normal(WIDTH, WIDTH)), "smooth,quantize"))
    assert [one.reason for one in alike.refused if one.by == "smooth" and "no migration strength" in one.reason]
    none = price(task_for(attention(), "smooth,low-rank"))
    assert [one.reason for one in none.refused if one.by == "smooth"] == ["there is nothing that it prepares"]


def test_where_refusals_are_many_reasons_are_counted_without_their_numbers() -> None:
    small = "quantize{site=a}: its error of 5e-07 is small beside that of other layers"
    reasons = [small, "smooth{site=a} + quantize{site=a}: error 2e-06 -> 3e-06, not worth it"] * (MANY // 2 + 1)
    plan = Plan("host", 1, "", Budget(0.1), 0, refused=tuple(Refusal("smooth", "a", reason) for reason in reasons))
    count = MANY // 2 + 1
    line = f"  smooth at a: {count} x its error is small beside that of other layers, {count} x errs hardly less, not worth it"
    assert line in explain(plan).splitlines()


def test_a_pass_of_a_newcomer_that_prepares_changes_is_found_in_the_same_way() -> None:
    class Level(Smooth):
        name = "level"

    task = task_for(attention(), "quantize")
    priced = price(dataclasses.replace(task, passes=(*task.passes, Level)))
    assert [one for one in priced.options if one.text.startswith("level{site=q+k+v} + quantize")]


def test_layers_in_one_precision_are_tried_behind_what_prepares_them() -> None:
    priced = price(task_for(attention(), "smooth,quantize"))
    (eight,) = (one for one in uniform_solutions(priced) if all(o.form == "int8" for o in one.options))
    better = behind(priced, eight)
    assert better is not None and better.error < eight.error
    assert {option.group for option in better.options} == {option.group for option in eight.options}
    assert behind(priced, better) is None


def test_what_the_allowance_does_not_need_is_left_to_the_end() -> None:
    priced = price(task_for(attention(), "smooth,quantize"))
    (eight,) = (one for one in uniform_solutions(priced) if all(o.form == "int8" for o in one.options))
    for allowed, needed in ((200 * eight.error, False), (0.99 * eight.error, True)):
        found = solve(priced.base, priced.options, priced.pairs, Limits(allowed))
        assert found is not None
        assert found.seconds <= eight.seconds * (1 + 1e-9)
        assert found.error <= allowed
        assert any(option.passes[0].prepares is not None for option in found.options) == needed


def test_of_one_phase_what_prepares_comes_first() -> None:
    texts = ("share-weights{site=q,bits=4}", "smooth{site=q+k}", "quantize{site=q}", "smooth{site=q+v}")
    found = merged(parse(text, PASSES) for text in texts)
    assert [str(one) for one in found] == ["smooth{site=q+k+v}", "share-weights{site=q}", "quantize{site=q}"]


def test_values_are_watched_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, data = attention(), Samples({"x": normal(32, WIDTH).astype(np.float32)})
    first = activation_rows(graph, data, [("n", -1)])
    second = activation_rows(graph, data, [("r", -1)], [("x", -1), ("n", -1)])
    monkeypatch.setattr("hwopt.analysis.rows.observing", None)
    again = activation_rows(graph, data, [("n", -1), ("r", -1), ("x", -1)])
    assert again["n"] is first["n"] and again["r"] is second["r"]


def test_a_plan_takes_3_bits_where_4_are_too_many() -> None:
    graph = attention()
    ctx = Context(find_target(TARGET))
    four, three = (held_bytes(run_pass(QuantizeWeights(bits=bits, group=32), graph, ctx)) for bits in (4, 3))
    size = (four + three) / 2
    task = task_for(graph, "quantize-weights", drop=0.9, size=size)
    found = search(task, price(task))
    bits = {one.bits for one in merged(parse(t, PASSES) for d in found.plan.decisions for t in d.by)}  # type: ignore[attr-defined]
    assert 3 in bits
    assert held_bytes(found.graph) <= size
    again = apply_plan(task.graph, plan_from_json(found.plan.to_json()), task.ctx, PASSES).graph
    assert again.digest == found.graph.digest


@pytest.mark.parametrize(
    ("inputs", "opset", "forms"), [(64, 21, {(8, 0), (4, 32), (3, 32)}), (40, 21, {(8, 0), (3, 0)}), (64, 13, {(8, 0)})]
)
def test_3_bits_are_offered_in_groups_or_by_channels_where_operators_allow(
    inputs: int, opset: int, forms: set[tuple[int, int]]
) -> None:
    graph = make([Node("MatMul", ("x", "w"), ("y",), "fc")], (4, inputs), w=normal(inputs, 24))
    graph = dataclasses.replace(graph, opsets=MappingProxyType({"": opset}))
    found = [one for one in QuantizeWeights.candidates(graph, find_target(TARGET)) if isinstance(one, QuantizeWeights)]
    assert {(one.bits, one.group) for one in found} == forms


def test_ranks_above_the_noise_are_among_those_that_are_offered() -> None:
    def ranks(weight: np.ndarray) -> list[int | str]:
        graph = make([Node("MatMul", ("x", "w"), ("y",), "fc")], (4, len(weight)), w=weight)
        return [one.rank for one in LowRank.candidates(graph, find_target(TARGET)) if isinstance(one, LowRank)]

    noise = normal(192, 192, seed=3)
    steps, known = ranks(noise), ranks(normal(192, 20) @ normal(20, 192, seed=1) + 0.1 * noise)
    assert 20 in known
    assert len(known) == len(steps)
    assert len(set(steps) - set(known)) == 1
    assert steps == [12, 24, 36, 48, 72]  # shares of the break-even rank: noise has none of its own
