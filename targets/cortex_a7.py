"""Arm Cortex-A7 x 4 at 0.9 GHz, as in a Raspberry Pi 2: 32-bit code with hard floats. Priced here, run under emulation only.

Throughputs are estimates from the width of its units (Arm, "Cortex-A7 NEON media processing engine technical reference
manual": one single precision multiply-add a cycle, 64 bits of integers); no board was measured.
"""

from __future__ import annotations

from hwopt.target import Memory
from targets import _isa_arm32
from targets._cpu import roofline_cpu

HERTZ = 0.9e9

TARGET = roofline_cpu(
    "cortex-a7",
    "Arm Cortex-A7, 4 cores at 0.9 GHz (Raspberry Pi 2): ARMv7 with NEON, hard floats",
    4,
    {"float32": 2 * HERTZ, "int8": 4 * HERTZ},  # 8 products of int8 in two cycles of VMULL and two of VPADAL
    (Memory("l1", 32 << 10, 8 * HERTZ), Memory("l2", 512 << 10, 4 * HERTZ), Memory("lpddr2", 1 << 30, 1.2e9)),
    (_isa_arm32.llvm(mcpu="cortex-a7"), _isa_arm32.microkernels()),
    elements_per_second=0.4 * HERTZ,
    depth={"int8": 2},
    efficiency={"conv": 0.7, "matmul": 0.7, "depthwise": 0.35},
    launch_seconds=4e-6,
    joules_per_op={"float32": 55e-12, "int8": 30e-12},  # about 0.1 W a core over the peaks
)
