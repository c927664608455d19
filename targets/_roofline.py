"""The roofline cost model that CPUs and GPUs share: max(compute, memory) + epilogue + launch.

Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", CACM 2009.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hwopt.backends.tvm.learn.counted_winograd import share_of_direct
from hwopt.target import Coded, Cost, Memory, MicroKernel, Workload

# The time of products that are added in 16 bits, by instructions: three for a word, five for two, instead of four for each.
PAIRED = (1.0, 0.75, 0.625)
INSTRUCTIONS = 8  # vector instructions in the time of one epilogue step: four cycles, two a cycle


def round_up(size: int, granule: int) -> int:
    return -(-size // granule) * granule


@dataclass(frozen=True)
class Roofline:
    """Seconds of one kernel from peaks, bandwidths and the shape's waste against the hardware's granules."""

    peak: Mapping[str, float]  # operations per second and core, 2 per multiply-add
    elements_per_second: float  # epilogue and elementwise results per core
    memories: tuple[Memory, ...]
    granule: Mapping[str, int]  # channels that one vector or tile holds
    depth: Mapping[str, int] = field(default_factory=dict)  # products along k that one instruction adds
    rows: int = 1  # rows (pixels) that one tile holds
    units: int = 0  # tiles that run at once, for wave quantization; 0: no waves
    efficiency: Mapping[str, float] = field(default_factory=dict)  # share of the peak that a kind of kernel reaches
    launch_seconds: float = 0.0
    uncertainty: float = 0.3  # half width of the interval, relative
    joules_per_op: Mapping[str, float] = field(default_factory=dict)
    micros: Mapping[str, MicroKernel] = field(default_factory=dict)  # of a CPU, whose convolutions may take fewer products

    def estimate(self, workload: Workload, threads: int) -> Cost:
        """Cost of one kernel on `threads` cores; dtypes without a peak of their own run as float32.

        Of weights that are stored as codes: decoded beforehand or in the kernel, whichever is faster.
        """
        plain = self._estimate(replace(workload, coded=None), threads)
        if workload.coded is None:
            return plain
        return min(plain, self._estimate(self.decoding(workload, workload.coded), threads), key=lambda cost: cost.seconds)

    def decoding(self, workload: Workload, coded: Coded) -> Workload:
        """The same work with weights that are decoded in the kernel: fewer bytes, more instructions.

        Up to 16 rows are computed in tiles of four, each of which decodes again; for more rows there is one copy in the cache.
        """
        lanes = self.granule.get("float32", 4)
        registers = max(1.0, 2.0**coded.bits / lanes) if coded.looked_up else 1.0  # that hold a codebook
        planes = coded.bits.bit_count()
        steps = 2.0 + 3.0 * (planes - 1) + 1.5 * (registers - 1) if registers <= 16 else 2.0 * lanes
        passes = -(-workload.m // 4) if workload.m <= 16 else 1.5
        elements = int(workload.n * workload.k * workload.groups * passes * steps / INSTRUCTIONS)
        return replace(workload, weight_bytes=coded.bytes, elements=workload.elements + elements, coded=None)

    def _estimate(self, workload: Workload, threads: int) -> Cost:
        dtype = workload.dtype if workload.dtype in self.peak else "float32"
        compute = self._operations(workload, dtype) / (self.peak[dtype] * self.efficiency.get(workload.kind, 0.7) * threads)
        compute += workload.elements / (self.elements_per_second * threads)
        seconds = max(compute, workload.bytes / self._bandwidth(workload.bytes)) + self.launch_seconds
        joules = 2 * workload.macs * self.joules_per_op.get(dtype, 0.0) + workload.bytes * self._joules_per_byte(workload.bytes)
        spread = self.uncertainty * seconds
        return Cost(seconds, joules, workload.weight_bytes, "analytical", seconds - spread, seconds + spread)

    def _operations(self, workload: Workload, dtype: str) -> float:
        """Operations including those spent on padding to the granules."""
        granule, depth = self.granule.get(dtype, 1), self.depth.get(dtype, 1)
        if workload.kind == "depthwise":  # vectors run along the groups
            return 2.0 * workload.m * round_up(workload.groups * workload.n, granule) * workload.k
        m, n, k = round_up(workload.m, self.rows), round_up(workload.n, granule), round_up(workload.k, depth)
        waste = 1.0
        if self.units and workload.macs:
            tiles = (m // self.rows) * (n // granule) * workload.groups
            waste = round_up(tiles, self.units) / tiles
        micro = self.micros.get(dtype)
        paired = PAIRED[min(workload.narrow, micro.narrow)] if micro is not None else 1.0
        return 2.0 * m * n * k * workload.groups * waste * paired * share_of_direct(workload, micro)

    def _holding(self, size: int) -> Memory:
        """The nearest memory that the working set fits into."""
        return next((memory for memory in self.memories if size <= memory.bytes), self.memories[-1])

    def _bandwidth(self, size: int) -> float:
        return self._holding(size).bytes_per_second

    def _joules_per_byte(self, size: int) -> float:
        return self._holding(size).joules_per_byte
