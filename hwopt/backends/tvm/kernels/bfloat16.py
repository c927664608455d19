"""bfloat16 inside of kernels: vectors of its bits as uint16 (see code.load), float32 for all arithmetic.

TVM turns every bfloat16 expression into float32 arithmetic before LLVM sees it, and LLVM's dot products want `bfloat` vectors;
so the instructions stand in small functions of LLVM's own language, which are linked into the kernel and inlined.
"""

from __future__ import annotations

from tvm import tirx

from hwopt.backends.tvm.kernels.code import Value, cast, vector
from hwopt.target import MicroKernel

NATIVE = "avx512bf16"  # has vcvtneps2bf16
_DOT = """declare <{lanes} x float> @{name}(<{lanes} x float>, <{pairs} x bfloat>, <{pairs} x bfloat>)
define internal <{lanes} x float> @hwopt_dot(<{lanes} x float> %t, <{lanes} x i32> %a, <{lanes} x i32> %b) alwaysinline {{
  %x = bitcast <{lanes} x i32> %a to <{pairs} x bfloat>
  %y = bitcast <{lanes} x i32> %b to <{pairs} x bfloat>
  %r = call <{lanes} x float> @{name}(<{lanes} x float> %t, <{pairs} x bfloat> %x, <{pairs} x bfloat> %y)
  ret <{lanes} x float> %r
}}
"""
_NARROW = """declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)
define internal <16 x i16> @hwopt_narrow(<16 x float> %v) alwaysinline {
  %n = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %v)
  %r = bitcast <16 x bfloat> %n to <16 x i16>
  ret <16 x i16> %r
}
"""


def multiplies(micro: MicroKernel) -> bool:
    """Whether the micro-kernel's instruction takes pairs of bfloat16."""
    return micro.dtype == "bfloat16" and micro.depth == 2


def library(micro: MicroKernel) -> str:
    """What kernels with this micro-kernel link, in LLVM's language."""
    dot = _DOT.format(lanes=micro.lanes, pairs=2 * micro.lanes, name=micro.intrinsic) if multiplies(micro) else ""
    return dot + (_NARROW if converts(micro, 16) else "")


def converts(micro: MicroKernel, lanes: int) -> bool:
    """Whether one instruction rounds `lanes` float32."""
    return NATIVE in micro.features and lanes == 16


def dot(micro: MicroKernel, total: Value, data: Value, weight: Value) -> Value:
    """total[lanes] + the sums of pairs of products: data and weight are [lanes, 2] bits."""
    words = vector("int32", micro.lanes)
    kind = vector("float32", micro.lanes)
    return tirx.call_pure_extern(kind, "hwopt_dot", total, tirx.reinterpret(words, data), tirx.reinterpret(words, weight))


def widen(bits: Value, lanes: int) -> Value:
    """The float32 of bfloat16 bits: exact."""
    shifted = tirx.shift_left(cast(bits, "uint32", lanes), _constant(16, lanes))
    return tirx.reinterpret(vector("float32", lanes), shifted)


def narrow(value: Value, lanes: int, native: bool = False) -> Value:
    """The bits of float32 numbers rounded to the nearest bfloat16, ties to even; NaN stays NaN (its highest bit is set).

    The instruction (`native`) gives zero for numbers below the smallest normal one.
    """
    if native:
        return tirx.call_pure_extern(vector("uint16", lanes), "hwopt_narrow", value)
    bits = tirx.reinterpret(vector("uint32", lanes), value)
    upper = tirx.shift_right(bits, _constant(16, lanes))
    odd = tirx.bitwise_and(upper, _constant(1, lanes))
    rounded = tirx.shift_right(bits + _constant(0x7FFF, lanes) + odd, _constant(16, lanes))
    is_nan = tirx.GT(tirx.bitwise_and(bits, _constant(0x7FFFFFFF, lanes)), _constant(0x7F800000, lanes))
    return cast(tirx.Select(is_nan, tirx.bitwise_or(upper, _constant(0x40, lanes)), rounded), "uint16", lanes)


def _constant(number: int, lanes: int) -> Value:
    scalar = tirx.const(number, "uint32")
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)
