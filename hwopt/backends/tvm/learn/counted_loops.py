"""The same counts for kernels without multiplications: elementwise, pools, rows (softmax, normalization) and moves of data."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hwopt.backends.tvm.learn.counted import LINE, Counted, Numbers, floats, memory_shape, step_names, steps_of, traffic
from hwopt.target import Workload

STEPS = ("Add", "Mul", "Relu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Gelu", "Softmax", "LayerNormalization",
         "GlobalAveragePool", "MaxPool", "AveragePool", "Transpose", "QuantizeLinear", "DequantizeLinear", "Cast", "Div",
         "Resize", "Concat", "Slice", "Gather", "Erf", "Sub", "Pow", "Sqrt", "ReduceMean")  # fmt: skip
DTYPES = ("float32", "bfloat16", "int8", "uint8", "int32", "int64")
VECTOR, WIDEST = 16, 64  # lanes of generic schedules, and of their sums over outer axes (generic.py)
PARALLEL = 16_384  # elements from which they are, as in generic.py
WAYS, SETS = 12, 64  # of a first cache: lines that lie a power of two apart share sets


def loops(work: Workload, threads: int) -> Counted:
    """Counts of vectors where whole ones are filled, of single elements where not, and of bytes."""
    dims = work.dims or (1,)
    family = _family(work)
    inner = max(1, dims[1] if len(dims) >= 4 and work.kind in ("elementwise", "pool") else dims[-1])  # channels lie last
    times, facts = _times(work, dims, inner), _facts(work, dims, inner)
    parallel = threads > 1 and work.elements >= PARALLEL
    split = {name: value / threads if parallel and name != "call" else value for name, value in times.items()}
    return Counted(family, {**split, "launch": 1000.0 * parallel}, floats(facts))


def _family(work: Workload) -> str:
    """Kernels that are made in the same way."""
    names = step_names(work)
    if "Softmax" in names or "LayerNormalization" in names:
        return "rows"
    if work.kind == "pool":
        kind = "windows" if work.window else "means"
        return f"{kind} {work.dtype}"
    if work.kind == "elementwise":
        return "relaid" if work.relaid else "elements"
    return "moves" if work.kind == "move" else "reductions"


def _times(work: Workload, dims: tuple[int, ...], inner: int) -> Numbers:
    """Elementwise code is vectors if they fill the channels, else single elements; sums are in vectors that divide them."""
    results, left, behind = float(math.prod(dims)), inner % VECTOR, steps_of(step_names(work))
    rows, each = results / inner, work.elements / max(1.0, results)
    even = float(left == 0)
    normalized = float("LayerNormalization" in step_names(work))
    return {
        "vectors": even * work.elements / VECTOR, "single": (1 - even) * work.elements, "results": results / VECTOR,
        "divided": work.elements / math.gcd(inner, WIDEST), "row_vectors": rows * -(-inner // VECTOR) * each,
        "row_pieces": rows * left.bit_count() * each, "rows": rows, "normalized": normalized * rows * -(-inner // VECTOR),
        "normalized_rows": normalized * rows, "moved": results * float(moves_last(work)),
        "crowded": results * _crowded(work, dims),
        "single_heavy": behind.heavy * results * (1 - even), **behind.times(results / VECTOR), **traffic(work), "call": 100.0,
    }  # fmt: skip


def _crowded(work: Workload, dims: tuple[int, ...]) -> float:
    """1 where an image is read channel by channel and its channels are more lines than the sets take that they fall into."""
    if not work.relaid or len(dims) < 3:
        return 0.0
    apart = 4 * math.prod(dims[2:])
    return float(dims[1] > WAYS * max(1, SETS * LINE // math.gcd(apart, SETS * LINE)))


def _facts(work: Workload, dims: tuple[int, ...], inner: int) -> Numbers:
    names, results, window = step_names(work), float(max(1, math.prod(dims))), work.window or (1,) * 9 + (0,) * 4
    channels, pixels = dims[1] if len(dims) > 1 else 1, math.prod(dims[2:]) if len(dims) > 2 else 1
    return {
        "first": _place(STEPS, *names[:1]), "second": _place(STEPS, *names[1:2]), "dtype": _place(DTYPES, work.dtype),
        "rank": len(dims), "inner": inner, "left": inner % VECTOR, "whole": inner // VECTOR, "power": math.gcd(inner, 4096),
        "last": dims[-1], "last_power": math.gcd(dims[-1], 64), "channels": channels, "channels_power": math.gcd(channels, 4096),
        "pixels": pixels, "pixels_power": math.gcd(4 * pixels, 4096), "lines": channels * math.gcd(4 * pixels, 4096) / 4096,
        "moves": moves_last(work), "steps": len(names), "read_each": work.read_bytes / results,
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
