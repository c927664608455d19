"""What the parts of a suite find, row by row, and where they may work."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np

from benchmarks.layout import Row, higher_is_better
from hwopt.evaluate import Comparison, compare

FLOAT = "float"


@dataclass(frozen=True)
class Setting:
    """Where the data lie, where artifacts may be written, with how many threads they run, and whether little must do."""

    pictures: Path
    fashion: Path
    scratch: Path
    threads: int | None = None
    quick: bool = False


@dataclass
class Findings:
    """Rows are printed to stderr as they are found: long suites show what they are at."""

    rows: list[Row] = field(default_factory=list)
    summary: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        peers = ", ".join(f"{name} {value:.4g}" for name, value in row.peers.items())
        self.say(f"{row.case}: {row.metric} {row.ours:.4g} {row.unit} ({peers})")

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.say(text)

    def say(self, text: str) -> None:
        click.echo(f"{time.perf_counter() - self.started:7.0f} s  {text}", err=True)

    def top_one(self, name: str, right: Mapping[str, np.ndarray]) -> None:
        """Rows and paired comparisons with `float` of every variant, given 1 or 0 for each sample."""
        for variant, found in right.items():
            if variant == FLOAT:
                continue
            pair = compare("top-1 accuracy", right[FLOAT], found)
            self.add(higher_is_better(f"{name} {variant}", pair.metric, "1", pair.score, {"hwopt float": pair.baseline}))
            self.summary |= {f"{name}_{variant}_{key}": value for key, value in figures(pair).items()}


def figures(pair: Comparison) -> dict[str, float]:
    """A paired comparison by name: the drop with its 95 % interval, flips, McNemar's p."""
    low, high = pair.interval or (None, None)
    found = {
        "score": pair.score, "drop": pair.drop, "drop_low": low, "drop_high": high, "samples": pair.samples,
        "right_to_wrong": pair.right_to_wrong, "wrong_to_right": pair.wrong_to_right, "mcnemar_p": pair.mcnemar_p,
    }  # fmt: skip
    return {key: value for key, value in found.items() if value is not None}
