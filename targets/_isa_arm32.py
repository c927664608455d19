"""Micro-kernels of 32-bit Arm with NEON and fused multiply-add (ARMv7-A with VFPv4: Cortex-A5, A7, A15, A17), hard floats.

Source: Arm, "Arm Architecture Reference Manual, ARMv7-A and ARMv7-R edition" (VFMA, VMULL, VPADAL; section A8.8).
"""

from __future__ import annotations

from collections.abc import Set

from hwopt.target import MicroKernel

_NEEDED = ("neon", "vfp4")
NEON_FLOAT = MicroKernel("float32", 4, 1, 16, "float32", "float32", "llvm.fma", _NEEDED)
# s8 x s8 -> s16 (VMULL), neighbours added into s32 (VPADAL): exact
_VMULL = "llvm.arm.neon.vmulls"
NEON_INT8 = MicroKernel("int8", 4, 2, 16, "int32", "int8", _VMULL, _NEEDED, wide=_VMULL)


FLAGS = frozenset({"neon", "vfpv4"})  # in the words of /proc/cpuinfo


def microkernels(features: Set[str] = FLAGS) -> dict[str, MicroKernel]:
    """None without NEON and fused multiply-add: products are then plain code."""
    return {"float32": NEON_FLOAT, "int8": NEON_INT8} if features >= FLAGS else {}


def llvm(features: Set[str] = FLAGS, mcpu: str = "generic") -> dict[str, object]:
    """The TVM target for these flags."""
    needed = [f"+{name}" for name in _NEEDED] if features >= FLAGS else []
    return {"kind": "llvm", "mtriple": "armv7-linux-gnueabihf", "mcpu": mcpu, "mfloat-abi": "hard", "mattr": needed}
