"""How the work of one kernel is divided among cores: in blocks of output positions and of channel tiles.

Tasks are counted off in equal numbers, neighbours to one core. Few large blocks read data and weights least often; but 128
columns in blocks of 26 are three tasks for one of two cores and two for the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hwopt.backends.tvm.kernels.geometry import Geometry

TASKS = 8  # for each core, at most
BYTES_PER_CYCLE = 32  # from the second cache
ITEM = {"float32": 4, "bfloat16": 2}  # others have one byte


@dataclass(frozen=True)
class Work:
    """A kernel to divide: `cycles` of one core for all of it, `tile` rows or columns and `tiles` of channels, indivisible.

    `along` is what blocks of positions cut: rows, columns or "", where they stay whole; `most` is their largest size.
    """

    shape: Geometry
    cycles: float
    along: str
    tile: int
    most: int
    tiles: int

    @property
    def size(self) -> int:
        return {"rows": self.shape.rows, "columns": self.shape.columns}.get(self.along, self.shape.rows)


def divided(work: Work, cores: int) -> tuple[int, int]:
    """(positions along the axis in a block, channel tiles in a block), those with which the busiest core is done first."""
    return min(_options(work, cores), key=lambda option: _cycles(work, cores, *option))


def _options(work: Work, cores: int) -> Iterator[tuple[int, int]]:
    most = max(1, TASKS * cores // work.shape.images)
    positions = {work.most: -(-work.size // work.most)}
    if work.along:
        positions |= {_block(work, count): count for count in range(1, min(work.size, most) + 1)}
    for block in sorted(positions, reverse=True):
        blocks = -(-work.size // block)
        pieces = range(1, max(1, most // blocks) + 1) if work.shape.groups == 1 else (1,)
        for size in sorted({-(-work.tiles // count) for count in pieces if count <= work.tiles}, reverse=True):
            yield block, size


def _block(work: Work, count: int) -> int:
    share = -(-work.size // count)
    return min(work.most, -(-share // work.tile) * work.tile)


def _cycles(work: Work, cores: int, block: int, tiles: int) -> float:
    """Of the busiest core, with the bytes that it reads from the second cache."""
    shape = work.shape
    positions, pieces = _sizes(work.size, block), _sizes(work.tiles, tiles)
    tasks = len(positions) * len(pieces) * shape.images
    starts = np.arange(0, tasks, -(-tasks // cores))
    products = np.tile(np.outer(positions, pieces).ravel(), shape.images)
    load = np.add.reduceat(products, starts).max() / products.sum()
    data, weights = _bytes(work)
    read = np.tile(np.add.outer(data * positions / work.size, weights * pieces / work.tiles).ravel(), shape.images)
    return float(work.cycles * load + np.add.reduceat(read, starts).max() / BYTES_PER_CYCLE)


def _sizes(size: int, block: int) -> np.ndarray:
    return np.array([min(block, size - start) for start in range(0, size, block)], float)


def _bytes(work: Work) -> tuple[float, float]:
    """Data of one image, and weights; data that are copied between their borders are read, written and read again."""
    shape = work.shape
    data = shape.height * shape.width * shape.channels * ITEM.get(shape.data_dtype, 1)
    weights = shape.out_channels * shape.taps[0] * shape.taps[1] * shape.run * ITEM.get(shape.weight_dtype, 1)
    return (3.0 if shape.padded else 1.0) * data, (3.0 if shape.computed else 1.0) * weights
