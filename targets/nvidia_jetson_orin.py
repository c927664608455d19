"""NVIDIA Jetson AGX Orin 64 GB (Ampere, 2022): 16 SMs with tensor cores. Priced, never run here.

Numbers: NVIDIA, "Jetson AGX Orin series technical brief" (dense figures, 1.3 GHz); L2 is an estimate: 512 bytes a cycle.
"""

from __future__ import annotations

from hwopt.target import Memory, Target
from targets._gpu import Gpu

PEAK = {"float32": 5.3e12, "float16": 42.5e12, "int8": 85e12}  # boost clock, whole chip, no sparsity
MEMORIES = (
    Memory("l2", 4 << 20, 0.7e12, 30e-12),
    Memory("lpddr5", 32 << 30, 204.8e9, 40e-12),
)
JOULES_PER_OP = {"float32": 7.5e-12, "float16": 9.4e-13, "int8": 4.7e-13}  # 40 W over the peaks

TARGET = Target(
    name="nvidia-jetson-orin",
    summary="NVIDIA Jetson AGX Orin: 16 SMs, 85 int8 TOPS, 205 GB/s",
    kind="gpu",
    cores=1,
    peak=PEAK,
    memories=MEMORIES,
    granule={"float32": 32, "float16": 64, "int8": 64},
    cost=Gpu("sm_87", 16, PEAK, MEMORIES, 3e-6, JOULES_PER_OP),
    tvm={"kind": "cuda", "arch": "sm_87", "host": {"kind": "llvm", "mtriple": "aarch64-linux-gnu"}},
)
