"""Arm Cortex-A7 x 4 at 0.9 GHz, as in a Raspberry Pi 2: 32-bit code with hard floats. Priced here, run under emulation only.

Throughputs are estimates from the width of its units (Arm, "Cortex-A7 NEON media processing engine technical reference
manual": one single precision multiply-add a cycle, 64 bits of integers); no board was measured.
"""

from __future__ import annotations

from hwopt.target import Memory, Target
from targets import _isa_arm32
from targets._cpu import needed_features
from targets._roofline import Roofline

HERTZ = 0.9e9
PEAK = {
    "float32": 2 * HERTZ,
    "int8": 4 * HERTZ,  # 8 products in two cycles of VMULL and two of VPADAL
}
MEMORIES = (
    Memory("l1", 32 << 10, 8 * HERTZ),
    Memory("l2", 512 << 10, 4 * HERTZ),
    Memory("lpddr2", 1 << 30, 1.2e9),
)
GRANULE = {"float32": 4, "int8": 4}

TARGET = Target(
    name="cortex-a7",
    summary="Arm Cortex-A7, 4 cores at 0.9 GHz (Raspberry Pi 2): ARMv7 with NEON, hard floats",
    kind="cpu",
    cores=4,
    peak=PEAK,
    memories=MEMORIES,
    granule=GRANULE,
    cost=Roofline(
        peak=PEAK,
        elements_per_second=0.4 * HERTZ,
        memories=MEMORIES,
        granule=GRANULE,
        depth={"int8": 2},
        efficiency={"conv": 0.7, "matmul": 0.7, "depthwise": 0.35},
        launch_seconds=4e-6,
        joules_per_op={"float32": 55e-12, "int8": 30e-12},  # about 0.1 W a core over the peaks
    ),
    tvm=_isa_arm32.llvm(mcpu="cortex-a7"),
    microkernels=_isa_arm32.microkernels(),
    features=needed_features(_isa_arm32.llvm(mcpu="cortex-a7")),
)
