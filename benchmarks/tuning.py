"""Suite `tuning`: candidates per second, ours and stock MetaSchedule's, and how fast ResNet-18's int8 kernels get to their best.

Stock is `tune_tir` on one convolution with its own LocalBuilder and LocalRunner; its cost model is `random`, the cheapest. What
it has not finished when its time is up counts as if it had: the ratio is a lower bound. Both have the same cores.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.layout import Row, higher_is_better, lower_is_better, result
from hwopt.backends.tvm import kernels
from hwopt.backends.tvm.kernels.spec import Activation, Add, Bias, ConvSpec, PoolSpec, Quantize, Scale
from hwopt.backends.tvm.tune.database import Database
from hwopt.backends.tvm.tune.session import Effort, State, tune
from hwopt.backends.tvm.tune.task import Task, make_task
from hwopt.plugins import find_target
from hwopt.target import Target

STOCK_TRIALS, STOCK_SECONDS = 16, 400
OUR_TRIALS = 64
SEARCH_SECONDS = 300.0
MOMENTS = (15, 30, 60, 120, 180)  # seconds at which the best so far is told


def run(threads: int | None = None, quick: bool = False) -> dict[str, Any]:
    """`quick`: a search of a minute."""
    threads = threads or 1
    target = find_target("host")
    ours, found = throughput(target, threads)
    stock = stock_throughput()
    rows: list[Row] = [
        higher_is_better("conv 3x3 64>64 56x56 float32", "candidates", "1/s", ours, {"MetaSchedule": stock["rate"]}),
    ]
    if stock["seconds_best"]:
        best = min(one.seconds for one in found.tasks)
        rows.append(lower_is_better("conv 3x3 64>64 56x56 float32", "best", "s", best, {"MetaSchedule": stock["seconds_best"]}))
    curve, state = resnet18(target, threads, 60.0 if quick else SEARCH_SECONDS)
    final, before = curve[-1][1], state.before
    for moment in (one for one in MOMENTS if one <= state.elapsed):
        reached = reached_by(moment, curve, before)
        rows.append(lower_is_better(f"resnet18 int8 after {moment} s", "kernels", "s", reached, {"final": final}))
    gains = [math.log(one.default / one.seconds) for one in state.tasks if one.default]
    summary = {
        "tuning_throughput_vs_stock": ours / stock["rate"], "trials_per_second": ours, "stock_trials_per_second": stock["rate"],
        "stock_finished": stock["finished"], "resnet18_int8_kernels_gain": before / final,
        "resnet18_int8_geometric_mean_gain": math.exp(sum(gains) / len(gains)), "resnet18_trials": state.trials,
        "resnet18_seconds_to_within_5_percent": next(at for at, seconds in curve if seconds <= 1.05 * final),
        "resnet18_after_180_s_over_final": reached_by(180.0, curve, before) / final,
        "resnet18_share_of_limit": state.limit / final, "threads": threads,
    }  # fmt: skip
    return result("tuning", rows, summary)


def reached_by(moment: float, curve: list[tuple[float, float]], before: float) -> float:
    """Seconds of all kernels; those that had no turn yet run with their default schedules."""
    return next((seconds for at, seconds in reversed(curve) if at <= moment), before)


def throughput(target: Target, threads: int) -> tuple[float, State]:
    """Candidates built, checked and timed per second of wall clock, starting the workers included."""
    spec = ConvSpec(1, 56, 56, 64, 64, (3, 3), pads=(1, 1, 1, 1))
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        works = {make_task(spec, target.microkernels["float32"], target, threads): 1}
        state = tune(works, target, Database(Path(folder) / "tuning.jsonl"), Effort(trials=OUR_TRIALS))
    return state.trials / (time.monotonic() - started), state


def stock_throughput() -> dict[str, float]:
    """MetaSchedule in a process of its own; candidates per second from the start of its search on, imports not counted."""
    command = [sys.executable, "-m", "benchmarks.tuning", str(STOCK_TRIALS)]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    try:
        out, _ = process.communicate(timeout=STOCK_SECONDS)
        return json.loads(out.splitlines()[-1])
    except subprocess.TimeoutExpired:
        _end(process.pid)
        return {"rate": STOCK_TRIALS / (time.monotonic() - started), "seconds_best": 0.0, "finished": 0.0}


def _end(group: int) -> None:
    """End a process and the workers that it left behind."""
    import os
    import signal

    os.killpg(group, signal.SIGKILL)


def resnet18_tasks(target: Target, threads: int) -> dict[Task, int]:
    """ResNet-18's quantized kernels at 224 x 224, with the number of calls of each."""
    calls: dict[Any, int] = {conv(3, 64, 224, 7, 2): 1, PoolSpec(1, 112, 112, 64, (3, 3), (2, 2), pads=(1,) * 4, **BYTES): 1}
    calls |= {conv(64, 64, 56): 2, conv(64, 64, 56, add=True): 2}
    for channels, size in ((128, 28), (256, 14), (512, 7)):
        calls |= {
            conv(channels // 2, channels, 2 * size, stride=2): 1, conv(channels // 2, channels, 2 * size, 1, 2): 1,
            conv(channels, channels, size): 1, conv(channels, channels, size, add=True): 2,
        }  # fmt: skip
    micros = {"ConvSpec": target.microkernels["int8"], "PoolSpec": target.microkernels["int8"]}
    return {
        make_task(spec, kernels.suited(spec, micros[type(spec).__name__]), target, threads): count
        for spec, count in calls.items()
    }


BYTES: dict[str, Any] = {"data_dtype": "uint8", "out_dtype": "uint8"}


def conv(channels: int, out: int, size: int, kernel: int = 3, stride: int = 1, add: bool = False) -> ConvSpec:
    """With bias, requantization and relu; with `add` a quantized residual before the relu."""
    steps = (Bias(), Scale(), *((Add("uint8", 0.05, 3),) if add else ()), Activation("relu"), Quantize(0.04, 0, "uint8"))
    return ConvSpec(
        1, size, size, channels, out, (kernel, kernel), (stride, stride), pads=(kernel // 2,) * 4, weight_dtype="int8",
        epilogue=steps, **BYTES,
    )  # fmt: skip


def resnet18(target: Target, threads: int, seconds: float) -> tuple[list[tuple[float, float]], State]:
    """(wall-clock seconds, seconds of all kernels with the best schedules so far) after every batch."""
    moments: list[tuple[float, dict[int, float]]] = []

    def watch(state: State) -> None:
        moments.append((state.elapsed, {index: one.ratio for index, one in enumerate(state.tasks)}))

    with tempfile.TemporaryDirectory() as folder:
        works = resnet18_tasks(target, threads)
        state = tune(works, target, Database(Path(folder) / "tuning.jsonl"), Effort(seconds=seconds), watch=watch)
    curve = [
        (at, sum(one.calls * one.default * ratios[index] for index, one in enumerate(state.tasks))) for at, ratios in moments
    ]
    return curve, state


def main(trials: int) -> None:
    """MetaSchedule as it comes; one line of JSON."""
    import tvm
    from tvm import te, topi
    from tvm.s_tir import meta_schedule

    data, weights = te.placeholder((1, 56, 56, 64), "float32", "x"), te.placeholder((3, 3, 64, 64), "float32", "w")
    function = te.create_prim_func([data, weights, topi.nn.conv2d_nhwc(data, weights, 1, 1, 1)])
    target = tvm.target.Target({**dict(find_target("host").tvm), "num-cores": 1})
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        database = meta_schedule.tir_integration.tune_tir(
            function, target, folder, max_trials_global=trials, num_trials_per_iter=trials, cost_model="random", seed=1
        )
        elapsed = time.monotonic() - started
        times = [float(record.run_secs[0]) for record in database.get_all_tuning_records() if record.run_secs]
    good = [one for one in times if one < 1e9]
    print(json.dumps({"rate": trials / elapsed, "seconds_best": min(good, default=0.0), "finished": float(len(good))}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
