"""How a changed model is trained: one recipe, written `distill{epochs=3,temperature=2}`; its text parses back into it."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from hwopt.errors import UsageError
from hwopt.pipeline import printed

if TYPE_CHECKING:
    from hwopt.recover.case import Case, Outcome
    from hwopt.recover.torch.student import Student

OPTIMIZERS = ("adam", "sgd")
STATISTICS = ("frozen", "estimated")


@dataclass(frozen=True)
class Recipe:
    """One training of the parameters that a changed graph has. Subclasses say by what: a loss, or a schedule around it.

    `steps`, `until` and `threads` are filled in when a recipe has run: written with them it does the same again, bit for bit.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""

    epochs: float = 3.0
    minutes: float = 0.0  # at most so long; 0: no limit. Fewer steps are planned where the time does not suffice
    steps: int = 0  # of the schedule, instead of epochs
    until: int = 0  # stop after so many of them: where the best state was found; -1: before the first
    batch: int = 64  # samples per step, where the graph takes more than its own batch and there are so many
    lr: float = 0.001
    optimizer: str = "adam"  # or sgd, with momentum 0.9
    warmup: float = 0.05  # share of the steps in which the learning rate rises; it falls along a cosine afterwards
    patience: int = 4  # stop after so many checks without a better state; 0: never
    checks: int = 10  # of the held-out samples, spread over the steps
    holdout: float = 0.1  # share of the training data that chooses the state and is not trained on
    scales: bool = True  # learn the step sizes of quantizers (LSQ)
    keep_zeros: bool = False  # weights that are zero stay zero: sparse ones
    statistics: str = "frozen"  # of a BatchNormalization that is still there; or estimated on the changed graph, before step 1
    logits: float = 1.0  # weight of the teacher's outputs in the loss
    temperature: float = 2.0
    features: float = 0.0  # weight of intermediate values of the same name and shape
    hard: float = 0.0  # weight of the labels' cross entropy
    loss: str = ""  # module:function of the user's instead: loss(outputs, teacher's outputs, labels) -> number
    seed: int = 0
    threads: int = 0  # of torch; 0: as many as it takes by itself (OMP_NUM_THREADS). Another number sums in another order

    def recover(self, case: Case) -> Outcome:
        """Train; a schedule overrides this and trains several times."""
        from hwopt.recover.torch.train import train

        return train(case, self)

    def student(self, case: Case) -> Student:
        """The case's graph as it is trained."""
        from hwopt.recover.torch.coded import CodedStudent

        return CodedStudent(case.graph, scales=self.scales, keep_zeros=self.keep_zeros)

    def conditions(self) -> tuple[tuple[str, bool], ...]:
        """Options of a subclass, and whether their values mean something."""
        return ()

    def usual(self) -> Recipe:
        """This recipe without what one run filled in."""
        return dataclasses.replace(self, steps=0, until=0, threads=0)

    def __str__(self) -> str:
        return printed(self.name, self)


@dataclass(frozen=True)
class Distill(Recipe):
    """Learn the float model's outputs, softened by the temperature (Hinton, Vinyals and Dean, arXiv:1503.02531), with
    `features` also its intermediate values (FitNets, arXiv:1412.6550). No labels are needed; `hard` adds them.
    """

    name: ClassVar[str] = "distill"
    summary: ClassVar[str] = "learn the float model's outputs (and features); no labels needed"


@dataclass(frozen=True)
class Qat(Recipe):
    """Quantization-aware training on the labels, step sizes learned too (LSQ, Esser et al., arXiv:1902.08153).

    Without labels the float model's outputs take their place.
    """

    name: ClassVar[str] = "qat"
    summary: ClassVar[str] = "quantization-aware training on the labels, with learned step sizes"

    logits: float = 0.0
    hard: float = 1.0


def files_read(recipe: Recipe) -> Iterator[Path]:
    """What a training depends on besides its data: the module of the user's loss, and the checkpoint that it goes back to."""
    checkpoint = Path(getattr(recipe, "checkpoint", ""))
    if checkpoint.is_file():
        yield checkpoint
    module = importlib.util.find_spec(recipe.loss.partition(":")[0]) if ":" in recipe.loss else None
    if module is not None and module.origin is not None and Path(module.origin).is_file():
        yield Path(module.origin)


def checked_recipe(recipe: Recipe) -> Recipe:
    """The same recipe; raises UsageError for values that mean nothing."""
    wrong = [
        ("epochs", recipe.epochs > 0), ("batch", recipe.batch >= 1), ("lr", recipe.lr > 0), ("checks", recipe.checks >= 1),
        ("temperature", recipe.temperature > 0), ("holdout", 0 <= recipe.holdout <= 0.5), ("warmup", 0 <= recipe.warmup < 1),
        ("optimizer", recipe.optimizer in OPTIMIZERS), ("statistics", recipe.statistics in STATISTICS),
        *((name, getattr(recipe, name) >= 0) for name in ("minutes", "steps", "patience", "threads", "seed")),
        ("until", recipe.until >= -1),
        *((name, getattr(recipe, name) >= 0) for name in ("logits", "features", "hard")),
        ("logits", bool(recipe.logits + recipe.features + recipe.hard or recipe.loss)), *recipe.conditions(),
    ]  # fmt: skip
    for name, fine in wrong:
        if not fine:
            kinds = {"optimizer": OPTIMIZERS, "statistics": STATISTICS}.get(name)
            hint = f"one of {', '.join(kinds)}" if kinds else f"usual: {name}={getattr(type(recipe)(), name)}"
            raise UsageError(f"{name} cannot be {getattr(recipe, name)}", place=str(recipe), hint=hint)
    return recipe
