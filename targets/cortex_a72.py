"""Arm Cortex-A72 x 4 at 1.5 GHz, as in a Raspberry Pi 4: NEON without dot products. Priced here, run under emulation only.

Arm, "Cortex-A72 technical reference manual" (caches); Raspberry Pi, "BCM2711 ARM peripherals" and "Raspberry Pi 4 product brief".
"""

from __future__ import annotations

from hwopt.target import Memory
from targets._arm import arm_target

HERTZ = 1.5e9

TARGET = arm_target(
    "cortex-a72",
    "Arm Cortex-A72, 4 cores at 1.5 GHz (Raspberry Pi 4): NEON",
    4,
    frozenset(),
    (
        Memory("l1", 32 << 10, 16 * HERTZ, 1e-12),
        Memory("llc", 1 << 20, 16 * HERTZ, 5e-12),  # the second level, shared by the four cores
        Memory("lpddr4", 4 << 30, 4e9, 60e-12),  # sustained copy bandwidth of the board, far below the 12.8 GB/s of the part
    ),
    hertz=HERTZ,
    core_bytes_per_second=8 * HERTZ,
    elements_per_cycle=1.0,  # four results in about four vector instructions, one a cycle
    joules_per_op={"float32": 60e-12, "int8": 45e-12},  # about 0.75 W a core over the peaks
)
