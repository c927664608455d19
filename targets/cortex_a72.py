"""Arm Cortex-A72 x 4 at 1.5 GHz, as in a Raspberry Pi 4: NEON without dot products. Priced here, run under emulation only.

Throughputs: Arm, "Cortex-A72 software optimization guide" (FMLA on 128 bits: one a cycle).
"""

from __future__ import annotations

from hwopt.target import Memory, Target
from targets import _isa_arm
from targets._roofline import Roofline

HERTZ = 1.5e9
PEAK = {
    "float32": 8 * HERTZ,  # 4 lanes x multiply-add, one FMLA a cycle
    "int8": 10.7 * HERTZ,  # 16 products in two SMULL/SMLAL and one SADALP
}
MEMORIES = (
    Memory("l1", 32 << 10, 16 * HERTZ),
    Memory("l2", 1 << 20, 8 * HERTZ),
    Memory("lpddr4", 4 << 30, 4e9),  # sustained copy bandwidth of the board, far below the 12.8 GB/s of the part
)
GRANULE = {"float32": 4, "int8": 8}

TARGET = Target(
    name="cortex-a72",
    summary="Arm Cortex-A72, 4 cores at 1.5 GHz (Raspberry Pi 4): NEON",
    kind="cpu",
    cores=4,
    peak=PEAK,
    memories=MEMORIES,
    granule=GRANULE,
    cost=Roofline(
        peak=PEAK,
        elements_per_second=1.0 * HERTZ,
        memories=MEMORIES,
        granule=GRANULE,
        depth={"int8": 2},
        efficiency={"conv": 0.75, "matmul": 0.75, "depthwise": 0.35},
        launch_seconds=2e-6,
        joules_per_op={"float32": 60e-12, "int8": 45e-12},  # about 0.75 W a core over the peaks
    ),
    tvm=_isa_arm.llvm(frozenset(), "cortex-a72"),
    microkernels=_isa_arm.microkernels(frozenset()),
    features=("asimd",),
)
