"""Suite `overhead`: what the generated driver adds to its kernels, on the demo model; the same model in TVM's virtual machine.

The whole run and its kernels alone take turns in one process: on the same buffers, compiled together with the same flags, each
turn some runs between two readings of the clock. The kernels are called from a bare loop, with their arguments made
beforehand; so the ratio of neighbouring turns is the driver's part, free of what a clock's reading costs. As a check every kernel
is also timed by itself, which counts the readings to the kernels: the best run over the sum of the best times is an upper bound.
Buffers and weights are warm in all of them. The virtual machine runs the kernels that TVM makes for it, as the fallback does.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.layout import Row, lower_is_better, result
from benchmarks.models import quantized
from hwopt.backends.tvm.build import compile_program
from hwopt.backends.tvm.vm import compile_vm
from hwopt.demo import MODEL, SHAPES, demo_data
from hwopt.emit.stamps import Stamped, build_stamped
from hwopt.ir import Graph
from hwopt.job import prepare, quiet
from hwopt.measure import MEDIAN_ERROR, QUARTILES
from hwopt.plugins import find_target
from hwopt.target import Target

TURNS, SECONDS = 2000, 0.0006  # short enough to be undisturbed most of the time
VM_TURNS = 100  # turns for each one of the virtual machine, which takes long
PASSES = 2000
Call = Callable[[int], float]  # how often -> seconds of one run


def run(threads: int = 1, quick: bool = False) -> dict[str, Any]:
    """The demo model in float and in int8."""
    rows: list[Row] = []
    summary: dict[str, float] = {}
    turns = TURNS // 20 if quick else TURNS
    target = find_target("host")
    for name, graph in graphs(threads).items():
        with tempfile.TemporaryDirectory() as folder:
            found = measured(graph, target, threads, Path(folder), turns)
        case = f"demo {name}"
        rows.append(Row(case, "driver's part of a run", "1", found["overhead"], {}, None))
        rows.append(lower_is_better(case, "latency", "s", found["run"], {"relax vm": found["vm"]}))
        summary |= {f"{key}_{name}": value for key, value in found.items() if key not in ("run", "vm")}
        summary[f"vs_relax_vm_{name}"] = found["vm"] / found["run"]
    for key, worst in (("driver_overhead", max), ("vs_relax_vm", min)):
        prefix = "overhead" if key == "driver_overhead" else key
        summary[key] = worst(summary[f"{prefix}_{name}"] for name in ("float", "int8"))
    return result("overhead", rows, {**summary, "threads": threads})


def graphs(threads: int) -> Mapping[str, Graph]:
    calibrate, evaluate = demo_data()
    job = prepare(MODEL, find_target("host"), SHAPES, None, calibrate, evaluate, None, None, threads, 0, quiet)
    return {"float": job.graph, "int8": quantized(job)}


def measured(graph: Graph, target: Target, threads: int, folder: Path, turns: int) -> dict[str, float]:
    """Medians: the driver's part with its standard error, that by stamps, and seconds of a run here and in the machine."""
    import tvm

    made = build_stamped(compile_program(graph, target, threads, "demo"), folder / "stamped", target.features, threads)
    library = tvm.runtime.load_module(str(made.path))
    tensors = tuple(tensors_of(made))
    calls: dict[str, Call] = {
        "run": lambda times: float(library["hwopt_stamp_run"](times, threads, *tensors)),
        "kernels": lambda times: float(library["hwopt_stamp_kernels"](times, threads, *tensors)),
    }
    times = taken(calls, turns)
    virtual = machine(compile_vm(graph, target), folder, tensors[: len(made.inputs)])
    beside = taken({"run": calls["run"], "vm": virtual}, max(3, turns // VM_TURNS))
    parts = times["run"] / times["kernels"] - 1
    low, median, high = np.percentile(parts, (25, 50, 75))
    return {
        "overhead": float(median), "overhead_error": float(MEDIAN_ERROR * (high - low) / QUARTILES / math.sqrt(turns)),
        "overhead_by_stamps": by_stamps(made, library, tensors, threads, float(times["run"].min())),
        "run": float(np.median(beside["run"])), "vm": float(np.median(beside["vm"])),
    }  # fmt: skip


def tensors_of(made: Stamped) -> Iterator[Any]:
    """Inputs like pictures, and room for the outputs."""
    import tvm

    random = np.random.default_rng(0)
    for tensor in made.inputs:
        yield tvm.runtime.tensor(random.random(tensor.type.dims).astype(tensor.type.dtype))
    for tensor in made.outputs:
        yield tvm.runtime.empty(tensor.type.dims, tensor.type.dtype)


def machine(library: bytes, folder: Path, inputs: tuple[Any, ...]) -> Call:
    """The same model in TVM's virtual machine, timed by TVM's loop in C++."""
    import tvm
    from tvm import relax

    path = folder / "vm.so"
    path.write_bytes(library)
    virtual = relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())
    virtual.save_function("main", "bound", *inputs, include_return=False)
    return lambda times: float(virtual.time_evaluator("bound", tvm.cpu(), number=times, repeat=1)().mean)


def taken(calls: Mapping[str, Call], turns: int) -> dict[str, np.ndarray]:
    """Seconds of one run in every turn; every other turn in the opposite order."""
    repeats = {name: max(1, int(SECONDS / min(call(3) for _ in range(5)))) for name, call in calls.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns):
        for name in calls if turn % 2 else reversed(calls):
            found[name].append(calls[name](repeats[name]))
    return {name: np.array(values) for name, values in found.items()}


def by_stamps(made: Stamped, library: Any, tensors: tuple[Any, ...], threads: int, seconds: float) -> float:
    """The driver's part of the best run if its kernels took what each takes at best, between two readings of the clock."""
    import tvm

    table = tvm.runtime.empty((PASSES, made.calls + 1), "float64")
    library["hwopt_stamp_calls"](PASSES, threads, *tensors, table)
    return seconds / float(table.numpy()[:, :-1].min(0).sum()) - 1
