"""What hwopt knows of a piece of hardware, and what a kernel costs on it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

HOST = "host"  # the name of the target that is whichever machine this is


@dataclass(frozen=True)
class Memory:
    """One level of the memory hierarchy, nearest first in Target.memories; the last one holds everything."""

    name: str
    bytes: int
    bytes_per_second: float
    joules_per_byte: float = 0.0


@dataclass(frozen=True)
class MicroKernel:
    """The inner step of a target's convolutions and matmuls: acc[rows, lanes] += activation[rows, depth] * weight[lanes, depth].

    `intrinsic` is LLVM's name of the instruction, or "" where plain multiply-add vector code is right. `activation` is the
    integer dtype that the instruction takes for activations; weights are int8 (or the float dtype itself).
    """

    dtype: str  # float32, bfloat16, int8
    lanes: int  # accumulators in one vector register
    depth: int  # products added into one accumulator by one instruction
    registers: int  # vector registers that the code can use
    accumulator: str  # float32, int32
    activation: str = ""
    intrinsic: str = ""
    features: tuple[str, ...] = ()  # LLVM -mattr names that it needs
    rows: int = 1  # output positions that one step multiplies; they share `rows` accumulator registers
    wide: str = ""  # of integers: LLVM's name of the instruction for products of 16-bit numbers, in pairs or one in each lane
    others: tuple[MicroKernel, ...] = ()  # of the same dtype, for work that this one does not take; the first that does is used
    narrow: int = 0  # pairs of products that it adds in 16 bits, which is exact for weights that small; `wide` adds the sums


@dataclass(frozen=True)
class Coded:
    """Weights that the kernel could read as codes and decode itself: `bytes` of codes, codebooks and scales; `bits` of a code."""

    bytes: int
    bits: int
    looked_up: bool  # in a codebook; else codes are numbers


@dataclass(frozen=True)
class Workload:
    """One fused kernel as a cost model sees it: `groups` independent [m, k] x [k, n] products, or elementwise work.

    A convolution is m = output pixels (batch included), n = output channels per group, k = input channels per group x taps.
    Bytes are what the kernel must read and write at least once.
    """

    name: str
    kind: str  # conv, depthwise, matmul, pool, elementwise, reduce, move
    dtype: str  # of the multiplicands: float32, int8, bfloat16 ...
    m: int = 0
    n: int = 0
    k: int = 0
    groups: int = 1
    taps: int = 1
    elements: int = 0  # scalar results outside of the products: epilogues, activations, pooling windows
    read_bytes: int = 0  # activations
    write_bytes: int = 0
    weight_bytes: int = 0  # decoded, as the arithmetic takes them
    coded: Coded | None = None  # the other form of the weights; a cost model prices the cheaper one
    window: tuple[int, ...] = ()  # of images: batch, then (height, width) of data, kernel, strides, dilations, pads
    dims: tuple[int, ...] = ()  # of the result
    steps: tuple[str, ...] = ()  # operators of the anchor and its epilogue, in order; a Transpose with its permutation
    narrow: int = 0  # pairs of products of neighbouring weights whose sums fit 16 bits (hwopt.analysis.narrow)
    relaid: bool = False  # reads an image of the model's caller, whose channels lie first
    order: str = ""  # of what only moves data: how its source lies, and further facts (analysis/orders.py)
    footprint: int = field(default=0, compare=False)  # weights of the whole model, about: they pass through the caches in a run

    @property
    def macs(self) -> int:
        return self.m * self.n * self.k * self.groups

    @property
    def bytes(self) -> int:
        return self.read_bytes + self.write_bytes + self.weight_bytes


@dataclass(frozen=True)
class Cost:
    """What a kernel, or a model, costs. `low` and `high` bound the seconds where the source states an interval."""

    seconds: float = 0.0
    joules: float = 0.0
    bytes: int = 0  # of weights
    source: str = "analytical"  # analytical | table | learned | measured
    low: float | None = None
    high: float | None = None

    def __add__(self, other: Cost) -> Cost:
        source = self.source if self.source == other.source else "mixed"
        low = (self.seconds if self.low is None else self.low) + (other.seconds if other.low is None else other.low)
        high = (self.seconds if self.high is None else self.high) + (other.seconds if other.high is None else other.high)
        return Cost(self.seconds + other.seconds, self.joules + other.joules, self.bytes + other.bytes, source, low, high)


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of costs; zero for none."""
    found = list(costs)
    return functools.reduce(Cost.__add__, found[1:], found[0]) if found else Cost()


class CostModel(Protocol):
    """Estimates kernels."""

    def estimate(self, workload: Workload, threads: int) -> Cost: ...


def origin(model: CostModel) -> str:
    """Where a cost model's prices are from, for people."""
    return str(getattr(model, "origin", "analytical"))


def table_of(model: CostModel) -> Path | None:
    """The file that a cost model's prices are read from, if there is one."""
    return getattr(model, "path", None)


@dataclass(frozen=True)
class Array:
    """A weight-stationary multiply-accumulate array, for which kernels call load, compute and store.

    A model of it in C (emit/hwopt_array.c) runs on the host in its place and counts cycles, DRAM traffic and energy.
    """

    rows: int
    columns: int
    hertz: float
    input_bytes: int  # of the scratchpads
    weight_bytes: int
    output_bytes: int
    dram_bytes_per_cycle: float
    vector_lanes: int
    launch_cycles: int
    double_buffered: bool
    mac_joules: float
    input_joules_per_byte: float
    weight_joules_per_byte: float
    output_joules_per_byte: float
    dram_joules_per_byte: float

    def microkernel(self) -> MicroKernel:
        """For int8; `registers` are the positions whose sums fit the output scratchpad. The rest runs on the controller."""
        positions = self.output_bytes // (2 if self.double_buffered else 1) // (4 * self.columns)
        plain = MicroKernel("int8", 4, 1, 16, "int32", "int8")
        return MicroKernel(
            "int8", self.columns, self.rows, max(1, positions), "int32", "int8", "hwopt.array", others=(plain,)
        )  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One piece of hardware. `peak` is operations (2 per multiply-add) per second of one core by multiplicand dtype."""

    name: str
    summary: str
    kind: str  # cpu | gpu | asic
    cores: int
    peak: Mapping[str, float]
    memories: tuple[Memory, ...]
    granule: Mapping[str, int]  # dtype -> channels that cost the same as one more channel
    cost: CostModel
    tvm: Mapping[str, Any]  # a TVM target as a dictionary, "mtriple" always stated
    microkernels: Mapping[str, MicroKernel] = field(default_factory=dict)
    features: tuple[str, ...] = ()  # what the machine must have, in /proc/cpuinfo's words
    runs_here: bool = False  # True where this process can execute the compiled code
    array: Array | None = None  # what a model in C stands in for, so that artifacts of the target run on the host
    spacious: bool = True  # kernels may use some megabytes of workspace where that makes them faster
    fallbacks: tuple[Target, ...] = ()  # other instruction sets that go into the same library, for processors without this one's

    @property
    def activation(self) -> str:
        """The dtype of quantized activations that its integer kernels take: uint8 or int8."""
        kernel = self.microkernels.get("int8")
        return kernel.activation if kernel else "int8"

    def cramped(self) -> Target:
        """The same, and its fallbacks, with kernels that take no workspace only to be faster."""
        return replace(self, spacious=False, fallbacks=tuple(one.cramped() for one in self.fallbacks))

    def granule_of(self, dtype: str) -> int:
        return self.granule.get(dtype, 1)
