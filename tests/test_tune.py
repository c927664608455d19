"""Tuning: the database, candidates that crash, hang or are wrong, the search, and that compilations use what it found."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.tuning import reached_by, resnet18_tasks
from hwopt.backends.tvm import kernels
from hwopt.backends.tvm.kernels.spec import Bias, ConvSpec, MatmulSpec, PoolSpec, Quantize, Scale
from hwopt.backends.tvm.kernels.winograd_schedule import winograd_spec
from hwopt.backends.tvm.tune.builder import Builder, Built, build_candidate, cluster
from hwopt.backends.tvm.tune.child import COLD, HOT, WARM, Arguments
from hwopt.backends.tvm.tune.database import Database, Trial, Tuned, default_path
from hwopt.backends.tvm.tune.runner import Kernels, Runner, ratio
from hwopt.backends.tvm.tune.session import Effort, Progress, State, tune
from hwopt.backends.tvm.tune.space import Proposer, space_of
from hwopt.backends.tvm.tune.task import Task, make_task, operations, plain, schedule_from, tasks_of
from hwopt.backends.tvm.tune.tensors import DLTensor
from hwopt.build import build
from hwopt.cli import main
from hwopt.errors import ToolchainError, UnsupportedError, UsageError
from hwopt.io.onnx import save
from hwopt.measure import Timing
from hwopt.plugins import find_target
from hwopt.tuning import Result, parse_effort, progress_line, report_data, tune_graph, tune_model
from tests._kernels import HEAD
from tests.test_compiler import small_net

CONV = ConvSpec(1, 8, 8, 8, 40, (3, 3), pads=(1, 1, 1, 1), epilogue=(Bias(),))
INTEGER = ConvSpec(
    1, 8, 8, 8, 40, (3, 3), pads=(1, 1, 1, 1), data_dtype="uint8", weight_dtype="int8", out_dtype="uint8",
    epilogue=(Bias(), Scale(), Quantize(0.05, 3, "uint8")),
)  # fmt: skip


def task(spec: Any = CONV, threads: int = 1) -> Task:
    target = find_target("host")
    family = "int8" if getattr(spec, "weight_dtype", "float32") == "int8" else "float32"
    return make_task(spec, target.microkernels[family], target, threads)


def other(number: int = 1) -> kernels.Schedule:
    """A schedule that is not the default one."""
    return dataclasses.replace(task().default, block_rows=number * task().default.tile_rows, unroll=1, block_tiles=1)


def good(schedule: kernels.Schedule, measured: float = 0.5, rounds: int = 31) -> Trial:
    return Trial(schedule, "ok", measured, 1.0, measured, rounds)


class Here(Executor):
    """Builds in this process."""

    def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Future:
        future: Future = Future()
        future.set_result(function(*arguments, **named))
        return future


# The database


def test_a_schedule_comes_back_from_json() -> None:
    schedule = task().default
    assert schedule_from(json.loads(json.dumps(plain(schedule)))) == schedule
    assert schedule_from({**plain(schedule), "another": 1}) is None
    assert schedule_from({**plain(schedule), "unroll": "4"}) is None


def test_the_best_schedule_is_found_again_by_another_database_object(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tuning.jsonl"
    Database(path).add(task(), [good(other(1), 0.8), good(other(2), 0.6), Trial(other(3), "wrong")])
    assert Database(path).best(task()) == other(2)
    assert len(Database(path).trials(task())) == 3


def test_a_schedule_that_hardly_wins_is_not_taken(tmp_path: Path) -> None:
    database = Database(tmp_path / "t.jsonl")
    database.add(task(), [good(other(), 0.995)])
    assert database.best(task()) is None


def test_few_rounds_do_not_beat_a_confirmed_schedule(tmp_path: Path) -> None:
    database = Database(tmp_path / "t.jsonl")
    database.add(task(), [good(other(1), 0.1, rounds=4), good(other(2), 0.7)])
    assert database.best(task()) == other(2)


def test_another_workload_number_of_threads_or_template_version_has_records_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(tmp_path / "t.jsonl")
    database.add(task(), [good(other())])
    assert database.best(task(INTEGER)) is None
    assert database.best(task(threads=2)) is None
    monkeypatch.setattr("hwopt.backends.tvm.tune.task.templates_digest", lambda: "newer")
    assert database.best(task()) is None
    monkeypatch.undo()
    assert database.best(task()) == other()


def test_layers_that_differ_in_quantization_constants_share_what_was_tuned(tmp_path: Path) -> None:
    finer = dataclasses.replace(INTEGER, pad_value=7, epilogue=(Bias(), Scale(), Quantize(0.01, 9, "uint8")))
    padded = dataclasses.replace(INTEGER, pad_value=1)
    database = Database(tmp_path / "t.jsonl")
    database.add(task(finer), [good(other())])
    assert database.best(task(padded)) == other()
    assert database.best(task(dataclasses.replace(INTEGER, height=9))) is None


def test_records_of_another_processor_do_not_count(tmp_path: Path) -> None:
    Database(tmp_path / "t.jsonl", cpu="one").add(task(), [good(other())])
    assert Database(tmp_path / "t.jsonl", cpu="two").best(task()) is None
    assert Database(tmp_path / "t.jsonl", cpu="one").best(task()) == other()


def test_a_cut_off_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    Database(path).add(task(), [good(other(1), 0.9)])
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:100])
    Database(path).add(task(), [good(other(2), 0.5)])
    found = Database(path)
    assert {one.schedule for one in found.trials(task())} == {other(1), other(2)}
    assert path.read_bytes().startswith(whole + whole[:100])


@pytest.mark.parametrize("line", [b"[]", b'{"format": 99}', b"\xff\xfe", b'{"format": 1, "key": 3}', b"null", b"[" * 100_000])
def test_foreign_lines_are_skipped_and_kept(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(line + b"\n")
    database = Database(path)
    database.add(task(), [good(other())])
    assert database.best(task()) == other()
    assert path.read_bytes().startswith(line)


def write_many(path: str, start: int) -> None:
    for number in range(start, start + 40):
        Database(path).add(task(), [good(other(number))])


def test_two_processes_lose_no_record(tmp_path: Path) -> None:
    path, context = str(tmp_path / "t.jsonl"), multiprocessing.get_context("fork")
    processes = [context.Process(target=write_many, args=(path, start)) for start in (1, 1001)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(Database(path).trials(task())) == 80


def test_a_reader_sees_what_another_writes(tmp_path: Path) -> None:
    reader, writer = Database(tmp_path / "t.jsonl"), Database(tmp_path / "t.jsonl")
    assert reader.best(task()) is None
    writer.add(task(), [good(other())])
    assert reader.best(task()) == other()


def test_the_default_database_lies_in_the_users_cache() -> None:
    assert default_path({"XDG_CACHE_HOME": "/cache"}) == Path("/cache/hwopt/tuning.jsonl")


# The space


@pytest.mark.parametrize(
    "spec",
    [
        CONV,
        INTEGER,
        MatmulSpec(1, 20, 50, 33),
        MatmulSpec(2, 20, 50, 33, constant=False),
        ConvSpec(1, 5, 9, 16, 16, (3, 3), pads=(1, 1, 1, 1), groups=16),
        PoolSpec(1, 9, 9, 40, (3, 3)),
        winograd_spec(ConvSpec(1, 18, 15, 20, 50, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), 1, "uint8", "int8", "int32")),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_every_proposal_is_legal_and_gives_the_default_schedules_result(spec: Any, threads: int) -> None:
    work = task(spec, threads)
    space = space_of(work)
    assert space is not None
    proposed = Proposer(space, 0).propose([], 4)
    assert len(set(proposed)) == len(proposed) > 0
    with Builder(executor=Here()) as builder, Runner(threads) as runner:
        symbols = [f"k{number}" for number in range(len(proposed) + 1)]
        schedules = [work.default, *proposed]
        built = builder.finish(work, schedules, symbols, builder.start(work, schedules, symbols))
        objects = {symbol: one.data for symbol, one in zip(symbols, built, strict=True)}
        from hwopt.backends.tvm.tune.session import signature

        found = runner.measure(Kernels(objects, signature(work, built[0].parameters)), rounds=1, turn=1e-5)
    assert {one.status for one in found.values()} == {"ok"}


def test_the_point_of_a_schedule_leads_back_to_it() -> None:
    space = space_of(task())
    assert space is not None
    point = space.point(task().default)
    assert space.legal(point)
    assert space.schedule(point).tile_columns == task().default.tile_columns


def test_proposals_depend_on_seed_and_history_only() -> None:
    space = space_of(task())
    assert space is not None
    trials = [good(one, 0.9 + 0.01 * index) for index, one in enumerate(Proposer(space, 0).propose([], 8))]
    assert Proposer(space, 3).propose(trials, 12) == Proposer(space, 3).propose(list(trials), 12)
    assert Proposer(space, 3).propose(trials, 12) != Proposer(space, 4).propose(trials, 12)


def test_nothing_is_proposed_twice() -> None:
    space = space_of(task(PoolSpec(1, 9, 9, 40, (3, 3))))
    assert space is not None
    trials: list[Trial] = []
    while proposed := Proposer(space, 0).propose(trials, 5):
        assert not {one.schedule for one in trials} & set(proposed)
        trials += [good(one, 1.0) for one in proposed]
    assert 1 <= len(trials) <= space.size


def test_what_was_slow_ranks_behind_what_was_fast() -> None:
    """Unrolling is said to cost a factor of 4: most candidates must be without it, though some are drawn at random."""
    space = space_of(task(MatmulSpec(1, 56, 64, 256)))
    assert space is not None
    trials = [good(one, 4.0 if one.unroll > 1 else 0.9) for one in Proposer(space, 0).propose([], 40)]
    assert {one.schedule.unroll > 1 for one in trials} == {True, False}
    later = Proposer(space, 0).propose(trials, 20)
    assert sum(one.unroll == 1 for one in later) > 10


# Measuring

BODIES = {
    "twice": "EACH(i, size(tensor(a, 1))) data(a, 1)[i] = 2 * data(a, 0)[i];",
    "same": "EACH(i, size(tensor(a, 1))) data(a, 1)[i] = data(a, 0)[i] + data(a, 0)[i];",
    "thrice": "EACH(i, size(tensor(a, 1))) data(a, 1)[i] = 3 * data(a, 0)[i];",
    "nothing": "",
    "hangs": "for (volatile int i = 0;; ++i) {}",
    "crashes": "*(volatile int *)8 = 1;",
    "fails": "return -1;",
}
SIGNATURE = (("data", "float32", 64, -1.0, 1.0), ("out", "float32", 64, 0.0, 1.0))


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("kernels")
    made = {}
    for name, body in BODIES.items():
        (folder / "k.c").write_text(f"{HEAD}KERNEL({name}) {{ {body} return 0; }}")
        subprocess.run(["cc", "-O1", "-w", "-fPIC", "-c", "k.c", "-o", "k.o"], cwd=folder, check=True)
        made[name] = (folder / "k.o").read_bytes()
    return made


def measured(objects: dict[str, bytes], *names: str) -> dict[str, Any]:
    with Runner(hang=3.0) as runner:
        return runner.measure(Kernels({name: objects[name] for name in names}, SIGNATURE), rounds=9, turn=1e-4)


def test_crashing_hanging_failing_and_wrong_candidates_do_not_harm_the_others(objects: dict[str, bytes]) -> None:
    found = measured(objects, "twice", "crashes", "thrice", "hangs", "nothing", "same", "fails")
    assert {name: one.status for name, one in found.items()} == {
        "twice": "ok", "crashes": "crashed", "thrice": "wrong", "hangs": "hung", "nothing": "wrong", "same": "ok",
        "fails": "failed",
    }  # fmt: skip
    assert found["crashes"].reason == "signal 11"
    assert len(found["twice"].times) == 9 and found["same"].times


def test_a_candidate_finds_the_caches_as_other_kernels_leave_them() -> None:
    """Weights come from the third level, everything else from the second, unless a kernel's peak is asked for."""
    rows = [
        ("data", "float32", 10_000, -1.0, 1.0),
        ("weights", "int8", 100_000, -8.0, 8.0),
        ("out", "float32", 1 << 20, 0.0, 1.0),
    ]
    arguments = Arguments(rows, 0)
    given = [DLTensor.from_address(slot.value).data for slot in arguments.slots]
    assert [len({*given[index::3]}) for index in range(3)] == [WARM // 40_000, COLD // 100_000, 1]
    assert Arguments([(HOT, *row[1:]) for row in rows], 0).sets == 1


def test_a_default_schedule_that_does_not_run_is_an_error(objects: dict[str, bytes]) -> None:
    with pytest.raises(ToolchainError, match="the default schedule crashed: signal 11"):
        measured(objects, "crashes", "twice")


def test_the_ratio_is_of_rounds_that_both_ran() -> None:
    assert ratio([2.0, 4.0], [1.0, 8.0, 0.1]) == 2.0


# The session


def bad_builds(work: Task, schedule: kernels.Schedule, symbol: str) -> Built:
    """The default schedule's code for the default, a wrong kernel for every other schedule, no code for some."""
    if schedule == work.default:
        return build_candidate(work, schedule, symbol)
    if schedule.unroll > 1:
        return Built(reason="no")
    spec = dataclasses.replace(work.spec, epilogue=())  # without its bias
    return dataclasses.replace(build_candidate(dataclasses.replace(work, spec=spec), schedule, symbol))


def test_wrong_and_unbuildable_candidates_are_recorded_and_never_used(tmp_path: Path) -> None:
    database = Database(tmp_path / "t.jsonl")
    state = tune({task(): 1}, find_target("host"), database, Effort(trials=6), executor=Here(), build=bad_builds, batch=6)
    assert state.trials == 6 and sum(state.failures.values()) == 6
    assert {one.status for one in database.trials(task())} <= {"wrong", "failed", "crashed"}
    assert database.best(task()) is None
    assert state.tasks[0].ratio == 1.0


def test_tuning_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    database = Database(tmp_path / "t.jsonl")

    def interrupt(state: State) -> None:
        raise KeyboardInterrupt

    options: dict[str, Any] = {"executor": Here(), "batch": 3}
    with pytest.raises(KeyboardInterrupt):
        tune({task(): 1}, find_target("host"), database, Effort(trials=40), watch=interrupt, **options)
    first = {one.schedule for one in database.trials(task())}
    assert len(first) == 3
    state = tune({task(): 1}, find_target("host"), database, Effort(trials=3), **options)
    assert state.tasks[0].trials == 6
    assert len({one.schedule for one in database.trials(task())}) == 6


def test_trials_are_bounded_and_defaults_of_all_kernels_known(tmp_path: Path) -> None:
    database = Database(tmp_path / "t.jsonl")
    works = {task(): 1, task(INTEGER): 2}
    state = tune(works, find_target("host"), database, Effort(trials=7), executor=Here(), batch=4)
    assert state.trials == 7
    assert sum(one.trials for one in state.tasks) == 7
    assert all(one.default > one.limit / 2 > 0 for one in state.tasks)
    assert state.after <= state.before


def test_the_kernel_with_more_to_gain_comes_first() -> None:
    slow = Progress(task(), 1, None, 0.1, default=1.0, best=[1.0])
    often = Progress(task(), 5, None, 0.1, default=1.0, best=[1.0])
    falling = Progress(task(), 1, None, 0.1, default=1.0, best=[1.0, 0.7])
    flat = Progress(task(), 1, None, 0.1, default=1.0, best=[0.7, 0.7])
    for one in (slow, often, falling, flat):
        one.proposer = Proposer(space_of(task()), 0)  # type: ignore[arg-type]
    assert often.gain() > slow.gain()
    assert falling.gain() > flat.gain()
    assert slow.gain(waiting=1) < slow.gain()
    flat.exhausted = True
    assert flat.gain() == 0


def test_a_kernel_at_its_limit_has_less_to_gain() -> None:
    near, far = (Progress(task(), 1, Proposer(space_of(task()), 0), limit, default=1.0) for limit in (0.95, 0.3))  # type: ignore[arg-type]
    assert far.gain() > 5 * near.gain()


def unbuildable(work: Task, schedule: kernels.Schedule, symbol: str) -> Built:
    return Built(reason="out of registers")


def test_a_kernel_whose_default_cannot_be_built_is_left_out_with_the_reason(tmp_path: Path) -> None:
    database = Database(tmp_path / "t.jsonl")
    state = tune({task(): 1}, find_target("host"), database, Effort(trials=5), executor=Here(), build=unbuildable)
    assert state.trials == 0
    assert state.tasks[0].reason == "the default schedule cannot be built: out of registers"


def test_an_endless_search_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="without an end"):
        tune({task(): 1}, find_target("host"), Database(tmp_path / "t.jsonl"), Effort())


def die(*_: Any) -> Built:
    import os

    os._exit(3)


def test_a_dying_build_worker_costs_its_candidate_only() -> None:
    with Builder(1, build=die) as builder:
        built = builder.finish(task(), [other()], ["k"], builder.start(task(), [other()], ["k"]))
    assert [one.reason for one in built] == ["it ends the process that builds it"]


def test_a_cluster_needs_dask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with pytest.raises(ToolchainError, match="tcp://nowhere:1: Dask is not installed; pip install distributed"):
        cluster("tcp://nowhere:1").__enter__()


def test_named_workers_build_what_is_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Noting(ThreadPoolExecutor):
        def submit(self, *given: Any, **more: Any) -> Any:
            asked.append("built")
            return super().submit(*given, **more)

    @contextlib.contextmanager
    def reached(address: str) -> Iterator[Executor]:
        asked.append(address)
        with Noting(1) as executor:
            yield executor

    monkeypatch.setattr("hwopt.backends.tvm.tune.builder.cluster", reached)
    save(small_net(), path := tmp_path / "net.onnx")
    arguments = ["tune", str(path), "--trials", "2", "--threads", "1", "--workers", "tcp://far:8786"]
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--tuning-db", str(tmp_path / "t.jsonl"), "--json"])
    assert asked[0] == "tcp://far:8786" and "built" in asked


def test_progress_says_the_best_time_the_share_of_the_limit_and_what_remains() -> None:
    one = Progress(task(), 2, None, limit=0.5e-3, default=2e-3, best=[0.5])
    state = State([one], Effort(trials=40), trials=10)
    assert progress_line(state).startswith("2 ms of 4, 50% of the limit, 10 trials, 30 left, about ")
    assert re.fullmatch(r".*, 10 trials, (59|60) s left", progress_line(dataclasses.replace(state, effort=Effort(seconds=60))))


# Compilations


def test_a_compilation_uses_the_tuned_schedule_and_says_so(tmp_path: Path) -> None:
    graph, target = small_net(), find_target("host")
    works = tasks_of(graph, target, 1)
    every = sum(works.values())
    assert every >= 4
    database = Database(tmp_path / "t.jsonl")
    first = next(iter(works))
    chosen = dataclasses.replace(first.default, unroll=1, block_rows=first.default.tile_rows, tile_columns=3, block_columns=18)
    database.add(first, [good(chosen)])
    tuned = Tuned(database, target)
    assert tuned(first.spec, first.micro, 1) == chosen
    built = build(graph, target, 1, tmp_path / "tuned", database)
    plainly = build(graph, target, 1, tmp_path / "plain")
    assert built.tuning == f"1 of {every} kernels run with tuned schedules, 1 were tuned"
    assert plainly.tuning == ""
    objects = [sorted(path.read_bytes() for path in one.library.folder.glob("*_kernels*.o")) for one in (built, plainly)]
    assert objects[0] != objects[1]
    feeds = built.artifact.random_inputs()
    np.testing.assert_allclose(built.artifact.run(feeds)["y"], plainly.artifact.run(feeds)["y"], rtol=1e-4, atol=1e-5)


def test_an_empty_database_is_reported(tmp_path: Path) -> None:
    graph, target = small_net(), find_target("host")
    built = build(graph, target, 1, tmp_path / "b", Database(tmp_path / "none.jsonl"))
    every = sum(tasks_of(graph, target, 1).values())
    assert built.tuning == f"0 of {every} kernels run with tuned schedules, 0 were tuned"


def test_only_this_machine_can_be_tuned(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="this machine is another"):
        tune_graph(small_net(), find_target("cortex-a72"), 1, Database(tmp_path / "t.jsonl"), Effort(trials=1))


@pytest.mark.parametrize(
    ("text", "effort"), [("200", Effort(trials=200)), ("90s", Effort(seconds=90)), ("1.5m", Effort(seconds=90))]
)
def test_an_effort_is_a_number_of_trials_or_a_time(text: str, effort: Effort) -> None:
    assert parse_effort(text) == effort


@pytest.mark.parametrize("text", ["", "0", "five", "1.5", "-3s", "3d"])
def test_an_effort_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write 200"):
        parse_effort(text)


def test_tune_on_the_command_line_needs_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["tune", "model.onnx"])
    assert stop.value.code == 2
    assert "give --trials 200 or --time 5m" in capsys.readouterr().err


def test_a_model_file_is_tuned_and_its_times_are_told(tmp_path: Path) -> None:
    save(small_net(), tmp_path / "small.onnx")
    seen: list[float] = []
    found = tune_model(
        tmp_path / "small.onnx", Effort(trials=4), threads=1, tuning_db=tmp_path / "t.jsonl", executor=Here(),
        watch=lambda state: seen.append(state.share),
    )  # fmt: skip
    assert found.state.trials == 4 and seen[-1] == 1.0
    assert found.before.median > 0 and found.after.median > 0
    assert len(Database(tmp_path / "t.jsonl")) == 4


def told(trials: int, after: float, seconds: float | None = 8.0) -> str:
    """The line for people of a search that took 20 s, for a model of 1 ms whose times vary by 0.1 ms."""
    state = SimpleNamespace(
        tasks=[], trials=trials, elapsed=20.0, failures={}, gained=after != 1.0, effort=Effort(None if seconds else 4, seconds)
    )
    before, found = (Timing(one * 1e-3, one * 0.95e-3, one * 1.05e-3, 40) for one in (1.0, after))
    return str(report_data(Result(state, before, found, Path("t.jsonl")))["summary"])


def test_the_line_for_people_says_what_the_search_is_worth() -> None:
    assert "2.000 times as fast)" in told(8, 0.5) and told(8, 0.5).endswith("kept in t.jsonl")
    assert "1.010 times as fast: a tie, as its times vary by more)" in told(8, 0.99)
    assert "no schedule was faster" in told(8, 1.0)
    assert "no schedule was tried" in told(0, 1.0) and "give more" in told(0, 1.0)
    assert "nothing new to try beside t.jsonl" in told(0, 1.0, None)


def test_the_benchmark_tells_what_was_reached_by_a_moment() -> None:
    curve = [(10.0, 3.0), (20.0, 2.0), (200.0, 1.0)]
    assert [reached_by(moment, curve, 4.0) for moment in (5.0, 15.0, 180.0, 300.0)] == [4.0, 3.0, 2.0, 1.0]


def test_the_benchmark_tunes_all_of_resnet18() -> None:
    works = resnet18_tasks(find_target("host"), 1)
    assert sum(operations(work.spec) // 2 * calls for work, calls in works.items()) == pytest.approx(1.8136e9, rel=1e-3)
    assert sum(works.values()) == 21  # 20 convolutions and the pool
