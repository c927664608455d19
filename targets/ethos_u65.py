"""A microNPU like Arm's Ethos-U65 with 512 multipliers in two engines, beside a Cortex-A or Cortex-M with SRAM and DRAM.

Arm, "Ethos-U65 NPU technical overview" (256 or 512 MACs a cycle, 2 AXI ports of 128 bits) and ethos-u-vela 5.2.0: its block and
its system configuration "High-End" (1 GHz, SRAM 16 GB/s, DRAM 3.75 GB/s).
"""

from __future__ import annotations

from hwopt.target import Memory, Target
from targets._energy import DRAM_JOULES_PER_BYTE, sram_joules_per_byte
from targets._npu import BlockArray

HERTZ = 1e9
MACS = 512
SRAM_BYTES_PER_SECOND, DRAM_BYTES_PER_SECOND = 16e9, 3.75e9

TARGET = Target(
    name="ethos-u65",
    summary="Ethos-U65-like NPU: 512 int8 multipliers at 1 GHz, SRAM 16 GB/s, DRAM 3.75 GB/s",
    kind="asic",
    cores=1,
    peak={"int8": 2 * MACS * HERTZ, "float32": 2 * MACS * HERTZ / 64},
    memories=(
        Memory("sram", 1 << 20, SRAM_BYTES_PER_SECOND, sram_joules_per_byte(1 << 20)),
        Memory("dram", 1 << 30, DRAM_BYTES_PER_SECOND, DRAM_JOULES_PER_BYTE),
    ),
    granule={"int8": 16, "float32": 16},
    cost=BlockArray(4, 8, 8, HERTZ, 1 << 20, SRAM_BYTES_PER_SECOND, DRAM_BYTES_PER_SECOND, engines=2),
    tvm={"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a53", "mattr": ["+neon"]},
)
