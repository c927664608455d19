"""What came out: the figures of report.json and their printed form."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from hwopt.analysis.workload import kernels
from hwopt.evaluate import Comparison
from hwopt.ir import Graph
from hwopt.plan.plan import Plan
from hwopt.plan.search import versions
from hwopt.target import Target


@dataclass(frozen=True)
class Figures:
    """One model: `score` on the evaluation data, seconds per run, bytes of weights, bytes of the activation arena."""

    score: float | None
    latency_seconds: float
    latency_spread_seconds: float
    latency_source: str  # measured, or the cost model's kind
    weight_bytes: int  # of the model as stored
    library_weight_bytes: int  # of the library, packed for its kernels
    peak_activation_bytes: int


def make_report(
    name: str,
    target: Target,
    threads: int,
    baseline: Figures,
    result: Figures,
    comparison: Comparison | None,
    layers: Sequence[Mapping[str, Any]],
    peers: Mapping[str, float],
    notes: Sequence[str],
) -> dict[str, Any]:
    """report.json as a dictionary; ratios above 1 mean that the result is better."""
    flips = None
    if comparison is not None and comparison.right_to_wrong is not None:
        flips = {
            "right_to_wrong": comparison.right_to_wrong,
            "wrong_to_right": comparison.wrong_to_right,
            "mcnemar_p": comparison.mcnemar_p,
        }
    return {
        "model": name,
        "target": target.name,
        "threads": threads,
        "baseline": dataclasses.asdict(baseline),
        "result": dataclasses.asdict(result),
        "speedup": baseline.latency_seconds / result.latency_seconds,
        "compression": max(baseline.weight_bytes, 1) / max(result.weight_bytes, 1),
        "metric": comparison.metric if comparison else None,
        "samples": comparison.samples if comparison else 0,
        "score_drop": comparison.drop if comparison else None,
        "score_drop_interval": list(comparison.interval) if comparison and comparison.interval else None,
        "paired_flips": flips,
        "peers": {
            peer: {"latency_seconds": seconds, "ratio": seconds / result.latency_seconds} for peer, seconds in peers.items()
        },
        "layers": list(layers),
        "hardware": hardware(target),
        "notes": list(notes),
        "machine": machine(),
        "versions": versions(),
    }


def hardware(target: Target) -> dict[str, Any]:
    """What a roofline needs of a target: peaks of one core in operations per second, bandwidths in bytes per second."""
    memories = [{"name": m.name, "bytes": m.bytes, "bytes_per_second": m.bytes_per_second} for m in target.memories]
    return {"kind": target.kind, "peak": dict(target.peak), "memories": memories}


def layer_table(before: Graph, after: Graph, plan: Plan, target: Target, threads: int) -> list[dict[str, Any]]:
    """One row per kernel of the result: its nodes, dtype, work, predicted time, and the time of the same kernel before."""
    earlier = {work.name: target.cost.estimate(work, threads).seconds for _, work in kernels(before)}
    rows = []
    for region, work in kernels(after):
        node = region.anchor
        rows.append(
            {
                "name": work.name,
                "op": node.op,
                "dtype": work.dtype,
                "macs": work.macs,
                "bytes": work.bytes,
                "weight_bytes": work.weight_bytes,
                "predicted_seconds_before": earlier.get(work.name),
                "predicted_seconds": target.cost.estimate(work, threads).seconds,
                "changes": [one for one in dict.fromkeys(h for n in region.nodes for h in n.history) if _decided(one, plan)],
            }
        )
    return rows


def _decided(history: str, plan: Plan) -> bool:
    """True for a stamp of one of the plan's families; the clean-up passes are left out of the table."""
    family = history.partition("{")[0]
    return any(text.partition("{")[0] == family for decision in plan.decisions for text in decision.by)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "cpu": model,
        "architecture": platform.machine(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        "system": platform.system(),
        "python": platform.python_version(),
    }


def summary(report: Mapping[str, Any]) -> str:
    """The table a person reads."""
    rows = [("", "latency", "spread", "score", "weights", "activations")]
    for label, key in (("float", "baseline"), ("optimized", "result")):
        rows.append((label, *_cells(report[key])))
    for peer, found in report["peers"].items():
        rows.append((peer, _milliseconds(found["latency_seconds"]), "", "", "", ""))
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


def _cells(figures: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    score = "" if figures["score"] is None else f"{figures['score']:.4f}"
    latency = _milliseconds(figures["latency_seconds"]) + ("" if figures["latency_source"] == "measured" else " (predicted)")
    return (
        latency,
        _milliseconds(figures["latency_spread_seconds"]),
        score,
        _size(figures["weight_bytes"]),
        _size(figures["peak_activation_bytes"]),
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _size(count: int) -> str:
    return f"{count / 1e6:.3g} MB" if count >= 1e6 else f"{count / 1e3:.3g} kB"
