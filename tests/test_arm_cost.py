"""Cost of kernels on Arm cores: sums by hand, tables that say where they are from, and loops cut out of assembly."""

from __future__ import annotations

import pytest

from benchmarks.arm_tables import Loop, inner_loops, products
from hwopt.plugins import find_target
from hwopt.target import Memory, Workload
from targets._arm import EDGES, FACTOR, ArmCore, table
from targets._arm import Loop as Rate

CORES = ("cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1", "neoverse-v1")
MEMORIES = (Memory("l1", 1000, 100.0), Memory("l2", 10_000, 10.0), Memory("dram", 10**9, 3.0))
RATES = {f"{dtype} {kind}": Rate(2.0, 4, 8) for dtype in ("float32", "int8") for kind in ("conv", "depthwise")}
CORE = ArmCore(10.0, MEMORIES, RATES, {"float32": 4, "int8": 4}, 2.0, 1.0, launch_seconds=0.0)


def conv(m: int, n: int, k: int, dtype: str = "float32", **more: int) -> Workload:
    return Workload("layer", "conv", dtype, m=m, n=n, k=k, **more)


def test_products_take_the_cycles_of_the_inner_loop_over_whole_vectors() -> None:
    cycles = 6 * 8 * 5 / 2.0  # channels padded from 7 to 8
    assert CORE.estimate(conv(6, 7, 5), 1).seconds == pytest.approx(cycles / 10 / (1 - EDGES))
    assert CORE.estimate(conv(6, 7, 5), 3).seconds == pytest.approx(cycles / 10 / (1 - EDGES) / 3)
    depthwise = Workload("layer", "depthwise", "int8", m=6, n=1, k=9, groups=7)
    assert CORE.estimate(depthwise, 1).seconds == pytest.approx(6 * 8 * 9 / 2.0 / 10 / (1 - EDGES))


def test_memory_is_drawn_from_the_nearest_level_that_holds_the_kernel() -> None:
    for size, bandwidth in ((900, 100.0), (9000, 10.0), (90_000, 2.0)):  # one core draws no more than 2 of what it shares
        assert CORE.estimate(conv(1, 1, 1, read_bytes=size), 1).seconds == pytest.approx(size / bandwidth)
    assert CORE.estimate(conv(1, 1, 1, read_bytes=90_000), 4).seconds == pytest.approx(90_000 / 3.0)
    assert CORE.estimate(conv(1, 1, 1, read_bytes=9000), 4).seconds == pytest.approx(9000 / 40.0)


def test_weights_that_overflow_the_first_level_are_read_again_for_every_tile() -> None:
    fits, over = conv(400, 8, 15), conv(400, 8, 16)  # a panel of 15 or 16 x 8 floats against 500 bytes
    assert CORE.estimate(fits, 1).seconds == pytest.approx(fits.macs / 20 / (1 - EDGES))
    assert CORE.estimate(over, 1).seconds == pytest.approx(over.macs / 4 * 4 / 10.0)  # every 4 positions, 4 bytes, second level


@pytest.mark.parametrize("name", CORES)
def test_tables_say_where_they_are_from_and_estimates_have_an_interval(name: str) -> None:
    found, cost = table(name), find_target(name).cost
    assert found["tool"].startswith("llvm-mca ")
    assert found["tvm"]
    assert isinstance(cost, ArmCore)
    priced = cost.estimate(conv(196, 256, 1152, read_bytes=200_704), 1)
    assert priced.source == "analytical"
    assert (priced.low, priced.high) == (priced.seconds / FACTOR, priced.seconds * FACTOR)


@pytest.mark.parametrize("name", CORES)
def test_inner_loops_stay_below_what_the_core_can_issue(name: str) -> None:
    """Vector units by Arm's optimization guides: one on A53 and A72, two on A76 and N1, four on V1."""
    units = {"cortex-a53": 1, "cortex-a72": 1, "cortex-a76": 2, "neoverse-n1": 2, "neoverse-v1": 4}[name]
    widest = {"neoverse-v1": 32, "neoverse-n1": 16, "cortex-a76": 16}.get(name, 8)
    for key, loop in table(name)["loops"].items():
        most = units * (4 if key.startswith("float32") else widest)
        assert 0.1 * most * (0.1 if "depthwise" in key else 1) < loop["macs"] / loop["cycles"] <= most, key


def test_newer_cores_are_faster_and_int8_is_where_there_are_dot_products() -> None:
    def seconds(name: str, dtype: str) -> float:
        return find_target(name).cost.estimate(conv(196, 256, 1152, dtype), 1).seconds

    assert [seconds(name, "float32") for name in ("cortex-a53", "cortex-a72", "cortex-a76", "neoverse-v1")] == sorted(
        (seconds(name, "float32") for name in ("cortex-a53", "cortex-a72", "cortex-a76", "neoverse-v1")), reverse=True
    )
    assert seconds("cortex-a76", "int8") < 0.5 * seconds("cortex-a76", "float32")
    assert seconds("neoverse-v1", "int8") < 0.25 * seconds("neoverse-v1", "float32")


def test_the_busiest_innermost_loop_is_found_in_assembly() -> None:
    text = """
kernel:
    mov x0, #1
.LBB0_1:                                // =>This Loop Header: Depth=1
    mov x1, #2
.LBB0_2:                                //   Parent Loop BB0_1 Depth=1
    .loc 1 2
    ldr q0, [x1]
    fmla v1.4s, v0.4s, v2.s[0]
    fmla v3.4s, v0.4s, v2.s[1]
    b.ne .LBB0_2
    cbnz x0, .LBB0_1
.LBB0_3:
    sdot v1.4s, v0.16b, v2.16b
    cbnz x2, .LBB0_3
"""
    first, second = inner_loops(text)
    assert first == Loop(("ldr q0, [x1]", "fmla v1.4s, v0.4s, v2.s[0]", "fmla v3.4s, v0.4s, v2.s[1]", "b.ne .LBB0_2"))
    assert (products(first), products(second)) == (8, 16)


def test_predictions_are_held_against_published_times() -> None:
    from benchmarks.fidelity import arm

    part = arm()
    assert len(part.rows) == 42
    assert {row.case.split(",")[0] for row in part.rows} == {
        "Raspberry Pi 3 Model B+",
        "Raspberry Pi 4 Model B",
        "Raspberry Pi 5",
    }
    assert 0.5 < part.summary["arm_f32_median_ratio_to_ncnn"] < 2
    assert 0.5 < part.summary["arm_int8_median_ratio_to_ncnn"] < 2
