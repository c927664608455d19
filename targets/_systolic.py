"""A systolic array: cycles from folds, fill and drain, and DRAM transfers hidden behind compute by double buffering.

Fold counts and cycles per fold follow SCALE-Sim (Samajdar et al., ISPASS 2020) for the weight-stationary dataflow.
Energy per operation and access: Horowitz, "Computing's energy problem", ISSCC 2014 (45 nm).
"""

from __future__ import annotations

from dataclasses import dataclass

from hwopt.target import Cost, Workload

MAC_JOULES = 0.23e-12  # 8-bit multiply 0.2 pJ + 8-bit add 0.03 pJ
SRAM_JOULES_PER_BYTE = 1.25e-12  # 10 pJ for 64 bits from an 8 KB array
DRAM_JOULES_PER_BYTE = 162.5e-12  # 1.3 nJ for 64 bits, the lower end


@dataclass(frozen=True)
class Systolic:
    """`rows` x `columns` multiply-accumulate cells, weights resident; the rest runs on a vector unit of `columns` lanes."""

    rows: int
    columns: int
    hertz: float
    scratchpad_bytes: int
    dram_bytes_per_second: float
    float_slowdown: float = 16.0  # cycles that a float operation takes on the control core, per int8 one
    launch_cycles: int = 500  # configuration and DMA descriptors of one kernel

    def estimate(self, workload: Workload, threads: int) -> Cost:
        """Cost of one kernel: max(array and vector cycles, DRAM transfer) + launch; nothing overlaps across kernels."""
        cycles = self.array_cycles(workload) + workload.elements / self.columns
        if workload.dtype not in ("int8", "uint8"):
            cycles *= self.float_slowdown
        transfer = self.dram_bytes(workload) / self.dram_bytes_per_second
        seconds = max(cycles / self.hertz, transfer) + self.launch_cycles / self.hertz
        touched = workload.macs * (1 / self.rows + 1 / self.columns)  # operands that enter at the array's edges
        joules = workload.macs * MAC_JOULES + touched * SRAM_JOULES_PER_BYTE
        joules += self.dram_bytes(workload) * DRAM_JOULES_PER_BYTE
        return Cost(seconds, joules, workload.weight_bytes, "analytical", 0.9 * seconds, 1.1 * seconds)

    def array_cycles(self, workload: Workload) -> float:
        """Weight-stationary: one fold per rows x columns block of weights; each streams m rows and fills and drains."""
        if not workload.macs:
            return 0.0
        folds = -(-workload.k // self.rows) * -(-workload.n // self.columns) * workload.groups
        return float(folds * (2 * self.rows + self.columns + workload.m - 2))

    def dram_bytes(self, workload: Workload) -> int:
        """Everything once, and the activations once more for every block of output channels if they do not stay on chip."""
        if workload.read_bytes <= self.scratchpad_bytes // 2 or not workload.macs:
            return workload.bytes
        passes = -(-workload.n // self.columns)
        return workload.weight_bytes + workload.write_bytes + workload.read_bytes * passes
