"""A graph -> the seconds of each of its kernels, timed inside of the compiled program by a process of its own."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hwopt.analysis.workload import workloads
from hwopt.backends.tvm.tune.runner import Runner
from hwopt.emit.memory import plan_memory, root_of
from hwopt.emit.program import Call, Program
from hwopt.ir import Graph
from hwopt.target import Target, Workload

LOW = 25  # percentile of the passes that counts: others only disturb, but the fastest of hundreds is luck
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
    """One graph: its kernels, one whole pass, and what belongs to no region in it (layouts of inputs).

    `seconds` sums up every call's own LOWth percentile: where others take the processor now and then, no pass is undisturbed.
    """

    samples: tuple[Sample, ...]
    seconds: float
    other_seconds: float
    clock: float  # seconds of the reference in the same process
    units: float = 0.0  # of the one that others on the same core slow down


@dataclass(frozen=True)
class Compiled:
    """A program that waits to be timed: `command` is for the measuring process, `labels` name the region of each call.

    Its constants lie in the file `command["blob"]`.
    """

    work: tuple[Workload, ...]
    labels: tuple[str, ...]
    objects: tuple[bytes, ...]
    command: dict[str, Any]


def compiled(graph: Graph, target: Target, threads: int, folder: Path) -> Compiled:
    """The graph as it would ship, its constants in a file in `folder`; raises HwoptError where it cannot be compiled."""
    from hwopt.backends.tvm.build import compile_program

    program = compile_program(graph, target, threads, "profile")
    labels = tuple(call.label for call in program.calls)
    return Compiled(workloads(graph), labels, tuple(program.objects), command(program, folder))


def timed(one: Compiled, runner: Runner, seconds: float, evict: int = 0) -> Profile:
    """Run it for so long and time its calls; between passes `evict` bytes go through the caches, as of a larger model.

    Raises ToolchainError where a kernel fails.
    """
    passes, clock, units = runner.time_calls(one.objects, {**one.command, "seconds": seconds, "evict": evict})
    times = np.array(passes)
    best, low = times.min(0), np.percentile(times, LOW, axis=0)
    found, other = assigned(one.work, one.labels, low, low / np.maximum(best, 1e-9) - 1)
    return Profile(tuple(found), float(low.sum()), other, clock, units)


def profile(graph: Graph, target: Target, threads: int, runner: Runner, seconds: float = 0.5) -> Profile:
    """Compile the graph and time its calls; raises HwoptError where it cannot be compiled or run."""
    with tempfile.TemporaryDirectory(dir=runner.folder) as folder:
        return timed(compiled(graph, target, threads, Path(folder)), runner, seconds)


def command(program: Program, folder: Path) -> dict[str, Any]:
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
        "blob": str(folder / "constants.bin"), "arena": plan.arena_bytes,
    }  # fmt: skip


def attribute(graph: Graph, calls: Sequence[Call], seconds: np.ndarray, noise: np.ndarray) -> tuple[list[Sample], float]:
    """What each region of a graph took, and what belongs to none, from the seconds of the calls."""
    return assigned(workloads(graph), [call.label for call in calls], seconds, noise)


def assigned(
    work: Sequence[Workload], labels: Sequence[str], seconds: np.ndarray, noise: np.ndarray
) -> tuple[list[Sample], float]:
    """Calls to regions: by the label where a template wrote it; what lies between two of them belongs to the regions between.

    TVM fuses what lies between as it likes: where the counts differ, the regions share the time by the bytes they move.
    """
    names = {one.name: index for index, one in enumerate(work)}
    labelled = [(place, names[label]) for place, label in enumerate(labels) if label in names]
    marks = [(-1, -1), *_rising(labelled), (len(labels), len(work))]
    samples, other = [], 0.0
    for (before, above), (place, region) in itertools.pairwise(marks):
        between, regions = list(range(before + 1, place)), work[above + 1 : region]
        found, left = _between(between, regions, seconds, noise)
        samples += found
        other += left
        if place < len(labels):
            samples.append(Sample(work[region], float(seconds[place]), float(noise[place])))
    return samples, other


def _rising(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those whose regions come in order."""
    found: list[tuple[int, int]] = []
    for place, region in pairs:
        if not found or region > found[-1][1]:
            found.append((place, region))
    return found


def _between(calls: list[int], regions: Sequence[Workload], times: np.ndarray, noise: np.ndarray) -> tuple[list[Sample], float]:
    seconds = float(sum(times[call] for call in calls))
    if not regions:
        return [], seconds
    if len(calls) == len(regions):
        return [Sample(one, float(times[call]), float(noise[call])) for call, one in zip(calls, regions, strict=True)], 0.0
    worst = max((float(noise[call]) for call in calls), default=0.0)
    share = np.array([one.bytes + 64.0 for one in regions])
    parts = seconds * share / share.sum()
    return [Sample(one, float(part), worst, len(regions)) for one, part in zip(regions, parts, strict=True)], 0.0
