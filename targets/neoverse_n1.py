"""Arm Neoverse N1 x 64 at 2.5 GHz, as in AWS Graviton2: NEON with dot products. Priced here, run under emulation only.

Arm, "Neoverse N1 software optimization guide" and "technical reference manual"; AWS, "Graviton2" (8 channels of DDR4-3200).
"""

from __future__ import annotations

from hwopt.target import Memory
from targets._arm import arm_target

HERTZ = 2.5e9

TARGET = arm_target(
    "neoverse-n1",
    "Arm Neoverse N1, 64 cores at 2.5 GHz (Graviton2-like): NEON with dot products",
    64,
    frozenset({"asimddp"}),
    (
        Memory("l1", 64 << 10, 32 * HERTZ, 1e-12),
        Memory("l2", 1 << 20, 16 * HERTZ, 5e-12),
        Memory("l3", 32 << 20, 64 * 4 * HERTZ, 15e-12),
        Memory("ddr4", 256 << 30, 160e9, 60e-12),  # about 80 % of the channels' 204.8 GB/s
    ),
    hertz=HERTZ,
    core_bytes_per_second=16e9,
    elements_per_cycle=2.0,  # two vector units
    joules_per_op={"float32": 40e-12, "int8": 20e-12},  # about 1.5 W a core over what the loops reach
)
