"""A server accelerator: a 128 x 128 weight-stationary array as in Google's TPU v2 to v4, here with int8 multiplications.

Norrie et al., "The design process for Google's training chips: TPUv2 and TPUv3", IEEE Micro 2021; Jouppi et al., "Ten lessons
from three generations shaped Google's TPUv4i", ISCA 2021 (1.05 GHz, 614 GB/s, int8; four such arrays: this is one of them).
"""

from __future__ import annotations

from targets._systolic import Systolic, systolic_target

INPUTS, WEIGHTS, OUTPUTS = 8 << 20, 4 << 20, 4 << 20  # vector memory of one core
SHARE = 614e9 / 4  # an array's, of the DRAM's bytes a second

TARGET = systolic_target(
    "systolic-128x128",
    "server-class 128 x 128 int8 systolic array at 1.05 GHz, 16 MiB on chip, HBM",
    Systolic(128, 128, 1.05e9, INPUTS, WEIGHTS, OUTPUTS, SHARE, vector_lanes=1024, float_slowdown=8.0, launch_cycles=2000),
    INPUTS + WEIGHTS + OUTPUTS,
    INPUTS,
    ("hbm", 8 << 30),
    {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3"},
)
