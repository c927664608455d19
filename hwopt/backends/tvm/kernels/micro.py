"""One step of a micro-kernel in TIR: accumulators[lanes] += weights[lanes, depth] * activation[depth].

Which instruction does it comes from the target's MicroKernel; here stands how each family of instructions wants its operands.
Activations are broadcast to all lanes, weights lie packed as [lanes][depth].

Instructions that multiply small matrices (smmla: 2 positions x 2 channels x 8 products) take `rows` positions at once. Their
accumulators hold 2 x 2 blocks: of positions p, q and channels 0 to 3 one has p0 p1 q0 q1, the other p2 p3 q2 q3.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

from tvm import tirx

from hwopt.backends.tvm.kernels import bfloat16, modular
from hwopt.backends.tvm.kernels.code import Code, Value, cast, intrinsic, load, splat, stored, vector
from hwopt.target import MicroKernel


def fused_multiply_add(micro: MicroKernel) -> bool:
    """Whether the target has one for float32, also outside of this micro-kernel."""
    return bool({"fma", "neon", "f"} & set(micro.features))  # of x86, Arm, RISC-V


def word_of(micro: MicroKernel) -> MicroKernel:
    """The micro-kernel of one word, for one that adds the products of several in 16 bits: its operands are tuples of words."""
    return dataclasses.replace(micro, depth=micro.depth // micro.narrow, narrow=1) if micro.narrow > 1 else micro


def weight_operand(code: Code, micro: MicroKernel, buffer: Value, index: Value) -> Any:
    """[lanes, depth] weights, in the form that `accumulate` takes, loaded once for all pixels of a tile."""
    if micro.narrow > 1:
        one = word_of(micro)
        return tuple(weight_operand(code, one, buffer, index + word * one.lanes * one.depth) for word in range(micro.narrow))
    value = load(buffer, index, micro.lanes * micro.depth)
    return code.bind("weight", widened(micro, value))


def data_operand(code: Code, micro: MicroKernel, buffer: Value, index: Value, dtype: str, count: int) -> Any:
    """`depth` activations, repeated in every lane; the last `depth - count` of them are zero and are not read."""
    if micro.narrow > 1:  # words without data are left out
        one = word_of(micro)
        starts = range(0, count, one.depth)
        return tuple(data_operand(code, one, buffer, index + at, dtype, min(one.depth, count - at)) for at in starts)
    lanes, depth = micro.lanes, micro.depth
    if depth == 1:
        if dtype == "bfloat16":
            return code.bind("data", splat(bfloat16.widen(load(buffer, index), 1), lanes))
        return code.bind("data", widened(micro, splat(load(buffer, index), lanes)))
    # moved as one scalar, so that one broadcast instruction does it
    word = "int32" if depth == 4 or dtype in ("bfloat16", "int16") else "int16"
    if count == depth:
        repeated = splat(tirx.reinterpret(word, load(buffer, index, depth)), lanes)
    else:
        parts = [_at_byte(load(buffer, index + byte), byte, word) for byte in range(count)]
        repeated = splat(functools.reduce(tirx.bitwise_or, parts), lanes)
    return code.bind("data", widened(micro, tirx.reinterpret(vector(stored(dtype), lanes * depth), repeated)))


def _at_byte(value: Value, byte: int, word: str) -> Value:
    if value.ty.dtype == "uint16":  # bfloat16
        return tirx.shift_left(tirx.Cast(word, value), tirx.const(16 * byte, word))
    unsigned = tirx.Cast(word, tirx.reinterpret("uint8", value))
    return tirx.shift_left(unsigned, tirx.const(8 * byte, word)) if byte else unsigned


def data_block(code: Code, micro: MicroKernel, buffer: Value, indices: Sequence[Value], dtype: str, count: int) -> Value:
    """The data operand of `rows` positions, whose words begin at the indices; the last one stands for those that are missing."""
    if micro.rows == 1:
        return data_operand(code, micro, buffer, indices[0], dtype, count)
    rows = [_word(buffer, index, dtype, micro.depth, count) for index in indices]
    rows += rows[-1:] * (micro.rows - len(rows))
    return code.bind("data", tirx.Shuffle(rows, list(range(micro.rows * micro.depth))))


def _word(buffer: Value, index: Value, dtype: str, depth: int, count: int) -> Value:
    """`depth` neighbours; those from `count` on are zero and are not read."""
    if count == depth:
        return load(buffer, index, depth)
    parts = [_at_byte(load(buffer, index + byte), byte, "int64") for byte in range(count)]
    return tirx.reinterpret(vector(dtype, depth), functools.reduce(tirx.bitwise_or, parts))


def accumulate_block(micro: MicroKernel, totals: Sequence[Value], data: Value, weight: Value) -> list[Value]:
    """The `rows` accumulators of a vector of channels plus the products of a data block and the channels' weights."""
    if micro.rows == 1:
        return [accumulate(micro, totals[0], data, weight)]
    half = micro.lanes * micro.depth // micro.rows
    parts = [tirx.Shuffle([weight], list(range(part * half, (part + 1) * half))) for part in range(micro.rows)]
    wide = vector(micro.accumulator, micro.lanes)
    return [intrinsic(wide, micro.intrinsic, total, data, part) for total, part in zip(totals, parts, strict=True)]


def arranged(micro: MicroKernel, rows: Sequence[Value]) -> list[Value]:
    """[position][channel] vectors as accumulators hold them, or the other way round: exchanging blocks is its own inverse."""
    if micro.rows == 1:
        return list(rows)
    return [tirx.Shuffle(list(rows), lanes) for lanes in ([0, 1, 4, 5], [2, 3, 6, 7])]


def accumulate(micro: MicroKernel, total: Value, data: Value, weight: Value) -> Value:
    """total + the products of data and weight, summed over the depth."""
    lanes, name = micro.lanes, micro.intrinsic
    wide = vector(micro.accumulator, lanes)
    if not name:
        return total + data * weight
    if name == "llvm.fma":
        return intrinsic(wide, name, data, weight, total)
    if bfloat16.multiplies(micro):
        return bfloat16.dot(micro, total, data, weight)
    if micro.dtype == "int16" and "vpdp" not in name:
        return modular.add(total, intrinsic(wide, name, data, weight), lanes)
    if micro.narrow:
        words = zip(data, weight, strict=False) if micro.narrow > 1 else [(data, weight)]
        found = [intrinsic(vector("int16", lanes * 2), name, one, other) for one, other in words]
        pairs = functools.reduce(operator.add, found)
        return total + intrinsic(wide, micro.wide, pairs, splat(tirx.const(1, "int16"), lanes * 2))
    if "pmadd" in name:  # x86: int16 pairs, exact for 8-bit values
        return total + intrinsic(wide, name, data, weight)
    if "vmulls" in name:  # the same in 32-bit NEON
        product = intrinsic(vector("int16", lanes * 2), name, data, weight)
        return intrinsic(wide, "llvm.arm.neon.vpadals", total, product)
    if "smull" in name:  # NEON: 8 x 8 -> 16 bits, then neighbours are added into 32 bits
        product = intrinsic(vector("int16", lanes * 2), name, data, weight)
        return total + intrinsic(wide, "llvm.aarch64.neon.saddlp", product)
    return intrinsic(wide, name, total, data, weight)  # vpdpbusd, sdot, udot


def widened(micro: MicroKernel, value: Value) -> Any:
    """Operands of instructions that take neither bytes nor bfloat16, converted."""
    if micro.accumulator == "int32" and not micro.intrinsic:
        return cast(value, "int32", micro.lanes)
    if "pmadd" in micro.intrinsic and not micro.narrow:
        return cast(value, "int16", micro.lanes * micro.depth)
    if micro.dtype == "bfloat16" and not bfloat16.multiplies(micro):
        return bfloat16.widen(value, micro.lanes)
    return value
