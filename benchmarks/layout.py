"""The one layout of every benchmark's result; a ratio above 1 means that hwopt is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hwopt.plan.search import versions
from hwopt.report import machine


@dataclass(frozen=True)
class Row:
    """One figure: ours, the peers' by name, and the ratio to the best of them (None where nothing compares)."""

    case: str
    metric: str
    unit: str
    ours: float
    peers: Mapping[str, float]
    ratio: float | None


def lower_is_better(case: str, metric: str, unit: str, ours: float, peers: Mapping[str, float]) -> Row:
    return Row(case, metric, unit, ours, dict(peers), min(peers.values()) / ours if peers and ours else None)


def higher_is_better(case: str, metric: str, unit: str, ours: float, peers: Mapping[str, float]) -> Row:
    return Row(case, metric, unit, ours, dict(peers), ours / max(peers.values()) if peers and max(peers.values()) else None)


def result(suite: str, rows: Sequence[Row], summary: Mapping[str, float]) -> dict[str, Any]:
    return {
        "suite": suite, "machine": machine(), "versions": versions(),
        "rows": [asdict(row) for row in rows], "summary": dict(summary),
    }  # fmt: skip
