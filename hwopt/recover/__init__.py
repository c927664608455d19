"""Getting the accuracy back by training: distillation from the float model, quantization-aware training. Needs torch.

    better = recover(graph, teacher, loader, "distill{epochs=3}", loss=my_loss)

The graph keeps its structure and its types: integer weights are trained as floats behind their quantizers and written back as
integers. `train` is one training, of which schedules are made.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

from hwopt.errors import ToolchainError
from hwopt.ir import Graph
from hwopt.recover.case import Case, Check, Checkpoints, Outcome, Training
from hwopt.recover.dkm import Dkm
from hwopt.recover.netadapt import NetAdapt
from hwopt.recover.recipe import Distill, Qat, Recipe
from hwopt.recover.registry import RECIPES, parse_recipe
from hwopt.recover.schedules import Gradual, Lottery

__all__ = [
    "RECIPES", "Case", "Check", "Checkpoints", "Distill", "Dkm", "Gradual", "Lottery", "NetAdapt", "Outcome", "Qat", "Recipe",
    "Training", "parse_recipe", "recover", "recovered", "require",
]  # fmt: skip


def recover(graph: Graph, teacher: Graph, data: Any, recipe: str | Recipe = "distill", **options: Any) -> Graph:
    """The graph, trained to be like `teacher` on `data`; the same one if no check found it better.

    `data` are Samples, arrays by input name, or any iterable of {input: array}, of (that, labels) or of what a torch DataLoader
    yields. Options are those of Case: `loss(outputs, teacher's outputs, labels)`, `held_out`, `score`, `progress`, `checkpoints`.
    Raises ToolchainError without torch.
    """
    return recovered(Case(graph, teacher, data, **options), recipe).graph


def recovered(case: Case, recipe: str | Recipe = "distill") -> Outcome:
    """The same with what was seen on the way, and the recipe that makes it again.

    Files in a folder of checkpoints are removed when it is done; after an interrupt, or an error, they stay.
    """
    require()
    if not isinstance(case.checkpoints, Path):
        return parse_recipe(recipe).recover(case)
    checkpoints = Checkpoints(case.checkpoints)
    outcome = parse_recipe(recipe).recover(dataclasses.replace(case, checkpoints=checkpoints))
    if not outcome.interrupted:
        checkpoints.clear()
    return outcome


def require() -> None:
    """Raise ToolchainError with the next step where torch is missing."""
    if importlib.util.find_spec("torch") is None:
        raise ToolchainError("needs torch, which is not installed", place="recovery", hint="pip install 'hwopt[torch]'")
