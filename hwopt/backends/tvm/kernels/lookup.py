"""Tables of 256 bytes, looked up a vector at a time: each entry is the result for one 8-bit value.

Permutations of bytes see 16 (pshufb), 64 (tbl) or 128 (vpermi2b) entries at once. The bits of the index that a permutation does
not look at choose between the results of several. Sources: Intel SDM volume 2, VPERMI2B, PSHUFB; Arm ARM, TBL.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from tvm import tirx

from hwopt.backends.tvm.kernels.code import Code, Value, function, intrinsic, load, splat, vector

ENTRIES = 256
SERIAL_ELEMENTS = 65536  # below this a parallel launch costs more than it gains
SHUFFLES = {64: "llvm.x86.avx512.pshuf.b.512", 32: "llvm.x86.avx2.pshuf.b"}


@dataclass(frozen=True)
class Form:
    """How a processor looks bytes up: `lanes` at a time, by an `instruction` that sees `reach` entries."""

    instruction: str
    lanes: int
    reach: int


def form_of(features: Set[str], bits: int) -> Form | None:
    """The form for LLVM's feature names and the width of addresses; None where bytes are looked up one by one."""
    if {"avx512bw", "avx512vbmi"} <= features:
        return Form("llvm.x86.avx512.vpermi2var.qi.512", 64, 128)
    if "avx512bw" in features:
        return Form(SHUFFLES[64], 64, 16)
    if "avx2" in features:
        return Form(SHUFFLES[32], 32, 16)
    return Form("llvm.aarch64.neon.tbl4.v16i8", 16, 64) if "neon" in features and bits == 64 else None


def build(count: int, kinds: tuple[str, str], form: Form, threads: int, symbol: str) -> tirx.PrimFunc:
    """PrimFunc(data, table, out): out[i] = table[byte of data[i]]; `kinds` are the 8-bit dtypes of data and of results."""
    data, out = (tirx.decl_buffer((count,), kind, name) for kind, name in zip(kinds, ("data", "out"), strict=True))
    table = tirx.decl_buffer((ENTRIES,), kinds[1], "table")
    whole, code = count // form.lanes, Code()
    parallel = threads > 1 and count >= SERIAL_ELEMENTS
    block = -(-whole // (4 * threads)) if parallel else max(whole, 1)

    def task(outer: Code, number: Value) -> None:
        registers = _registers(outer, table, form)

        def part(inner: Code, index: Value) -> None:
            given = tirx.reinterpret(vector("int8", form.lanes), load(data, index * form.lanes, form.lanes))
            found = _looked_up(inner, inner.bind("index", given), registers, form)
            inner.store(out, index * form.lanes, tirx.reinterpret(vector(kinds[1], form.lanes), found), form.lanes)

        many = block if whole % block == 0 else tirx.Min(block, whole - number * block)
        outer.loop("part", many, part, start=number * block)

    def single(inner: Code, index: Value) -> None:
        entry = tirx.Cast("int32", tirx.reinterpret("uint8", load(data, index)))
        inner.store(out, index, load(table, entry))

    code.loop("task", -(-whole // block), task, parallel=parallel)
    code.loop("single", count - whole * form.lanes, single, start=whole * form.lanes)
    return function(symbol, [data, table, out], code)


def _registers(code: Code, table: Value, form: Form) -> list[Value]:
    """The table, in registers: whole ones, or 16 entries in every 16 bytes of one."""
    width = 16 if form.reach == 16 else form.lanes
    signed = (tirx.reinterpret(vector("int8", width), load(table, start, width)) for start in range(0, ENTRIES, width))
    parts = [code.bind("entries", one) for one in signed]
    if form.reach != 16:
        return parts
    return [code.bind("repeated", tirx.Shuffle([part] * (form.lanes // 16), list(range(form.lanes)))) for part in parts]


def _looked_up(code: Code, index: Value, registers: list[Value], form: Form) -> Value:
    kind = vector("int8", form.lanes)
    if form.reach == 128:
        halves = [intrinsic(kind, form.instruction, low, index, high) for low, high in (registers[:2], registers[2:])]
        return _chosen(code, halves, index, form)
    if form.reach == 64:
        return _summed(code, index, registers, form)
    low = code.bind("low", index & splat(15, form.lanes, "int8"))
    return _chosen(code, [intrinsic(kind, form.instruction, one, low) for one in registers], index, form)


def _chosen(code: Code, found: list[Value], index: Value, form: Form) -> Value:
    """One of the candidates by the highest bits of the index: each bit moves into the sign, which blends look at."""
    words = vector("int16", form.lanes // 2)
    bit = 8 - (len(found).bit_length() - 1)
    while len(found) > 1:
        wide = tirx.reinterpret(words, index)
        moved = tirx.shift_left(wide, splat(7 - bit, form.lanes // 2, "int16")) if bit < 7 else wide
        high = tirx.LT(tirx.reinterpret(vector("int8", form.lanes), moved), splat(0, form.lanes, "int8"))
        found = [code.bind("chosen", tirx.Select(high, b, a)) for a, b in zip(found[::2], found[1::2], strict=True)]
        bit += 1
    return found[0]


def _summed(code: Code, index: Value, registers: list[Value], form: Form) -> Value:
    """tbl gives zero beyond its entries: all quarters of the table are looked up, all but one of the results are zero."""
    kind, total = vector("int8", form.lanes), None
    for quarter in range(ENTRIES // form.reach):
        own = registers[4 * quarter : 4 * quarter + 4]
        moved = index - splat(_signed(quarter * form.reach), form.lanes, "int8") if quarter else index
        found = intrinsic(kind, form.instruction, *own, moved)
        total = found if total is None else total | found
    return code.bind("found", total)


def _signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte
