"""The same counts for kernels without multiplications: elementwise, pools, rows (softmax, normalization) and moves of data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from hwopt.analysis.workload import FORMS
from hwopt.backends.tvm.learn.counted import (
    CONVERSIONS,
    FIRST,
    GATES,
    LINE,
    SECOND,
    Counted,
    Numbers,
    floats,
    memory_shape,
    share,
    step_names,
    steps_of,
    traffic,
)
from hwopt.backends.tvm.learn.counted_moves import Move, gathered_shape, gathered_times, turned_shape, turned_times
from hwopt.target import Workload

STEPS = ("Add", "Mul", "Relu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Gelu", "Softmax", "LayerNormalization",
         "GlobalAveragePool", "MaxPool", "AveragePool", "Transpose", "QuantizeLinear", "DequantizeLinear", "Cast", "Div",
         "Resize", "Concat", "Slice", "Gather", "Erf", "Sub", "Pow", "Sqrt", "ReduceMean", "ReduceSum", "ReduceMax", "Pad",
         "DepthToSpace", "SpaceToDepth", "Split", "GlobalMaxPool", "LeakyRelu", "Tanh", "Exp", "Softplus", "Abs", "Neg",
         "Max", "Min")  # fmt: skip
MOVED = ("Concat", "Slice", "Split", "Pad", "Gather", "Resize", "DepthToSpace", "SpaceToDepth", "Transpose")
TRIVIAL = (
    "Relu",
    "Clip",
    "Add",
    "Sub",
    "Mul",
    "Min",
    "Max",
    "Abs",
    "Neg",
    "LeakyRelu",
    "HardSigmoid",
    "HardSwish",
)  # as table.py
SLOW = ("Sigmoid", "Gelu", "Erf", "Tanh", "Exp", "Softplus", "Div", "Sqrt", "Pow", "Log")  # each counts by itself
DTYPES = ("float32", "bfloat16", "int8", "uint8", "int32", "int64", "bool")
VECTOR, WIDEST = 16, 64  # lanes of generic schedules, and of their sums over outer axes (generic.py)
PARALLEL = 16_384  # elements from which they are, as in generic.py
WAYS, SETS = 12, 64  # of a first cache: lines that lie a power of two apart share sets


def loops(work: Workload, threads: int) -> Counted:
    """Counts of vectors where whole ones are filled, of single elements where not, and of bytes."""
    nest = Nest(work)
    parallel = threads > 1 and work.elements >= PARALLEL
    turned, moved = _family(work) == "turned", work.kind == "move"
    counts = turned_times(work) if turned else {**_times(nest), **(gathered_times(work) if moved else {})}
    facts = turned_shape(work) if turned else {**_facts(nest), **(gathered_shape(work) if moved else {})}
    times = {name: value / threads if parallel and name != "call" else value for name, value in counts.items()}
    return Counted(_family(work), {**times, "launch": 1000.0 * parallel}, floats(facts))


def _family(work: Workload) -> str:
    """Kernels that are made in the same way."""
    names = step_names(work)
    if "Softmax" in names or "LayerNormalization" in names:
        return "softmax" if "Softmax" in names else "norms"
    integers = " int8" if work.dtype == "int8" else ""
    if work.kind == "pool":
        return f"windows{integers}" if work.window else f"means{integers}"
    if work.kind == "elementwise":
        return "relaid" if work.relaid else "tables" if Nest(work).looked_up else f"elements{integers}"
    if work.kind == "move":
        return "turned" if Move(work).turned[0] else "transposed" if names[:1] == ["Transpose"] else "moves"
    return "reductions"


@dataclass(frozen=True)
class Nest:
    """The loops over a kernel's results: `rows` times `inner` of them, of which whole vectors are filled as far as they go."""

    work: Workload

    @cached_property
    def names(self) -> list[str]:
        return step_names(self.work)

    @property
    def dims(self) -> tuple[int, ...]:
        return self.work.dims or (1,)

    @cached_property
    def inner(self) -> int:
        """Extent of the innermost loop: images have their channels last, whatever ONNX says."""
        image = len(self.dims) >= 4 and self.work.kind in ("elementwise", "pool", "move") and self.names[:1] != ["Transpose"]
        by_rows = "Softmax" in self.names or "LayerNormalization" in self.names
        return max(1, self.dims[1] if image and not by_rows else self.dims[-1])

    @cached_property
    def results(self) -> float:
        return float(max(1, math.prod(self.dims)))

    @property
    def rows(self) -> float:
        return self.results / self.inner

    @property
    def left(self) -> int:
        """Results behind the last whole vector."""
        return self.inner % VECTOR

    @property
    def each(self) -> float:
        """Scalar results and operands of a window for each result."""
        return self.work.elements / self.results

    @cached_property
    def behind(self) -> list[str]:
        """The operators that compute something for each result."""
        if self.looked_up:
            return []
        return self.names if self.work.kind == "elementwise" else self.names[1:]

    @cached_property
    def looked_up(self) -> bool:
        """True where bytes become bytes, nothing else is read, and computing that in vectors takes longer: a table does it."""
        work, hard = self.work, any(name not in (*TRIVIAL, *CONVERSIONS) for name in self.names)
        alike = work.kind == "elementwise" and work.read_bytes == work.write_bytes == self.results
        return hard and alike and work.weight_bytes < LINE

    @cached_property
    def axes(self) -> tuple[int, ...]:
        """That the first operator names: those that it joins, cuts, or sums up over."""
        op, _, detail = self.work.steps[0].partition(" ") if self.work.steps else ("", "", "")
        return tuple(map(int, detail.split(","))) if op != "Transpose" and detail.replace(",", "").isdigit() else ()

    @cached_property
    def by_rows(self) -> bool:
        """True for a reduction over the innermost axis, whether the result keeps it or not."""
        if not self.axes or not self.names[0].startswith("Reduce"):
            return False
        kept = all(axis < len(self.dims) and self.dims[axis] == 1 for axis in self.axes)
        return max(self.axes) == len(self.dims) + (0 if kept else len(self.axes)) - 1

    @cached_property
    def inside(self) -> bool:
        """True where the named axis is the innermost one of the memory."""
        image = len(self.dims) == 4 and self.work.kind in ("move", "pool")
        return bool(self.axes) and self.axes[-1] == (1 if image else len(self.dims) - 1)

    @cached_property
    def stride(self) -> int:
        """Bytes between neighbours of a transposed row where they come from."""
        order = self.work.steps[0].partition(" ")[2] if self.names[:1] == ["Transpose"] else ""
        if not order:
            return 0
        places = [int(one) for one in order.split(",")]
        source = dict(zip(places, self.dims, strict=False))
        size = max(1, round(self.work.read_bytes / self.results))
        return size * math.prod(source.get(axis, 1) for axis in range(places[-1] + 1, len(places)))


def _times(nest: Nest) -> Numbers:
    """Whole vectors, what is left of a row, rows narrower than a vector, and every slow function by itself."""
    work, left = nest.work, nest.left
    whole = nest.rows * (nest.inner // VECTOR)
    narrow = nest.inner < VECTOR
    ends = nest.rows * (left > 0) * (not narrow)
    steps = max(1.0, float(len(nest.behind)))
    parts = whole + nest.rows * left.bit_count() * (not narrow)
    size = work.read_bytes / nest.results
    slow = {f"do_{name}": parts * nest.behind.count(name) for name in SLOW}
    converted = sum(name in CONVERSIONS for name in nest.behind)
    slowly = sum(map(nest.behind.count, SLOW))
    singles = nest.rows * nest.inner * narrow
    moved = float(moves_last(work))
    return {
        "vectors": whole, "ends": ends, "end_pieces": nest.rows * left.bit_count() * (not narrow), "left": ends * left,
        "left_steps": ends * left * steps, "narrow": singles, "narrow_steps": singles * steps, "steps": parts * steps,
        "rows": nest.rows, "converted": parts * converted, "narrow_slow": singles * slowly, "left_slow": ends * left * slowly,
        "narrow_converted": singles * converted, "left_converted": ends * left * converted,
        "gates": parts * sum(map(nest.behind.count, GATES)), "stacked": nest.results * _stacked(nest),
        **slow, **_sums(nest), **_row_sums(nest), **_moves(nest),
        "window_rows": nest.rows * -(-nest.inner // VECTOR) * nest.each, "moved": moved * nest.results,
        "moved_far": moved * nest.results * float(nest.stride >= 4096 or nest.stride * VECTOR > 1 << 15),
        "bytes": float(work.read_bytes + work.write_bytes) / LINE, "single_bytes": nest.results * (size <= 1),
        "crowded": nest.results * _crowded(work, nest.dims), "looked_up": parts * nest.looked_up,
        "bytes_read": parts * (size < 3), **_streamed(work),
        **traffic(work), "call": 100.0,
    }  # fmt: skip


def _streamed(work: Workload) -> Numbers:
    """Cache lines that go through, by the level that holds all of them together."""
    return {
        "through_second": work.bytes / LINE * share(work.bytes, FIRST),
        "through_third": work.bytes / LINE * share(work.bytes, SECOND),
    }


def _sums(nest: Nest) -> Numbers:
    """Steps over outer axes: as many results at once as divide the channels, so the data are gone through for every such few."""
    lanes, work = math.gcd(nest.inner, WIDEST), nest.work
    steps = work.elements / lanes * (not nest.by_rows)
    return {
        "sums": steps, "sum_results": nest.results / lanes, "sum_vectors": steps * lanes / VECTOR * (lanes >= VECTOR),
        "sum_wide": steps * (work.read_bytes > 3 * nest.results * nest.each),
        "sum_second": steps * share(work.read_bytes, FIRST), "sum_third": steps * share(work.read_bytes, SECOND),
    }  # fmt: skip


def _row_sums(nest: Nest) -> Numbers:
    """Sums over the innermost axis: in vectors where whole ones fill it, else one after the other; maxima look for NaN."""
    whole, elements = nest.each % VECTOR == 0, float(nest.work.elements)
    ordered = nest.names[:1] in (["ReduceMax"], ["ReduceMin"])
    return {
        "row_vectors": elements / VECTOR * (nest.by_rows and whole), "row_singles": elements * (nest.by_rows and not whole),
        "ordered": elements * ordered / (1 if nest.by_rows else math.gcd(nest.inner, WIDEST)),
    }  # fmt: skip


def _stacked(nest: Nest) -> int:
    """How often operands are laid behind each other before they are compared."""
    return sum(name in ("Max", "Min") for name in nest.names) if nest.work.kind == "elementwise" else 0


def _moves(nest: Nest) -> Numbers:
    """Results of each operator that only moves data, in vectors where rows are as long."""
    name = nest.names[0] if nest.work.kind == "move" and nest.names else ""
    pieces = nest.results / (VECTOR if nest.inner >= VECTOR else 1)
    smooth = name == "Resize" and "nearest" not in nest.work.steps[0]
    found = {f"move_{one}": pieces * (one == name) * (not smooth) for one in MOVED}
    return {**found, "move_smooth": pieces * smooth, "move_inside": pieces * nest.inside}


def _crowded(work: Workload, dims: tuple[int, ...]) -> float:
    """1 where an image is read channel by channel and its channels are more lines than the sets take that they fall into."""
    if not work.relaid or len(dims) < 3:
        return 0.0
    apart = 4 * math.prod(dims[2:])
    return float(dims[1] > WAYS * max(1, SETS * LINE // math.gcd(apart, SETS * LINE)))


def _facts(nest: Nest) -> Numbers:
    work, dims, names = nest.work, nest.dims, nest.names
    results, window = nest.results, work.window or (1,) * 9 + (0,) * 4
    channels, pixels = dims[1] if len(dims) > 1 else 1, math.prod(dims[2:]) if len(dims) > 2 else 1
    return {
        "first": _place(STEPS, *names[:1]), "second": _place(STEPS, *names[1:2]), "last_step": _place(STEPS, *names[-1:]),
        "dtype": _place(DTYPES, work.dtype), "rank": len(dims), "inner": nest.inner, "left": nest.left,
        "whole": nest.inner // VECTOR, "power": math.gcd(nest.inner, 4096), "log_rows": math.log(nest.rows),
        "last": dims[-1], "last_power": math.gcd(dims[-1], 64), "channels": channels,
        "channels_power": math.gcd(channels, 4096), "pixels": pixels, "pixels_power": math.gcd(4 * pixels, 4096),
        "lines": channels * math.gcd(4 * pixels, 4096) / 4096, "moves": moves_last(work), "stride": nest.stride,
        "stride_power": math.gcd(nest.stride, 4096), "steps": len(names), "read_each": work.read_bytes / results,
        "write_each": work.write_bytes / results, "weights_each": work.weight_bytes / results, "work_each": nest.each,
        "log_results": math.log(results), "log_elements": math.log1p(work.elements), "kernel": window[3] * window[4],
        "stride_down": window[5], "padded": any(window[9:]), "reads_more": work.read_bytes / max(1, work.write_bytes),
        "looked_up": nest.looked_up, "inside": nest.inside, "by_rows": nest.by_rows, "axis": nest.axes[-1] if nest.axes else -1,
        "form": _form(work), "extent": nest.each % VECTOR == 0, **steps_of(names).shape(), **memory_shape(work),
    }  # fmt: skip


def _form(work: Workload) -> int:
    """The most that a second operand has, as in analysis/workload.py."""
    return max((_place(FORMS, step.partition(" ")[2]) for step in work.steps), default=-1)


def _place(known: Sequence[str], name: str = "") -> int:
    return known.index(name) if name in known else -1


def moves_last(work: Workload) -> bool:
    """True for a permutation that does not leave the last axis where it is: it moves single elements."""
    order = work.steps[0].partition(" ")[2] if work.steps and work.steps[0].startswith("Transpose ") else ""
    return bool(order) and order.split(",")[-1] != str(len(order.split(",")) - 1)
