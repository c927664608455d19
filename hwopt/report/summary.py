"""report.json, and a Pareto front, as a person reads them in a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hwopt.plan.front import Point


def summary(report: Mapping[str, Any]) -> str:
    """The table a person reads."""
    rows = [("", "latency", "spread", "score", "weights", "in the library", "activations")]
    for label, key in (("float", "baseline"), ("optimized", "result")):
        rows.append((label, *_cells(report[key])))
    for peer, found in report["peers"].items():
        rows.append((peer, milliseconds(found["latency_seconds"]), "", "", "", "", ""))
    lines = [f"{report['model']} on {report['target']}, threads: {report['threads']}", *_aligned(rows)]
    inside = f" ({report['library_compression']:.2f} in the library)" if "library_compression" in report else ""
    lines.append(f"speed-up {report['speedup']:.2f}, weights {report['compression']:.2f} times smaller{inside}")
    if report["score_drop"] is not None:
        low, high = report["score_drop_interval"] or (math.nan, math.nan)
        interval = f"95 % interval {low:+.4f} to {high:+.4f}, {report['samples']} samples" if low == low else "one number"
        lines.append(f"drop of {report['metric']} {report['score_drop']:+.4f} ({interval})")
    if report["paired_flips"]:
        flips = report["paired_flips"]
        lines.append(f"paired flips: {flips['right_to_wrong']} right to wrong, {flips['wrong_to_right']} wrong to right")
    lines += _simulated_lines(report.get("simulated", {}))
    return "\n".join([*lines, *(f"note: {note}" for note in report["notes"])])


def front_table(points: Sequence[Point]) -> str:
    """A Pareto front, gentlest first: predicted costs, measured score, and the file of each plan."""
    rows = [("", "latency", "weights", "activations", "energy", "score", "drop")]
    for point in points:
        energy = f"{point.joules * 1e6:.3g} uJ" if point.joules else ""
        costs = (milliseconds(point.seconds), size(point.bytes), size(point.peak_bytes), energy)
        rows.append((point.plan or "unchanged", *costs, f"{point.score:.4f}", f"{point.drop:+.4f}"))
    return "\n".join(_aligned(rows))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _simulated_lines(found: Mapping[str, Any]) -> list[str]:
    """What the model of an array counted, for targets that have one."""
    return [
        f"simulated {label}: {one['array_cycles']:,} cycles on the array, {one['stall_cycles']:,} waiting for memory, "
        f"{one['other_cycles']:,} elsewhere, {one['joules'] * 1e6:.3g} uJ"
        if one["kernels"]
        else f"simulated {label}: no kernel runs on the array"
        for label, key in (("float", "baseline"), ("optimized", "result")) if (one := found.get(key))
    ]  # fmt: skip


def _cells(figures: Mapping[str, Any]) -> tuple[str, str, str, str, str, str]:
    score = "" if figures["score"] is None else f"{figures['score']:.4f}"
    latency, measured = milliseconds(figures["latency_seconds"]), figures["latency_source"] == "measured"
    return (
        latency if measured else f"{latency} (predicted)",
        milliseconds(figures["latency_spread_seconds"]) if measured else "",
        score,
        size(figures["weight_bytes"]),
        size(figures["library_weight_bytes"]),
        size(figures["peak_activation_bytes"]),
    )


def milliseconds(seconds: float) -> str:
    """Three digits and the unit."""
    return f"{seconds * 1e3:.3g} ms"


def size(count: float) -> str:
    """Bytes in kB or MB, three digits."""
    return f"{count / 1e6:.3g} MB" if count >= 1e6 else f"{count / 1e3:.3g} kB"
