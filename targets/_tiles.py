"""The cost model of a processor that has a matrix unit (Intel AMX) beside its vector units."""

from __future__ import annotations

from dataclasses import dataclass

from hwopt.target import Cost, MicroKernel, Workload
from targets._roofline import Roofline


def is_tile(kernel: MicroKernel) -> bool:
    """Whether a micro-kernel multiplies tiles."""
    return ".tdp" in kernel.intrinsic


@dataclass(frozen=True)
class TilesOrVectors:
    """Each kernel runs where it is faster, as the templates choose: whole tiles of 16 x 16 results and 64 bytes of depth
    (rounded up by `tiles`), or vectors. Depthwise kernels share no weights between channels, so they never fill a tile.
    """

    tiles: Roofline
    vectors: Roofline

    def estimate(self, workload: Workload, threads: int) -> Cost:
        """The cheaper of the two."""
        slow = self.vectors.estimate(workload, threads)
        if workload.kind == "depthwise":
            return slow
        return min(self.tiles.estimate(workload, threads), slow, key=lambda cost: cost.seconds)
