"""Micro-kernels of 64-bit Arm by the features of /proc/cpuinfo, and the LLVM names that go with them.

Source: Arm, "Arm Architecture Reference Manual for A-profile" (FMLA, SMULL, SADALP, SDOT, USDOT, SMMLA, BFDOT); Linux, "ARM64 ELF
hwcaps".
"""

from __future__ import annotations

from collections.abc import Set

from hwopt.target import MicroKernel

NEON_FLOAT = MicroKernel("float32", 4, 1, 32, "float32", "float32", "llvm.fma", ("neon",))
# s8 x s8 -> s16 (SMULL), neighbours added into s32 (SADALP): exact, for cores without dot products
_SMULL = "llvm.aarch64.neon.smull"
NEON_INT8 = MicroKernel("int8", 4, 2, 32, "int32", "int8", _SMULL, ("neon",), wide=_SMULL)
SDOT = MicroKernel("int8", 4, 4, 32, "int32", "int8", "llvm.aarch64.neon.sdot", ("neon", "dotprod"))
# with I8MM also u8 x s8, and products of matrices: 2 positions x 2 channels x 8 products in one instruction
_I8MM = ("neon", "dotprod", "i8mm")
USDOT = MicroKernel("int8", 4, 4, 32, "int32", "uint8", "llvm.aarch64.neon.usdot", _I8MM)
USMMLA = MicroKernel("int8", 4, 8, 32, "int32", "uint8", "llvm.aarch64.neon.usmmla", _I8MM, rows=2)
SMMLA = MicroKernel("int8", 4, 8, 32, "int32", "int8", "llvm.aarch64.neon.smmla", _I8MM, rows=2, others=(SDOT, USMMLA, USDOT))

BFDOT = MicroKernel("bfloat16", 4, 2, 32, "float32", "bfloat16", "llvm.aarch64.neon.bfdot.v4f32.v8bf16", ("neon", "bf16"))


def microkernels(features: Set[str]) -> dict[str, MicroKernel]:
    """The best micro-kernel per dtype; `asimddp` is what Linux calls the dot products."""
    integer = SMMLA if "i8mm" in features else SDOT if "asimddp" in features else NEON_INT8
    return {"float32": NEON_FLOAT, "int8": integer, **({"bfloat16": BFDOT} if "bf16" in features else {})}


def llvm(features: Set[str], mcpu: str = "generic") -> dict[str, object]:
    """The TVM target for these flags."""
    needed = dict.fromkeys(name for kernel in microkernels(features).values() for name in kernel.features)
    return {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": mcpu, "mattr": [f"+{name}" for name in needed]}
