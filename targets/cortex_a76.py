"""Arm Cortex-A76 x 4 at 2.4 GHz, as in a Raspberry Pi 5: NEON with dot products. Priced here, run under emulation only.

Arm, "Cortex-A76 technical reference manual" (caches); Raspberry Pi, "Raspberry Pi 5 product brief" (LPDDR4X-4267, 32 bits).
"""

from __future__ import annotations

from hwopt.target import Memory
from targets._arm import arm_target

HERTZ = 2.4e9

TARGET = arm_target(
    "cortex-a76",
    "Arm Cortex-A76, 4 cores at 2.4 GHz (Raspberry Pi 5): NEON with dot products",
    4,
    frozenset({"asimddp"}),
    (
        Memory("l1", 64 << 10, 32 * HERTZ, 1e-12),
        Memory("l2", 512 << 10, 16 * HERTZ, 5e-12),
        Memory("l3", 2 << 20, 32 * HERTZ, 15e-12),
        Memory("lpddr4x", 8 << 30, 11e9, 40e-12),  # about two thirds of the part's 17 GB/s
    ),
    hertz=HERTZ,
    core_bytes_per_second=8 * HERTZ,
    elements_per_cycle=2.0,  # two vector units
    joules_per_op={"float32": 40e-12, "int8": 12e-12},  # about 1.5 W a core over what the loops reach
)
