"""Arm cores: cycles of the inner loops that TVM generates, as llvm-mca issues them, and caches and memory around them.

The tables data/arm_<core>.json come from `python -m benchmarks.arm_tables`; no Arm machine was measured. A kernel takes
max(inner loops, cache, memory) + elementwise work + launch:

* inner loops: multiply-adds, channels padded to whole vectors, at the table's rate; `EDGES` of them is lost at loop ends. Where
  Winograd's algorithm takes fewer cycles, by the model that chooses it, they count for as much less.
* cache: weights of a channel tile that overflow half of the first level come from the second one for every tile of positions.
* memory: all bytes once, from the nearest level that holds them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hwopt.backends.tvm.learn.counted_winograd import share_of_direct
from hwopt.target import Cost, Memory, MicroKernel, Target, Workload
from targets import _isa_arm
from targets._roofline import round_up

DATA = Path(__file__).with_name("data")
EDGES = 0.15  # of the time: prologues, shorter last tiles, copies of padded borders; an assumption
FACTOR = 2.0  # either way: two thirds of ncnn's published times lie within it, medians much nearer (benchmarks.run fidelity)
PRIVATE = ("l1", "l2")  # levels that every core has for itself
SIZE = {"float32": 4, "int8": 1}


@dataclass(frozen=True)
class Loop:
    """One inner loop: multiply-adds a cycle, and the tile of positions x channels that it computes."""

    macs_per_cycle: float
    positions: int
    channels: int


@dataclass(frozen=True)
class ArmCore:
    """The cost model of `hertz` and the memories of a chip. Bandwidths of private levels are a core's, of others the chip's."""

    hertz: float
    memories: tuple[Memory, ...]
    loops: Mapping[str, Loop]
    lanes: Mapping[str, int]
    core_bytes_per_second: float  # what one core draws of a level that it shares
    elements_per_cycle: float
    launch_seconds: float = 2e-6
    joules_per_op: Mapping[str, float] = field(default_factory=dict)
    micros: Mapping[str, MicroKernel] = field(default_factory=dict)

    def estimate(self, workload: Workload, threads: int) -> Cost:
        """Cost of one kernel on `threads` cores; other dtypes count as float32."""
        dtype = "int8" if workload.dtype in ("int8", "uint8") else "float32"
        compute = self._products(workload, dtype) / threads
        memory = workload.bytes / self._bandwidth(self._holding(workload.bytes), threads)
        elements = workload.elements / (self.elements_per_cycle * self.hertz * threads)
        seconds = max(compute, self._panels(workload, dtype, threads), memory) + elements + self.launch_seconds
        joules = 2 * workload.macs * self.joules_per_op.get(dtype, 0.0)
        joules += workload.bytes * self._holding(workload.bytes).joules_per_byte
        low, high = seconds / FACTOR, seconds * FACTOR
        return Cost(seconds, joules, workload.weight_bytes, "analytical", low, high)

    def _loop(self, workload: Workload, dtype: str) -> Loop:
        return self.loops[f"{dtype} {'depthwise' if workload.kind == 'depthwise' else 'conv'}"]

    def _products(self, workload: Workload, dtype: str) -> float:
        """Seconds of the inner loops on one core."""
        lanes, loop = self.lanes[dtype], self._loop(workload, dtype)
        if workload.kind == "depthwise":  # vectors run along the groups
            macs = workload.m * round_up(workload.groups * workload.n, lanes) * workload.k
        else:
            macs = workload.m * round_up(workload.n, lanes) * workload.k * workload.groups
        return share_of_direct(workload, self.micros.get(dtype)) * macs / (loop.macs_per_cycle * self.hertz * (1 - EDGES))

    def _panels(self, workload: Workload, dtype: str, threads: int) -> float:
        """Seconds of reading weights again for every tile of positions, where they overflow half of the first level."""
        loop = self._loop(workload, dtype)
        if workload.kind == "depthwise" or workload.k * loop.channels * SIZE[dtype] <= self.memories[0].bytes // 2:
            return 0.0
        return workload.macs / loop.positions * SIZE[dtype] / self._bandwidth(self.memories[1], threads)

    def _holding(self, size: int) -> Memory:
        return next((memory for memory in self.memories if size <= memory.bytes), self.memories[-1])

    def _bandwidth(self, memory: Memory, threads: int) -> float:
        if memory.name in PRIVATE:
            return memory.bytes_per_second * threads
        return min(memory.bytes_per_second, self.core_bytes_per_second * threads)


def table(core: str) -> dict[str, Any]:
    """The shipped table of a core: who made it, and its loops."""
    return json.loads((DATA / f"arm_{core.replace('-', '_')}.json").read_text())


def loops(core: str) -> dict[str, Loop]:
    stored = table(core)["loops"]
    return {name: Loop(one["macs"] / one["cycles"], one["positions"], one["channels"]) for name, one in stored.items()}


def arm_target(
    core: str, summary: str, cores: int, features: frozenset[str], memories: tuple[Memory, ...], *, hertz: float,
    core_bytes_per_second: float, elements_per_cycle: float, joules_per_op: Mapping[str, float],
) -> Target:  # fmt: skip
    """A target for a chip with `cores` of this core; peaks are what its inner loops reach."""
    micro, table_loops = _isa_arm.microkernels(features), loops(core)
    granule = {dtype: kernel.lanes * (2 if dtype == "int8" else 1) for dtype, kernel in micro.items()}
    peak = {dtype: 2 * table_loops[f"{dtype} conv"].macs_per_cycle * hertz for dtype in micro}
    cost = ArmCore(
        hertz, memories, table_loops, {dtype: kernel.lanes for dtype, kernel in micro.items()}, core_bytes_per_second,
        elements_per_cycle, joules_per_op=joules_per_op, micros=micro,
    )  # fmt: skip
    return Target(
        name=core, summary=summary, kind="cpu", cores=cores, peak=peak, memories=memories, granule=granule, cost=cost,
        tvm=_isa_arm.llvm(features, core), microkernels=micro, features=tuple(sorted({"asimd", *features})),
    )  # fmt: skip
