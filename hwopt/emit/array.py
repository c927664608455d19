"""The C model of a target's array that runs on the host in its place: the source with the target's figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hwopt.target import Array

SOURCE = Path(__file__).with_name("hwopt_array.c")
FUNCTIONS = tuple(f"hwopt_array_{what}" for what in ("begin", "load", "compute", "store", "end"))  # what kernels call
FIELDS = ("kernels", "macs", "array_cycles", "stall_cycles", "other_cycles", "dram_bytes")  # of hwopt_simulation, then joules

_TYPES = """
typedef struct {
  uint64_t m, n, k, groups, parts, input_bytes, weight_bytes, output_bytes;
} hwopt_array_shape;

/* Counted since the start, or since the last call with `restart`. `other_cycles`: launches, first blocks, epilogues. */
typedef struct {
  uint64_t kernels, macs, array_cycles, stall_cycles, other_cycles, dram_bytes;
  double joules;
} hwopt_simulation;

int32_t hwopt_array_begin(int64_t m, int64_t n, int64_t k, int64_t groups, int64_t parts, int64_t inputs, int64_t outputs,
                          int64_t steps);
int32_t hwopt_array_load(const int8_t *weights, int32_t rows);
int32_t hwopt_array_compute(int32_t *sums, const int8_t *data, int64_t stride, int64_t positions);
int32_t hwopt_array_store(void);
int32_t hwopt_array_end(void);
"""


def array_sources(array: Array, name: str) -> Mapping[str, str]:
    """hwopt_array.c and its header for a model called `name`, which gets a function `<name>_simulated`."""
    return {"hwopt_array.c": SOURCE.read_text(), "hwopt_array.h": _header(array, name)}


def simulated(name: str) -> str:
    """The function that tells what was counted."""
    return f"{name}_simulated"


def _header(array: Array, name: str) -> str:
    half = 2 if array.double_buffered else 1
    values = {
        "ROWS": array.rows, "COLUMNS": array.columns, "LANES": array.vector_lanes, "LAUNCH_CYCLES": array.launch_cycles,
        "INPUT_BYTES": array.input_bytes // half, "WEIGHT_BYTES": array.weight_bytes // half,
        "DOUBLE_BUFFERED": int(array.double_buffered), "DRAM_BYTES_PER_CYCLE": repr(array.dram_bytes_per_cycle),
        "MAC_JOULES": repr(array.mac_joules), "INPUT_JOULES": repr(array.input_joules_per_byte),
        "WEIGHT_JOULES": repr(array.weight_joules_per_byte), "OUTPUT_JOULES": repr(array.output_joules_per_byte),
        "DRAM_JOULES": repr(array.dram_joules_per_byte), "SIMULATED": simulated(name),
    }  # fmt: skip
    figures = "".join(f"#define HWOPT_ARRAY_{key} {value}\n" for key, value in values.items())
    declared = f"void {simulated(name)}(hwopt_simulation *found, int restart);\n"
    return f"#ifndef HWOPT_ARRAY_H\n#define HWOPT_ARRAY_H\n#include <stdint.h>\n{figures}{_TYPES}{declared}#endif\n"
