"""A microNPU like Arm's Ethos-U55 with 256 multipliers, beside a Cortex-M55 with SRAM and flash.

Arm, "Ethos-U55 NPU technical overview" (32 to 256 MACs a cycle, 2 AXI ports of 64 bits) and ethos-u-vela 5.2.0: its block of
2 x 2 pixels x 8 channels x depth 8, and its system configuration "High-End Embedded" (500 MHz, SRAM 4 GB/s, flash 0.5 GB/s).
"""

from __future__ import annotations

from hwopt.target import Memory, Target
from targets._energy import DRAM_JOULES_PER_BYTE, sram_joules_per_byte
from targets._npu import BlockArray

HERTZ = 500e6
MACS = 256
SRAM_BYTES_PER_SECOND, FLASH_BYTES_PER_SECOND = 4e9, 0.5e9

TARGET = Target(
    name="ethos-u55",
    summary="Ethos-U55-like NPU: 256 int8 multipliers at 500 MHz, SRAM 4 GB/s, flash 0.5 GB/s",
    kind="asic",
    cores=1,
    peak={"int8": 2 * MACS * HERTZ, "float32": 2 * MACS * HERTZ / 64},
    memories=(
        Memory("sram", 2 << 20, SRAM_BYTES_PER_SECOND, sram_joules_per_byte(2 << 20)),
        Memory("flash", 64 << 20, FLASH_BYTES_PER_SECOND, DRAM_JOULES_PER_BYTE),
    ),
    granule={"int8": 8, "float32": 8},
    cost=BlockArray(4, 8, 8, HERTZ, 2 << 20, SRAM_BYTES_PER_SECOND, FLASH_BYTES_PER_SECOND),
    tvm={"kind": "llvm", "mtriple": "thumbv7em-none-eabi", "mcpu": "cortex-m7"},
)
