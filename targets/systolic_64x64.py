"""An edge accelerator as large as Google's Edge TPU: 64 x 64 cells at 480 MHz are its stated 4 int8 TOPS.

Coral, "Edge TPU performance benchmarks" and data sheet (4 TOPS, 2 W, about 8 MB on chip); the array's size is that of Seshadri et
al., "An evaluation of edge TPU accelerators for convolutional neural networks", 2021. Output-stationary, LPDDR4-like memory.
"""

from __future__ import annotations

from hwopt.target import Memory, Target
from targets._energy import DRAM_JOULES_PER_BYTE, sram_joules_per_byte
from targets._systolic import Systolic

HERTZ = 480e6
SIDE = 64
INPUTS, WEIGHTS, OUTPUTS = 2 << 20, 4 << 20, 2 << 20
DRAM_BYTES_PER_SECOND = 8e9  # one channel of 32-bit LPDDR4 at about 2 GT/s

TARGET = Target(
    name="systolic-64x64",
    summary="Edge-TPU-like 64 x 64 int8 systolic array at 480 MHz, 8 MiB on chip",
    kind="asic",
    cores=1,
    peak={"int8": 2 * SIDE * SIDE * HERTZ, "float32": 2 * SIDE * SIDE * HERTZ / 64},
    memories=(
        Memory("scratchpad", INPUTS + WEIGHTS + OUTPUTS, 2 * SIDE * HERTZ, sram_joules_per_byte(INPUTS)),
        Memory("dram", 1 << 30, DRAM_BYTES_PER_SECOND, DRAM_JOULES_PER_BYTE),
    ),
    granule={"int8": SIDE, "float32": SIDE},
    cost=Systolic(
        SIDE, SIDE, HERTZ, INPUTS, WEIGHTS, OUTPUTS, DRAM_BYTES_PER_SECOND, dataflow="os", float_slowdown=64.0, launch_cycles=2000
    ),
    tvm={"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a53", "mattr": ["+neon"]},
)
