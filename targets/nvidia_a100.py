"""NVIDIA A100 80 GB SXM (Ampere, 2020): 108 SMs with tensor cores. Priced, never run here.

Numbers: NVIDIA, "A100 tensor core GPU datasheet" and "A100 tensor core GPU architecture" whitepaper
(L2: 5120 bytes a cycle).
"""

from __future__ import annotations

from hwopt.target import Memory, Target
from targets._gpu import Gpu

PEAK = {"float32": 19.5e12, "float16": 312e12, "int8": 624e12}  # boost clock, whole chip, no sparsity
MEMORIES = (
    Memory("l2", 40 << 20, 5.1e12, 30e-12),
    Memory("hbm2e", 80 << 30, 2039e9, 40e-12),
)
JOULES_PER_OP = {"float32": 2.1e-11, "float16": 1.3e-12, "int8": 6.4e-13}  # 400 W over the peaks

TARGET = Target(
    name="nvidia-a100",
    summary="NVIDIA A100: 108 SMs, 624 int8 TOPS, 2039 GB/s",
    kind="gpu",
    cores=1,
    peak=PEAK,
    memories=MEMORIES,
    granule={"float32": 32, "float16": 64, "int8": 64},
    cost=Gpu("sm_80", 108, PEAK, MEMORIES, 3e-6, JOULES_PER_OP),
    tvm={"kind": "cuda", "arch": "sm_80", "host": {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}},
)
