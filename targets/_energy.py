"""Joules of arithmetic and memory accesses of accelerators: Horowitz, "Computing's energy problem", ISSCC 2014 (45 nm, 0.9 V).

Newer processes are better by a factor that is nearly the same for all of them, so ratios between designs hold. Eyeriss (Chen et
al., ISCA 2016) measures 6 and 200 multiply-adds for an access of the buffer and of DRAM, for 16-bit words of a 100 KB buffer.
"""

from __future__ import annotations

import math

MAC_JOULES = 0.2e-12 + 0.1e-12  # 8-bit multiply, 32-bit add
DRAM_JOULES_PER_BYTE = 1.3e-9 / 8  # 64 bits: 1.3 to 2.6 nJ; the lower end
SRAM = ((8 << 10, 10e-12 / 8), (32 << 10, 20e-12 / 8), (1 << 20, 100e-12 / 8))  # bytes of the array, joules per byte


def sram_joules_per_byte(size: int) -> float:
    """Of one access to an array of `size` bytes: straight lines through Horowitz' three sizes on logarithmic axes."""
    points = [(math.log(bytes_), math.log(joules)) for bytes_, joules in SRAM]
    (x0, y0), (x1, y1) = points[:2] if size < SRAM[1][0] else points[1:]
    return math.exp(y0 + (math.log(max(size, 1)) - x0) * (y1 - y0) / (x1 - x0))
