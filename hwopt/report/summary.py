"""report.json as a person reads it in a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def summary(report: Mapping[str, Any]) -> str:
    """The table a person reads."""
    rows = [("", "latency", "spread", "score", "weights", "in the library", "activations")]
    for label, key in (("float", "baseline"), ("optimized", "result")):
        rows.append((label, *_cells(report[key])))
    for peer, found in report["peers"].items():
        rows.append((peer, milliseconds(found["latency_seconds"]), "", "", "", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{report['model']} on {report['target']}, threads: {report['threads']}"]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append(f"speed-up {report['speedup']:.2f}, weights {report['compression']:.2f} times smaller")
    if report["score_drop"] is not None:
        low, high = report["score_drop_interval"] or (math.nan, math.nan)
        interval = f"95 % interval {low:+.4f} to {high:+.4f}, {report['samples']} samples" if low == low else "one number"
        lines.append(f"drop of {report['metric']} {report['score_drop']:+.4f} ({interval})")
    if report["paired_flips"]:
        flips = report["paired_flips"]
        lines.append(f"paired flips: {flips['right_to_wrong']} right to wrong, {flips['wrong_to_right']} wrong to right")
    return "\n".join([*lines, *(f"note: {note}" for note in report["notes"])])


def _cells(figures: Mapping[str, Any]) -> tuple[str, str, str, str, str, str]:
    score = "" if figures["score"] is None else f"{figures['score']:.4f}"
    latency = milliseconds(figures["latency_seconds"]) + ("" if figures["latency_source"] == "measured" else " (predicted)")
    return (
        latency,
        milliseconds(figures["latency_spread_seconds"]),
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
