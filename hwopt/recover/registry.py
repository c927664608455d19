"""All recipes by name, and how their text is read."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hwopt.pipeline import parse_as
from hwopt.recover.dkm import Dkm
from hwopt.recover.netadapt import NetAdapt
from hwopt.recover.recipe import Distill, Qat, Recipe, checked_recipe
from hwopt.recover.schedules import Gradual, Lottery

KINDS = (Distill, Qat, Dkm, Gradual, NetAdapt, Lottery)
RECIPES: Mapping[str, type[Recipe]] = MappingProxyType({kind.name: kind for kind in KINDS})


def parse_recipe(text: str | Recipe) -> Recipe:
    """`distill`, `distill{epochs=3}` or `distill:epochs=3,lr=0.01`. Raises UsageError that names what is wrong."""
    if isinstance(text, Recipe):
        return checked_recipe(text)
    head, colon, rest = text.strip().partition(":")
    spelled = f"{head}{{{rest}}}" if colon and "{" not in head else text
    return checked_recipe(parse_as(spelled, RECIPES, "recovery"))
