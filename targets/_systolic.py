"""A systolic array: cycles from folds with fill and drain, and from the traffic between three scratchpads and DRAM.

A product [m, k] x [k, n] is cut into folds that fit the array. Cycles of one fold are those of SCALE-Sim (Samajdar et al.,
ISPASS 2020, equations 1 to 4; v3: Raj et al., ISPASS 2025), with R rows, C columns:

    weight-stationary  a block of k x n stays, m rows stream     ceil(k/R) ceil(n/C) (2 R + C + m - 2)
    input-stationary   a block of k x m stays, n columns stream  ceil(k/R) ceil(m/C) (2 R + C + n - 2)
    output-stationary  a block of m x n stays, k steps stream    ceil(m/R) ceil(n/C) (  R + C + k - 2)

Transfers run behind the compute where scratchpads are double buffered: half of each holds what is worked on.
Energy: see _energy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hwopt.target import Array, Cost, Memory, Target, Workload
from targets._energy import DRAM_JOULES_PER_BYTE, MAC_JOULES, sram_joules_per_byte

DATAFLOWS = {"ws": "weight-stationary", "os": "output-stationary", "is": "input-stationary"}
PARTIAL_BYTES = 4  # a partial sum is 32 bits wide


def folds_of(size: int, granule: int) -> int:
    return -(-size // granule)


@dataclass(frozen=True)
class Traffic:
    """Bytes between each scratchpad and DRAM for one kernel."""

    inputs: float
    weights: float
    outputs: float

    @property
    def bytes(self) -> float:
        return self.inputs + self.weights + self.outputs


@dataclass(frozen=True)
class Systolic:
    """`rows` x `columns` multiply-accumulate cells; what is no product runs on a vector unit of `vector_lanes`.

    `partial_sums`: "tile" cuts m (or n) so that the sums stay in the output scratchpad until k is done, "spill" sends them to
    DRAM and back after every fold.
    """

    rows: int
    columns: int
    hertz: float
    input_bytes: int
    weight_bytes: int
    output_bytes: int
    dram_bytes_per_second: float
    dataflow: str = "ws"
    double_buffered: bool = True
    partial_sums: str = "tile"
    vector_lanes: int = 0  # 0: as many as columns
    float_slowdown: float = 16.0  # cycles that a float operation takes on the control core, per int8 one
    launch_cycles: int = 500  # configuration and DMA descriptors of one kernel
    margin: float = 0.05  # beyond the interval of the transfers; cycles of the array itself are SCALE-Sim's to one

    def array(self) -> Array:
        """What the C model needs to know; it keeps weights and sums in place, as dataflow "ws" with "tile"."""
        inputs, weights, outputs = map(sram_joules_per_byte, (self.input_bytes, self.weight_bytes, self.output_bytes))
        return Array(
            self.rows, self.columns, self.hertz, self.input_bytes, self.weight_bytes, self.output_bytes,
            self.dram_bytes_per_second / self.hertz, self._lanes, self.launch_cycles, self.double_buffered, MAC_JOULES, inputs,
            weights, outputs, DRAM_JOULES_PER_BYTE,
        )  # fmt: skip

    def estimate(self, workload: Workload, threads: int) -> Cost:
        """Cost of one kernel: max(compute, transfers) + what nothing hides + launch; nothing overlaps across kernels."""
        seconds = (self.cycles(workload) + self.launch_cycles) / self.hertz
        low, high = ((cycles + self.launch_cycles) / self.hertz for cycles in self.interval(workload))
        return Cost(seconds, self.joules(workload), workload.weight_bytes, "analytical", low, high)

    def interval(self, workload: Workload) -> tuple[float, float]:
        """Cycles if every byte crossed the DRAM port once, all of it hidden, and if nothing of the transfers were hidden."""
        slow = 1.0 if workload.dtype in ("int8", "uint8") else self.float_slowdown
        elements, compute = workload.elements / self._lanes * slow, self.product_cycles(workload) * slow
        once = workload.bytes * self.hertz / self.dram_bytes_per_second
        most = compute + self.transfer_cycles(workload) + elements + self.fill_cycles(workload)
        return (1 - self.margin) * (max(compute, once) + elements), (1 + self.margin) * most

    def cycles(self, workload: Workload) -> float:
        """Of one kernel without its launch."""
        slow = 1.0 if workload.dtype in ("int8", "uint8") else self.float_slowdown
        elements = workload.elements / self._lanes * slow
        compute, transfer = self.product_cycles(workload) * slow, self.transfer_cycles(workload)
        hidden = max(compute, transfer) if self.double_buffered else compute + transfer
        return hidden + elements + self.fill_cycles(workload)

    def product_cycles(self, workload: Workload) -> float:
        """Of the multiplications; depthwise layers run on the vector unit where that is faster."""
        array = self.array_cycles(workload)
        if workload.kind != "depthwise":
            return array
        return min(array, folds_of(workload.groups * workload.n, self._lanes) * float(workload.m * workload.k))

    @property
    def _lanes(self) -> int:
        return self.vector_lanes or self.columns

    def array_cycles(self, workload: Workload) -> float:
        """All folds with fill and drain, without a stall."""
        m, n, k = workload.m, workload.n, workload.k
        if not workload.macs:
            return 0.0
        skew = self.rows + self.columns - 2
        if self.dataflow == "os":
            folds = folds_of(m, self.rows) * folds_of(n, self.columns)
            return float(workload.groups * folds * (k + skew))
        streamed, kept = (m, n) if self.dataflow == "ws" else (n, m)
        folds, parts = folds_of(k, self.rows) * folds_of(kept, self.columns), self._parts(workload)
        return float(workload.groups * folds * (streamed + parts * (self.rows + skew)))

    def _parts(self, workload: Workload) -> int:
        """Pieces of the streamed side whose partial sums fit half of the output scratchpad."""
        streamed = workload.m if self.dataflow == "ws" else workload.n
        if self.dataflow == "os" or self.partial_sums == "spill" or folds_of(workload.k, self.rows) == 1:
            return 1
        return folds_of(streamed, max(1, self._half(self.output_bytes) // (PARTIAL_BYTES * self.columns)))

    def _half(self, size: int) -> int:
        return size // 2 if self.double_buffered else size

    def transfer_cycles(self, workload: Workload) -> float:
        """Cycles that DRAM needs for the kernel."""
        return self.traffic(workload).bytes * self.hertz / self.dram_bytes_per_second

    def fill_cycles(self, workload: Workload) -> float:
        """The first blocks, which nothing hides: two blocks as large as the array."""
        first = 2 * self.rows * self.columns if workload.macs else 0
        return min(first, workload.bytes) * self.hertz / self.dram_bytes_per_second

    def traffic(self, workload: Workload) -> Traffic:
        """What crosses the DRAM interface; groups run one after the other."""
        if not workload.macs:
            return Traffic(workload.read_bytes, workload.weight_bytes, workload.write_bytes)
        return min(self._tiled(workload), key=lambda one: one.bytes)

    def _tiled(self, workload: Workload) -> Iterator[Traffic]:
        """The loop orders of the dataflow; a side that does not stay on chip is fetched again for every block of the other."""
        inputs, weights = workload.read_bytes, workload.weight_bytes
        groups = workload.groups
        input_fits = inputs / groups <= self._half(self.input_bytes)
        weight_fits = weights / groups <= self._half(self.weight_bytes)
        across_n, parts = folds_of(workload.n, self.columns), self._parts(workload)
        if self.dataflow == "os":
            down, across = folds_of(workload.m, self.rows), across_n
            input_block = inputs / groups / down <= self._half(self.input_bytes)
            weight_block = weights / groups / across <= self._half(self.weight_bytes)
            yield Traffic(inputs * (1 if input_fits else across), weights * (1 if weight_block else down), workload.write_bytes)
            yield Traffic(inputs * (1 if input_block else across), weights * (1 if weight_fits else down), workload.write_bytes)
            return
        outputs = float(workload.write_bytes)
        if self.partial_sums == "spill":  # read again and written after every fold but the last
            outputs += PARTIAL_BYTES * 2 * (folds_of(workload.k, self.rows) - 1) * workload.m * workload.n * groups
        if self.dataflow == "ws":
            part_fits = inputs / groups / parts <= self._half(self.input_bytes)
            yield Traffic(inputs * (1 if part_fits else across_n), weights * (1 if weight_fits else parts), outputs)
            return
        across_m = folds_of(workload.m, self.columns)
        part_fits = weights / groups / parts <= self._half(self.weight_bytes)
        yield Traffic(inputs * (1 if input_fits else parts), weights * (1 if part_fits else across_m), outputs)

    def joules(self, workload: Workload) -> float:
        """Multiply-adds, accesses of the scratchpads by the array, and DRAM."""
        reads = self._scratchpad_bytes(workload)
        sizes = (self.input_bytes, self.weight_bytes, self.output_bytes)
        scratch = sum(count * sram_joules_per_byte(size) for count, size in zip(reads, sizes, strict=True))
        vector = workload.elements * MAC_JOULES
        return workload.macs * MAC_JOULES + scratch + vector + self.traffic(workload).bytes * DRAM_JOULES_PER_BYTE

    def _scratchpad_bytes(self, workload: Workload) -> tuple[float, float, float]:
        """Bytes that the array takes from, or gives to, its input, weight and output scratchpads."""
        if not workload.macs:
            return workload.read_bytes, workload.weight_bytes, workload.write_bytes
        m, n, k, groups = workload.m, workload.n, workload.k, workload.groups
        down, across = folds_of(k, self.rows), folds_of(n, self.columns)
        if self.dataflow == "os":
            return groups * m * k * across, groups * k * n * folds_of(m, self.rows), groups * PARTIAL_BYTES * m * n
        sums = groups * PARTIAL_BYTES * m * n * (2 * down - 1)  # read and written, but for the first
        if self.dataflow == "ws":
            return groups * m * k * across, groups * k * n * self._parts(workload), sums
        return groups * m * k * self._parts(workload), groups * k * n * folds_of(m, self.columns), sums


def systolic_target(
    name: str, summary: str, cost: Systolic, scratchpad: int, bank: int, dram: tuple[str, int], tvm: dict[str, Any],
    modelled: bool = True,
) -> Target:  # fmt: skip
    """A square array with a scratchpad of so many bytes, a bank of which is read at once, and its DRAM by name and size.

    Artifacts for one that is `modelled` run on the host, with a model of the array in C.
    """
    side, peak = cost.rows, 2 * cost.rows * cost.columns * cost.hertz
    return Target(
        name=name, summary=summary, kind="asic", cores=1, peak={"int8": peak, "float32": peak / cost.float_slowdown},
        memories=(
            Memory("scratchpad", scratchpad, 2 * side * cost.hertz, sram_joules_per_byte(bank)),
            Memory(*dram, cost.dram_bytes_per_second, DRAM_JOULES_PER_BYTE),
        ),
        granule={"int8": side, "float32": side}, cost=cost, tvm=tvm, array=cost.array() if modelled else None,
    )  # fmt: skip
