"""Cost models of accelerators against a register-by-register simulation, SCALE-Sim's cycles, and sums done by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hwopt.plugins import find_target
from hwopt.target import Workload
from targets._energy import DRAM_JOULES_PER_BYTE, MAC_JOULES, SRAM, sram_joules_per_byte
from targets._npu import EXPOSED, BlockArray
from targets._systolic import DATAFLOWS, Systolic

BIG = 1 << 30


def product(m: int, n: int, k: int, groups: int = 1, **more: int) -> Workload:
    move = {"read_bytes": groups * m * k, "weight_bytes": groups * k * n, "write_bytes": groups * m * n}
    return Workload("layer", "matmul", "int8", m=m, n=n, k=k, groups=groups, **{**move, **more})


def array(rows: int = 4, columns: int = 8, dataflow: str = "ws", size: int = BIG, **more: object) -> Systolic:
    return Systolic(rows, columns, 1.0, size, size, size, 1e30, dataflow=dataflow, **more)  # type: ignore[arg-type]


def shifted(grid: np.ndarray, entering: np.ndarray, axis: int) -> np.ndarray:
    """Every register's value moves on by one cell; the edge takes what enters."""
    moved = np.roll(grid, 1, axis)
    moved[(slice(None), 0) if axis else 0] = entering
    return moved


def weight_stationary(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, int]:
    """left [m, rows] @ right [rows, columns], cell by cell and cycle by cycle: the result and the cycles it took."""
    (m, rows), columns = left.shape, right.shape[1]
    cycle, weights = 0, np.zeros((rows, columns), int)
    for row in reversed(right):  # loaded through the top edge, the last row first
        weights, cycle = shifted(weights, row, 0), cycle + 1
    data, sums, result, missing = np.zeros((rows, columns), int), np.zeros((rows, columns), int), np.zeros((m, columns), int), m
    start = cycle
    while missing:
        at = cycle - start
        entering = np.array([left[at - row, row] if 0 <= at - row < m else 0 for row in range(rows)])
        data = shifted(data, entering, 1)
        sums = shifted(sums, np.zeros(columns, int), 0) + data * weights
        cycle += 1
        for column in range(columns):
            index = at - (rows - 1) - column
            if 0 <= index < m:
                result[index, column] = sums[-1, column]
        missing -= 0 <= at - (rows - 1) - (columns - 1) < m
    return result, cycle


def output_stationary(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, int]:
    """left [rows, k] @ right [k, columns]; both enter skewed. Cycles up to the last multiplication."""
    (rows, k), columns = left.shape, right.shape[1]
    data, weights, sums = (np.zeros((rows, columns), int) for _ in range(3))
    cycle = 0
    while not np.array_equal(sums, left @ right):
        data = shifted(data, np.array([left[i, cycle - i] if 0 <= cycle - i < k else 0 for i in range(rows)]), 1)
        weights = shifted(weights, np.array([right[cycle - j, j] if 0 <= cycle - j < k else 0 for j in range(columns)]), 0)
        sums, cycle = sums + data * weights, cycle + 1
    return sums, cycle


@pytest.mark.parametrize(("m", "rows", "columns"), [(1, 1, 1), (5, 3, 2), (2, 4, 6), (9, 2, 5)])
def test_cycles_of_a_fold_are_those_of_an_array_built_of_registers(m: int, rows: int, columns: int) -> None:
    random = np.random.default_rng(m)
    left, right = random.integers(1, 9, (m, rows)), random.integers(1, 9, (rows, columns))
    result, cycles = weight_stationary(left, right)
    assert np.array_equal(result, left @ right)
    assert array(rows, columns).array_cycles(product(m, columns, rows)) == cycles
    assert array(rows, columns, "is").array_cycles(product(columns, m, rows)) == cycles
    left, right = random.integers(1, 9, (rows, m)), random.integers(1, 9, (m, columns))
    assert array(rows, columns, "os").array_cycles(product(rows, columns, m)) == output_stationary(left, right)[1]


def test_every_layer_takes_as_many_cycles_as_in_scale_sim_but_for_stalls() -> None:
    from benchmarks import fidelity, scale_sim

    known = scale_sim.stored()["cycles"]
    assert len(known) == len(
        {scale_sim.key(one, flow) for net in scale_sim.layers().values() for one in net for flow in DATAFLOWS}
    )
    for key, cycles in known.items():
        flow, m, n, k = key.split()
        ours = fidelity.array(flow).array_cycles(product(int(m), int(n), int(k)))
        assert ours == cycles["total"] - cycles["stalls"] + 1, key  # it counts from zero


def test_stalls_for_dram_and_the_ranking_of_dataflows_agree_with_scale_sim() -> None:
    from benchmarks.fidelity import systolic

    summary = systolic().summary
    assert summary["systolic_layers_within_10"] >= 0.9
    assert summary["systolic_rankings_agree"] >= 0.9
    assert summary["systolic_inside_interval"] >= 0.8


@pytest.mark.parametrize("flow", DATAFLOWS)
def test_what_fits_crosses_the_dram_port_once(flow: str) -> None:
    one = product(100, 50, 30)
    assert array(dataflow=flow).traffic(one).bytes == one.bytes


def test_what_does_not_fit_is_fetched_again_for_every_block() -> None:
    one = product(m=100, n=50, k=30)  # 7 blocks of n; inputs of 3,000 bytes
    small = dataclasses.replace(array(size=3000), output_bytes=BIG)
    assert (small.traffic(one).inputs, small.traffic(one).weights) == (7 * 3000, 1500)
    assert dataclasses.replace(small, double_buffered=False).traffic(one).inputs == 3000
    other = dataclasses.replace(array(dataflow="is", size=2000), output_bytes=BIG)
    assert other.traffic(one).weights == 13 * 1500  # 13 blocks of m
    os_small = array(dataflow="os", size=800).traffic(one)  # neither fits; blocks of both do: the cheaper side goes again
    assert (os_small.inputs, os_small.weights) == (7 * 3000, 1500)


def test_sums_that_do_not_fit_cut_the_stream_or_go_to_dram() -> None:
    one = product(m=64, n=8, k=8)  # two blocks of k; 8 columns of 4-byte sums
    fits, half = array(), dataclasses.replace(array(), output_bytes=2 * 4 * 8 * 32)
    assert half.array_cycles(one) - fits.array_cycles(one) == 2 * (2 * 4 + 8 - 2)  # each block is loaded once more
    spill = dataclasses.replace(fits, partial_sums="spill")
    assert spill.traffic(one).outputs - fits.traffic(one).outputs == 2 * 4 * 64 * 8
    assert half.array_cycles(product(m=64, n=8, k=4)) == fits.array_cycles(product(m=64, n=8, k=4))  # one block: no sums wait


def test_double_buffers_hide_the_shorter_of_compute_and_transfer() -> None:
    one = product(m=100, n=8, k=4)
    slow = dataclasses.replace(array(), dram_bytes_per_second=4.0)
    compute, transfer, fill = 100 + 14, one.bytes / 4, 2 * 32 / 4
    assert slow.cycles(one) == max(compute, transfer) + fill
    assert dataclasses.replace(slow, double_buffered=False).cycles(one) == compute + transfer + fill


def test_the_interval_reaches_from_all_hidden_and_once_to_nothing_hidden() -> None:
    one = product(m=100, n=50, k=30)
    model = dataclasses.replace(array(size=3000), output_bytes=BIG, dram_bytes_per_second=20.0, margin=0.0)
    compute, moved = model.array_cycles(one), model.traffic(one).bytes / 20
    assert moved > one.bytes / 20
    assert model.interval(one) == (max(compute, one.bytes / 20), compute + moved + 2 * 32 / 20)


def test_energy_is_the_sum_of_what_is_touched() -> None:
    one, model = product(m=10, n=8, k=4), array(size=32 << 10)
    touched = 10 * 4 + 8 * 4 + 4 * 10 * 8  # inputs once, weights once, sums of 4 bytes written once
    want = 10 * 8 * 4 * MAC_JOULES + touched * 2.5e-12 + one.bytes * DRAM_JOULES_PER_BYTE
    assert model.joules(one) == pytest.approx(want)
    assert all(sram_joules_per_byte(size) == pytest.approx(joules) for size, joules in SRAM)
    assert SRAM[0][1] < sram_joules_per_byte(16 << 10) < SRAM[1][1] < sram_joules_per_byte(256 << 10) < SRAM[2][1]


def test_depthwise_layers_run_where_they_are_faster() -> None:
    channels = dataclasses.replace(product(m=100, n=1, k=9, groups=64), kind="depthwise")
    assert array().product_cycles(channels) == 64 / 8 * 100 * 9  # 8 lanes
    narrow = dataclasses.replace(array(16, 16), vector_lanes=1)
    assert narrow.product_cycles(channels) == narrow.array_cycles(channels)


def test_every_estimate_states_its_source_and_an_interval() -> None:
    for name in ("systolic-16x16", "systolic-64x64", "systolic-128x128", "ethos-u55", "ethos-u65"):
        cost = find_target(name).cost.estimate(product(196, 256, 512), 1)
        assert cost.source == "analytical"
        assert cost.low is not None and cost.high is not None
        assert cost.low < cost.seconds < cost.high
        assert cost.joules > 0


def test_larger_arrays_are_faster_on_large_layers_but_waste_more_on_small_ones() -> None:
    models = [find_target(name).cost for name in ("systolic-16x16", "systolic-64x64", "systolic-128x128")]
    large, small = product(3136, 256, 1152), product(16, 16, 16)
    assert sorted(models, key=lambda one: -one.estimate(large, 1).seconds) == models
    share = [one.array_cycles(small) * one.rows * one.columns / small.macs for one in models if isinstance(one, Systolic)]
    assert share == sorted(share)


def test_npu_multiplies_a_block_a_cycle_and_waits_for_its_slowest_memory() -> None:
    npu = BlockArray(
        4, 8, 8, hertz=1.0, sram_bytes=1 << 20, sram_bytes_per_second=8.0, weight_bytes_per_second=1.0, launch_cycles=0
    )
    assert npu.product_cycles(product(8, 16, 32)) == 2 * 2 * 4
    assert npu.product_cycles(product(9, 17, 33)) == 3 * 3 * 8  # 32 input channels at a time
    assert npu.product_cycles(product(8, 16, 27, taps=9)) == 2 * 2 * 12  # four taps at a time
    assert npu.product_cycles(dataclasses.replace(product(8, 1, 9, groups=16), kind="depthwise")) == 2 * 2 * 4 * 3
    weights = npu.estimate(product(8, 16, 32), 1).seconds
    others = 2 * 2 * 4 + 8 * 16 / 4 + (8 * 32 + 8 * 16) / 8
    assert weights == pytest.approx(16 * 32 + EXPOSED * others)  # a byte a cycle, longer than products, results, activations
    assert npu.estimate(product(8, 16, 32, weight_bytes=0), 1).seconds == pytest.approx(48 + EXPOSED * (16 + 32))


def test_npu_cycles_are_near_those_of_the_makers_compiler() -> None:
    from benchmarks.fidelity import npu

    summary = npu().summary
    assert summary["npu_layers_within_25"] >= 0.5
    assert all(0.75 < summary[f"npu_{target}_median_ratio"] < 1.25 for target in ("ethos-u55", "ethos-u65"))
