"""Micro-kernels of 64-bit RISC-V without vectors (RV64GC, what Linux distributions require): plain code on scalar registers.

Source: RISC-V International, "The RISC-V instruction set manual, volume I" (extensions M, A, F, D, C; FMADD.S).
"""

from __future__ import annotations

from collections.abc import Set

from hwopt.target import MicroKernel

_BASE = ("m", "a", "f", "d", "c")
# four accumulators are scalars: LLVM writes one fmadd.s, or one mul and add, for each
FLOAT = MicroKernel("float32", 4, 1, 8, "float32", "float32", "llvm.fma", _BASE)
INT8 = MicroKernel("int8", 4, 1, 6, "int32", "int8", "", _BASE)


FLAGS = frozenset(_BASE)


def microkernels(features: Set[str] = FLAGS) -> dict[str, MicroKernel]:
    """None for a processor without floats: products are then plain code."""
    return {"float32": FLOAT, "int8": INT8} if features >= FLAGS else {}


def llvm(features: Set[str] = FLAGS, mcpu: str = "generic-rv64") -> dict[str, object]:
    """The TVM target: RV64GC with floats in registers, or integers alone."""
    whole = features >= FLAGS
    names = [f"+{name}" for name in (_BASE if whole else "mac")]
    triple = {"kind": "llvm", "mtriple": "riscv64-linux-gnu", "mcpu": mcpu}
    return {**triple, "mabi": "lp64d" if whole else "lp64", "mattr": names}
