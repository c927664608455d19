"""A microNPU like Arm's Ethos-U65 with 512 multipliers in two engines, beside a Cortex-A or Cortex-M with SRAM and DRAM.

Arm, "Ethos-U65 NPU technical overview" (256 or 512 MACs a cycle, 2 AXI ports of 128 bits) and ethos-u-vela 5.2.0: its block and
its system configuration "High-End" (1 GHz, SRAM 16 GB/s, DRAM 3.75 GB/s).
"""

from __future__ import annotations

from targets._npu import npu_target

TARGET = npu_target(
    "ethos-u65",
    "Ethos-U65-like NPU: 512 int8 multipliers at 1 GHz, SRAM 16 GB/s, DRAM 3.75 GB/s",
    1e9,
    granule=16,
    sram=(1 << 20, 16e9),
    outside=("dram", 1 << 30, 3.75e9),
    tvm={"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a53", "mattr": ["+neon"]},
    engines=2,
)
