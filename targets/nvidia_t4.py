"""NVIDIA T4 (Turing, 2018): 40 SMs with tensor cores. Compiled and priced, never run here.

Numbers: NVIDIA, "T4 tensor core GPU datasheet" and "Turing GPU architecture" whitepaper.
"""

from __future__ import annotations

from hwopt.target import Memory, Target
from targets._gpu import Gpu

PEAK = {"float32": 8.1e12, "float16": 65e12, "int8": 130e12}  # boost clock, whole chip
MEMORIES = (
    Memory("l2", 4 << 20, 1.3e12, 30e-12),  # measured by Jia et al., "Dissecting the NVidia Turing T4", 2019
    Memory("gddr6", 16 << 30, 320e9, 60e-12),
)
JOULES_PER_OP = {"float32": 8.6e-12, "float16": 1.1e-12, "int8": 0.54e-12}  # 70 W over the peaks

TARGET = Target(
    name="nvidia-t4",
    summary="NVIDIA T4: 40 SMs, 130 int8 TOPS, 320 GB/s",
    kind="gpu",
    cores=1,
    peak=PEAK,
    memories=MEMORIES,
    granule={"float32": 32, "float16": 64, "int8": 64},
    cost=Gpu("sm_75", 40, PEAK, MEMORIES, 4e-6, JOULES_PER_OP),
    tvm={"kind": "cuda", "arch": "sm_75", "host": {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}},
)
