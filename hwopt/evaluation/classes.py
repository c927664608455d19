"""Who pays for a compression: the score class by class.

A small drop on average can be a large one for a few classes: Hooker et al., "What Do Compressed Deep Neural Networks Forget?"
(arXiv:1911.05248). With many classes some lose by chance, so p-values are also given as Holm's method corrects them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hwopt.evaluate import compare

WORST = 5


def class_data(groups: np.ndarray, before: np.ndarray, after: np.ndarray, names: Sequence[str], by: str) -> dict[str, Any]:
    """One row per class that has samples, those that lose most first; `groups` is the class of each sample."""
    rows = [_row(int(one), groups == one, before, after, names) for one in np.unique(groups)]
    rows.sort(key=lambda row: (-row["drop"] * row["samples"], row["mcnemar_p"], row["class"]))
    _correct(rows)
    worst = [row for row in rows if row["drop"] > 0][:WORST]
    losing = sum(row["drop"] > 0 for row in rows)
    return {
        "by": by,
        "rows": rows,
        "worst": [row["name"] for row in worst],
        "losing": losing,
        "gaining": sum(row["drop"] < 0 for row in rows),
        "significant": [row["name"] for row in rows if row["holm_p"] < 0.05 and row["drop"] > 0],
    }


def _row(number: int, chosen: np.ndarray, before: np.ndarray, after: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    found = compare("", before[chosen], after[chosen])
    return {
        "class": number,
        "name": names[number] if number < len(names) else str(number),
        "samples": found.samples,
        "float": found.baseline,
        "compressed": found.score,
        "drop": found.drop,
        "right_to_wrong": found.right_to_wrong,
        "wrong_to_right": found.wrong_to_right,
        "mcnemar_p": 1.0 if found.mcnemar_p is None else found.mcnemar_p,
    }


def _correct(rows: list[dict[str, Any]]) -> None:
    """Add `holm_p`: the p-values of all classes together, Holm (1979)."""
    ordered = sorted(rows, key=lambda row: row["mcnemar_p"])
    highest = 0.0
    for place, row in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - place) * row["mcnemar_p"]))
        row["holm_p"] = highest
