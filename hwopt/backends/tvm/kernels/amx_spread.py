"""Work of the vector units beside that of the matrix unit: rows of results, some with each chunk of products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hwopt.backends.tvm.kernels.code import Code, Value

ROWS_AT_ONCE = 4  # rows of results without a loop around them


@dataclass(frozen=True)
class Background:
    """Rows of results that wait for the epilogue: `row(code, index)` finishes one of `count`."""

    row: Callable[[Code, Value], None]
    count: int


class Spread:
    """Rows of the background over `iterations`, so that the last ones may have none."""

    def __init__(self, background: Background | None, iterations: int) -> None:
        self.background = background
        self.count = background.count if background else 0
        self.each = -(-self.count // iterations)

    def rows(self, iteration: Value) -> int:
        return max(0, min(self.each, self.count - iteration * self.each)) if self.count else 0

    def emit(self, code: Code, iteration: Value, rows: int) -> None:
        """`rows` of an iteration whose number may be known at run time only."""
        if not self.background:
            return
        row, first = self.background.row, iteration * self.each
        if rows > ROWS_AT_ONCE:
            code.loop("row", rows, lambda inner, index: row(inner, first + index))
            return
        for index in range(rows):
            row(code, first + index)
