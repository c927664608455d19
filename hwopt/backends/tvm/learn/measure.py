"""A graph -> the seconds of each of its kernels, timed inside of the compiled program by a process of its own."""

from __future__ import annotations

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
    """A program that waits to be timed: `command` is for the measuring process, `owners` are the regions of each call.

    Its constants lie in the file `command["blob"]`.
    """

    work: tuple[Workload, ...]
    owners: tuple[tuple[str, ...], ...]
    objects: tuple[bytes, ...]
    command: dict[str, Any]


def compiled(graph: Graph, target: Target, threads: int, folder: Path) -> Compiled:
    """The graph as it would ship, its constants in a file in `folder`; raises HwoptError where it cannot be compiled."""
    from hwopt.backends.tvm.build import compile_program

    program = compile_program(graph, target, threads, "profile")
    return Compiled(workloads(graph), owners_of(program.calls), tuple(program.objects), command(program, folder))


def timed(one: Compiled, runner: Runner, seconds: float, evict: int = 0) -> Profile:
    """Run it for so long and time its calls; between passes `evict` bytes go through the caches, as of a larger model.

    Raises ToolchainError where a kernel fails.
    """
    passes, clock, units = runner.time_calls(one.objects, {**one.command, "seconds": seconds, "evict": evict})
    times = np.array(passes)
    best, low = times.min(0), np.percentile(times, LOW, axis=0)
    found, other = assigned(one.work, one.owners, low, low / np.maximum(best, 1e-9) - 1)
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
    return assigned(workloads(graph), owners_of(calls), seconds, noise)


def owners_of(calls: Sequence[Call]) -> tuple[tuple[str, ...], ...]:
    """The regions whose time each call's is: what a template computes has a call of its own, which bears its name.

    What else was emitted for such a region brings an input into another order, mostly behind the kernel that computes it.
    """
    alone = {one for call in calls if call.label in call.regions for one in call.regions}
    return tuple(
        call.regions if call.label in call.regions else tuple(one for one in call.regions if one not in alone) for call in calls
    )


def assigned(
    work: Sequence[Workload], owners: Sequence[Sequence[str]], seconds: np.ndarray, noise: np.ndarray
) -> tuple[list[Sample], float]:
    """Calls to regions: each takes what its calls take. Regions that TVM put into one kernel share it by the bytes they move."""
    names = {one.name: index for index, one in enumerate(work)}
    places = [[names[one] for one in some if one in names] for some in owners]
    samples = [Sample(one, 0.0, 0.0) for one in work]
    for calls, regions in _joined(places):
        share = np.array([work[region].bytes + 64.0 for region in regions])
        parts = float(sum(seconds[call] for call in calls)) * share / share.sum()
        worst = max(float(noise[call]) for call in calls)
        for region, part in zip(regions, parts, strict=True):
            samples[region] = Sample(work[region], float(part), worst, len(regions))
    return samples, float(sum(seconds[call] for call, some in enumerate(places) if not some))


def _joined(places: Sequence[Sequence[int]]) -> list[tuple[list[int], list[int]]]:
    """(calls, regions) that have to do with each other and with nobody else."""
    found: list[tuple[list[int], set[int]]] = []
    for call, regions in enumerate(places):
        mine = [one for one in found if not one[1].isdisjoint(regions)]
        rest = [one for one in found if one[1].isdisjoint(regions)]
        merged = ([*(call for calls, _ in mine for call in calls), call], set(regions).union(*(some for _, some in mine)))
        found = [*rest, merged] if regions else found
    return [(calls, sorted(regions)) for calls, regions in found]
