"""How tiles of a matrix unit (Intel AMX) lie over channels-last data: which 16 output positions one tile takes, and from where.

A tile's rows are output positions at one distance in memory, `step` elements. Rows of an image are joined by counting positions
through from one output row to the next, `pitch` positions apart, so that a tile may begin in one row and end in the next:

    pointwise, matmul    all positions follow each other: pitch = columns
    no padding           read where the data lie: pitch = input width
    otherwise            read from a padded copy in workspace ("staged"), whose rows are pitch x stride pixels long; the padding
                         right of a row is at the same time the one left of the next

Positions from `columns` on in each row are computed and thrown away. A stride downwards is undone by the copy: input rows
y, y + stride, y + 2 x stride ... follow each other in one of `stride` planes.

Along a tap's run, tiles take `depth` elements at a time. The last one of a run that is no multiple begins earlier, so that it
ends with the run; its weights for what was multiplied before are zero. A shorter run has one tile of its own width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hwopt.backends.tvm.kernels.geometry import Geometry
from hwopt.target import MicroKernel

WORD = 4  # bytes that one lane of a tile product takes at a time
SIZES = {"uint8": 1, "int8": 1, "bfloat16": 2}  # bytes of what tiles hold


@dataclass(frozen=True)
class Run:
    """One tap's neighbouring elements as tiles of `width` elements: `count` of them, the last one beginning at `last`."""

    count: int
    width: int
    last: int
    over: int  # elements behind the run that the tile reads

    def start(self, chunk: int) -> int:
        return self.last if chunk == self.count - 1 else chunk * self.width


def run_of(shape: Geometry, micro: MicroKernel) -> Run:
    """Whole tiles, or one as wide as the run, rounded up to words."""
    count = -(-shape.run // micro.depth)
    if count > 1 or shape.run == micro.depth:
        return Run(count, micro.depth, shape.run - micro.depth, 0)
    word = WORD // SIZES[micro.dtype]
    width = -(-shape.run // word) * word
    return Run(1, width, 0, width - shape.run)


@dataclass(frozen=True)
class Layout:
    """Positions in memory; all sizes in elements of the data, `pitch` in positions."""

    run: Run
    staged: bool
    pitch: int
    step: int  # from one position to the next
    left: int  # pixels of padding in front of a row
    used: int  # input columns that are read
    shared: int  # pixels behind a row's end that are the beginning of the next row

    def positions(self, shape: Geometry, rows: int) -> int:
        """Positions from the first to the last one of `rows` output rows, those between the rows included."""
        return (rows - 1) * self.pitch + shape.columns

    def input_rows(self, shape: Geometry, rows: int) -> int:
        return (rows - 1) * shape.strides[0] + (shape.taps[0] - 1) * shape.dilations[0] + 1

    def plane(self, shape: Geometry, rows: int) -> int:
        """Elements of one plane of the staged data of `rows` output rows, with what is read behind its end."""
        lines = -(-self.input_rows(shape, rows) // shape.strides[0])
        tail = self.shared * shape.channels + self.run.over
        return -(-(lines * self.pitch * self.step + tail) // 64) * 64

    def space(self, shape: Geometry, rows: int, tile: int) -> int:
        """Elements of all planes; the last tile of `tile` positions reads beyond them."""
        return shape.strides[0] * self.plane(shape, rows) + tile * self.step + 64

    def tap(self, shape: Geometry, rows: int, down: int, across: int) -> int:
        """What is added to a position's first element for one tap."""
        sideways = across * shape.dilations[1] * shape.channels
        if not self.staged:
            return down * shape.dilations[0] * shape.width * shape.channels + sideways
        plane, line = down * shape.dilations[0] % shape.strides[0], down * shape.dilations[0] // shape.strides[0]
        return plane * self.plane(shape, rows) + line * self.pitch * self.step + sideways


def layout_of(shape: Geometry, micro: MicroKernel) -> Layout:
    """The layout of a kernel, staged where reading in place is impossible or would waste a quarter of the products."""
    run, stride = run_of(shape, micro), shape.strides[1]
    span = shape.run // shape.channels if shape.groups == 1 else 1  # a joined tap is a kernel row wide
    needed = (shape.columns - 1) * stride + (shape.taps[1] - 1) * shape.dilations[1] + span
    left = min(shape.pads[1], needed)
    used = min(shape.width, needed - left)
    right = needed - left - used
    step = stride * shape.channels
    if not shape.padded and not run.over:
        if shape.rows == 1:
            return Layout(run, False, shape.columns, step, 0, used, 0)
        if shape.strides[0] == 1 and shape.width % stride == 0 and shape.width // stride <= 1.25 * shape.columns:
            return Layout(run, False, shape.width // stride, step, 0, used, 0)
    pitch = max(shape.columns, -(-(needed - min(left, right)) // stride))
    return Layout(run, True, pitch, step, left, used, max(0, needed - pitch * stride))


def pack(shape: Geometry, weights: np.ndarray, micro: MicroKernel) -> np.ndarray:
    """[groups, n, taps..., run] -> [groups, vectors, taps, chunks, width / word, lanes, word]: rows of 64 bytes, 16 to a tile."""
    run, taps, word = run_of(shape, micro), shape.taps[0] * shape.taps[1], WORD // SIZES[micro.dtype]
    vectors = shape.vectors(micro.lanes)
    full = np.zeros((shape.groups, vectors * micro.lanes, taps, run.count, run.width), weights.dtype)
    given = weights.reshape(shape.groups, shape.n, taps, shape.run)
    for chunk in range(run.count):
        piece = given[..., chunk * run.width : (chunk + 1) * run.width]
        skip = chunk * run.width - run.start(chunk)
        full[:, : shape.n, :, chunk, skip : skip + piece.shape[-1]] = piece
    split = full.reshape(shape.groups, vectors, micro.lanes, taps, run.count, run.width // word, word)
    return np.ascontiguousarray(split.transpose(0, 1, 3, 4, 5, 2, 6)).reshape(-1)


def packed_size(shape: Geometry, micro: MicroKernel) -> int:
    """Elements of the packed weights."""
    run = run_of(shape, micro)
    return shape.groups * shape.vectors(micro.lanes) * shape.taps[0] * shape.taps[1] * run.count * run.width * micro.lanes
