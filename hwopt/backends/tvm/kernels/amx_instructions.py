"""The tile instructions of Intel AMX in TIR, and memory for what they move."""

from __future__ import annotations

from tvm import tirx

from hwopt.backends.tvm.kernels.code import Code, Value


def room(code: Code, name: str, size: int, dtype: str) -> Value:
    """Memory for tiles. TVM would cut off what it does not see used, and of a tile it sees the first element only."""
    buffer = code.alloc(name, size, dtype)
    code.store(buffer, size - 1, tirx.const(0, dtype))
    return buffer


def address(buffer: Value, index: Value) -> Value:
    return tirx.address_of(tirx.BufferLoad(buffer, [index]))


def number_of(tile: int) -> Value:
    """Tile numbers are immediates."""
    return tirx.const(tile, "int8")


def stride(size: int) -> Value:
    return tirx.const(size, "int64")


def tile_instruction(code: Code, name: str, *arguments: Value) -> None:
    code.statements.append(tirx.Evaluate(tirx.call_llvm_intrin("void", f"llvm.x86.{name}", *arguments)))


def prefetch(code: Code, place: Value) -> None:
    """A cache line to the second level, for reading; never faults."""
    read, second_level, data = (tirx.const(value, "int32") for value in (0, 2, 1))
    code.statements.append(tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", place, read, second_level, data)))
