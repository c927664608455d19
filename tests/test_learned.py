"""Learned prices: trees as data, intervals that cover, tables that are found and checked, profiling that can be interrupted."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hwopt import profiling
from hwopt.analysis.workload import kernels, workloads
from hwopt.backends.tvm.kernels import default_schedule
from hwopt.backends.tvm.kernels.geometry import geometry
from hwopt.backends.tvm.kernels.schedule import cycles
from hwopt.backends.tvm.kernels.spec import ConvSpec
from hwopt.backends.tvm.learn import measure, stock, trees
from hwopt.backends.tvm.learn.features import counted
from hwopt.backends.tvm.learn.measure import attribute, profile
from hwopt.backends.tvm.learn.model import Learned
from hwopt.backends.tvm.learn.networks import FAMILIES, random_network
from hwopt.backends.tvm.learn.predictor import SLOWEST_LINE, most_of, weighed
from hwopt.backends.tvm.learn.records import Record, append, clocked, fastest, judged, quality, read, table_of, together
from hwopt.backends.tvm.learn.records import learned as learned_from
from hwopt.backends.tvm.learn.table import Table, find_table, from_json, load_table, path_for, table_name, work_key
from hwopt.backends.tvm.learn.tiles import tile_of
from hwopt.backends.tvm.learn.trees import Trees, from_sklearn
from hwopt.backends.tvm.tune.runner import Runner
from hwopt.backends.tvm.tune.task import templates_digest
from hwopt.emit.program import Call
from hwopt.errors import UnsupportedError, UsageError
from hwopt.plugins import find_target
from hwopt.profiling import form_of, profile_target, sample_graph, seconds_of
from hwopt.target import Coded, MicroKernel, Workload, origin
from targets import _isa_x86
from targets._roofline import Roofline
from tests.test_lower import graph_of

MICRO = MicroKernel("float32", 8, 1, 16, "float32", "float32")
PAIRS = MicroKernel("int8", 8, 8, 14, "int32", "uint8", "pmadd", narrow=2)  # two words at once
ANALYTICAL = Roofline({"float32": 1e11}, 1e10, find_target("x86-64-v2").memories, {"float32": 8}, launch_seconds=1e-6)


def layer(n: int = 64, k: int = 64, side: int = 14) -> Workload:
    size = side * side
    return Workload(
        "layer", "conv", "float32", size, n, k, read_bytes=4 * size * k, write_bytes=4 * size * n, weight_bytes=4 * n * k,
        window=(1, side, side, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0), dims=(1, n, side, side), steps=("Conv",),
    )  # fmt: skip


def truth(work: Workload) -> float:
    """A made-up machine."""
    return 1e-6 + work.macs / 4e10 * (1.5 if work.n % 8 else 1.0) + work.bytes / 1e10


def synthetic(count: int = 240, seed: int = 0) -> list[Record]:
    random = np.random.default_rng(seed)
    works = [layer(int(random.integers(4, 256)), int(random.integers(4, 256)), int(random.integers(4, 32))) for _ in range(count)]
    noise = 1 + 0.01 * random.random(count)
    return [Record(w, truth(w) * n, 0.01, 1e-5, 1, i, "float32") for i, (w, n) in enumerate(zip(works, noise, strict=True))]


@pytest.fixture(scope="module")
def target():
    return dataclasses.replace(find_target("x86-64-v2"), microkernels={"float32": MICRO}, runs_here=True)


@pytest.fixture(scope="module")
def table(target) -> Table:
    return table_of(synthetic(), target, None, "2026-01-01")


@pytest.fixture
def learned(table: Table, tmp_path: Path) -> Learned:
    path = tmp_path / "table.json"
    path.write_text(table.to_json())
    return Learned(path, ANALYTICAL, {"float32": MICRO})


def test_trees_predict_what_the_library_predicts() -> None:
    from sklearn.ensemble import GradientBoostingRegressor

    random = np.random.default_rng(0)
    rows, wanted = random.random((200, 5)), random.random(200)
    booster = GradientBoostingRegressor(n_estimators=20, max_depth=4).fit(rows, wanted)
    fresh = random.random((50, 5))
    assert np.allclose(from_sklearn(booster).predict(fresh), booster.predict(fresh), atol=1e-6)


def test_unseen_kernels_are_predicted_and_covered_by_their_intervals(table: Table, target) -> None:
    found = judged(table.model, synthetic(200, seed=7), target)
    assert found.within_10 > 0.85
    assert found.covered > 0.8


def test_intervals_grow_away_from_what_was_measured(table: Table, target) -> None:
    known, far = (counted(work, target.microkernels, 1) for work in (layer(), layer(4000, 4000, 100)))
    assert table.model.predict(far, 1)[1] > 0.1 + table.model.predict(known, 1)[1]


def test_a_table_is_the_same_after_json(table: Table, target) -> None:
    again = from_json(table.to_json(), "here")
    assert again.to_json() == table.to_json()
    for record in synthetic(20, seed=3):
        found = counted(record.work, target.microkernels, 1)
        assert again.model.predict(found, 1) == table.model.predict(found, 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 99),
        ("threads", []),
        ("measured", {"a": ["fast"]}),
        ("model", {"product float32 x1": {"times": [["issue", -1.0]], "shape": [], "trees": []}}),
        ("model", {"product float32 x1": {"times": [["issue", 1.0]], "shape": []}}),
        ("facts", None),
    ],
)
def test_a_bad_table_is_one_error_that_names_file_and_key(table: Table, tmp_path: Path, key: str, value: object) -> None:
    data = json.loads(table.to_json())
    data[key] = value
    if value is None:
        del data[key]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match=key) as caught:
        load_table(path)
    assert str(path) in str(caught.value)


def test_a_table_that_is_no_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(UsageError, match=r"t\.json"):
        load_table(tmp_path / "t.json")


def test_measured_kernels_cost_what_was_measured(learned: Learned) -> None:
    record = synthetic()[0]
    found = learned.estimate(record.work, 1)
    assert (found.source, found.seconds) == ("measured", pytest.approx(record.seconds, rel=1e-4))
    assert found.low is not None and found.high is not None and found.low <= found.seconds <= found.high


def test_other_kernels_are_learned_with_an_interval(learned: Learned) -> None:
    work = layer(100, 100, 21)
    found = learned.estimate(work, 1)
    assert found.source == "learned"
    assert found.seconds == pytest.approx(truth(work), rel=0.2)
    assert found.low is not None and found.high is not None and found.low < found.seconds < found.high


def test_what_no_graph_made_or_nobody_measured_stays_analytical(learned: Learned) -> None:
    for work in (dataclasses.replace(layer(), steps=()), dataclasses.replace(layer(), dtype="float64")):
        assert learned.estimate(work, 1) == ANALYTICAL.estimate(work, 1)


def test_numbers_of_threads_that_were_not_measured_stay_analytical(learned: Learned) -> None:
    work = layer(256, 256, 28)
    assert learned.estimate(work, 4) == ANALYTICAL.estimate(work, 4)
    assert learned.estimate(work, 1) != ANALYTICAL.estimate(work, 1)


@pytest.fixture
def few_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "TREES", 30)


def on_two(records: list[Record]) -> list[Record]:
    """The same kernels on two threads of the made-up machine, which take 0.6 times as long."""
    return [dataclasses.replace(record, seconds=0.6 * record.seconds, threads=2) for record in records]


@pytest.mark.usefixtures("few_trees")
def test_a_table_says_how_much_faster_than_stated_the_clock_was(learned: Learned) -> None:
    assert learned.clock == 1.0  # nobody stated one
    assert dataclasses.replace(learned, hertz=4e9).clock == pytest.approx(80_000 / 1e-5 / 4e9)


@pytest.mark.usefixtures("few_trees")
def test_two_threads_are_learned_where_they_were_measured(target, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(table_of([*synthetic(), *on_two(synthetic())], target, None).to_json())
    model, work = Learned(path, ANALYTICAL, {"float32": MICRO}), layer(100, 100, 21)
    assert model.table.threads == (1, 2)
    one, two = (model.estimate(work, threads) for threads in (1, 2))
    assert two.source == "learned" and two.seconds == pytest.approx(0.6 * one.seconds, rel=0.1)
    assert model.estimate(synthetic()[0].work, 2).source == "measured"


@pytest.mark.usefixtures("few_trees")
def test_a_family_that_was_measured_on_one_thread_only_follows_the_analytical_model_on_two(target, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    others = [dataclasses.replace(r, work=dataclasses.replace(r.work, kind="elementwise", m=0)) for r in synthetic(160)]
    path.write_text(table_of([*synthetic(), *on_two(others)], target, None).to_json())
    model, work = Learned(path, ANALYTICAL, {"float32": MICRO}), layer(100, 100, 21)
    ratio = ANALYTICAL.estimate(work, 2).seconds / ANALYTICAL.estimate(work, 1).seconds
    assert model.estimate(work, 2).seconds == pytest.approx(ratio * model.estimate(work, 1).seconds)
    assert model.estimate(work, 2).source == "learned"


@pytest.mark.usefixtures("few_trees")
def test_products_of_small_integers_follow_those_of_all_integers_where_only_they_were_measured(target, tmp_path: Path) -> None:
    plain = dataclasses.replace(MICRO, dtype="int8", depth=2, accumulator="int32", activation="uint8", intrinsic="pmadd")
    pairs = dataclasses.replace(plain, depth=4, narrow=1, others=(plain,))
    records = [dataclasses.replace(one, work=dataclasses.replace(one.work, dtype="int8")) for one in synthetic()]
    path = tmp_path / "table.json"
    path.write_text(table_of(records, dataclasses.replace(target, microkernels={"int8": pairs}), None).to_json())
    prior = dataclasses.replace(ANALYTICAL, peak={"int8": 1e10}, granule={"int8": 8}, micros={"int8": pairs})
    model, work = Learned(path, prior, {"int8": pairs}), dataclasses.replace(layer(90, 70, 9), dtype="int8")
    small = dataclasses.replace(work, narrow=1)
    full, found = model.estimate(work, 1), model.estimate(small, 1)
    assert (full.source, found.source) == ("learned", "learned")
    gain = prior.estimate(small, 1).seconds / prior.estimate(work, 1).seconds
    assert gain < 0.9 and found.seconds / full.seconds == pytest.approx(gain)


def test_products_of_two_words_are_priced_by_what_those_of_one_word_taught() -> None:
    first = _isa_x86.microkernels({"avx2", "fma"})["int8"]
    work = dataclasses.replace(layer(128, 64), dtype="int8")
    one, two = (counted(dataclasses.replace(work, narrow=pairs), {"int8": first}, 1) for pairs in (1, 2))
    assert one.family == two.family and one.times.keys() == two.times.keys()
    assert two.times["products"] == pytest.approx(0.8 * one.times["products"])


def test_a_number_of_threads_with_few_kernels_is_none_that_was_measured(target) -> None:
    assert table_of([*synthetic(), *on_two(synthetic(40))], target, None).threads == (1,)


def test_weights_as_codes_cost_as_much_more_as_the_analytical_model_says(learned: Learned) -> None:
    plain = layer(256, 256)
    coded = dataclasses.replace(plain, m=1, coded=Coded(8_000, 2, True))
    one = dataclasses.replace(coded, coded=None)
    ratio = ANALYTICAL.estimate(coded, 1).seconds / ANALYTICAL.estimate(one, 1).seconds
    assert learned.estimate(coded, 1).seconds == pytest.approx(ratio * learned.estimate(one, 1).seconds)


def test_sums_of_learned_and_measured_prices_say_that_they_are_mixed(learned: Learned) -> None:
    total = learned.estimate(synthetic()[0].work, 1) + learned.estimate(layer(100, 100, 21), 1)
    assert total.source == "mixed"


@pytest.mark.usefixtures("few_trees")
def test_kernels_with_cold_weights_cost_more_also_where_they_were_measured(target, tmp_path: Path) -> None:
    """The same layers in a small model and in one whose weights pass through all caches."""
    far = 64 << 20
    cold = [
        dataclasses.replace(r, work=dataclasses.replace(r.work, footprint=far), seconds=r.seconds + r.work.weight_bytes / 2e8)
        for r in synthetic(seed=5)
    ]
    path = tmp_path / "table.json"
    path.write_text(table_of([*synthetic(), *cold], target, None).to_json())
    model, record = Learned(path, ANALYTICAL, {"float32": MICRO}), synthetic()[0]
    there = dataclasses.replace(record.work, footprint=far)
    assert (record.work, model.estimate(record.work, 1).source) == (there, "measured")
    wanted = record.seconds + record.work.weight_bytes / 2e8
    assert model.estimate(there, 1).seconds == pytest.approx(wanted, rel=0.25)
    assert wanted > 1.5 * record.seconds


def test_prices_say_where_they_are_from(learned: Learned) -> None:
    assert "2026-01-01" in origin(learned)
    assert origin(ANALYTICAL) == "analytical"


def test_a_table_is_found_by_processor_and_instructions(tmp_path: Path, target) -> None:
    path = path_for(target, tmp_path)
    assert find_table(target.tvm, tmp_path) is None
    path.write_text("")
    assert find_table(target.tvm, tmp_path) == path
    assert table_name("a", "avx2") != table_name("a", "avx512f")
    assert find_table({**target.tvm, "mattr": ["+other"]}, tmp_path) is None


def test_keys_ignore_names_and_tell_kernels_apart() -> None:
    assert work_key(layer(), 1) == work_key(dataclasses.replace(layer(), name="other"), 1)
    assert len({work_key(layer(), 1), work_key(layer(), 2), work_key(layer(65), 1)}) == 3


def test_tiles_are_the_ones_that_the_templates_choose() -> None:
    for micro in (MICRO, MicroKernel("int8", 16, 4, 32, "int32", "uint8"), PAIRS):
        for n, channels, side, kernel in ((64, 64, 14, 3), (24, 10, 7, 1), (100, 3, 30, 5)):
            spec = ConvSpec(1, side, side, channels, n, (kernel, kernel))
            shape, plan = geometry(spec), default_schedule(spec, micro)
            steps = shape.taps[0] * shape.taps[1] * shape.words(micro.depth)
            found = tile_of(shape.rows, shape.columns, n, steps, micro)
            tile = (plan.tile_rows, plan.tile_columns, plan.vectors)
            assert found == (pytest.approx(cycles(shape, micro, *tile)), tile)


def test_counts_are_never_below_zero_and_facts_finite() -> None:
    for seed in range(10):
        for work in workloads(sample_graph(seed, "float32", find_target("x86-64-v2"))):
            found = counted(work, {"float32": MICRO}, 1)
            assert all(value >= 0 for value in found.times.values())
            assert np.isfinite(list(found.shape.values())).all()


def loop(kind: str, step: str, read: int, dims: tuple[int, ...], *more: str, dtype: str = "float32") -> Workload:
    size = 1 if dtype == "uint8" else 4
    return Workload(
        "loop", kind, dtype, elements=read, read_bytes=size * read, write_bytes=size * int(np.prod(dims)), dims=dims,
        steps=(step, *more),
    )  # fmt: skip


def test_sums_over_the_innermost_axis_and_over_others_are_counted_apart() -> None:
    rows, columns = (counted(loop("reduce", f"ReduceSum {axis}", 64 * 48, (1, 48)), {}, 1).times for axis in (2, 1))
    assert rows["row_vectors"] + rows["row_singles"] > 0 == rows["sums"]
    assert columns["sums"] > 0 == columns["row_vectors"] + columns["row_singles"]


def test_windows_are_counted_by_the_places_that_they_see(target) -> None:
    node = "y = MaxPool <kernel_shape = [3,2], strides = [2,1], pads = [1,0,1,1], dilations = [1,2]> (x)"
    (work,) = workloads(graph_of(f"agraph (float[1,40,9,7] x) => (float[1,40,5,6] y) {{ {node} }}"))
    seen = np.zeros((5, 6))
    for y, x, down, across in itertools.product(range(5), range(6), range(3), range(2)):
        seen[y, x] += 0 <= 2 * y - 1 + down < 9 and 0 <= x + 2 * across < 7
    found = counted(work, {"float32": dataclasses.replace(target.microkernels["float32"], lanes=16)}, 1)
    assert found.family == "pooled floats"
    vectors = 3  # 16, 16 and 8 channels
    assert (found.times["taps"], found.times["results"]) == ((seen == 6).sum() * 6 * vectors, 30 * vectors)
    assert found.times["border_taps"] == seen.sum() * vectors - found.times["taps"]


def test_a_function_of_bytes_is_a_table_and_costs_no_function() -> None:
    one = counted(loop("elementwise", "Sigmoid", 6400, (1, 64, 100), "QuantizeLinear", dtype="uint8"), {}, 1)
    other = counted(loop("elementwise", "Sigmoid", 6400, (1, 64, 100)), {}, 1)
    assert one.family == "tables" and one.times["do_Sigmoid"] == 0 < one.times["looked_up"]
    assert other.family == "elements" and other.times["do_Sigmoid"] > 0


def test_what_a_clock_cannot_read_moves_no_weight() -> None:
    count = np.array([[1.0]] * 40 + [[200.0]] * 10)
    seconds = np.array([30e-9] * 40 + [1e-6] * 10)  # 5 ns each, and the clock's step
    assert weighed(count, seconds, most_of(["steps"]))[0] == pytest.approx(5e-9, rel=0.2)


def test_what_made_one_kernel_slow_is_not_put_down_to_its_few_lines() -> None:
    count = np.array([[1000.0, 0.0]] * 40 + [[1000.0, 0.4]] * 3)  # steps, lines from memory
    seconds = np.array([1e-6] * 40 + [300e-6] * 3)
    found = weighed(count, seconds, most_of(["steps", "weights_memory"]))
    assert found[0] == pytest.approx(1e-9, rel=0.05) and found[1] == SLOWEST_LINE < weighed(count, seconds, most_of("ab"))[1]


def test_networks_are_kept_out_as_a_whole_too(target) -> None:
    found = quality(synthetic(400), target)
    assert found is not None and 0.5 < found.networks_within_10 <= 1


def test_calls_belong_to_their_regions_and_layouts_of_inputs_to_none() -> None:
    graph = sample_graph(1, "float32", find_target("x86-64-v2"))
    names = [work.name for _, work in kernels(graph)]
    layout = Call("transpose", ("a",), label="layout", regions=(names[0],))
    calls = [layout, *(Call("k", ("a",), label=name, regions=(name,)) for name in names)]
    best = np.arange(1.0, len(calls) + 1)
    samples, other = attribute(graph, calls, best, np.zeros(len(calls)))
    assert other == 1.0
    assert [(one.work.name, one.seconds) for one in samples] == [(name, 2.0 + i) for i, name in enumerate(names)]


def test_fused_calls_are_divided_and_marked_as_shared() -> None:
    graph = sample_graph(4, "float32", find_target("x86-64-v2"))
    names = tuple(work.name for _, work in kernels(graph))
    samples, _ = attribute(graph, [Call("fused", ("a",), label="fused", regions=names)], np.array([3.0]), np.zeros(1))
    assert sum(one.seconds for one in samples) == pytest.approx(3.0)
    assert all(one.shared == len(workloads(graph)) for one in samples)


def test_records_survive_their_file_and_a_cut_last_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append(path, synthetic(3))
    append(path, [dataclasses.replace(synthetic(1)[0], work=dataclasses.replace(layer(), coded=Coded(1, 4, False)))])
    whole = read(path)
    assert whole[:3] == synthetic(3)
    assert whole[3].work.coded == Coded(1, 4, False)
    path.write_text(path.read_text()[:-20])
    assert read(path) == whole[:3]


def test_a_bad_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append(path, synthetic(2))
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(UsageError, match="line 1"):
        read(path)


def test_noise_and_drift_are_dropped_and_a_slow_clock_taken_out() -> None:
    one, two, three = synthetic(3)
    slow = dataclasses.replace(two, seconds=1.05 * two.seconds, clock=1.05 * two.clock)
    shared = [dataclasses.replace(three, noise=0.5), dataclasses.replace(three, shared=2)]
    other = [dataclasses.replace(record, units=1e-5) for record in (one, slow, three)]
    found = clocked([*other, *shared, dataclasses.replace(three, units=1.5e-5)])
    assert [record.seconds for record in found] == pytest.approx([one.seconds, two.seconds, three.seconds])


def test_visits_that_others_disturbed_do_not_count() -> None:
    quiet = [dataclasses.replace(one, units=1e-5) for one in synthetic(2)]
    slow = [dataclasses.replace(one, seconds=1.6 * one.seconds, units=1.7e-5) for one in quiet]
    assert together([slow, quiet, slow]) == quiet
    assert together([slow]) == slow


def test_a_network_that_others_disturb_is_visited_again(tmp_path: Path, target, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = [stock.Network(seed, "float32", 1, "", None) for seed in range(2)]
    group = [(tmp_path / str(one.seed), one) for one in networks]
    visits = {0: iter([1e-5, 1e-5]), 1: iter([2e-5, 2e-5, 1e-5, 2e-5, 1.01e-5])}
    records = dict(enumerate(synthetic(2)))

    def visit(bench, runner, one):
        return [dataclasses.replace(records[one.seed], seed=one.seed, units=next(visits[one.seed]))]

    monkeypatch.setattr(profiling, "_visit", visit)
    bench = profiling.Bench(target, 1, tmp_path / "log.jsonl", tmp_path, (), "", profiling.State([], 0.0, 1.0))
    profiling._time_group(bench, None, group)
    assert [one.units for one in bench.state.records] == [1e-5, 1e-5] and not any(map(list, visits.values()))
    assert read(bench.log) == bench.state.records


def test_random_networks_are_the_same_for_the_same_seed_and_differ_else() -> None:
    texts = [random_network(seed)[0].SerializeToString() for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_every_family_comes_in_every_dtype() -> None:
    target = find_target("x86-64-v3")
    found = {(FAMILIES[seed % len(FAMILIES)], form_of(seed, target)) for seed in range(3 * len(FAMILIES))}
    assert len(found) == len(set(FAMILIES)) * len({form for _, form in found})


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Compiling and timing are replaced, everything else is real; the list grows with every visit, the 20th is interrupted."""
    seen: list[int] = []

    def compiled(graph, target, threads, folder) -> measure.Compiled:
        works = tuple(workloads(graph))
        return measure.Compiled(works, tuple(work.name for work in works), (b"code", b""), {"calls": []})

    def timed(one, runner, seconds, evict) -> measure.Profile:
        seen.append(len(seen))
        if len(seen) == 20:
            raise KeyboardInterrupt
        samples = tuple(measure.Sample(work, 1e-6 + work.macs / 4e10 + work.bytes / 1e10, 0.01) for work in one.work)
        return measure.Profile(samples, 1.0, 0.0, 1e-5)

    monkeypatch.setattr(measure, "compiled", compiled)
    monkeypatch.setattr(measure, "timed", timed)
    monkeypatch.setattr(trees, "TREES", 6)
    return seen


def test_an_interrupted_profile_goes_on_where_it_stopped(tmp_path: Path, target, instant: list[int]) -> None:
    out = tmp_path / "table.json"
    with pytest.raises(KeyboardInterrupt):
        profile_target(target, 100, out=out)
    kept = read(out.with_suffix(".jsonl"))
    assert len(instant) == 20 and kept and load_table(out).measured
    _, state = profile_target(target, 0.5, out=out)
    seeds = [record.seed for record in state.records[len(kept) :]]
    assert state.records[: len(kept)] == kept
    assert seeds and min(seeds) > max(record.seed for record in kept)


def test_networks_that_were_compiled_ahead_are_timed_later(
    tmp_path: Path, target, instant: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "table.json"
    _, state = profile_target(target, 0.0, prepare=0.5, out=out)
    assert state.waiting and not instant and not out.exists()
    for folder in sorted(out.with_suffix(".networks").iterdir())[4:]:  # however fast this machine is
        shutil.rmtree(folder)
    waiting = [one.seed for _, one in stock.kept(out.with_suffix(".networks"), 1, templates_digest())]
    monkeypatch.setattr("hwopt.profiling._compile_one", lambda *_: pytest.fail("compiled again"))
    with pytest.raises(pytest.fail.Exception):
        profile_target(target, 100, out=out)
    assert {record.seed for record in read(out.with_suffix(".jsonl"))} == set(waiting)


def test_a_network_that_cannot_be_compiled_is_not_tried_again(
    tmp_path: Path, target, instant: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def failing(graph, *_) -> measure.Compiled:
        tried.append(graph.digest)
        raise UnsupportedError("cannot be built", place="here")

    monkeypatch.setattr(measure, "compiled", failing)
    _, state = profile_target(target, 0.0, prepare=0.3, out=tmp_path / "table.json")
    assert len(tried) > 1 and len(set(tried)) == len(tried) == len(state.failures)


def test_a_network_that_waits_is_the_same_when_it_is_read(tmp_path: Path) -> None:
    program = measure.Compiled((layer(), layer(5)), (("a",), ()), (b"one", b"", b"three"), {"calls": [["s", [0]]], "blob": "x"})
    (tmp_path / "000003_int8_1").mkdir()
    stock.keep(stock.Network(3, "int8", 1, "code", program), tmp_path / "000003_int8_1")
    ((folder, found),) = stock.kept(tmp_path, 1, "code")
    expected = {**program.command, "blob": str(folder / "constants.bin")}
    assert dataclasses.replace(found.program, command=program.command) == program and found.program.command == expected
    assert list(stock.kept(tmp_path, 2, "code")) == []
    assert list(stock.kept(tmp_path, 1, "other")) == [] and not folder.exists()


def test_what_other_templates_took_is_left_out(tmp_path: Path, target, instant: list[int]) -> None:
    out = tmp_path / "table.json"
    append(out.with_suffix(".jsonl"), synthetic(5))
    with pytest.raises(KeyboardInterrupt):
        profile_target(target, 100, out=out)
    kept = len(read(out.with_suffix(".jsonl")))
    _, state = profile_target(target, 0.0, prepare=1e-9, out=out)
    assert (state.older, len(state.records)) == (5, kept - 5) and kept > 5
    assert all(record.code == templates_digest() for record in state.records)
    assert len(load_table(out).measured) <= len(state.records)


def test_predictors_learn_from_the_fastest_of_several_records_and_from_steady_ones() -> None:
    (one,) = synthetic(1)
    slow, unsteady = (
        dataclasses.replace(one, seconds=2 * one.seconds),
        dataclasses.replace(one, seconds=0.5 * one.seconds, noise=0.15),
    )
    elsewhere = dataclasses.replace(slow, work=dataclasses.replace(one.work, footprint=one.work.footprint + 1024))
    assert fastest([slow, one, unsteady, elsewhere]) == [one, elsewhere]


def test_on_several_threads_kernels_may_vary_more() -> None:
    (one,) = synthetic(1)
    pair = [dataclasses.replace(one, noise=0.15, threads=count) for count in (1, 2)]
    assert [record.threads for record in fastest(pair)] == [2]


@pytest.mark.usefixtures("few_trees")
def test_a_kernel_whose_time_varied_is_priced_by_the_predictor(target) -> None:
    first, *others = synthetic(60)
    table = table_of([dataclasses.replace(first, seconds=3 * first.seconds, noise=0.1), *others], target, None)
    assert work_key(first.work, 1) not in table.measured
    assert all(work_key(one.work, 1) in table.measured for one in others)


def test_two_visits_count_as_the_faster_one_and_say_how_they_differ() -> None:
    one, other = synthetic(1)[0], dataclasses.replace(synthetic(1)[0], seconds=1.2 * synthetic(1)[0].seconds)
    (found,) = together([[one], [other]])
    assert (found.seconds, found.noise) == (one.seconds, pytest.approx(0.1))
    slow_clock = dataclasses.replace(other, clock=1.2 * other.clock)
    assert together([[one], [slow_clock]])[0].noise == one.noise


def test_profiling_another_machine_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="another"):
        profile_target("cortex-a53", 1)


def test_times_are_read_with_their_unit() -> None:
    assert [seconds_of(text) for text in ("90s", "10m", "1h")] == [90, 600, 3600]
    with pytest.raises(UsageError, match="10"):
        seconds_of("10")


def test_a_graph_is_timed_kernel_by_kernel_in_its_own_process() -> None:
    host = find_target("host")
    graph = sample_graph(1, "float32", host)
    with Runner(1, hang=60) as runner:
        found = profile(graph, host, 1, runner, 0.05)
        program = measure.compiled(graph, host, 1, runner.folder)
        again = [measure.timed(program, runner, 0.05, evict) for evict in (0, 1 << 20)]
    assert all([one.work for one in more.samples] == list(workloads(graph)) for more in again)
    assert [one.work for one in found.samples] == list(workloads(graph))
    assert all(one.seconds > 0 for one in found.samples)
    assert found.clock > 0


def test_an_empty_tree_is_refused() -> None:
    with pytest.raises(UsageError, match="tree"):
        Trees.from_data({"base": 0.0, "trees": [[[], []]]})
    with pytest.raises(UsageError, match="node"):
        Trees.from_data({"base": 0.0, "trees": [[[0], [1.0]]]})


def test_training_is_the_same_for_the_same_seed(target) -> None:
    one, two = (learned_from(synthetic(60), target, members=2, seed=3) for _ in range(2))
    assert one.to_data() == two.to_data()


def test_listing_targets_does_not_import_tvm() -> None:
    script = "import sys; from hwopt.plugins import find_targets; find_targets(); sys.exit('tvm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
