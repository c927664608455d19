"""The figures of report.json."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from hwopt.analysis.workload import kernels
from hwopt.backends.tvm.learn.counted_winograd import products_of
from hwopt.evaluate import Comparison
from hwopt.ir import Graph
from hwopt.plan.plan import Plan
from hwopt.plan.search import versions
from hwopt.target import Target, Workload


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
    """report.json as a dictionary; ratios above 1 mean that the result is better. `layers` as layer_table gives them."""
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
        "library_compression": max(baseline.library_weight_bytes, 1) / max(result.library_weight_bytes, 1),
        "metric": comparison.metric if comparison else None,
        "samples": comparison.samples if comparison else 0,
        "score_drop": comparison.drop if comparison else None,
        "score_drop_interval": list(comparison.interval) if comparison and comparison.interval else None,
        "paired_flips": flips,
        "peers": {
            peer: {"latency_seconds": seconds, "ratio": seconds / result.latency_seconds} for peer, seconds in peers.items()
        },
        "layers": list(layers),
        "hardware": hardware(target, threads, layers),
        "notes": list(notes),
        "machine": machine(),
        "versions": versions(),
    }


def hardware(target: Target, threads: int, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a roofline needs of a target: peaks of one core in operations per second, bandwidths in bytes per second.

    Processors run faster than the clock that their systems state. `clock` is how many times, by the reference in a table of
    measured kernels, or at least so many that no kernel in `layers` does more than the peak; peaks and caches are raised by it.
    """
    cores = threads if target.kind == "cpu" else 1
    shown = [
        2 * row.get("products", row["macs"]) / row["predicted_seconds"] / (target.peak[row["dtype"]] * cores)
        for row in layers if row["dtype"] in target.peak and row["predicted_seconds"] > 0
    ]  # fmt: skip
    clock = max(getattr(target.cost, "clock", 1.0), *shown, 1.0)
    *caches, far = target.memories
    levels = [*((one, clock) for one in caches), (far, 1.0)]
    memories = [{"name": m.name, "bytes": m.bytes, "bytes_per_second": m.bytes_per_second * by} for m, by in levels]
    return {"kind": target.kind, "peak": {k: v * clock for k, v in target.peak.items()}, "memories": memories, "clock": clock}


def layer_table(before: Graph, after: Graph, plan: Plan, target: Target, threads: int) -> list[dict[str, Any]]:
    """One row per kernel of the result: its nodes, dtype, work, predicted time, and the time of the same kernel before.

    `products` are the multiply-adds that the kernel does for `macs`: fewer where Winograd's algorithm computes it.
    Times are in the plan's seconds: multiplied by what the measured model takes over what was predicted for it.
    """
    earlier = {work.name: _seconds(work, plan, target, threads) for _, work in kernels(before)}
    rows = []
    for region, work in kernels(after):
        node = region.anchor
        rows.append(
            {
                "name": work.name,
                "op": node.op,
                "dtype": work.dtype,
                "macs": work.macs,
                "products": products_of(work, target.microkernels.get(work.dtype)) if target.spacious else work.macs,
                "bytes": work.bytes,
                "weight_bytes": work.weight_bytes,
                "predicted_seconds_before": earlier.get(work.name),
                "predicted_seconds": _seconds(work, plan, target, threads),
                "changes": [one for one in dict.fromkeys(h for n in region.nodes for h in n.history) if _decided(one, plan)],
            }
        )
    return rows


def _seconds(work: Workload, plan: Plan, target: Target, threads: int) -> float:
    return plan.time_scale * target.cost.estimate(work, threads).seconds


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
