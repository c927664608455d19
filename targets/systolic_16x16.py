"""An ASIC-like edge accelerator: a Gemmini-like 16 x 16 weight-stationary array (Genc et al., DAC 2021)."""

from __future__ import annotations

from targets._systolic import Systolic, systolic_target

SCRATCHPAD = 256 * 1024  # Gemmini's default, shared by inputs and weights
ACCUMULATORS = 64 * 1024  # Gemmini's default
BUS = 16e9  # bytes a second: one 16-byte beat a cycle at 1 GHz, Gemmini's default system bus

TARGET = systolic_target(
    "systolic-16x16",
    "Gemmini-like 16 x 16 int8 systolic array at 1 GHz, 256 KiB scratchpad",
    Systolic(16, 16, 1e9, SCRATCHPAD // 2, SCRATCHPAD // 2, ACCUMULATORS, BUS),
    SCRATCHPAD,
    SCRATCHPAD,
    ("dram", 1 << 30),
    {"kind": "llvm", "mtriple": "riscv64-linux-gnu", "mcpu": "generic-rv64", "mattr": ["+m", "+a", "+f", "+d", "+c"]},
)
