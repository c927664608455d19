"""Which of a group's options are worth a look."""

from __future__ import annotations

from typing import Any

import pytest

from hwopt.pipeline import Refusal
from hwopt.plan.budget import Budget
from hwopt.plan.options import Base, Option, useful
from hwopt.target import Cost
from passes.low_rank import LowRank


class Prices:
    """A pricer of options that were priced already."""

    scale = 1.0

    def cost(self, work: object) -> Cost:
        return Cost()


@pytest.mark.parametrize(("left", "kept"), [(17.0, 2), (280.0, 1)])
def test_small_differences_of_large_gains_count_where_little_is_left(left: float, kept: int) -> None:
    """265 of 282 us saved, or 267: that leaves 17 us or 15."""
    anyhow: Any = {}
    base = Base({}, 1000.0, 100, anyhow)
    both = [
        Option("fc", (LowRank(("fc",), rank),), gain, -1000 // rank, anyhow, left=left) for rank, gain in ((64, 265), (32, 267))
    ]
    refused: list[Refusal] = []
    prices: Any = Prices()
    assert len(useful(both, base, prices, Budget(), refused)) == kept
    assert ["is not faster" in one.reason for one in refused] == [True] * (2 - kept)
