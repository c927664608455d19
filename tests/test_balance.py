"""No core has much more to do than another, and a kernel is not cut into more pieces than that takes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hwopt.backends.tvm import kernels
from hwopt.backends.tvm.kernels.geometry import geometry
from hwopt.backends.tvm.kernels.spec import ConvSpec, MatmulSpec
from targets import _isa_x86
from tests.test_kernels import FLAGS

FLOAT = _isa_x86.microkernels(FLAGS["avx512-vnni"])["float32"]
SPECS: dict[str, ConvSpec | MatmulSpec] = {
    "128 rows of a transformer": MatmulSpec(1, 128, 1536, 384),
    "narrow matmul": MatmulSpec(1, 300, 48, 200),
    "14 rows of an image": ConvSpec(1, 14, 14, 256, 256, (3, 3), pads=(1, 1, 1, 1)),
    "large image": ConvSpec(1, 112, 112, 32, 64, (3, 3), pads=(1, 1, 1, 1)),
    "pointwise": ConvSpec(1, 7, 7, 320, 1280, (1, 1)),
    "batch": ConvSpec(3, 28, 28, 64, 64, (3, 3), pads=(1, 1, 1, 1)),
}


def loads(spec: ConvSpec | MatmulSpec, cores: int) -> np.ndarray:
    """The products of each core's tasks, as TVM counts them off."""
    shape, schedule = geometry(spec), kernels.default_schedule(spec, FLOAT, cores)
    tiles = -(-shape.vectors(FLOAT.lanes) // schedule.vectors)
    axes = [
        [min(block, size - start) for start in range(0, size, block)]
        for size, block in (
            (shape.rows, schedule.block_rows), (shape.columns, schedule.block_columns), (tiles, schedule.block_tiles),
        )
    ]  # fmt: skip
    work = [int(np.prod(task)) for _ in range(shape.images) for task in itertools.product(*axes)]
    assert len(work) == schedule.tasks(shape, shape.vectors(FLOAT.lanes)) and schedule.parallel
    share = -(-len(work) // cores)
    return np.array([sum(work[start : start + share]) for start in range(0, len(work), share)])


@pytest.mark.parametrize("cores", [2, 3, 4, 8])
@pytest.mark.parametrize("name", SPECS)
def test_the_busiest_core_has_little_more_than_its_share(name: str, cores: int) -> None:
    found = loads(SPECS[name], cores)
    assert found.max() <= 1.2 * found.sum() / cores


def test_two_cores_read_half_of_the_weights_each() -> None:
    found = kernels.default_schedule(SPECS["128 rows of a transformer"], FLOAT, 2)
    assert found.block_columns >= 128 and found.block_tiles * found.vectors * FLOAT.lanes == 768


@pytest.mark.parametrize(("height", "batch"), [(28, 1), (14, 1), (7, 1), (7, 4), (112, 3)])
def test_rows_of_depthwise_layers_are_shared_evenly(height: int, batch: int) -> None:
    spec = ConvSpec(batch, height, 32, 512, 512, (3, 3), pads=(1, 1, 1, 1), groups=512)
    found = kernels.default_schedule(spec, FLOAT, 2)
    tasks = batch * -(-height // found.block_rows)
    assert -(-tasks // 2) * found.block_rows <= -(-batch * height // 2) + 1
