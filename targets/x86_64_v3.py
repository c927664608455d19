"""x86-64-v3: AVX2 with fused multiply-add, most x86 processors since 2013. Priced as an Intel Skylake core at 3 GHz.

Clock and caches: Intel, "Core i5-6500" (2015); bytes per cycle: Intel, "64 and IA-32 architectures optimization manual".
"""

from __future__ import annotations

from hwopt.target import Memory
from targets._x86_level import level

HERTZ = 3e9

TARGET = level(
    "x86-64-v3",
    "an Intel Core i5-6500 at 3 GHz",
    HERTZ,
    (
        Memory("l1", 32 << 10, 64 * HERTZ),
        Memory("l2", 256 << 10, 32 * HERTZ),
        Memory("l3", 6 << 20, 10 * HERTZ),
        Memory("ddr4", 16 << 30, 14e9),
    ),
)
