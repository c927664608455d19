"""What a kernel has to do, counted: cycles of its inner loop, epilogues, bytes by where they come from.

Each count is of something that the templates' code really does with the schedule that they choose. A predictor weighs the
counts (never below zero) into a time, and learns from measurements what is missing from that. `shape` are further facts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hwopt.target import MicroKernel, Workload

LINE = 64  # bytes
INSTRUCTION = 7  # bytes of a vector instruction, about
FIRST, SECOND, THIRD = 48 << 10, 1 << 20, 32 << 20  # of caches, about: weights of the counts and the trees move these borders
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "uint8": 1}
HEAVY = ("Sigmoid", "Gelu", "Erf", "Tanh", "Exp", "Softmax", "Sqrt", "Pow", "Div")
GATES = ("HardSwish", "HardSigmoid")
CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "Cast")
Micros = Mapping[str, MicroKernel]
Numbers = dict[str, float]


@dataclass(frozen=True)
class Counted:
    """`times` are counts in about cycles, of one thread; `shape` what else makes kernels faster or slower."""

    family: str
    times: Numbers
    shape: Numbers


@dataclass(frozen=True)
class Steps:
    """How often each kind of step stands behind the anchor."""

    light: float
    heavy: float
    conversions: float
    sums: float
    gates: float
    scaled: float  # gates with more steps behind them, which integers then do not do

    def times(self, vectors: float) -> Numbers:
        """Applied to so many vectors of results."""
        kinds = {"light": self.light, "heavy": self.heavy, "convert": self.conversions, "add": self.sums, "gate": self.gates}
        kinds["scaled"] = self.scaled
        return {f"steps_{name}": vectors * count for name, count in kinds.items()}

    @property
    def instructions(self) -> float:
        """Of one vector, about: functions are polynomials."""
        return 2 + self.light + 35 * self.heavy + 5 * self.conversions + 2 * self.sums + 6 * self.gates

    def shape(self) -> Numbers:
        return self.times(1.0)


def steps_of(names: list[str]) -> Steps:
    kinds = (HEAVY, CONVERSIONS, ("Add", "Sub"), GATES)
    heavy, conversions, sums, gates = (float(sum(one in some for one in names)) for some in kinds)
    places = [place for place, one in enumerate(names) if one in GATES]
    scaled = sum(any(one not in CONVERSIONS for one in names[place + 1 :]) for place in places)
    light = len(names) - heavy - conversions - sums - gates
    return Steps(light, heavy, conversions, sums, gates, float(scaled))


def step_names(work: Workload) -> list[str]:
    return [step.partition(" ")[0] for step in work.steps]


def pieces(count: int, lanes: int) -> int:
    """Vectors of powers of two in which the templates store what does not fill one."""
    return (count % lanes).bit_count()


def traffic(work: Workload) -> Numbers:
    """Cache lines of activations and weights, by the level that they come from or go to."""
    cold = share(work.footprint, SECOND)  # weights: what one run of the whole model reads has passed since they were used
    beyond = share(work.footprint, THIRD)
    return {
        "read": work.read_bytes / LINE, "read_second": work.read_bytes * share(work.read_bytes, FIRST) / LINE,
        "read_third": work.read_bytes * share(work.read_bytes, SECOND) / LINE,
        "write": work.write_bytes / LINE, "write_third": work.write_bytes * share(work.write_bytes, SECOND) / LINE,
        "weights": work.weight_bytes / LINE, "weights_third": work.weight_bytes * cold / LINE,
        "weights_memory": work.weight_bytes * beyond / LINE,
    }  # fmt: skip


def share(size: float, cache: float) -> float:
    """How much of what is used again and again misses a cache: none of half its size, all of twice that."""
    return min(1.0, max(0.0, math.log2(max(size, 1) / cache) / 2 + 0.5))


def code_of(instructions: float, footprint: int) -> Numbers:
    """Cache lines of code: weights that pass through the caches push it out of them like everything else."""
    lines = instructions * INSTRUCTION / LINE
    return {"code": lines, "code_third": lines * share(footprint, SECOND), "code_memory": lines * share(footprint, THIRD)}


def memory_shape(work: Workload) -> Numbers:
    return {
        "log_read": math.log1p(work.read_bytes), "log_write": math.log1p(work.write_bytes),
        "log_weights": math.log1p(work.weight_bytes), "footprint": math.log2(1 + work.footprint / SECOND),
    }  # fmt: skip


def spread(times: Numbers, threads: int, cycles: float) -> Numbers:
    """The share of one thread where the kernel is parallel; a launch is what it costs instead."""
    from hwopt.backends.tvm.kernels.schedule import parallel_pays

    if not parallel_pays(cycles, threads):
        return {**times, "launch": 0.0}
    return {**{name: value if name == "call" else value / threads for name, value in times.items()}, "launch": 1000.0}


def floats(values: Mapping[str, float]) -> Numbers:
    return {name: float(value) for name, value in values.items()}
