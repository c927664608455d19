"""A graph -> the seconds of each of its kernels, timed inside of the compiled program by a process of its own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hwopt.analysis.workload import kernels
from hwopt.backends.tvm.tune.runner import Runner
from hwopt.emit.memory import plan_memory, root_of
from hwopt.emit.program import Call, Program
from hwopt.ir import Graph
from hwopt.target import Target, Workload

LOW = 15  # percentile of the passes that must lie near the fastest one, or the machine was too busy
NOISE = 0.08


@dataclass(frozen=True)
class Sample:
    """One kernel: its work and what it took. `noise` is how far the LOWth percentile of the passes lies above the fastest.

    `shared` counts the regions that TVM compiled together with this one: their time was divided among them.
    """

    work: Workload
    seconds: float
    noise: float
    shared: int = 1

    @property
    def clean(self) -> bool:
        return self.noise <= NOISE and self.seconds > 0


@dataclass(frozen=True)
class Profile:
    """One graph: its kernels, the sum over all calls, and that of calls that belong to no region (layouts of inputs)."""

    samples: tuple[Sample, ...]
    seconds: float
    other_seconds: float
    clock: float  # seconds of the reference in the same process


def profile(graph: Graph, target: Target, threads: int, runner: Runner, seconds: float = 0.5) -> Profile:
    """Compile the graph as it would ship and time its calls; raises HwoptError where it cannot be compiled or run."""
    from hwopt.backends.tvm.build import compile_program

    program = compile_program(graph, target, threads, "profile")
    passes, clock = runner.time_calls(program.objects, command(program, runner.folder, seconds))
    times = np.array(passes)
    best, low = times.min(0), np.percentile(times, LOW, axis=0)
    found, other = attribute(graph, program.calls, best, low / np.maximum(best, 1e-9) - 1)
    return Profile(tuple(found), float(best.sum()), other, clock)


def command(program: Program, folder: Path, seconds: float) -> dict[str, Any]:
    """The program as the measuring process reads it (see tune/whole.py); constants go into a file."""
    plan, names = plan_memory(program), {name: index for index, name in enumerate(program.buffers)}
    blob, offsets = bytearray(), {}
    for name, buffer in program.buffers.items():
        if buffer.data is not None:
            offsets[name] = len(blob)
            blob += buffer.data.tobytes() + bytes(-buffer.data.nbytes % 64)
    (folder / "constants.bin").write_bytes(blob)
    buffers = []
    for name, buffer in program.buffers.items():
        root = root_of(program, name)
        place = "blob" if root in offsets else "arena" if root in plan.offsets else "own"
        offset = {**offsets, **plan.offsets}.get(root, 0) if place != "own" else 0
        buffers.append([buffer.dtype, list(buffer.shape), place, offset])
    return {
        "buffers": buffers, "calls": [[call.symbol, [names[one] for one in call.args]] for call in program.calls],
        "blob": str(folder / "constants.bin"), "arena": plan.arena_bytes, "seconds": seconds,
    }  # fmt: skip


def attribute(graph: Graph, calls: Sequence[Call], best: np.ndarray, noise: np.ndarray) -> tuple[list[Sample], float]:
    """Calls to regions: by the label where a template wrote it; what lies between two of them belongs to the regions between.

    TVM fuses what lies between as it likes: where the counts differ, the regions share the time by the bytes they move.
    """
    work = [one for _, one in kernels(graph)]
    names = {one.name: index for index, one in enumerate(work)}
    labelled = [(place, names[call.label]) for place, call in enumerate(calls) if call.label in names]
    marks = [(-1, -1), *_rising(labelled), (len(calls), len(work))]
    samples, other = [], 0.0
    for (before, above), (place, region) in itertools.pairwise(marks):
        between, regions = list(range(before + 1, place)), work[above + 1 : region]
        found, left = _between(between, regions, best, noise)
        samples += found
        other += left
        if place < len(calls):
            samples.append(Sample(work[region], float(best[place]), float(noise[place])))
    return samples, other


def _rising(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those whose regions come in order."""
    found: list[tuple[int, int]] = []
    for place, region in pairs:
        if not found or region > found[-1][1]:
            found.append((place, region))
    return found


def _between(calls: list[int], regions: list[Workload], best: np.ndarray, noise: np.ndarray) -> tuple[list[Sample], float]:
    seconds = float(sum(best[call] for call in calls))
    if not regions:
        return [], seconds
    if len(calls) == len(regions):
        return [Sample(one, float(best[call]), float(noise[call])) for call, one in zip(calls, regions, strict=True)], 0.0
    worst = max((float(noise[call]) for call in calls), default=0.0)
    share = np.array([one.bytes + 64.0 for one in regions])
    parts = seconds * share / share.sum()
    return [Sample(one, float(part), worst, len(regions)) for one, part in zip(regions, parts, strict=True)], 0.0
