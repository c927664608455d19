"""Products with coded weights: codes are read from memory and decoded in registers, for matmuls and 1x1 convolutions.

With few rows a matmul waits for its weights, and codes are 4 to 16 times smaller than numbers. A task takes some channel tiles:

    few rows:   for each channel tile: for each tile of rows:
                    for each block of k: sums = 0; for each chunk: decode, multiply and add; totals += scale of the block * sums
    many rows:  decode the tile's weights into workspace once, then the dense kernel

Without blocks (one scale per channel, or none) there is one sum, and the scale is a step of the epilogue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import tirx

from hwopt.backends.tvm.kernels.array import is_array
from hwopt.backends.tvm.kernels.code import Code, Value, function, load, pieces, splat
from hwopt.backends.tvm.kernels.decode import Coding, Decoder
from hwopt.backends.tvm.kernels.epilogue import Epilogue, Place
from hwopt.backends.tvm.kernels.gemm import Gemm
from hwopt.backends.tvm.kernels.geometry import Geometry
from hwopt.backends.tvm.kernels.micro import accumulate, data_operand, fused_multiply_add, widened
from hwopt.backends.tvm.kernels.schedule import SERIAL_MACS, Schedule, cycles, default_schedule, tiles_of
from hwopt.backends.tvm.kernels.spec import Step
from hwopt.target import MicroKernel

DIRECT_ROWS = 16  # with more rows, weights are decoded once into workspace
LINE, AHEAD = 64, 1024  # bytes of a cache line, and how far ahead of the codes in use to ask for more (measured: 1.1 to 1.3 x)
UNROLLED = 256  # decoding instructions in one chunk of a tile: more takes seconds to compile
WORKSPACE = 512 << 10  # bytes of decoded weights per task: a share of the second level cache


@dataclass(frozen=True)
class PackedSpec:
    """[m, k] x decoded [k, n] -> [m, n]. `block` neighbours along k share a scale and, with `zeros`, a zero point; 0: none."""

    m: int
    n: int
    k: int
    coding: Coding
    block: int = 0
    zeros: bool = False
    data_dtype: str = "float32"
    out_dtype: str = "float32"
    epilogue: tuple[Step, ...] = ()

    @property
    def weight_dtype(self) -> str:
        return "float32" if self.data_dtype == "float32" else "int8"

    @property
    def accumulator(self) -> str:
        return "float32" if self.data_dtype == "float32" else "int32"

    @property
    def macs(self) -> int:
        return self.m * self.n * self.k

    @property
    def blocks(self) -> int:
        return -(-self.k // self.block) if self.block else 0

    @property
    def dense(self) -> Geometry:
        """The same product with decoded weights."""
        return Geometry(
            images=1, height=1, width=self.m, channels=self.k, rows=1, columns=self.m, n=self.n, run=self.k,
            data_dtype=self.data_dtype, weight_dtype=self.weight_dtype, out_dtype=self.out_dtype,
            accumulator=self.accumulator, epilogue=self.epilogue, computed=True,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Codes:
    """Weights to pack: codes uint8 [n, k]; books [books, 2^bits] or None; scales and zero points float32 [n, blocks] or None."""

    codes: np.ndarray
    books: np.ndarray | None = None
    scales: np.ndarray | None = None
    zeros: np.ndarray | None = None


def supports(spec: PackedSpec, micro: MicroKernel) -> str:
    """Why there is no kernel, or ""."""
    if is_array(micro):
        return "an array is loaded with decoded weights"
    if micro.activation != spec.data_dtype or micro.dtype != spec.weight_dtype:
        return f"the micro-kernel multiplies {micro.activation} by {micro.dtype}"
    if micro.narrow > 1:
        return "codes are decoded a word at a time"
    if micro.narrow and spec.coding.books:
        return "a codebook may hold weights that overflow pairs of products in 16 bits"
    reason = Decoder.supports(spec.coding, micro, spec.n)
    if reason or not spec.block:
        return reason
    chunk = Decoder(spec.coding, micro, spec.n).chunk
    if micro.dtype != "float32":
        return "integers have no scales inside of a sum"
    return f"blocks of {spec.block} are no multiples of {chunk} codes" if spec.block % chunk and spec.blocks > 1 else ""


def pack(spec: PackedSpec, weights: Codes, micro: MicroKernel) -> list[np.ndarray]:
    """Codes, codebooks, scales and zero points as the kernel reads them, those that it has."""
    decoder = Decoder(spec.coding, micro, spec.n)
    found = [decoder.pack(weights.codes)]
    if decoder.table_size:
        found.append(decoder.table(weights.books))
    return found + [_rows(one, micro.lanes) for one in (weights.scales, weights.zeros) if one is not None]


def _rows(array: np.ndarray, lanes: int) -> np.ndarray:
    """[n, blocks] -> [vectors, blocks, lanes], flat."""
    vectors = -(-len(array) // lanes)
    full = np.zeros((vectors * lanes, array.shape[1]), np.float32)
    full[: len(array)] = array
    return np.ascontiguousarray(full.reshape(vectors, lanes, -1).transpose(0, 2, 1)).reshape(-1)


def schedule_of(spec: PackedSpec, micro: MicroKernel, cores: int = 1) -> Schedule:
    """Rows and vectors whose sums, totals and codes fit the registers; or the dense kernel's tile."""
    vectors = -(-spec.n // micro.lanes)
    parallel = cores > 1 and spec.macs >= SERIAL_MACS
    if spec.m > DIRECT_ROWS:
        found = _dense_tile(spec, micro)
        most = max(1, WORKSPACE // (_decoded_bytes(spec, micro) * found.vectors))
        tiles = -(-vectors // found.vectors)
        share = -(-tiles // (4 * cores)) if parallel else tiles
        return replace(found, block_tiles=min(most, share, tiles), parallel=parallel)
    sums = 2 if spec.block else 1
    room = micro.registers - min(8, micro.registers // 4)
    fitting = (v for v in (4, 2, 1) if v in widths(spec, micro) and sums * v * min(spec.m, 4) + v <= room)
    wide = next(fitting, 1)
    rows = max(1, min(spec.m, (room - wide) // (sums * wide)))
    rows = -(-spec.m // -(-spec.m // rows))  # even tiles
    tiles = -(-vectors // wide)
    share = -(-tiles // (4 * cores)) if parallel else tiles
    return Schedule(1, rows, wide, 1, 1, -(-spec.m // rows) * rows, share, parallel)


def widths(spec: PackedSpec, micro: MicroKernel) -> list[int]:
    """How many vectors of channels a tile of few rows may have, for code that compiles in a second."""
    decoder = Decoder(spec.coding, micro, spec.n)
    most = max(1, UNROLLED // (decoder.steps * decoder.instructions))
    return [wide for wide in (1, 2, 3, 4, 6, 8) if wide <= min(-(-spec.n // micro.lanes), most)] or [1]


def workspace_bytes(spec: PackedSpec, schedule: Schedule, micro: MicroKernel) -> int:
    """Of the decoded weights of one task."""
    count = min(schedule.block_tiles * schedule.vectors, -(-spec.n // micro.lanes))
    return count * _decoded_bytes(spec, micro) if spec.m > DIRECT_ROWS else 0


def _dense_tile(spec: PackedSpec, micro: MicroKernel) -> Schedule:
    """The dense kernel's tile, of so few vectors that their decoded weights fit the workspace."""
    most = max(1, WORKSPACE // _decoded_bytes(spec, micro))
    fitting = [tile for tile in tiles_of(spec.dense, micro) if tile[2] <= most]
    rows, columns, vectors = min(fitting, key=lambda tile: cycles(spec.dense, micro, *tile))
    whole = default_schedule(spec.dense, micro, 1)
    block = -(-spec.m // columns) * columns
    unroll = whole.unroll if columns * vectors <= whole.tile_columns * whole.vectors else 1
    return replace(whole, tile_rows=rows, tile_columns=columns, vectors=vectors, unroll=unroll, block_columns=block)


def _decoded_bytes(spec: PackedSpec, micro: MicroKernel) -> int:
    """Of one vector of channels."""
    return spec.k * micro.lanes * (4 if micro.dtype == "float32" else 1)


def build(spec: PackedSpec, schedule: Schedule, micro: MicroKernel, symbol: str) -> tirx.PrimFunc:
    """PrimFunc(data, codes, [codebooks], [scales], [zero points], *epilogue tensors, out)."""
    return Packed(spec, schedule, micro).build(symbol)


class Packed:
    """One kernel under construction."""

    def __init__(self, spec: PackedSpec, schedule: Schedule, micro: MicroKernel) -> None:
        self.spec, self.schedule, self.micro = spec, schedule, micro
        self.decoder = Decoder(spec.coding, micro, spec.n)
        self.vectors = -(-spec.n // micro.lanes)
        self.chunks = self.decoder.chunks(spec.k)
        self.panel = self.chunks * self.decoder.chunk_bytes  # bytes of one vector of channels
        size = self.vectors * micro.lanes * spec.blocks
        self.data = tirx.decl_buffer((spec.m * spec.k,), spec.data_dtype, "data")
        self.codes = tirx.decl_buffer((self.vectors * self.panel,), "uint8", "codes")
        books = max(1, self.decoder.coding.books) * len(self.decoder.table(None)) if self.decoder.table_size else 0
        self.table = tirx.decl_buffer((books,), spec.weight_dtype, "table") if books else None
        self.scales = tirx.decl_buffer((size,), "float32", "scales") if spec.block else None
        self.zeros = tirx.decl_buffer((size,), "float32", "zeros") if spec.zeros else None
        self.out = tirx.decl_buffer((spec.m * spec.n,), spec.out_dtype, "out")
        self.epilogue = Epilogue(
            spec.epilogue, spec.accumulator, spec.out_dtype, spec.n, 1, spec.m * spec.n, fused_multiply_add(micro)
        )

    def build(self, symbol: str) -> tirx.PrimFunc:
        code = Code()
        tiles = -(-self.vectors // self.schedule.vectors)
        tasks = -(-tiles // self.schedule.block_tiles)
        body = self._dense_task() if self.spec.m > DIRECT_ROWS else self._task
        code.loop("task", tasks, body, parallel=self.schedule.parallel)
        given = [one for one in (self.codes, self.table, self.scales, self.zeros) if one is not None]
        return function(symbol, [self.data, *given, *self.epilogue.parameters, self.out], code)

    def _tiles(self, code: Code, task: Value, body: Callable[[Code, Value, int, int], None]) -> None:
        """body(code, first vector, vectors, lanes of the last) for whole channel tiles of a task, then for the shorter one."""
        width, lanes, block = self.schedule.vectors, self.micro.lanes, self.schedule.block_tiles
        whole, first = self.spec.n // (width * lanes), task * block
        total = -(-self.vectors // width)
        many = block if block < total and total % block == 0 and whole == total else tirx.Max(0, tirx.Min(block, whole - first))
        many = whole if block >= total else many
        code.loop("tile", many, lambda inner, tile: body(inner, tile * width, width, lanes), start=first)
        if whole < total:
            here = True if block >= total else tirx.And(tirx.LE(first, whole), tirx.GT(first + block, whole))
            rest = self.spec.n - (self.vectors - 1) * lanes
            code.when(here, lambda inner: body(inner, whole * width, self.vectors - whole * width, rest))

    def _task(self, code: Code, task: Value) -> None:
        rows = self.schedule.tile_columns

        def tile(inner: Code, vector: Value, vectors: int, last: int) -> None:
            inner.loop("rows", self.spec.m // rows, lambda some, r: Tile(self, vector, vectors, last, rows).emit(some, r * rows))
            if self.spec.m % rows:
                Tile(self, vector, vectors, last, self.spec.m % rows).emit(inner, self.spec.m - self.spec.m % rows)

        self._tiles(code, task, tile)

    def _dense_task(self) -> Callable[[Code, Value], None]:
        """Decode some channel tiles into workspace, then multiply as with packed weights."""
        gemm = Gemm(self.spec.dense, self.schedule, self.micro)
        gemm.data, gemm.out, gemm.epilogue = self.data, self.out, self.epilogue
        count = min(self.schedule.block_tiles * self.schedule.vectors, self.vectors)

        def task(code: Code, number: Value) -> None:
            tile = number * self.schedule.block_tiles
            first = tile * self.schedule.vectors
            space = code.alloc("decoded", count * gemm.panel, self.spec.weight_dtype)
            many = count if self.vectors % count == 0 else tirx.Min(count, self.vectors - first)
            code.loop("vector", many, lambda inner, v: self._decode(inner, v, space, (v - first) * gemm.panel), start=first)
            gemm.task(code, 0, 0, 0, tile, lambda _: (space, first * -gemm.panel))

        return task

    def _decode(self, code: Code, vector: Value, space: Value, target: Value) -> None:
        """All weights of one vector of channels, with the scales of their blocks."""
        registers = self.decoder.registers(code, self.table, vector)

        def chunk(inner: Code, number: Value, steps: int, block: Any) -> None:
            start = target + number * (self.decoder.steps * self.decoder.row)
            for step, weight in enumerate(self.operands(inner, vector, number, registers, steps)):
                value = weight if block is None or block[0] is None else weight - block[0]
                value = value if block is None else value * block[1]
                inner.store(space, start + step * self.decoder.row, value, self.decoder.row)

        def begin(outer: Code, index: Value) -> Any:
            return None if self.scales is None else (self.zero(outer, vector, index), self.scale(outer, vector, index))

        self.walk(code, begin, chunk)

    def operands(self, code: Code, vector: Value, chunk: Value, registers: list[Value], steps: int) -> Iterator[Value]:
        """The weights of the first steps of a chunk."""
        at = code.bind("at", vector * self.panel + chunk * self.decoder.chunk_bytes)
        for line in range(0, self.decoder.chunk_bytes, LINE):
            prefetch(code, self.codes, at + (AHEAD + line))
        return self.decoder.operands(code, self.codes, at, self.table, registers, steps)

    def walk(
        self, code: Code, begin: Callable[..., Any], chunk: Callable[..., None], end: Callable[..., None] | None = None
    ) -> None:
        """Along k: state = begin(code, block), chunk(code, number, steps, state) for its chunks, end(code, block, state)."""
        size, spec = self.decoder.chunk, self.spec
        rest = -(-(spec.k % size) // self.micro.depth)  # steps of an incomplete chunk
        whole = self.chunks - (1 if rest else 0)
        per_block = spec.block // size if spec.blocks > 1 else self.chunks

        def block(outer: Code, index: Value, first: Value, many: int, short: bool) -> None:
            state = begin(outer, index)
            outer.loop("chunk", many, lambda inner, number: chunk(inner, number, self.decoder.steps, state), start=first)
            if short:
                chunk(outer, whole, rest, state)
            if end is not None:
                end(outer, index, state)

        full = whole // per_block
        code.loop("block", full, lambda inner, index: block(inner, index, index * per_block, per_block, False))
        if whole % per_block or rest:
            block(code, full, full * per_block, whole % per_block, bool(rest))

    def scale(self, code: Code, vector: Value, block: Value) -> Value:
        at = (vector * self.spec.blocks + block) * self.micro.lanes
        return code.bind("scale", load(self.scales, at, self.micro.lanes))

    def zero(self, code: Code, vector: Value, block: Value) -> Value:
        """The zero points of a vector of channels; None where all are zero."""
        at = (vector * self.spec.blocks + block) * self.micro.lanes
        return None if self.zeros is None else code.bind("zero", load(self.zeros, at, self.micro.lanes))


@dataclass(frozen=True)
class Tile:
    """`rows` rows x `vectors` vectors of channels, the last of which has `last` valid ones."""

    kernel: Packed
    vector: Value
    vectors: int
    last: int
    rows: int

    def emit(self, code: Code, row: Value) -> None:
        kernel, spec, lanes = self.kernel, self.kernel.spec, self.kernel.micro.lanes
        totals = self._sums(code, "total", [self._initial(code, v) for v in range(self.vectors)])
        sums = [[code.alloc("sum", lanes, "float32") for _ in some] for some in totals] if spec.block else totals
        registers = [kernel.decoder.registers(code, kernel.table, self.vector)]
        if kernel.decoder.coding.books > 1:
            registers += [kernel.decoder.registers(code, kernel.table, self.vector + v) for v in range(1, self.vectors)]

        def begin(outer: Code, index: Value) -> Any:
            if not spec.block:
                return [None] * self.vectors
            for one in (one for some in sums for one in some):
                outer.store(one, 0, splat(0.0, lanes), lanes)
            return [kernel.zero(outer, self.vector + v, index) for v in range(self.vectors)]

        def chunk(inner: Code, number: Value, steps: int, zeros: list[Value]) -> None:
            weights = [
                kernel.operands(inner, self.vector + v, number, registers[v % len(registers)], steps) for v in range(self.vectors)
            ]
            for step, operands in enumerate(zip(*weights, strict=True)):
                shifted = [w if z is None else inner.bind("weight", w - z) for w, z in zip(operands, zeros, strict=True)]
                self._products(inner, sums, row, number, step, shifted)

        def end(outer: Code, index: Value, _: Any) -> None:
            for v in range(self.vectors if spec.block else 0):
                scale = kernel.scale(outer, self.vector + v, index)
                for total, one in zip(totals, sums, strict=True):
                    added = multiply_add(kernel.micro, load(one[v], 0, lanes), scale, load(total[v], 0, lanes))
                    outer.store(total[v], 0, added, lanes)

        kernel.walk(code, begin, chunk, end)
        self._finish(code, totals, row)

    def _lanes(self, vector: int) -> int:
        return self.last if vector == self.vectors - 1 else self.kernel.micro.lanes

    def _initial(self, code: Code, vector: int) -> Value:
        """The bias, or zero where a vector is partial."""
        lanes, kind = self.kernel.micro.lanes, self.kernel.spec.accumulator
        if self._lanes(vector) == lanes:
            return self.kernel.epilogue.initial(code, (self.vector + vector) * lanes, lanes)
        return splat(0 if kind == "int32" else 0.0, lanes, kind)

    def _sums(self, code: Code, name: str, initial: list[Value]) -> list[list[Value]]:
        """Accumulators [row][vector]."""
        lanes, found = self.kernel.micro.lanes, []
        for _ in range(self.rows):
            found.append([code.alloc(name, lanes, self.kernel.spec.accumulator) for _ in initial])
            for one, value in zip(found[-1], initial, strict=True):
                code.store(one, 0, value, lanes)
        return found

    def _products(self, code: Code, sums: list[list[Value]], row: Value, chunk: Value, step: int, weights: list[Value]) -> None:
        kernel, micro, spec = self.kernel, self.kernel.micro, self.kernel.spec
        whole = isinstance(chunk, int) and chunk * kernel.decoder.chunk + (step + 1) * micro.depth > spec.k
        count = spec.k % micro.depth if whole else micro.depth
        place = chunk * kernel.decoder.chunk + step * micro.depth
        wide = [widened(micro, weight) for weight in weights]
        for index, some in enumerate(sums):
            data = data_operand(code, micro, kernel.data, (row + index) * spec.k + place, spec.data_dtype, count)
            for one, weight in zip(some, wide, strict=True):
                code.store(one, 0, accumulate(micro, load(one, 0, micro.lanes), data, weight), micro.lanes)

    def _finish(self, code: Code, totals: list[list[Value]], row: Value) -> None:
        kernel, lanes, epilogue = self.kernel, self.kernel.micro.lanes, self.kernel.epilogue
        for index, some in enumerate(totals):
            for vector, total in enumerate(some):
                for offset, count in pieces(self._lanes(vector), lanes):
                    channel = (self.vector + vector) * lanes + offset
                    shared = epilogue.per_channel(code, channel, count)
                    place = Place((row + index) * kernel.spec.n + channel, channel)
                    value = epilogue.apply(
                        code, load(total, offset, count), place, shared, count, self._lanes(vector) == lanes
                    )  # fmt: skip
                    code.store(kernel.out, place.flat, value, count)


def prefetch(code: Code, buffer: Value, index: Value) -> None:
    """Ask for a cache line that will be read soon: several streams at once are more than some prefetchers follow."""
    place = tirx.call_intrin("handle", "tirx.address_of", tirx.BufferLoad(buffer, [index]))
    hints = (tirx.const(number, "int32") for number in (0, 3, 1))  # to read, to keep in all caches, data
    code.statements.append(tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", place, *hints)))


def multiply_add(micro: MicroKernel, left: Value, right: Value, total: Value) -> Value:
    return accumulate(replace(micro, intrinsic="llvm.fma" if fused_multiply_add(micro) else ""), total, left, right)
