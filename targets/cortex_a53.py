"""Arm Cortex-A53 x 4 at 1.4 GHz, as in a Raspberry Pi 3 B+: in order, NEON without dot products. Priced, never run here.

Arm, "Cortex-A53 technical reference manual" (caches); Raspberry Pi, "Raspberry Pi 3 Model B+ product brief".
"""

from __future__ import annotations

from hwopt.target import Memory
from targets._arm import arm_target

HERTZ = 1.4e9

TARGET = arm_target(
    "cortex-a53",
    "Arm Cortex-A53, 4 in-order cores at 1.4 GHz (Raspberry Pi 3 B+): NEON",
    4,
    frozenset(),
    (
        Memory("l1", 32 << 10, 8 * HERTZ, 1e-12),
        Memory("llc", 512 << 10, 8 * HERTZ, 5e-12),  # the second level, shared by the four cores
        Memory("lpddr2", 1 << 30, 2e9, 60e-12),  # sustained copy bandwidth of the board; the part states 3.6 GB/s
    ),
    hertz=HERTZ,
    core_bytes_per_second=4 * HERTZ,
    elements_per_cycle=0.5,  # vectors of 128 bits take the 64-bit unit twice
    joules_per_op={"float32": 60e-12, "int8": 30e-12},  # about 0.15 W a core over what the loops reach
)
