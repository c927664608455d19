"""Arithmetic of int32 modulo 2^32.

TVM tells LLVM that its own sums of int32 never overflow, so these are small functions of LLVM's own language.
"""

from __future__ import annotations

from tvm import tirx

from hwopt.backends.tvm.kernels.code import Value, vector

_FUNCTION = """define internal {kind} @hwopt_{name}_{lanes}({kind} %a, {kind} %b) alwaysinline {{
  %r = {name} {kind} %a, %b
  ret {kind} %r
}}
"""


def library(most: int) -> str:
    """What kernels link that use these functions for vectors of up to `most` lanes, a power of two."""
    every = [1 << power for power in range(most.bit_length())]
    kinds = {lanes: f"<{lanes} x i32>" if lanes > 1 else "i32" for lanes in every}
    return "".join(
        _FUNCTION.format(kind=kind, lanes=lanes, name=name) for lanes, kind in kinds.items() for name in ("add", "sub", "mul")
    )


def add(a: Value, b: Value, lanes: int) -> Value:
    return _call("add", a, b, lanes)


def subtract(a: Value, b: Value, lanes: int) -> Value:
    return _call("sub", a, b, lanes)


def multiply(a: Value, b: Value, lanes: int) -> Value:
    return _call("mul", a, b, lanes)


def _call(name: str, a: Value, b: Value, lanes: int) -> Value:
    return tirx.call_pure_extern(vector("int32", lanes), f"hwopt_{name}_{lanes}", a, b)
