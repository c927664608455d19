"""The one layout of every benchmark's result; a ratio above 1 means that hwopt is better."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hwopt.plan.search import versions
from hwopt.report.figures import machine

PEERS = ("openvino", "nncf", "torch")


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


def result(suite: str, rows: Sequence[Row], summary: Mapping[str, float], notes: Sequence[str] = ()) -> dict[str, Any]:
    """`notes` say what was left out, or failed, and why; without any the key is absent."""
    found = {
        "suite": suite, "machine": machine(), "versions": {**versions(), **_peers()},
        "rows": [asdict(row) for row in rows], "summary": dict(summary),
    }  # fmt: skip
    return {**found, "notes": list(notes)} if notes else found


def _peers() -> dict[str, str]:
    """Versions of the runtimes to compare with, where they are installed."""
    installed = {found.metadata["Name"].lower(): found.version for found in importlib.metadata.distributions()}
    return {name: installed[name] for name in PEERS if name in installed}
