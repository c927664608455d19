"""x86-64-v4: AVX-512 without VNNI, servers since 2017. Priced as an Intel Skylake-SP core at 2.4 GHz.

Clock and caches: Intel, "Xeon Gold 6148" (2017); bytes per cycle: Intel, "64 and IA-32 architectures optimization manual".
"""

from __future__ import annotations

from hwopt.target import Memory
from targets._x86_level import level

HERTZ = 2.4e9

TARGET = level(
    "x86-64-v4",
    "an Intel Xeon Gold 6148 at 2.4 GHz",
    HERTZ,
    (
        Memory("l1", 32 << 10, 128 * HERTZ),
        Memory("l2", 1 << 20, 52 * HERTZ),
        Memory("l3", 27 << 20, 12 * HERTZ),
        Memory("ddr4", 64 << 30, 12e9),
    ),
)
