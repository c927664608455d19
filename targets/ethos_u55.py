"""A microNPU like Arm's Ethos-U55 with 256 multipliers, beside a Cortex-M55 with SRAM and flash.

Arm, "Ethos-U55 NPU technical overview" (32 to 256 MACs a cycle, 2 AXI ports of 64 bits) and ethos-u-vela 5.2.0: its block of
2 x 2 pixels x 8 channels x depth 8, and its system configuration "High-End Embedded" (500 MHz, SRAM 4 GB/s, flash 0.5 GB/s).
"""

from __future__ import annotations

from targets._npu import npu_target

TARGET = npu_target(
    "ethos-u55",
    "Ethos-U55-like NPU: 256 int8 multipliers at 500 MHz, SRAM 4 GB/s, flash 0.5 GB/s",
    500e6,
    granule=8,
    sram=(2 << 20, 4e9),
    outside=("flash", 64 << 20, 0.5e9),
    tvm={"kind": "llvm", "mtriple": "thumbv7em-none-eabi", "mcpu": "cortex-m7"},
)
