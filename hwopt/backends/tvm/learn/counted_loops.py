"""The same counts for kernels without multiplications: elementwise, pools, rows (softmax, normalization) and moves of data."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hwopt.backends.tvm.learn.counted import Counted, Numbers, floats, memory_shape, step_names, steps_of, traffic
from hwopt.target import Workload

STEPS = ("Add", "Mul", "Relu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Gelu", "Softmax", "LayerNormalization",
         "GlobalAveragePool", "MaxPool", "AveragePool", "Transpose", "QuantizeLinear", "DequantizeLinear", "Cast", "Div",
         "Resize", "Concat", "Slice", "Gather", "Erf", "Sub", "Pow", "Sqrt", "ReduceMean")  # fmt: skip
KINDS = ("elementwise", "pool", "reduce", "move")
DTYPES = ("float32", "bfloat16", "int8", "uint8", "int32", "int64")
FAMILY = {"pool": "pools", "reduce": "rows"}
VECTOR = 16  # lanes of generic schedules (generic.py): what does not fill them is code of its own
PARALLEL = 16_384  # elements from which they are, as in generic.py


def loops(work: Workload, threads: int) -> Counted:
    """Counts of vectors where whole ones are filled, of single elements where not, and of bytes."""
    dims = work.dims or (1,)
    inner = dims[1] if len(dims) >= 4 and work.kind != "move" else dims[-1]  # channels lie last
    times, facts = _times(work, dims, max(1, inner)), _facts(work, dims, max(1, inner))
    parallel = threads > 1 and work.elements >= PARALLEL
    split = {name: value / threads if parallel and name != "call" else value for name, value in times.items()}
    return Counted(FAMILY.get(work.kind, "elements"), {**split, "launch": 1000.0 * parallel}, floats(facts))


def _times(work: Workload, dims: tuple[int, ...], inner: int) -> Numbers:
    results, left, behind = float(math.prod(dims)), inner % VECTOR, steps_of(step_names(work))
    rows, each = results / inner, work.elements / max(1.0, results)
    return {
        "vectors": rows * (inner // VECTOR) * each, "left": rows * left * each, "results": results / VECTOR, "rows": rows,
        "single": results * float(moves_last(work) or work.relaid), "uneven": work.elements * float(left > 0),
        "uneven_heavy": behind.heavy * results * float(left > 0), **behind.times(results / VECTOR), **traffic(work),
        "call": 100.0,
    }  # fmt: skip


def _facts(work: Workload, dims: tuple[int, ...], inner: int) -> Numbers:
    names, results, window = step_names(work), float(max(1, math.prod(dims))), work.window or (1,) * 9 + (0,) * 4
    channels = dims[1] if len(dims) > 1 else 1
    return {
        "kind": _place(KINDS, work.kind), "first": _place(STEPS, *names[:1]), "second": _place(STEPS, *names[1:2]),
        "dtype": _place(DTYPES, work.dtype), "rank": len(dims), "inner": inner, "left": inner % VECTOR, "whole": inner // VECTOR,
        "power": math.gcd(inner, 4096), "last": dims[-1], "last_power": math.gcd(dims[-1], 64), "channels": channels,
        "channels_power": math.gcd(channels, 4096), "pixels": math.prod(dims[2:]) if len(dims) > 2 else 1,
        "moves": moves_last(work), "relaid": work.relaid, "steps": len(names), "read_each": work.read_bytes / results,
        "write_each": work.write_bytes / results, "work_each": work.elements / results, "log_results": math.log(results),
        "log_elements": math.log1p(work.elements), "kernel": window[3] * window[4], "stride": window[5],
        "padded": any(window[9:]), "reads_more": work.read_bytes / max(1, work.write_bytes), **steps_of(names).shape(),
        **memory_shape(work),
    }  # fmt: skip


def _place(known: Sequence[str], name: str = "") -> int:
    return known.index(name) if name in known else -1


def moves_last(work: Workload) -> bool:
    """True for a permutation that does not leave the last axis where it is: it moves single elements."""
    order = work.steps[0].partition(" ")[2] if work.steps and work.steps[0].startswith("Transpose ") else ""
    return bool(order) and order.split(",")[-1] != str(len(order.split(",")) - 1)
