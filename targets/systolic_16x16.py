"""An ASIC-like edge accelerator: a Gemmini-like 16 x 16 weight-stationary array (Genc et al., DAC 2021)."""

from __future__ import annotations

from hwopt.target import Memory, Target
from targets._energy import DRAM_JOULES_PER_BYTE, sram_joules_per_byte
from targets._systolic import Systolic

HERTZ = 1e9
SIDE = 16
SCRATCHPAD = 256 * 1024  # Gemmini's default, shared by inputs and weights
ACCUMULATORS = 64 * 1024  # Gemmini's default
DRAM_BYTES_PER_SECOND = 16e9  # one 16-byte beat a cycle at 1 GHz, Gemmini's default system bus
COST = Systolic(SIDE, SIDE, HERTZ, SCRATCHPAD // 2, SCRATCHPAD // 2, ACCUMULATORS, DRAM_BYTES_PER_SECOND)

TARGET = Target(
    name="systolic-16x16",
    summary="Gemmini-like 16 x 16 int8 systolic array at 1 GHz, 256 KiB scratchpad",
    kind="asic",
    cores=1,
    peak={"int8": 2 * SIDE * SIDE * HERTZ, "float32": 2 * SIDE * SIDE * HERTZ / 16},
    memories=(
        Memory("scratchpad", SCRATCHPAD, 2 * SIDE * HERTZ, sram_joules_per_byte(SCRATCHPAD)),
        Memory("dram", 1 << 30, DRAM_BYTES_PER_SECOND, DRAM_JOULES_PER_BYTE),
    ),
    granule={"int8": SIDE, "float32": SIDE},
    cost=COST,
    tvm={"kind": "llvm", "mtriple": "riscv64-linux-gnu", "mcpu": "generic-rv64", "mattr": ["+m", "+a", "+f", "+d", "+c"]},
    array=COST.array(),  # artifacts run on the host, with a model of the array in C
)
