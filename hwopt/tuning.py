"""Tuning a model's kernels on this machine: `hwopt tune`, and `hwopt compile --tune`."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwopt.errors import ToolchainError, UnsupportedError, UsageError
from hwopt.ir import Graph
from hwopt.measure import Timing, interleaved
from hwopt.pipeline import Context
from hwopt.plugins import find_target
from hwopt.report.figures import machine
from hwopt.target import HOST, Target

if TYPE_CHECKING:  # TVM is imported when something is tuned
    from hwopt.backends.tvm.read import Reading
    from hwopt.backends.tvm.tune.database import Database
    from hwopt.backends.tvm.tune.runner import Runner
    from hwopt.backends.tvm.tune.session import Effort, State
    from hwopt.device.link import Address
    from hwopt.device.runner import DeviceRunner

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
PASS_SECONDS = 60.0  # of one run of a whole model, at most: what takes longer is said to hang


def parse_effort(text: str) -> Effort:
    """How long to tune: `200` candidates, or a time, `90s`, `5m`, `1h`."""
    from hwopt.backends.tvm.tune.session import Effort

    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    number = float(found[1]) if found else 0.0
    if found is None or number <= 0 or (not found[2] and number != int(number)):
        raise UsageError(f"cannot read {text!r}", place="tuning effort", hint="write 200 (candidates), 90s, 5m or 1h")
    return Effort(seconds=number * UNITS[found[2]]) if found[2] else Effort(trials=int(number))


def open_database(path: Path | str | None, target: Target, device: str = "") -> Database:
    """The database at `path`, or the user's own; where it is known what measures, only what the same measured counts.

    That is a device's name, or, on the target itself, this processor.
    """
    from hwopt.backends.tvm.tune.database import Database

    return Database(path, cpu=device or (machine()["cpu"] if target.runs_here else ""))


def read_database(path: Path | str, target: Target) -> Database:
    """The database as a compilation that measures nothing reads it.

    Of a target that is whichever machine this is, this processor's records count; of a named one all of them, so that the same
    file gives the same code on every machine.
    """
    from hwopt.backends.tvm.tune.database import Database

    return Database(path, cpu=machine()["cpu"] if HOST in target.name.split(",") else "")


@dataclass(frozen=True, eq=False)
class Result:
    """The kernels' times as tuning saw them, and the whole model's, default and tuned schedules run in turns."""

    state: State
    before: Timing
    after: Timing
    path: Path  # of the database


def tune_model(
    model: Path | str,
    effort: Effort,
    *,
    target: str | Target | None = None,
    threads: int | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    binds: Mapping[str, Any] | None = None,
    tuning_db: Path | str | None = None,
    executor: Executor | None = None,
    workers: str | None = None,
    device: Address | None = None,
    seed: int = 0,
    watch: Callable[[State], None] = lambda _: None,
) -> Result:
    """Search schedules for the kernels of an ONNX file or of an artifact; compilations find them in the database.

    Candidates are built on `executor`, on the Dask cluster whose address is `workers`, or in local processes.
    They are measured here, or on `device`; records carry its name. An artifact is tuned for its own target and threads unless
    others are given. Raises UnsupportedError for a target that is not this machine or the device, and for models that run in
    TVM's virtual machine; DeviceError where the device cannot be reached, or stays away: what was measured is kept.
    """
    graph, hardware, count = _subject(Path(model), target, threads, shapes, binds)
    compact = Path(model).is_dir() and _limited(Path(model), "weight_bytes")
    runner = _device_runner(device, hardware, count, seed) if device else None
    database = open_database(tuning_db, hardware, str(runner.device["name"]) if runner else "")
    with builders(workers, executor) as chosen:
        state = tune_graph(
            graph, hardware, count, database, effort, executor=chosen, seed=seed, watch=watch, runner=runner, compact=compact
        )
    times = _compared(graph, hardware, count, database if state.gained else None, device, compact)
    before, after = times["default"], times["tuned"]
    if device and after.median > before.median:
        _withdraw_all(state, database, after.median / before.median)
        after = before
    return Result(state, before, after, database.path)


def builders(workers: str | None, executor: Executor | None = None) -> AbstractContextManager[Executor | None]:
    """Who builds candidates: the Dask cluster at the address `workers`, an executor, or (None) local processes."""
    from hwopt.backends.tvm.tune.builder import cluster

    return cluster(workers) if workers else contextlib.nullcontext(executor)


def _withdraw_all(state: State, database: Database, ratio: float) -> None:
    """The whole model is slower on the device, where kernels are not timed inside of it: all run as the defaults do."""
    from hwopt.backends.tvm.tune.settle import withdraw

    for one in state.tasks:
        withdraw(database, one.task, ratio, f"the whole model takes {ratio:.3f} times as long with it and others", every=True)
        one.withdrawn(database)


def _device_runner(device: Address, target: Target, threads: int, seed: int) -> DeviceRunner:
    from hwopt.device.fit import check_fit
    from hwopt.device.runner import DeviceRunner

    runner = DeviceRunner(device, threads, seed=seed)
    check_fit(runner.device, target, threads, str(device))
    return runner


def tune_graph(
    graph: Graph,
    target: Target,
    threads: int,
    database: Database,
    effort: Effort,
    *,
    executor: Executor | None = None,
    seed: int = 0,
    watch: Callable[[State], None] = lambda _: None,
    runner: Runner | None = None,
    compact: bool = False,
) -> State:
    """The same for a graph that is ready to compile; `compact` as hwopt.build.build has it.

    On this machine what was found must win inside of the whole model, too, or is withdrawn (tune/settle.py).
    """
    from hwopt.backends.tvm.tune.session import tune
    from hwopt.backends.tvm.tune.task import tasks_of
    from hwopt.backends.tvm.vm import reasons

    if not target.runs_here and runner is None:
        hint = "hwopt device serve on such a machine, then --device host:port"
        raise UnsupportedError("tuning measures, and this machine is another", place=f"target {target.name}", hint=hint)
    found = reasons(graph)
    if found:
        raise UnsupportedError(f"runs in TVM's virtual machine, whose kernels are not tuned: {found[0]}", place=graph.name)
    tasks = tasks_of(graph, target, threads, compact)
    state = tune(tasks, target, database, effort, executor=executor, seed=seed, watch=watch, runner=runner)
    if runner is None and state.gained:
        _settle(graph, target, threads, database, state, seed, compact)
        watch(state)
    return state


def _settle(graph: Graph, target: Target, threads: int, database: Database, state: State, seed: int, compact: bool) -> None:
    """Withdraw what does not win in the whole model."""
    from hwopt.backends.tvm.build import reading
    from hwopt.backends.tvm.tune.runner import Runner
    from hwopt.backends.tvm.tune.session import machine as cores_for
    from hwopt.backends.tvm.tune.settle import Noted, settle
    from hwopt.build import identifier

    def read(choose: Noted) -> Reading:
        return reading(graph, target, threads, choose, compact)

    _, cores, _ = cores_for(threads)
    try:
        with Runner(threads, cores, PASS_SECONDS, seed) as runner:
            lost = settle(read, identifier(graph.name), target, database, runner)
    except ToolchainError as error:  # nor could it be timed without tuning
        for one in state.tasks:
            one.reason = one.reason or f"not compared in the whole model: {error}"
        return
    for one in state.tasks:
        if one.task in lost:
            one.withdrawn(database)


def _subject(
    model: Path,
    target: str | Target | None,
    threads: int | None,
    shapes: Mapping[str, tuple[int, ...]] | None,
    binds: Mapping[str, Any] | None,
) -> tuple[Graph, Target, int]:
    """The graph as a compilation of it sees it, the target and the number of threads."""
    from hwopt.artifact import Artifact
    from hwopt.io.onnx import load, read
    from hwopt.job import clean

    if model.is_dir():
        manifest = Artifact(model, foreign=True).manifest
        hardware = find_target(target or manifest["target"]) if not isinstance(target, Target) else target
        hardware = hardware.cramped() if _limited(model, "activation_bytes") else hardware
        return read(model / "model.onnx"), hardware, threads or manifest["threads"]
    hardware = find_target(target or "host") if not isinstance(target, Target) else target
    graph = clean(load(model, shapes=shapes, binds=binds), Context(hardware))
    return graph, hardware, threads or hardware.cores


def _limited(artifact: Path, amount: str) -> bool:
    """Whether an artifact had a budget of its size (all kernels decode their weights then that can), or of its memory."""
    from hwopt.artifact import Artifact

    return (Artifact(artifact, foreign=True).plan.get("budget") or {}).get(amount) is not None


def _compared(
    graph: Graph, target: Target, threads: int, database: Database | None, device: Address | None = None, compact: bool = False
) -> dict[str, Timing]:
    """The whole model with default and with tuned schedules, in turns; without a database both are the same code, timed once."""
    from hwopt.build import build

    chosen = {"default": None, **({} if database is None else {"tuned": database})}
    with tempfile.TemporaryDirectory(prefix="hwopt-") as folder:
        built = {
            name: build(graph, target, threads, Path(folder) / name, one, compact=compact).artifact
            for name, one in chosen.items()
        }
        if device:
            from hwopt.device.bench import bench

            times = bench({name: artifact.path for name, artifact in built.items()}, device)
        else:
            feeds = built["default"].random_inputs()
            times = interleaved({name: artifact.runner(feeds) for name, artifact in built.items()})
    return {"default": times["default"], "tuned": times.get("tuned", times["default"])}


def progress_line(state: State) -> str:
    """One line for people: best so far, the share of the hardware's limit, what remains."""
    text = f"{state.after * 1e3:.4g} ms of {state.before * 1e3:.4g}"
    if state.after:
        text += f", {state.limit / state.after:.0%} of the limit"
    return f"{text}, {state.trials} trials, {_remaining(state)}"


def _remaining(state: State) -> str:
    if state.effort.seconds is not None:
        return f"{max(0.0, state.effort.seconds - state.elapsed):.0f} s left"
    left = max(0, (state.effort.trials or 0) - state.trials)
    rate = state.trials / max(state.elapsed, 1e-9)
    return f"{left} left" + (f", about {left / rate:.0f} s" if rate and left else "")


def _gain(result: Result) -> str:
    """What the whole model gained; less than its times vary is a tie."""
    before, after = result.before, result.after
    if not result.state.gained:
        return "no schedule was faster" if result.state.trials else "no schedule was tried"
    tie = abs(before.median - after.median) < max(before.spread, after.spread)
    how = f"{before.median / after.median:.3f} times as fast" + (": a tie, as its times vary by more" if tie else "")
    return f"{after.median * 1e3:.4g} ms after ({how})"


def _kept(result: Result) -> str:
    state = result.state
    if state.trials:
        return f"kept in {result.path}"
    short = state.effort.seconds is not None and state.elapsed >= state.effort.seconds
    return "give more: that is not enough to measure a candidate" if short else f"nothing new to try beside {result.path}"


def report_data(result: Result) -> dict[str, Any]:
    """What `hwopt tune` prints: one row per kernel, the whole model, and a line for people."""
    rows = [
        {
            "kernel": one.task.name, "calls": one.calls, "trials": one.trials, "us before": one.default * 1e6,
            "us after": one.seconds * 1e6, "gain": 1 / one.ratio, "of limit": one.limit / one.seconds if one.seconds else 0.0,
            "note": one.reason or ("" if one.proposer else "nothing to search"),
        }
        for one in result.state.tasks
    ]  # fmt: skip
    before, after, state = result.before.median, result.after.median, result.state
    failures = "".join(f", {count} {status}" for status, count in sorted(state.failures.items()))
    summary = (
        f"whole model: {before * 1e3:.4g} ms before, {_gain(result)}; "
        f"{state.trials} trials in {state.elapsed:.0f} s{failures}; {_kept(result)}"
    )
    return {
        "kernels": rows, "seconds_before": before, "seconds_after": after, "trials": state.trials, "seconds": state.elapsed,
        "failures": dict(state.failures), "database": str(result.path), "summary": summary,
    }  # fmt: skip
