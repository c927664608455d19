"""The k largest or smallest of each row with their places, equal ones by place: a merge sort that keeps k of a run."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from hwopt.backends.tvm.kernels.code import Code, Value, function, load


@dataclass(frozen=True)
class TopkSpec:
    """The first `k` of `rows` rows of `size` float32 values, from the largest or the smallest on."""

    rows: int
    size: int
    k: int
    largest: bool


@dataclass(frozen=True)
class Runs:
    """Sorted runs, one at every `width` elements, with the places of their values."""

    values: Value
    places: Value


def build(spec: TopkSpec, symbol: str) -> tirx.PrimFunc:
    """PrimFunc(data [rows x size], first [1] int32, values [rows x k], places [rows x k] int64): places count from `first` on.

    (TVM takes a function of one tensor for a reshape.)
    """
    data = tirx.decl_buffer((spec.rows * spec.size,), "float32", "data")
    values = tirx.decl_buffer((spec.rows * spec.k,), "float32", "values")
    places = tirx.decl_buffer((spec.rows * spec.k,), "int64", "places")
    begin = tirx.decl_buffer((1,), "int32", "first")
    code = Code()
    here, there = (
        Runs(code.alloc(f"values_{side}", spec.size, "float32"), code.alloc(f"places_{side}", spec.size, "int32"))
        for side in ("here", "there")
    )

    def row(inner: Code, number: Value) -> None:
        def given(some: Code, at: Value) -> None:
            some.store(here.values, at, load(data, number * spec.size + at))
            some.store(here.places, at, load(begin, 0) + at)

        inner.loop("element", spec.size, given)
        source, target, width = here, there, 1
        while width < spec.size:
            _merge(inner, spec, source, target, width)
            source, target, width = target, source, 2 * width

        def kept(some: Code, at: Value) -> None:
            some.store(values, number * spec.k + at, load(source.values, at))
            some.store(places, number * spec.k + at, tirx.Cast("int64", load(source.places, at)))

        inner.loop("kept", spec.k, kept)

    code.loop("row", spec.rows, row)
    return function(symbol, [data, begin, values, places], code)


def _merge(code: Code, spec: TopkSpec, source: Runs, target: Runs, width: int) -> None:
    """Two neighbouring runs of at most min(width, k) elements into one of at most min(2 width, k), for all of them."""
    length, last = min(width, spec.k), spec.size - 1

    def pair(inner: Code, number: Value) -> None:
        first = inner.bind("first", number * (2 * width))
        second = inner.bind("second", first + width)
        ends = [inner.bind("end", tirx.Min(start + length, spec.size)) for start in (first, second)]
        at = [inner.alloc(f"at_{side}", 1, "int32") for side in ("first", "second")]
        inner.store(at[0], 0, first)
        inner.store(at[1], 0, second)

        def step(some: Code, index: Value) -> None:
            left, right = (some.bind("next", load(one, 0)) for one in at)
            safe = [some.bind("safe", tirx.Min(one, last)) for one in (left, right)]
            one, other = (some.bind("value", load(source.values, place)) for place in safe)
            later = tirx.LT(one, other) if spec.largest else tirx.LT(other, one)  # equal values stay in order
            taken = some.bind("taken", tirx.And(tirx.LT(left, ends[0]), tirx.Or(tirx.GE(right, ends[1]), tirx.Not(later))))
            some.store(target.values, first + index, tirx.Select(taken, one, other))
            chosen = tirx.Select(taken, load(source.places, safe[0]), load(source.places, safe[1]))
            some.store(target.places, first + index, chosen)
            some.store(at[0], 0, left + tirx.Cast("int32", taken))
            some.store(at[1], 0, right + 1 - tirx.Cast("int32", taken))

        inner.loop("step", tirx.Min(min(2 * width, spec.k), spec.size - first), step)

    code.loop("pair", -(-spec.size // (2 * width)), pair)
