"""Arm Neoverse V1 x 64 at 2.6 GHz, as in AWS Graviton3: NEON with matrix products of int8. Priced, run under emulation only.

Arm, "Neoverse V1 software optimization guide" and "technical reference manual"; AWS, "Graviton3" (8 channels of DDR5-4800).
"""

from __future__ import annotations

from hwopt.target import Memory
from targets._arm import arm_target

HERTZ = 2.6e9

TARGET = arm_target(
    "neoverse-v1",
    "Arm Neoverse V1, 64 cores at 2.6 GHz (Graviton3-like): NEON with int8 matrix products",
    64,
    frozenset({"asimddp", "i8mm"}),
    (
        Memory("l1", 64 << 10, 48 * HERTZ, 1e-12),
        Memory("l2", 1 << 20, 32 * HERTZ, 5e-12),
        Memory("l3", 32 << 20, 64 * 4 * HERTZ, 15e-12),
        Memory("ddr5", 256 << 30, 240e9, 50e-12),  # about 80 % of the channels' 307 GB/s
    ),
    hertz=HERTZ,
    core_bytes_per_second=25e9,
    elements_per_cycle=4.0,  # four vector units
    joules_per_op={"float32": 25e-12, "int8": 5e-12},  # about 2 W a core over what the loops reach
)
