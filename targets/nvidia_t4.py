"""NVIDIA T4 (Turing, 2018): 40 SMs with tensor cores. Compiled and priced, never run here.

Numbers: NVIDIA, "T4 tensor core GPU datasheet" and "Turing GPU architecture" whitepaper.
"""

from __future__ import annotations

from hwopt.target import Memory, Target
from targets._roofline import Roofline

PEAK = {"float32": 8.1e12, "float16": 65e12, "int8": 130e12}  # boost clock, whole chip
MEMORIES = (
    Memory("l2", 4 << 20, 1.3e12, 30e-12),  # measured by Jia et al., "Dissecting the NVidia Turing T4", 2019
    Memory("gddr6", 16 << 30, 320e9, 60e-12),
)
GRANULE = {"float32": 32, "float16": 64, "int8": 64}  # columns of a thread block's tile

TARGET = Target(
    name="nvidia-t4",
    summary="NVIDIA T4: 40 SMs, 130 int8 TOPS, 320 GB/s",
    kind="gpu",
    cores=1,
    peak=PEAK,
    memories=MEMORIES,
    granule=GRANULE,
    cost=Roofline(
        peak=PEAK,
        elements_per_second=320e9,
        memories=MEMORIES,
        granule=GRANULE,
        depth={"float16": 16, "int8": 32},
        rows=64,
        units=40,
        efficiency={"conv": 0.6, "matmul": 0.6, "depthwise": 0.05},
        launch_seconds=4e-6,
        joules_per_op={"float32": 8.6e-12, "float16": 1.1e-12, "int8": 0.54e-12},  # 70 W over the peaks
    ),
    tvm={"kind": "cuda", "arch": "sm_75", "host": {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}},
)
