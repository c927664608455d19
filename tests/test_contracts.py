"""What every discovered pass and every discovered target has to keep, whoever wrote it."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import sys
import typing
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from hwopt.backends.ort import run
from hwopt.errors import HwoptError
from hwopt.ir import Graph, Node, TensorType, infer_types
from hwopt.pipeline import Context, Pass, Phase, Refusal, parse, run_pass
from hwopt.plugins import find_passes, find_target, find_targets
from hwopt.target import Target, Workload
from tests.random_graphs import random_feeds, random_graph, random_samples

PASSES, TARGETS = find_passes(), find_targets()
CLEAN = [name for name, kind in PASSES.items() if kind.phase is Phase.CLEAN]
EXACT = [name for name, kind in PASSES.items() if kind.exact]
FAMILIES = [name for name, kind in PASSES.items() if kind.phase is not Phase.CLEAN]
GRAPHS = 200
BATCHES = 8  # the graphs are split over so many test cases
TARGET = "cortex-a72"  # the same on every machine, unlike host

every_pass = pytest.mark.parametrize("name", PASSES)
every_target = pytest.mark.parametrize("name", TARGETS)
batches = pytest.mark.parametrize("seeds", [range(i, GRAPHS, BATCHES) for i in range(BATCHES)], ids=lambda seeds: seeds.start)


def context(graph: Graph, seed: int = 0) -> Context:
    """What any pass may ask for: a target and random calibration data."""
    return Context(find_target(TARGET), random_samples(graph, seed, 2 * graph.tensor(graph.inputs[0]).dims[0]), seed)


def options(kind: type[Pass], graph: Graph) -> list[Pass]:
    return [one for one in kind.candidates(graph, find_target(TARGET)) if isinstance(one, Pass)]


def instances(kind: type[Pass], graph: Graph, seed: int) -> list[Pass]:
    """The pass as it stands if it is exact; else one of its candidates, another one for each seed; none if it has none."""
    if kind.exact:
        return [kind()]
    found = options(kind, graph)
    return [found[seed % len(found)]] if found else []


def changed(before: Graph, after: Graph) -> Iterator[Node]:
    """Nodes that are new, or do something else than before."""
    for node in after.nodes:
        old = before.node.get(node.name)
        if old is None or (old.op, len(old.inputs), dict(old.attrs)) != (node.op, len(node.inputs), dict(node.attrs)):
            yield node


def assert_close(want: dict[str, np.ndarray], got: dict[str, np.ndarray], by: Pass) -> None:
    for value, array in want.items():
        scale = max(1e-3, float(np.abs(array).max(initial=0)))
        assert float(np.abs(got[value] - array).max(initial=0)) <= 2e-5 * scale, f"{by} changed {value}"


def test_the_families_and_the_clean_up_are_discovered() -> None:
    assert {"fold-constants", "fold-batch-norm", "drop-identity", "fuse-layer-norm"} <= set(CLEAN)
    assert {"prune-channels", "low-rank", "share-weights", "quantize"} <= set(FAMILIES)
    assert {target.kind for target in TARGETS.values()} >= {"cpu", "gpu", "asic"}


@every_pass
def test_name_is_the_file_name(name: str) -> None:
    assert PASSES[name].__module__.rpartition(".")[2].replace("_", "-") == name


@every_pass
def test_class_explains_itself(name: str) -> None:
    kind = PASSES[name]
    assert 10 <= len(kind.summary) <= 100
    assert inspect.getdoc(kind) != inspect.getdoc(Pass), "write a docstring: the rewrite, its condition, its source"
    assert "->" in (inspect.getdoc(kind) or "") + (sys.modules[kind.__module__].__doc__ or ""), "show the rewrite"
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert kind.run is not Pass.run


@every_pass
def test_text_form_is_read_back(name: str) -> None:
    kind = PASSES[name]
    assert str(kind()) == name
    assert parse(name, PASSES) == kind()
    for one in _variations(kind):
        assert parse(str(one), PASSES) == one


def _variations(kind: type[Pass]) -> Iterator[Pass]:
    """One instance for every option, with another value than the default's."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        try:
            yield kind(**{field.name: _other(hints[field.name], field.default)})
        except HwoptError:  # an option that checks its values may refuse this one, with a message
            continue


def _other(kind: object, default: Any) -> Any:
    if kind == tuple[str, ...]:
        return ("fc1", 'a name, with {braces} + "quotes"', "/layer/0/Conv:down")
    if kind is bool:
        return not default
    return default + 3 if kind is int else default / 2 + 0.1 if kind is float else default


@every_pass
def test_graph_where_nothing_applies_comes_back_as_it_is(name: str) -> None:
    nodes = (Node("Sin", ("x",), ("h",), "sin"), Node("Floor", ("h",), ("y",), "floor"))
    types = MappingProxyType({"x": TensorType("float32", (2, 3))})
    graph = infer_types(Graph("nothing", ("x",), ("y",), nodes, types, MappingProxyType({}), MappingProxyType({"": 21})))
    kind = PASSES[name]
    offered = [one for seed in range(4) for one in options(kind, random_graph(seed, kind="cnn"))]
    for one in [dataclasses.replace(one, site=()) for one in offered[:1]] or [kind()]:
        assert run_pass(one, graph, context(graph)) is graph
    assert options(kind, graph) == []


@every_pass
def test_unknown_site_is_an_error_that_names_it_or_changes_nothing(name: str) -> None:
    graph = random_graph(3, kind="cnn")
    offered = options(PASSES[name], graph)
    one = dataclasses.replace(offered[0] if offered else PASSES[name](), site=("no such node",))
    try:
        assert run_pass(one, graph, context(graph)) is graph
    except HwoptError as error:
        assert "no such node" in str(error)


@batches
def test_exact_passes_keep_outputs_and_find_nothing_the_second_time(seeds: range) -> None:
    for seed in seeds:
        graph = random_graph(seed, messy=seed % 2 == 1)
        feeds = random_feeds(graph, seed)
        want = run(graph, feeds)
        for name in EXACT:
            one, ctx = PASSES[name](), context(graph)
            after = run_pass(one, graph, ctx)
            assert run_pass(one, after, context(graph)) is after, f"{one} on its own result, seed {seed}"
            if after is graph:
                continue
            assert (after.inputs, after.outputs) == (graph.inputs, graph.outputs)
            assert all(node.history[-1:] == (str(one),) for node in changed(graph, after)), f"{one} leaves no stamp"
            assert_close(want, run(after, feeds), one)
            graph = after


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in EXACT])
@batches
def test_families_leave_valid_graphs_that_run(name: str, seeds: range) -> None:
    for seed in seeds:
        graph = random_graph(seed)
        for one in instances(PASSES[name], graph, seed):
            after = run_pass(one, graph, context(graph))
            assert (after.inputs, after.outputs) == (graph.inputs, graph.outputs)
            if after is graph:
                continue
            assert any(str(one) in node.history for node in after.nodes) or len(after.nodes) < len(graph.nodes)
            for value, array in run(after, random_feeds(graph, seed)).items():
                assert np.isfinite(array).all()
                assert array.shape == graph.tensor(value).dims


@every_pass
def test_same_inputs_give_the_same_bytes(name: str) -> None:
    for seed in (5, 11, 23):
        digests = set()
        for _ in range(2):
            graph = random_graph(seed, messy=True)
            for one in instances(PASSES[name], graph, seed):
                digests.add(run_pass(one, graph, context(graph)).digest)
        assert len(digests) <= 1


@every_pass
def test_candidates_are_passes_with_a_site_or_refusals_with_a_reason(name: str) -> None:
    kind = PASSES[name]
    for seed in range(12):
        graph = random_graph(seed)
        digest = graph.digest
        found = list(kind.candidates(graph, find_target(TARGET)))
        assert found == list(kind.candidates(random_graph(seed), find_target(TARGET))), "the same graph, other candidates"
        assert graph.digest == digest
        for one in found:
            if isinstance(one, Refusal):
                assert one.by == name
                assert one.site
                assert len(one.reason) > 5
                continue
            assert type(one) is kind
            assert one.site
            assert parse(str(one), PASSES) == one
        assert len({str(one) for one in found if isinstance(one, Pass)}) == sum(isinstance(one, Pass) for one in found)


@every_target
def test_target_states_what_it_is(name: str) -> None:
    target = find_target(name)
    assert target.name == name
    assert len(target.summary) >= 10
    assert target.kind in ("cpu", "gpu", "asic")
    assert target.cores >= 1
    assert "float32" in target.peak or "int8" in target.peak
    assert all(1e6 < peak < 1e17 for peak in target.peak.values())
    assert all(granule >= 1 for granule in target.granule.values())
    assert target.activation in ("int8", "uint8")
    assert target.tvm["kind"]
    assert all(kernel.lanes >= 1 and kernel.depth >= 1 and kernel.registers >= 1 for kernel in target.microkernels.values())
    sizes = [memory.bytes for memory in target.memories]
    assert sizes == sorted(sizes), "memories stand nearest first"
    assert all(memory.bytes > 0 and memory.bytes_per_second > 0 for memory in target.memories)


def layer(dtype: str, kind: str = "conv", **changes: int) -> Workload:
    """A convolution of 28 x 28 pixels, 64 channels to 64, with the bytes that it must move."""
    size = {"m": 784, "n": 64, "k": 576, "groups": 1, "elements": 50_176, **changes}
    if kind == "depthwise":
        size.update(n=1, k=9, groups=size["n"])
    if kind not in ("conv", "depthwise", "matmul"):
        size.update(m=0, n=0, k=0)
    wide = 1 if dtype == "int8" else 4
    move = {"read_bytes": 50_176 * wide, "write_bytes": size["elements"] * wide, "weight_bytes": size["n"] * size["k"] * wide}
    return Workload("layer", kind, dtype, taps=9, **size, **move)


def seconds(target: Target, workload: Workload, threads: int = 1) -> float:
    cost = target.cost.estimate(workload, threads)
    assert math.isfinite(cost.seconds)
    assert cost.seconds > 0
    assert math.isfinite(cost.joules)
    assert cost.joules >= 0
    assert cost.source in ("analytical", "table", "learned", "measured")
    if cost.low is not None and cost.high is not None:
        assert cost.low <= cost.seconds <= cost.high
    return cost.seconds


@every_target
def test_cost_of_every_kind_of_kernel_is_positive_and_finite(name: str) -> None:
    target = find_target(name)
    kinds = ("conv", "depthwise", "matmul", "pool", "elementwise", "reduce", "move")
    for kind, dtype, threads in itertools.product(kinds, target.peak, (1, target.cores)):
        assert seconds(target, layer(dtype, kind), threads) < 10
    assert seconds(target, Workload("empty", "move", "float32")) < 1


@every_target
@pytest.mark.parametrize("size", ["m", "n", "k", "elements"])
def test_more_work_never_costs_less(name: str, size: str) -> None:
    target = find_target(name)
    for dtype in target.peak:
        base = getattr(layer(dtype), size)
        series = [seconds(target, layer(dtype, **{size: base * factor // 4})) for factor in range(1, 33)]
        rising = [more >= less * (1 - 1e-12) for less, more in itertools.pairwise(series)]
        assert all(rising), f"{dtype}: {size}"
        assert series[-1] > series[0]


@every_target
def test_int8_is_not_slower_than_float_where_its_peak_is_higher(name: str) -> None:
    target = find_target(name)
    if target.peak.get("int8", 0.0) >= target.peak.get("float32", math.inf):
        assert seconds(target, layer("int8")) <= seconds(target, layer("float32"))
