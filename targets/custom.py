"""Kinds of TOML files that describe hardware of the user's own (`--target my_npu.toml`): systolic, npu, gpu and cpu.

The fields of each class are the keys of the file; see hwopt.target_file for how they are checked.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hwopt.backends.tvm.learn.model import Learned
from hwopt.emit.cpu import host_machine
from hwopt.errors import UsageError, did_you_mean
from hwopt.target import Memory, Target
from targets import _isa_arm, _isa_arm32, _isa_riscv, _isa_x86
from targets._cpu import cpu_features, needed_features
from targets._cpuinfo import WORDS
from targets._energy import DRAM_JOULES_PER_BYTE, sram_joules_per_byte
from targets._gpu import Gpu
from targets._npu import BlockArray
from targets._roofline import Roofline
from targets._systolic import Systolic

MACHINES: dict[str, Any] = {"x86_64": _isa_x86, "aarch64": _isa_arm, "arm": _isa_arm32, "riscv": _isa_riscv}
ALIKE = 0.8  # of difflib: a word as like a known one as that is misspelt, others are a newer processor's
CONTROLLER = {"kind": "llvm", "mtriple": "riscv64-linux-gnu", "mcpu": "generic-rv64", "mattr": ["+m", "+a", "+f", "+d", "+c"]}


def _memories(near: int, near_rate: float, far: int, far_rate: float) -> tuple[Memory, ...]:
    return (
        Memory("scratchpad", near, near_rate, sram_joules_per_byte(near)),
        Memory("dram", max(near, far), far_rate, DRAM_JOULES_PER_BYTE),
    )


@dataclass(frozen=True)
class SystolicFile:
    """A systolic array of `rows` x `columns`; three scratchpads."""

    rows: int
    columns: int
    clock_hz: float
    input_bytes: int
    weight_bytes: int
    output_bytes: int
    dram_bytes_per_second: float
    dram_bytes: int = 1 << 30
    dataflow: Literal["ws", "os", "is"] = "ws"
    partial_sums: Literal["tile", "spill"] = "tile"
    double_buffered: bool = True
    vector_lanes: int | None = None
    float_slowdown: float = 16.0
    launch_cycles: int = 500

    def target(self, name: str, summary: str) -> Target:
        peak = 2 * self.rows * self.columns * self.clock_hz
        near = self.input_bytes + self.weight_bytes + self.output_bytes
        cost = Systolic(
            self.rows, self.columns, self.clock_hz, self.input_bytes, self.weight_bytes, self.output_bytes,
            self.dram_bytes_per_second, self.dataflow, self.double_buffered, self.partial_sums, self.vector_lanes or self.columns,
            self.float_slowdown, self.launch_cycles,
        )  # fmt: skip
        return Target(
            name, summary, "asic", 1, {"int8": peak, "float32": peak / self.float_slowdown},
            _memories(near, (self.rows + self.columns) * self.clock_hz, self.dram_bytes, self.dram_bytes_per_second),
            {"int8": self.columns, "float32": self.columns}, cost, CONTROLLER,
            array=cost.array() if (self.dataflow, self.partial_sums) == ("ws", "tile") else None,
        )  # fmt: skip


@dataclass(frozen=True)
class NpuFile:
    """An NPU that multiplies blocks of `pixels` x `channels` x `depth` a cycle; weights beside a slow memory."""

    pixels: int
    channels: int
    depth: int
    clock_hz: float
    sram_bytes: int
    sram_bytes_per_second: float
    weight_bytes_per_second: float
    engines: int = 1
    outputs_per_cycle: float = 4.0
    float_slowdown: float = 64.0
    launch_cycles: int = 700

    def target(self, name: str, summary: str) -> Target:
        peak = 2 * self.pixels * self.channels * self.depth * self.engines * self.clock_hz
        cost = BlockArray(
            self.pixels, self.channels, self.depth, self.clock_hz, self.sram_bytes, self.sram_bytes_per_second,
            self.weight_bytes_per_second, self.engines, self.outputs_per_cycle, self.float_slowdown, self.launch_cycles,
        )  # fmt: skip
        return Target(
            name, summary, "asic", 1, {"int8": peak, "float32": peak / self.float_slowdown},
            _memories(self.sram_bytes, self.sram_bytes_per_second, 1 << 30, self.weight_bytes_per_second),
            {"int8": self.channels, "float32": self.channels}, cost, CONTROLLER,
        )  # fmt: skip


@dataclass(frozen=True)
class GpuFile:
    """An NVIDIA GPU of a known architecture: peaks of the whole chip, memories L2 and DRAM."""

    arch: Literal["sm_75", "sm_80", "sm_87", "sm_90"]
    sms: int
    float32_ops_per_second: float
    float16_ops_per_second: float
    int8_ops_per_second: float
    memories: tuple[Memory, ...]
    launch_seconds: float = 3e-6

    def target(self, name: str, summary: str) -> Target:
        if len(self.memories) < 2:
            raise UsageError("a GPU has two memories, L2 and DRAM", place="memories")
        peak = {
            "float32": self.float32_ops_per_second, "float16": self.float16_ops_per_second, "int8": self.int8_ops_per_second,
        }  # fmt: skip
        cost = Gpu(self.arch, self.sms, peak, self.memories, self.launch_seconds)
        tvm = {"kind": "cuda", "arch": self.arch, "host": {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}}
        return Target(name, summary, "gpu", 1, peak, self.memories, {"float32": 32, "float16": 64, "int8": 64}, cost, tvm)


@dataclass(frozen=True)
class CpuFile:
    """A processor: features in /proc/cpuinfo's words choose its kernels; operations are those of one core, 2 per product.

    `table` is what `hwopt profile` measured there: it gives the prices of the kernels that it knows.
    """

    machine: Literal["x86_64", "aarch64", "arm", "riscv"]
    cores: int
    clock_hz: float
    float32_ops_per_cycle: float
    int8_ops_per_cycle: float
    memories: tuple[Memory, ...]
    features: tuple[str, ...] = ()
    efficiency: float = 0.7
    launch_seconds: float = 1e-6
    table: Path | None = None

    def target(self, name: str, summary: str) -> Target:
        isa, found = MACHINES[self.machine], frozenset(self.features)
        known = WORDS[self.machine]
        misspelt = [word for word in sorted(found - known) if difflib.get_close_matches(word, known, cutoff=ALIKE)]
        if misspelt:
            reason = f"no feature {misspelt[0]!r} of {self.machine} in /proc/cpuinfo's words"
            raise UsageError(reason, place="features", hint=did_you_mean(misspelt[0], known))
        micro, llvm = isa.microkernels(found), isa.llvm(found)
        if not micro:
            raise UsageError(f"there are no kernels for {self.machine} with these features", place="features")
        needed = needed_features(llvm)
        peak = {"float32": self.float32_ops_per_cycle * self.clock_hz, "int8": self.int8_ops_per_cycle * self.clock_hz}
        granule = {dtype: kernel.lanes for dtype, kernel in micro.items()}
        kinds = {"conv": self.efficiency, "matmul": self.efficiency, "depthwise": self.efficiency / 2}
        cost = Roofline(
            peak=peak, elements_per_second=granule["float32"] * self.clock_hz / 4, memories=self.memories, granule=granule,
            depth={dtype: kernel.depth for dtype, kernel in micro.items()}, micros=micro, efficiency=kinds,
            launch_seconds=self.launch_seconds,
        )  # fmt: skip
        return Target(
            name, summary, "cpu", self.cores, peak, self.memories, granule,
            cost if self.table is None else Learned(self.table, cost, micro), llvm, micro, needed,
            self.machine == host_machine() and set(needed) <= cpu_features(),
        )  # fmt: skip


FILES = {"systolic": SystolicFile, "npu": NpuFile, "gpu": GpuFile, "cpu": CpuFile}
