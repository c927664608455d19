"""RISC-V of 64 bits without vectors (RV64GC), priced as four SiFive U74 at 1.5 GHz (StarFive JH7110). Run under emulation only.

Throughputs are estimates from SiFive, "U74 core complex manual" (two instructions a cycle, one of them a multiply-add of
floats or a product of integers; fully pipelined); no board was measured.
"""

from __future__ import annotations

from hwopt.target import Memory
from targets import _isa_riscv
from targets._cpu import roofline_cpu

HERTZ = 1.5e9

TARGET = roofline_cpu(
    "riscv64",
    "64-bit RISC-V without vectors (RV64GC), 4 cores at 1.5 GHz as in a StarFive JH7110",
    4,
    {"float32": 2 * HERTZ, "int8": 2 * HERTZ},  # a multiplication and an addition of integers issue together
    (Memory("l1", 32 << 10, 8 * HERTZ), Memory("l2", 2 << 20, 4 * HERTZ), Memory("lpddr4", 4 << 30, 2.5e9)),
    (_isa_riscv.llvm(), _isa_riscv.microkernels()),
    elements_per_second=0.25 * HERTZ,
    efficiency={"conv": 0.7, "matmul": 0.7, "depthwise": 0.5},
    launch_seconds=3e-6,
    joules_per_op={"float32": 130e-12, "int8": 130e-12},  # about 0.4 W a core over the peaks
)
