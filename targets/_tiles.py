"""The cost model of a processor that may have a matrix unit (Intel AMX) beside its vector units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hwopt.target import Cost, CostModel, Memory, MicroKernel, Workload
from targets._cpu import operations_per_cycle
from targets._roofline import Roofline

ROWS = 16  # of a tile


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


def priced(
    kernels: Mapping[str, MicroKernel], memories: tuple[Memory, ...], hertz: float, joules_per_op: Mapping[str, float]
) -> CostModel:
    """The cost model for these micro-kernels: of the vector instructions, or, where there are tiles, of what is faster."""
    vectors = {dtype: kernel.others[-1] if is_tile(kernel) else kernel for dtype, kernel in kernels.items()}
    model = _roofline(vectors, memories, hertz, joules_per_op)
    return model if vectors == kernels else TilesOrVectors(_roofline(kernels, memories, hertz, joules_per_op), model)


def _roofline(
    kernels: Mapping[str, MicroKernel], memories: tuple[Memory, ...], hertz: float, joules_per_op: Mapping[str, float]
) -> Roofline:
    tiles = any(is_tile(kernel) for kernel in kernels.values())
    share = 0.55 if tiles else 0.7
    return Roofline(
        micros=kernels,
        peak={dtype: operations_per_cycle(kernel) * hertz for dtype, kernel in kernels.items()},
        elements_per_second=kernels["float32"].lanes * hertz / 4,  # an epilogue step: about four vector instructions
        memories=memories,
        granule={dtype: kernel.lanes for dtype, kernel in kernels.items()},
        depth={dtype: kernel.depth for dtype, kernel in kernels.items()},
        rows=ROWS if tiles else 1,
        efficiency={"conv": share, "matmul": share, "depthwise": 0.3},
        launch_seconds=0.5e-6,
        joules_per_op=joules_per_op,
    )
