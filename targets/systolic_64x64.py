"""An edge accelerator as large as Google's Edge TPU: 64 x 64 cells at 480 MHz are its stated 4 int8 TOPS.

Coral, "Edge TPU performance benchmarks" and data sheet (4 TOPS, 2 W, about 8 MB on chip); the array's size is that of Seshadri et
al., "An evaluation of edge TPU accelerators for convolutional neural networks", 2021. Output-stationary, LPDDR4-like memory.
"""

from __future__ import annotations

from targets._systolic import Systolic, systolic_target

INPUTS, WEIGHTS, OUTPUTS = 2 << 20, 4 << 20, 2 << 20
LPDDR4 = 8e9  # bytes a second: one channel of 32 bits at about 2 GT/s

TARGET = systolic_target(
    "systolic-64x64",
    "Edge-TPU-like 64 x 64 int8 systolic array at 480 MHz, 8 MiB on chip",
    Systolic(64, 64, 480e6, INPUTS, WEIGHTS, OUTPUTS, LPDDR4, dataflow="os", float_slowdown=64.0, launch_cycles=2000),
    INPUTS + WEIGHTS + OUTPUTS,
    INPUTS,
    ("dram", 1 << 30),
    {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a53", "mattr": ["+neon"]},
    modelled=False,
)
