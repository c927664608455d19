"""The tile that the templates' schedule chooses, found for all tiles at once: planning asks for thousands of kernels."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from hwopt.target import MicroKernel

LATENCY = 8  # as in kernels/schedule.py, whose `cycles` this is for arrays


@functools.lru_cache(maxsize=4096)
def best_tile(
    rows: int, columns: int, vectors: int, steps: int, registers: int, group: int, words: int
) -> tuple[float, tuple[int, int, int]]:
    """Cycles of an image and group, and (rows, columns, vectors) of the tile; `group` positions are computed at once, of `words`
    words in a step.
    """
    tall, wide, deep = _tiles(min(rows, 8), min(columns, 30), min(vectors, 12), registers, group, words)
    total = np.zeros(len(tall))
    for height, ys in _cuts(rows, tall):
        for width, xs in _cuts(columns, wide):
            positions = -(-(height * width) // group) * group
            for depth, vs in _cuts(vectors, deep):
                issue = issued(positions, depth, group, words)
                each = steps * (issue + 0.5) + 2.0 * positions * depth + 12
                total += ys * xs * vs * each * (height > 0) * (width > 0) * (depth > 0)
    best = int(total.argmin())
    return float(total[best]), (int(tall[best]), int(wide[best]), int(deep[best]))


@functools.cache
def _tiles(
    rows: int, columns: int, vectors: int, registers: int, group: int, words: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tiles whose accumulators and operands fit the registers, in the templates' order."""
    deep, wide, tall = (one.ravel() for one in np.meshgrid(
        np.arange(1, vectors + 1), np.arange(1, columns + 1), np.arange(1, rows + 1), indexing="ij"
    ))  # fmt: skip
    fits = (-(-(tall * wide) // group) * group) * deep + words * (group * deep + 1) <= registers
    return tall[fits], wide[fits], deep[fits]


def issued(positions: Any, vectors: Any, group: int, words: int) -> Any:
    """Cycles of a step, of numbers or arrays."""
    loads = positions + group * vectors
    if words > 1:
        return np.maximum((2 * words + 1) * positions * vectors + words * loads, 4 * LATENCY) / 4
    return np.maximum(np.maximum(positions * vectors, loads), LATENCY) / 2


def unrolled(accumulators: int, words: int) -> int:
    """How many steps a loop's turn has, as in kernels/schedule.py."""
    return next(count for count in (4, 2, 1) if accumulators * count <= 32 // words or count == 1)


def _cuts(size: int, tile: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tile size, how many) of whole tiles and the rest."""
    return [(tile, size // tile), (size % tile, np.ones_like(tile))]


def cuts(size: int, tile: int) -> list[tuple[int, int]]:
    """The same for one tile, as in kernels/schedule.py."""
    return [(width, count) for width, count in ((tile, size // tile), (size % tile, 1)) if width and count]


def tile_of(rows: int, columns: int, channels: int, steps: int, micro: MicroKernel) -> tuple[float, tuple[int, int, int]]:
    """The same for a micro-kernel and output channels of a group."""
    return best_tile(rows, columns, -(-channels // micro.lanes), steps, micro.registers, micro.rows, max(1, micro.narrow))
