"""NVIDIA GPUs: tiles of the output on streaming multiprocessors (SMs), in waves, as many at a time as registers and memory allow.

Tiles, registers and shared memory are those of matmuls that TVM schedules and nvcc compiles (data/gpu_<arch>.json, from
`python -m benchmarks.gpu_tables`); nothing was run. Limits of an SM: NVIDIA, "CUDA C++ programming guide", table "Technical
specifications per compute capability". Hiding latencies takes about 8 warps an SM (2 for each of its 4 schedulers): Volkov,
"Understanding latency hiding on GPUs", 2016.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hwopt.target import Cost, Memory, Workload
from targets._roofline import round_up

DATA = Path(__file__).with_name("data")
REGISTERS, WARP = 65536, 32  # of an SM, and threads; of all compute capabilities from 7.5 to 9.0
SHARED_BYTES = {"sm_75": 64 << 10, "sm_80": 163 << 10, "sm_87": 163 << 10, "sm_90": 227 << 10}  # one block may take
THREADS = {"sm_75": 1024, "sm_80": 2048, "sm_87": 1536, "sm_90": 2048}  # resident on an SM
BLOCKS = {"sm_75": 16, "sm_80": 32, "sm_87": 16, "sm_90": 32}
HIDING_WARPS = 8
EFFICIENCY = {"float32": 0.75, "float16": 0.5, "int8": 0.5}  # of the peak with latencies hidden: dlight's tiles; an assumption
EXPOSED = 0.1  # of what runs beside the longest part: loads before the first and stores after the last tile; an assumption
DEPTH = {"float32": 1, "float16": 16, "int8": 32}  # of one tensor core instruction: mma.m16n8k16, mma.m16n8k32
BYTES = {"float32": 4, "float16": 2, "int8": 1}


@dataclass(frozen=True)
class Tile:
    """One block of a matmul kernel: what it computes and what it takes of an SM."""

    rows: int
    columns: int
    threads: int
    registers: int  # of a thread
    shared_bytes: int

    def resident(self, arch: str) -> int:
        """Blocks that an SM holds at a time. Registers are given in units of 256 to a warp."""
        warps = -(-self.threads // WARP)
        by_registers = REGISTERS // (warps * round_up(self.registers * WARP, 256))
        by_shared = SHARED_BYTES[arch] // max(1, self.shared_bytes)
        return max(1, min(by_registers, by_shared, THREADS[arch] // self.threads, BLOCKS[arch]))


@functools.cache
def tiles(arch: str) -> Mapping[str, Tile]:
    """By dtype."""
    names = ("rows", "columns", "threads", "registers", "shared_bytes")
    return {dtype: Tile(*(one[name] for name in names)) for dtype, one in table(arch)["tiles"].items()}


def table(arch: str) -> dict[str, Any]:
    """The shipped table of an architecture: who made it, and its tiles."""
    return json.loads((DATA / f"gpu_{arch}.json").read_text())


@dataclass(frozen=True)
class Gpu:
    """The cost model of `sms` multiprocessors. `peak` is the whole chip's; the last memory is DRAM, the one before it L2."""

    arch: str
    sms: int
    peak: Mapping[str, float]
    memories: tuple[Memory, ...]
    launch_seconds: float = 3e-6
    joules_per_op: Mapping[str, float] = field(default_factory=dict)

    def estimate(self, workload: Workload, threads: int) -> Cost:
        """Launch + the longest of waves of tiles, L2 and DRAM. Low: the peaks alone; high: twice the estimate."""
        dtype = {"int8": "int8", "uint8": "int8", "float16": "float16", "bfloat16": "float16"}.get(workload.dtype, "float32")
        dtype = dtype if dtype in self.peak else "float32"
        memory = workload.bytes / self._holding(workload.bytes).bytes_per_second
        elements = workload.elements / (self.peak["float32"] / 8)  # about 8 operations for an epilogue's result
        parts = (self.products(workload, dtype), self.refetch(workload, dtype), memory)
        seconds = max(parts) + EXPOSED * (sum(parts) - max(parts)) + elements + self.launch_seconds
        low = max(2 * workload.macs / self.peak[dtype], memory) + 0.5 * self.launch_seconds
        joules = 2 * workload.macs * self.joules_per_op.get(dtype, 0.0)
        joules += workload.bytes * self._holding(workload.bytes).joules_per_byte
        return Cost(seconds, joules, workload.weight_bytes, "analytical", min(low, seconds), 2 * seconds)

    def products(self, workload: Workload, dtype: str) -> float:
        """Seconds of the multiplications; depthwise ones use no tensor cores and a quarter of the others."""
        if not workload.macs:
            return 0.0
        if workload.kind == "depthwise":
            return 2 * workload.macs / (0.25 * self.peak["float32"])
        tile = tiles(self.arch)[dtype]
        per_sm = math.ceil(self.blocks(workload, tile) / self.sms)  # the last wave is as long as a whole one
        operations = 2.0 * tile.rows * tile.columns * round_up(workload.k, DEPTH[dtype])
        return per_sm * operations * self.sms / (self.peak[dtype] * EFFICIENCY[dtype] * self.hidden(tile, per_sm))

    def blocks(self, workload: Workload, tile: Tile) -> int:
        return math.ceil(workload.m / tile.rows) * math.ceil(workload.n / tile.columns) * workload.groups

    def hidden(self, tile: Tile, per_sm: int) -> float:
        """The share of the peak that the warps resident on an SM can ask for."""
        warps = min(tile.resident(self.arch), per_sm) * tile.threads / WARP
        return min(1.0, warps / HIDING_WARPS)

    def refetch(self, workload: Workload, dtype: str) -> float:
        """Seconds of reading both operands from L2, once for every tile."""
        if not workload.macs or workload.kind == "depthwise":
            return 0.0
        tile = tiles(self.arch)[dtype]
        moved = self.blocks(workload, tile) * (tile.rows + tile.columns) * workload.k * BYTES[dtype]
        return moved / self.memories[0].bytes_per_second

    def _holding(self, size: int) -> Memory:
        return next((memory for memory in self.memories if size <= memory.bytes), self.memories[-1])
