"""NVIDIA H100 SXM (Hopper, 2022): 132 SMs with tensor cores. Priced, never run here.

Numbers: NVIDIA, "H100 tensor core GPU datasheet" and "H100 tensor core GPU architecture"
whitepaper; L2 as Chips and Cheese measured it, 2023.
"""

from __future__ import annotations

from hwopt.target import Memory, Target
from targets._gpu import Gpu

PEAK = {"float32": 67e12, "float16": 989e12, "int8": 1979e12}  # boost clock, whole chip, no sparsity
MEMORIES = (
    Memory("l2", 50 << 20, 5.5e12, 30e-12),
    Memory("hbm3", 80 << 30, 3350e9, 40e-12),
)
JOULES_PER_OP = {"float32": 1e-11, "float16": 7.1e-13, "int8": 3.5e-13}  # 700 W over the peaks

TARGET = Target(
    name="nvidia-h100",
    summary="NVIDIA H100: 132 SMs, 1979 int8 TOPS, 3350 GB/s",
    kind="gpu",
    cores=1,
    peak=PEAK,
    memories=MEMORIES,
    granule={"float32": 32, "float16": 64, "int8": 64},
    cost=Gpu("sm_90", 132, PEAK, MEMORIES, 3e-6, JOULES_PER_OP),
    tvm={"kind": "cuda", "arch": "sm_90", "host": {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}},
)
