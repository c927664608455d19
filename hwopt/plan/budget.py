"""What the user allows: a drop of the score, and limits on latency, size, memory and energy."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hwopt.errors import UsageError, did_you_mean

_UNITS = {
    "latency": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9},
    "size": {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
}
_UNITS["memory"] = _UNITS["size"]
_UNITS["energy"] = {"J": 1.0, "mJ": 1e-3, "uJ": 1e-6, "nJ": 1e-9}
_FIELDS = {"latency": "latency_seconds", "size": "weight_bytes", "memory": "activation_bytes", "energy": "joules"}
_AMOUNTS = {"latency_seconds": "seconds", "weight_bytes": "bytes", "activation_bytes": "peak_bytes", "joules": "joules"}
_KINDS = {amount: kind for kind, name in _FIELDS.items() for shown, amount in _AMOUNTS.items() if shown == name}


@dataclass(frozen=True)
class Budget:
    """None means no limit. `max_drop` is a fraction of 1: 0.01 allows one point."""

    max_drop: float = 0.01
    latency_seconds: float | None = None
    weight_bytes: float | None = None
    activation_bytes: float | None = None

    joules: float | None = None

    @property
    def limited(self) -> bool:
        """True if anything but the score is limited."""
        return bool(self.limits())

    def limits(self) -> dict[str, float]:
        """The limits that are stated, by the names of `Amounts`."""
        found = ((amount, getattr(self, name)) for name, amount in _AMOUNTS.items())
        return {amount: limit for amount, limit in found if limit is not None}


@dataclass(frozen=True)
class Amounts:
    """What one run of a model takes: seconds, bytes of weights, peak bytes of activations, joules."""

    seconds: float
    bytes: float
    peak_bytes: float
    joules: float = 0.0


def exceeded(budget: Budget, amounts: Amounts) -> str:
    """Which limit these figures break, with the numbers; empty if none."""
    for name, limit in budget.limits().items():
        found = getattr(amounts, name)
        if found > limit:
            kind, one, unit = unit_of(name, limit)
            return f"{'weights' if kind == 'size' else kind} {digits(found / one)} {unit} of {digits(limit / one)} {unit}"
    return ""


def digits(value: float) -> str:
    """Four digits, or all those before the point: no exponent where the unit is small for what it shows."""
    return f"{value:.4g}" if value < 1e4 else f"{value:.0f}"


def unit_of(amount: str, limit: float) -> tuple[str, float, str]:
    """The word of --budget for an amount, and the decimal unit that shows this limit as people write it: 40 KB, not 0.04 MB."""
    kind = _KINDS[amount]
    units = sorted((value, unit) for unit, value in _UNITS[kind].items() if "i" not in unit)
    value, unit = next((one for one in reversed(units) if one[0] <= limit), units[0])
    return kind, value, unit


def parse_budget(max_drop: str | float, limits: tuple[str, ...] = ()) -> Budget:
    """`1%` (or 0.01) and `latency=2ms`, `size=1MB`, `memory=4MB`, `energy=2mJ`, several in one text joined by commas."""
    found: dict[str, float] = {}
    for limit in (part for text in limits for part in re.split(r"[,|]", text) if part.strip()):
        kind, _, amount = limit.strip().partition("=")
        if kind not in _FIELDS:
            raise UsageError(f"unknown budget {kind!r}", place=f"--budget {limit}", hint=did_you_mean(kind, _FIELDS))
        found[_FIELDS[kind]] = _quantity(kind, amount, limit)
    return Budget(max_drop=_fraction(max_drop), **found)


def _quantity(kind: str, amount: str, whole: str) -> float:
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*([A-Za-z]+)\s*", amount)
    units = _UNITS[kind]
    spelled = {unit.lower(): unit for unit in units}
    if match is None or match[2].lower() not in spelled:
        raise UsageError(
            f"cannot read {amount!r}", place=f"--budget {whole}", hint=f"write a number and one of {', '.join(units)}"
        )
    try:
        value = float(match[1]) * units[spelled[match[2].lower()]]
    except ValueError as error:
        raise UsageError(f"{match[1]!r} is no number", place=f"--budget {whole}") from error
    if value <= 0:
        raise UsageError("must be above zero", place=f"--budget {whole}")
    return value


def _fraction(text: str | float) -> float:
    try:
        value = float(text[:-1]) / 100 if isinstance(text, str) and text.endswith("%") else float(text)
    except ValueError as error:
        raise UsageError(f"cannot read {text!r}", place="--max-drop", hint="write 1% or 0.01") from error
    if isinstance(text, str) and not text.endswith("%") and value >= 1:
        raise UsageError(f"{text} would be the whole score", place="--max-drop", hint=f"write {text}% or {value / 100:g}")
    if not 0 <= value <= 1:
        raise UsageError(f"{text} is not between 0 and 100 %", place="--max-drop", hint="write 1% or 0.01")
    return value
