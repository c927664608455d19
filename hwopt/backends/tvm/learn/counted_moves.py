"""Counts of kernels that only move data: runs that are copied, squares that are turned, elements that are gathered one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from hwopt.backends.tvm.learn.counted import FIRST, LINE, SECOND, Numbers, share
from hwopt.target import Workload

SQUARE, LEAST = 16, 8  # sides as in kernels/transpose.py
PAGE = 4096


@dataclass(frozen=True)
class Move:
    """The loops over the result as it lies in memory, and what the innermost one reads."""

    work: Workload

    @cached_property
    def op(self) -> str:
        return self.work.steps[0].partition(" ")[0] if self.work.steps else ""

    @cached_property
    def words(self) -> list[str]:
        return self.work.order.split()

    @cached_property
    def view(self) -> bool:
        return "view" in self.words

    @cached_property
    def part(self) -> int:
        """Every part of a Concat is a multiple of so many along its axis; 0 for all others."""
        return int(self.words[self.words.index("of") + 1]) if "of" in self.words else 0

    @cached_property
    def lying(self) -> tuple[str, str]:
        """How the source lies and how the result does."""
        named = [one for one in self.words if one in ("first", "last")] or ["first"]
        behind = "first" if self.op == "Transpose" and len(named) == 1 else named[-1]
        return named[0], behind

    @cached_property
    def size(self) -> int:
        """Bytes of an element."""
        dtype = self.work.dtype
        return {"float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "float64": 8}.get(dtype, 1)

    @cached_property
    def axes(self) -> tuple[tuple[int, int], ...]:
        """(extent, place in the source's memory) of the result's axes as they lie, without those of one element."""
        dims = self.work.dims or (1,)
        rank, detail = len(dims), self.work.steps[0].partition(" ")[2]
        order = [int(one) for one in detail.split(",")] if self.op == "Transpose" and detail else list(range(rank))
        source, result = (_laid(rank, how) for how in self.lying)
        places = {axis: place for place, axis in enumerate(source)}
        return tuple((dims[axis], places[order[axis]]) for axis in result if dims[axis] != 1)

    @cached_property
    def stride(self) -> int:
        """Elements between neighbours of the result where they come from."""
        inner = self.axes[-1][1] if self.axes else 0
        return math.prod(extent for extent, place in self.axes if place > inner)

    @cached_property
    def run(self) -> int:
        """Extent of the innermost loop."""
        return self.axes[-1][0] if self.axes else 1

    @cached_property
    def turned(self) -> tuple[int, int, int]:
        """(count, rows, columns) of matrices; zeros where the kernel is none of the template's."""
        places = [place for _, place in self.axes]
        kept = sorted(places)
        head = next((at for at, (one, other) in enumerate(zip(places, kept, strict=True)) if one != other), len(places))
        tail, rest = places[head:], kept[head:]
        cut = tail.index(rest[0]) if tail else 0
        alike = bool(tail) and tail == rest[len(rest) - cut :] + rest[: len(rest) - cut]
        twice = self.lying == ("last", "last")  # two transpositions that TVM puts into one loop
        if self.op != "Transpose" or self.view or twice or not alike or len(self.work.steps) > 1:
            return 0, 0, 0
        extents = [extent for extent, _ in self.axes]
        count, columns, rows = (math.prod(part) for part in (extents[:head], extents[head : head + cut], extents[head + cut :]))
        return (count, rows, columns) if min(rows, columns) >= LEAST else (0, 0, 0)


def _laid(rank: int, how: str) -> Sequence[int]:
    """The axes as they lie; of an image whose channels are split in groups both axes of them are last."""
    if how == "last" and rank == 5:
        return [0, 3, 4, 1, 2]
    return [0, *range(2, rank), 1] if how == "last" and rank > 2 else range(rank)


def turned_times(work: Workload) -> Numbers:
    """Squares of registers: the lines that they read and write, and of those the ones that lie in other pages."""
    move = Move(work)
    count, rows, columns = move.turned
    down, across = -(-rows // SQUARE), -(-columns // SQUARE)
    squares = float(count * down * across)
    far = float(columns * move.size * SQUARE > PAGE)
    away = float(rows * move.size * SQUARE > PAGE)
    total = work.read_bytes + work.write_bytes
    uneven = bool(rows & 7 or columns & 7) if move.size > 1 else bool(rows & 15 or columns & 15)
    small = min(rows, columns) < SQUARE
    return {
        "squares": squares, "small": squares * small, "uneven": squares * uneven, "bands": float(count * across),
        "far": squares * far * SQUARE, "away": squares * away * SQUARE,
        "power": squares * SQUARE * float(math.gcd(rows * move.size, PAGE) >= 512),
        "power_read": squares * SQUARE * float(math.gcd(columns * move.size, PAGE) >= 512),
        "through_second": total / LINE * share(total, FIRST), "through_third": total / LINE * share(total, SECOND),
        "lines": total / LINE, "wide": squares * (move.size > 2), "bytes": squares * (move.size == 1), "call": 100.0,
    }  # fmt: skip


def turned_shape(work: Workload) -> Numbers:
    move = Move(work)
    count, rows, columns = move.turned
    return {
        "rows": rows, "columns": columns, "count": count, "size": move.size, "rows_power": math.gcd(rows, 64),
        "columns_power": math.gcd(columns, 64), "rows_left": rows % SQUARE, "columns_left": columns % SQUARE,
        "log_bytes": math.log(max(1, work.bytes)), "row_bytes": rows * move.size, "column_bytes": columns * move.size,
    }  # fmt: skip


def gathered_times(work: Workload) -> Numbers:
    """Of kernels that TVM emits: results in runs, and those that are gathered one by one, by how far they lie apart."""
    move = Move(work)
    results = float(math.prod(work.dims or (1,)))
    apart = move.stride * move.size
    strided = float(move.stride > 1)
    crossing = bool(move.part and move.run % SQUARE == 0 and move.part % SQUARE)
    return {
        "run_vectors": results / SQUARE * (not strided) * (move.run >= SQUARE), "crossing": results * crossing,
        "short_runs": results / max(1, move.run) * (not strided), "viewed": results * move.view * strided,
        "strided": results * strided, "strided_lines": results * strided * (apart >= LINE),
        "strided_pages": results * strided * (apart * SQUARE >= 1 << 15),
        "strided_power": results * strided * (math.gcd(apart, PAGE) >= 1024),
    }  # fmt: skip


def gathered_shape(work: Workload) -> Numbers:
    move = Move(work)
    return {
        "gather_stride": move.stride * move.size, "gather_power": math.gcd(move.stride * move.size, PAGE), "run": move.run,
        "run_left": move.run % SQUARE, "view": move.view, "part": move.part, "part_left": move.part % SQUARE,
        "from_last": move.lying[0] == "last", "to_last": move.lying[1] == "last", "strided": move.stride > 1,
        "quarter_left": move.run // 4 % SQUARE, "size": move.size,
    }  # fmt: skip
