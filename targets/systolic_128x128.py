"""A server accelerator: a 128 x 128 weight-stationary array as in Google's TPU v2 to v4, here with int8 multiplications.

Norrie et al., "The design process for Google's training chips: TPUv2 and TPUv3", IEEE Micro 2021; Jouppi et al., "Ten lessons
from three generations shaped Google's TPUv4i", ISCA 2021 (1.05 GHz, 614 GB/s, int8; four such arrays: this is one of them).
"""

from __future__ import annotations

from hwopt.target import Memory, Target
from targets._energy import DRAM_JOULES_PER_BYTE, sram_joules_per_byte
from targets._systolic import Systolic

HERTZ = 1.05e9
SIDE = 128
INPUTS, WEIGHTS, OUTPUTS = 8 << 20, 4 << 20, 4 << 20  # vector memory of one core
DRAM_BYTES_PER_SECOND = 614e9 / 4  # an array's share
COST = Systolic(
    SIDE, SIDE, HERTZ, INPUTS, WEIGHTS, OUTPUTS, DRAM_BYTES_PER_SECOND,
    vector_lanes=1024, float_slowdown=8.0, launch_cycles=2000,
)  # fmt: skip

TARGET = Target(
    name="systolic-128x128",
    summary="server-class 128 x 128 int8 systolic array at 1.05 GHz, 16 MiB on chip, HBM",
    kind="asic",
    cores=1,
    peak={"int8": 2 * SIDE * SIDE * HERTZ, "float32": 2 * SIDE * SIDE * HERTZ / 8},
    memories=(
        Memory("scratchpad", INPUTS + WEIGHTS + OUTPUTS, 2 * SIDE * HERTZ, sram_joules_per_byte(INPUTS)),
        Memory("hbm", 8 << 30, DRAM_BYTES_PER_SECOND, DRAM_JOULES_PER_BYTE),
    ),
    granule={"int8": SIDE, "float32": SIDE},
    cost=COST,
    tvm={"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3"},
    array=COST.array(),  # artifacts run on the host, with a model of the array in C
)
