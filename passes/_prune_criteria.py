"""Every criterion by its name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from passes._prune_gradients import fisher, obd, taylor
from passes._prune_repair import obs
from passes._prune_scores import Criterion, activation, geometric_median, l1, l2, random

CRITERIA: Mapping[str, Criterion] = MappingProxyType({
    "activation": activation, "fisher": fisher, "fpgm": geometric_median, "l1": l1, "l2": l2, "magnitude": l1, "obd": obd,
    "obs": obs, "random": random, "taylor": taylor,
})  # fmt: skip
