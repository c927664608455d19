"""Weights as small codes, turned into multiplicands in registers: how codes lie in memory, and the instructions that read them.

A code of 1 to 8 bits is an index into a codebook, or a signed number itself. Codes of `lanes` output channels lie side by side;
one 32-bit lane holds 32 / width consecutive codes of its channel, so that a shift brings each of them to the lowest bits, and
permutations (vpermps, vpermi2ps, vpshufb, tbl) look them up: they read the lowest bits of an index and ignore the others.
A code of 3, 5, 6 or 7 bits is split into planes of 4, 2 and 1 bits. For integer kernels the same holds within bytes.

    [vectors, chunks, planes, registers of a plane, lanes, bytes of a lane]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx

from hwopt.backends.tvm.kernels.code import Code, Value, cast, intrinsic, load, splat, vector
from hwopt.target import MicroKernel

Layout = Sequence[tuple[int, int]]  # (width, lowest bit in the code) of each plane


@dataclass(frozen=True)
class Coding:
    """How a weight is coded: `books` codebooks of 2^bits entries, each for an equal share of the channels; 0: signed numbers."""

    bits: int
    books: int = 0

    @property
    def planes(self) -> Layout:
        """Widths that divide a byte, the widest one first and in the lowest bits."""
        found, offset = [], 0
        for width in (8, 4, 2, 1):
            if self.bits & width:
                found.append((width, offset))
                offset += width
        return found


class Decoder:
    """Reads the codes of one kernel. A chunk is the fewest codes of a channel that fill whole registers."""

    def __init__(self, coding: Coding, micro: MicroKernel, channels: int) -> None:
        self.micro, self.channels = micro, channels
        self.lanes, self.depth = micro.lanes, micro.depth
        self.integer = micro.dtype != "float32"
        permutes = self.integer or "avx512f" in micro.features
        narrow = coding.books == 0 and coding.bits < 8 and permutes  # numbers, but a lookup takes fewer instructions
        self.given = coding
        self.coding = dataclasses.replace(coding, books=1) if narrow else coding
        self.word = 8 if self.integer else 32
        narrowest = min(width for width, _ in self.coding.planes)
        self.steps = max(self.word // narrowest, 4)  # vectors of weights in a chunk
        self.chunk = self.steps * self.depth
        self.row = self.lanes * self.depth  # weights in one step
        self.sizes = [self.row * (self.steps if width == 8 else self.steps * width // 8) for width, _ in self.coding.planes]
        self.chunk_bytes = sum(self.sizes)

    @staticmethod
    def supports(coding: Coding, micro: MicroKernel, channels: int) -> str:
        """Why codes cannot be read in this micro-kernel, or ""."""
        if micro.dtype not in ("float32", "int8"):
            return f"there is no decoder for {micro.dtype}"
        if micro.dtype == "int8" and coding.bits > 4:
            return f"bytes are looked up among 16, not {2**coding.bits}"
        if coding.books > 1 and channels // coding.books % micro.lanes:
            return f"a codebook for {channels // coding.books} channels does not fill vectors of {micro.lanes}"
        return ""

    def chunks(self, depth: int) -> int:
        return -(-depth // self.chunk)

    def pack(self, codes: np.ndarray) -> np.ndarray:
        """uint8 [channels, k] -> the bytes that `operands` reads, channels and k filled up with code 0."""
        vectors, chunks = -(-len(codes) // self.lanes), self.chunks(codes.shape[1])
        full = np.zeros((vectors * self.lanes, chunks * self.chunk), np.uint8)
        full[: codes.shape[0], : codes.shape[1]] = codes
        whole = full.reshape(vectors, self.lanes, chunks, self.steps, self.depth)
        planes = [self._plane((whole >> offset) & (2**width - 1), width) for width, offset in self.coding.planes]
        return np.concatenate(planes, axis=2).reshape(-1)

    def _plane(self, codes: np.ndarray, width: int) -> np.ndarray:
        """[vectors, lanes, chunks, steps, depth] -> [vectors, chunks, bytes]."""
        vectors, lanes, chunks, steps, depth = codes.shape
        if width == 8:
            return codes.transpose(0, 2, 3, 1, 4).reshape(vectors, chunks, -1)
        many, kind = self.word // width, np.uint8 if self.integer else np.uint32
        split = codes.reshape(vectors, lanes, chunks, steps // many, many, depth).astype(kind)
        shifts = (width * np.arange(many)).astype(kind)[:, None]
        words = np.bitwise_or.reduce(np.left_shift(split, shifts), axis=4)  # [vectors, lanes, chunks, registers, depth]
        return np.ascontiguousarray(words.transpose(0, 2, 3, 1, 4)).view(np.uint8).reshape(vectors, chunks, -1)

    @property
    def instructions(self) -> int:
        """About how many a step takes to decode: code that is unrolled too far takes seconds to compile."""
        looked_up = self.coding.books > 0
        registers = max(1, 2**self.coding.bits // self.lanes) if looked_up and not self.integer else 1
        planes = 2 + 3 * (len(self.coding.planes) - 1)
        return planes + (2 * self.lanes if looked_up and not self._permutes else 3 * (registers - 1) // 2)

    @property
    def table_size(self) -> int:
        """Entries of one codebook as it lies in memory: whole registers, a short one repeated."""
        if not self.coding.books:
            return 0
        return max(2**self.coding.bits, 16 if self.integer else self.lanes)

    def table(self, books: np.ndarray | None) -> np.ndarray:
        """[books, 2^bits] as the kernel reads them; the numbers themselves where there are none."""
        kind = np.int8 if self.integer else np.float32
        if books is None:
            count = 2**self.given.bits
            books = ((np.arange(count) + count // 2) % count - count // 2).reshape(1, -1)
        books = np.tile(books.astype(kind), (1, self.table_size // books.shape[1]))
        if self.integer:  # permutations of bytes work within 16 of them
            books = np.tile(books, (1, max(1, self.row // 16)))
        return np.ascontiguousarray(books).reshape(-1)

    def registers(self, code: Code, table: Value, vector_index: Value) -> list[Value]:
        """The codebook of a vector of channels, in registers."""
        if not self.coding.books:
            return []
        size = max(16, self.row) if self.integer else self.table_size
        book = 0
        if self.coding.books > 1:
            book = tirx.floordiv(vector_index * self.lanes, self.channels // self.coding.books) * size
        if not self._permutes:
            return [code.bind("book", book)]
        width = size if self.integer else self.lanes
        return [code.bind("table", load(table, book + start, width)) for start in range(0, size, width)]

    @property
    def _permutes(self) -> bool:
        """Whether the table stays in registers; else every lane loads its entry."""
        features = self.micro.features
        if self.integer:
            return self._tables or (self.row >= 16 and bool({"avx512f", "avx2"} & set(features)))
        if "avx512f" in features:
            return True
        if "avx2" in features:
            return self.coding.bits <= 6
        return self._tables and self.coding.bits <= 4

    @property
    def _tables(self) -> bool:
        """64-bit Arm, which has tbl of up to four registers."""
        return "neon" in self.micro.features and self.micro.registers == 32

    def operands(self, code: Code, codes: Value, at: Value, table: Value, registers: list[Value], steps: int) -> Iterator[Value]:
        """The weights of `steps` steps of the chunk at byte `at`, each [lanes, depth]."""
        loaded: dict[tuple[int, int], Value] = {}
        for step in range(steps):
            yield code.bind("weight", self._operand(code, codes, at, table, registers, step, loaded))

    def _operand(
        self, code: Code, codes: Value, at: Value, table: Value, registers: list[Value], step: int, loaded: dict
    ) -> Value:
        if self.coding.planes == [(8, 0)] and not self.coding.books:
            raw = tirx.reinterpret(vector("int8", self.row), load(codes, at + step * self.row, self.row))
            return raw if self.integer else cast(raw, "float32", self.lanes)
        found, start = [], 0
        for (width, _), size in zip(self.coding.planes, self.sizes, strict=True):
            found.append(self._word(code, codes, at + start, width, step, (start, loaded)))
            start += size
        if not self.coding.books:
            (word, shift), width = found[0], self.coding.bits
            top = self._shift(tirx.shift_left, word, 32 - width - shift)
            return cast(self._shift(tirx.shift_right, top, 32 - width), "float32", self.lanes)
        index = self._index(code, found)
        return self._bytes(table, registers, index) if self.integer else self._floats(code, table, registers, index)

    def _word(self, code: Code, codes: Value, at: Value, width: int, step: int, cache: tuple[int, dict]) -> tuple[Value, int]:
        """The register that holds a step's codes of one plane as int32 lanes, and how far up they stand in it."""
        start, loaded = cache
        if width == 8:
            return cast(load(codes, at + step * self.row, self.row), "int32", self.lanes), 0
        many, size = self.word // width, self.row * self.word // 8
        number = step // many
        if (start, number) not in loaded:
            raw = load(codes, at + number * size, size)
            loaded[start, number] = code.bind("word", tirx.reinterpret(vector("int32", size // 4), raw))
        return loaded[start, number], width * (step % many)

    def _shift(self, operation: Any, value: Value, count: int) -> Value:
        return operation(value, splat(count, self._words, "int32")) if count else value

    @property
    def _words(self) -> int:
        """int32 lanes of a register."""
        return self.row // 4 if self.integer else self.lanes

    def _index(self, code: Code, found: list[tuple[Value, int]]) -> Value:
        """The codes of a step; above the highest bit stands anything."""
        total: Value = None
        for (word, shift), (width, offset) in zip(found, self.coding.planes, strict=True):
            last = offset + width == self.coding.bits
            value = self._shift(tirx.shift_right, word, shift)
            if not last or self.integer or not self._permutes:
                value = value & splat(self._mask(width), self._words, "int32")
            value = self._shift(tirx.shift_left, value, offset)
            total = value if total is None else total | value
        return code.bind("index", total)

    def _mask(self, width: int) -> int:
        one = 2**width - 1
        return one * 0x01010101 if self.integer else one

    def _floats(self, code: Code, table: Value, registers: list[Value], index: Value) -> Value:
        lanes, features = self.lanes, self.micro.features
        kind = vector("float32", lanes)
        if not self._permutes:
            return tirx.BufferLoad(table, [splat(registers[0], lanes, "int32") + index])
        if "avx512f" in features and len(registers) > 1:
            pairs = zip(registers[::2], registers[1::2], strict=True)
            found = [intrinsic(kind, "llvm.x86.avx512.vpermi2var.ps.512", low, index, high) for low, high in pairs]
            return self._select(code, found, index, 2 * lanes)
        if self._tables:
            return self._neon(registers, index)
        name = "llvm.x86.avx512.permvar.sf.512" if "avx512f" in features else "llvm.x86.avx2.permps"
        return self._select(code, [intrinsic(kind, name, one, index) for one in registers], index, lanes)

    def _select(self, code: Code, found: list[Value], index: Value, bit: int) -> Value:
        """One of the candidates by the index's bits from `bit` on: the bit moves into the sign, which blends look at."""
        while len(found) > 1:
            moved = self._shift(tirx.shift_left, index, 32 - bit.bit_length())
            high = tirx.LT(moved, splat(0, self.lanes, "int32"))
            found = [tirx.Select(high, b, a) for a, b in zip(found[::2], found[1::2], strict=True)]
            found, bit = [code.bind("chosen", one) for one in found], bit * 2
        return found[0]

    def _neon(self, registers: list[Value], index: Value) -> Value:
        """tbl looks bytes up: 4 i, 4 i + 1, 4 i + 2, 4 i + 3 for entry i."""
        index = index & splat(self.table_size - 1, 4, "int32")
        places = index * splat(0x04040404, 4, "int32") + splat(0x03020100, 4, "int32")
        tables = [tirx.reinterpret("int8x16", one) for one in registers]
        name = f"llvm.aarch64.neon.tbl{len(tables)}.v16i8"
        return tirx.reinterpret("float32x4", intrinsic("int8x16", name, *tables, tirx.reinterpret("int8x16", places)))

    def _bytes(self, table: Value, registers: list[Value], index: Value) -> Value:
        """The entries of byte indices, [lanes, depth] int8."""
        kind = vector("int8", self.row)
        index = tirx.reinterpret(kind, index)
        if not self._permutes:
            wide = cast(index, "int32", self.row)
            return tirx.BufferLoad(table, [splat(registers[0], self.row, "int32") + wide])
        names = {64: "llvm.x86.avx512.pshuf.b.512", 32: "llvm.x86.avx2.pshuf.b", 16: "llvm.x86.ssse3.pshuf.b.128"}
        name = f"llvm.aarch64.neon.tbl1.v{self.row}i8" if self._tables else names[self.row]
        return intrinsic(kind, name, registers[0], index)
