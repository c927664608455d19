"""What a search over recovery turns: learning rate, temperature, length and shape of a recipe's training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hwopt.recover.recipe import Recipe

FACTORS: Mapping[str, tuple[float, ...]] = {
    "lr": (1.0, 0.3, 3.0), "epochs": (1.0, 0.5), "softness": (1.0, 4.0), "short": (1.0, 3.0),
}  # fmt: skip
VALUES: Mapping[str, tuple[Any, ...]] = {
    "temperature": (1.0, 4.0),
    "warmup": (0.05, 0.2),
    "stages": (2, 4),
    "optimizer": ("sgd",),
}
PREFIX = "recover."


def recovery_knobs(recipe: Recipe) -> dict[str, tuple[Any, ...]]:
    """`recover.lr` -> values, the recipe's own one first, of all that mean something to it."""
    known = {one.name for one in dataclasses.fields(recipe)}
    idle = {"temperature"} if not recipe.logits else set()
    idle |= {"epochs"} if recipe.steps else set()
    found: dict[str, tuple[Any, ...]] = {}
    for name in (*FACTORS, *VALUES):
        if name in known - idle:
            own = getattr(recipe, name)
            others = [own * factor for factor in FACTORS[name]] if name in FACTORS else VALUES[name]
            found[PREFIX + name] = tuple(dict.fromkeys((own, *others)))
    return found


def turned(recipe: Recipe, knobs: Mapping[str, Any]) -> Recipe:
    """The recipe with what of `recovery_knobs` is among these; other names are those of passes."""
    return dataclasses.replace(recipe, **{name.removeprefix(PREFIX): v for name, v in knobs.items() if name.startswith(PREFIX)})
