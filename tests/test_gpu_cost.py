"""Cost of kernels on NVIDIA GPUs: occupancy and waves by hand, tables that say where they are from."""

from __future__ import annotations

import pytest

from hwopt.plugins import find_target
from hwopt.target import Memory, Workload
from targets._gpu import EFFICIENCY, HIDING_WARPS, SHARED_BYTES, Gpu, Tile, table, tiles

GPUS = ("nvidia-t4", "nvidia-a100", "nvidia-h100", "nvidia-jetson-orin")
PEAK = {"float32": 1e12, "float16": 8e12, "int8": 16e12}
MEMORIES = (Memory("l2", 4 << 20, 1e15), Memory("dram", 1 << 34, 1e11))
CHIP = Gpu("sm_75", 40, PEAK, MEMORIES, launch_seconds=0.0)


def product(m: int, n: int, k: int, dtype: str = "float16", **more: int) -> Workload:
    return Workload("layer", "matmul", dtype, m=m, n=n, k=k, **more)


@pytest.mark.parametrize(
    ("tile", "arch", "blocks"),
    [
        (Tile(64, 64, 128, 64, 1024), "sm_75", 8),  # 1,024 threads; registers: 65536 / (4 x 2048) = 8
        (Tile(64, 64, 128, 128, 1024), "sm_75", 4),  # registers: 65536 / (4 x 4096)
        (Tile(64, 64, 128, 65, 1024), "sm_80", 7),  # 65 x 32 = 2080 are given as 2304: 65536 / 9216
        (Tile(64, 64, 128, 32, 20_000), "sm_75", 3),  # shared memory: 65536 / 20000
        (Tile(64, 64, 128, 32, 20_000), "sm_90", 11),
        (Tile(64, 64, 32, 16, 0), "sm_75", 16),  # no more than 16 blocks
        (Tile(64, 64, 512, 16, 0), "sm_87", 3),  # 1,536 threads
    ],
)
def test_an_sm_holds_as_many_blocks_as_threads_registers_and_memory_allow(tile: Tile, arch: str, blocks: int) -> None:
    assert tile.resident(arch) == blocks


def test_the_last_wave_costs_as_much_as_a_whole_one() -> None:
    tile = tiles("sm_75")["float16"]
    full = CHIP.products(product(tile.rows * 40, tile.columns, 512), "float16")  # one block on each SM
    assert CHIP.products(product(tile.rows * 7, tile.columns, 512), "float16") == full
    assert CHIP.products(product(tile.rows * 41, tile.columns, 512), "float16") >= 2 * full * CHIP.hidden(tile, 1)


def test_products_run_at_the_peak_times_what_tiles_reach() -> None:
    tile = tiles("sm_75")["float16"]
    work = product(tile.rows * 40, tile.columns, 512)
    want = 2 * work.macs / (PEAK["float16"] * EFFICIENCY["float16"] * CHIP.hidden(tile, 1))
    assert CHIP.products(work, "float16") == pytest.approx(want)
    assert CHIP.products(product(tile.rows * 40, tile.columns, 497), "float16") == pytest.approx(want)  # k in steps of 16
    assert CHIP.products(product(tile.rows * 40 - 1, tile.columns, 512), "float16") == pytest.approx(want)


def test_few_warps_do_not_hide_latencies() -> None:
    small = Tile(32, 32, 64, 16, 0)  # two warps a block
    assert CHIP.hidden(small, 1) == 2 / HIDING_WARPS
    assert CHIP.hidden(small, 3) == 6 / HIDING_WARPS
    assert CHIP.hidden(small, 100) == 1.0


def test_memory_and_launch_bound_what_is_small() -> None:
    moved = Workload("copy", "move", "float32", read_bytes=1 << 30)
    assert CHIP.estimate(moved, 1).seconds == pytest.approx((1 << 30) / 1e11)
    assert Gpu("sm_75", 40, PEAK, MEMORIES).estimate(product(1, 1, 1), 1).seconds > 3e-6


def test_depthwise_layers_take_no_tensor_cores() -> None:
    work = Workload("layer", "depthwise", "int8", m=10_000, n=1, k=9, groups=100)
    assert CHIP.products(work, "int8") == pytest.approx(2 * work.macs / 0.25e12)


@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_tables_are_from_a_compiled_kernel_that_fits_the_architecture(arch: str) -> None:
    found = table(arch)
    assert found["tool"].startswith("nvcc ")
    assert found["tvm"]
    for name, tile in tiles(arch).items():
        assert tile.shared_bytes <= SHARED_BYTES[arch], name
        assert 16 <= tile.registers <= 255
        assert tile.resident(arch) * tile.registers * tile.threads <= 65536


@pytest.mark.parametrize("name", GPUS)
def test_estimates_state_their_source_and_lie_between_the_peak_and_twice_the_estimate(name: str) -> None:
    target = find_target(name)
    work = product(3136, 512, 1152, "int8", read_bytes=1 << 20, weight_bytes=512 * 1152)
    cost = target.cost.estimate(work, 1)
    assert cost.source == "analytical"
    assert cost.low is not None
    assert 2 * work.macs / target.peak["int8"] <= cost.low <= cost.seconds
    assert cost.high == 2 * cost.seconds


def test_larger_chips_are_faster_where_there_is_work_for_them() -> None:
    work = product(50_176, 512, 1152, "float16", read_bytes=1 << 27)
    seconds = [find_target(name).cost.estimate(work, 1).seconds for name in ("nvidia-jetson-orin", "nvidia-a100", "nvidia-h100")]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > 2 * seconds[1]
