"""A microcontroller's NPU: blocks of pixels x channels x depth per cycle, accumulators inside, no ripple as in a systolic array.

The shape of the cycles, the longest of multiplications, output unit and each memory, is that of Vela's estimator (Arm,
ethos-u-vela 5.2.0, npu_performance.py). In four cycles a block of pixels x channels takes 4 x `depth` input channels of one tap,
or `depth` input channels of four taps, whichever needs fewer. Activations cross the SRAM port, weights the flash or DRAM port.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hwopt.target import Cost, Memory, Target, Workload
from targets._energy import DRAM_JOULES_PER_BYTE, MAC_JOULES, sram_joules_per_byte

EXPOSED = 0.1  # of what runs beside the longest part: the first block in, the last one out; an assumption


@dataclass(frozen=True)
class BlockArray:
    """`pixels` x `channels` accumulators, each adding `depth` products a cycle; `engines` of them share the work."""

    pixels: int
    channels: int
    depth: int
    hertz: float
    sram_bytes: int
    sram_bytes_per_second: float
    weight_bytes_per_second: float
    engines: int = 1
    outputs_per_cycle: float = 4.0
    float_slowdown: float = 64.0  # floats run on the controller's core
    launch_cycles: int = 700  # commands, the first block in and the last one out, memory latencies
    interval: tuple[float, float] = (0.85, 1.6)  # where most of Vela's cycles lie: see benchmarks.run fidelity

    def estimate(self, workload: Workload, threads: int) -> Cost:
        """Cost of one kernel; weights stream while the multiplications run."""
        slow = 1.0 if workload.dtype in ("int8", "uint8") else self.float_slowdown
        results = max(workload.elements, workload.m * workload.n * workload.groups) / (self.outputs_per_cycle * self.engines)
        moved = workload.read_bytes + workload.write_bytes
        outside = workload.weight_bytes + max(0, moved - self.sram_bytes)  # what SRAM does not hold lies beside the weights
        parts = (
            self.product_cycles(workload) * slow / self.hertz, results * slow / self.hertz, moved / self.sram_bytes_per_second,
            outside / self.weight_bytes_per_second,
        )  # fmt: skip
        seconds = max(parts) + EXPOSED * (sum(parts) - max(parts)) + self.launch_cycles / self.hertz
        low, high = (share * seconds for share in self.interval)
        return Cost(seconds, self.joules(workload), workload.weight_bytes, "analytical", low, high)

    def product_cycles(self, workload: Workload) -> float:
        """Multiplications of the array; depthwise kernels use the depth for four taps of one channel every four cycles."""
        blocks = -(-workload.m // self.pixels)
        if not workload.macs:
            return 0.0
        if workload.kind == "depthwise":
            return float(blocks * -(-workload.groups * workload.n // self.channels) * 4 * -(-workload.k // 4)) / self.engines
        inputs = -(-workload.k // workload.taps)  # channels
        by_channels = workload.taps * -(-inputs // (4 * self.depth))
        by_taps = -(-workload.taps // 4) * -(-inputs // self.depth)
        inner = 4 * min(by_channels, by_taps)
        return float(workload.groups * blocks * -(-workload.n // self.channels) * inner) / self.engines

    def joules(self, workload: Workload) -> float:
        """Multiply-adds; operands from SRAM once per block that shares them; weights from flash or DRAM."""
        reused = workload.macs / self.channels + workload.macs / self.pixels
        sram = (reused + workload.read_bytes + workload.write_bytes) * sram_joules_per_byte(32 << 10)
        return workload.macs * MAC_JOULES + sram + workload.weight_bytes * DRAM_JOULES_PER_BYTE


def npu_target(
    name: str, summary: str, hertz: float, granule: int, sram: tuple[int, float], outside: tuple[str, int, float],
    tvm: dict[str, Any], engines: int = 1,
) -> Target:  # fmt: skip
    """256 int8 multipliers in each engine, SRAM for activations, and the memory that weights lie in; bytes and bytes a second."""
    cost = BlockArray(4, 8, 8, hertz, *sram, outside[2], engines=engines)
    macs = cost.pixels * cost.channels * cost.depth * engines
    return Target(
        name=name, summary=summary, kind="asic", cores=1,
        peak={"int8": 2 * macs * hertz, "float32": 2 * macs * hertz / cost.float_slowdown},
        memories=(Memory("sram", *sram, sram_joules_per_byte(sram[0])), Memory(*outside, DRAM_JOULES_PER_BYTE)),
        granule={"int8": granule, "float32": granule}, cost=cost, tvm=tvm,
    )  # fmt: skip
