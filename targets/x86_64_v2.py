"""x86-64-v2: SSE4.2, every 64-bit x86 processor since 2009. Priced as an Intel Atom of the Goldmont Plus kind at 2 GHz.

Clock and caches: Intel, "Celeron J4105" (2017).
"""

from __future__ import annotations

from hwopt.target import Memory
from targets._x86_level import level

HERTZ = 2e9

TARGET = level(
    "x86-64-v2",
    "an Intel Celeron J4105 at 2 GHz",
    HERTZ,
    (Memory("l1", 24 << 10, 16 * HERTZ), Memory("l2", 4 << 20, 8 * HERTZ), Memory("ddr4", 4 << 30, 8e9)),
)
