"""Kernels of TVM's own operators, which no template covers, as something that tuning can work on.

Of their schedules two numbers count: `tile_columns` are the lanes of a vector, `vectors` how many vectors a step computes. Or
MetaSchedule found them (tune/traces.py): then a trace says everything.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

from hwopt.backends.tvm.generic import LANES, Knobs, scheduled, traced
from hwopt.backends.tvm.kernels.schedule import Schedule
from hwopt.backends.tvm.kernels.spec import Step

LANE_COUNTS, VECTOR_COUNTS = (4, 8, 16, 32, 64), (1, 2, 4, 8)
LEAST = 16384  # elements of a kernel's buffers below which nothing is to be gained
ITEM = {"float32": 4, "uint8": 1, "int8": 1}  # dtypes that any random values are right for, unlike indices


@dataclass(frozen=True)
class LoopsSpec:
    """One kernel: a digest and its loops before they are scheduled, in TVM's JSON, with the bytes that it touches."""

    name: str
    digest: str
    bytes: int
    source: str = field(repr=False, compare=False, metadata={"plain": False})
    data_dtype: str = "float32"
    weight_dtype: str = "float32"
    out_dtype: str = "float32"
    accumulator: str = "float32"
    epilogue: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Traced(Schedule):
    """What MetaSchedule made of a kernel: instructions and decisions as JSON. Of the numbers only `parallel` counts."""

    trace: str = ""


def spec_of(function: Any, name: str) -> LoopsSpec | None:
    """The spec of an unscheduled PrimFunc; None where it is small, or reads what random values are not right for."""
    import tvm

    buffers = list(function.params)
    static = all(hasattr(size, "value") for one in buffers for size in one.shape)
    if not static or any(str(one.dtype) not in ITEM for one in buffers):
        return None
    counts = [math.prod(int(size) for size in one.shape) for one in buffers]
    if sum(counts) < LEAST:
        return None
    plain = function.without_attr("global_symbol") if "global_symbol" in function.attrs else function
    source = tvm.ir.save_json(plain)
    size = sum(count * ITEM[str(one.dtype)] for count, one in zip(counts, buffers, strict=True))
    return LoopsSpec(name, hashlib.sha256(plain.script().encode()).hexdigest()[:24], size, source)


def default_loops(cores: int) -> Schedule:
    return Schedule(1, LANES, 1, 1, 1, 1, 1, cores > 1)


def traced_loops(trace: str, cores: int) -> Traced:
    return Traced(1, 1, 1, 1, 1, 1, 1, cores > 1, trace=trace)


def build_loops(spec: LoopsSpec, schedule: Schedule, symbol: str) -> Any:
    """The kernel with its loops in this order; for any number of threads above one where the schedule is parallel."""
    return ordered(source_of(spec).with_attr("global_symbol", symbol), schedule)


def source_of(spec: LoopsSpec) -> Any:
    """The PrimFunc before it is scheduled."""
    import tvm

    return tvm.ir.load_json(spec.source)


def ordered(function: Any, schedule: Schedule) -> Any:
    """A PrimFunc with its loops as a schedule says."""
    if isinstance(schedule, Traced):
        return traced(function, schedule.trace)
    return scheduled(function, 2 if schedule.parallel else 1, Knobs(schedule.tile_columns, schedule.vectors))
