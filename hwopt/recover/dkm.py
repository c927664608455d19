"""dkm: palettes whose codes are trained together with their entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hwopt.recover.recipe import Recipe

if TYPE_CHECKING:
    from hwopt.recover.case import Case
    from hwopt.recover.torch.student import Student


@dataclass(frozen=True)
class Dkm(Recipe):
    """Differentiable k-means (Cho et al. 2022, arXiv:2108.12659): A = softmax(-|w - c| / tau), c = A^T w / sum A, W = A c.

    The weights behind each palette, at first those of the teacher where it has them, are trained through their soft
    assignment; the graph gets the nearest codes, as integers,
    and the entries. Checks look at that graph, never at the soft one. Distill trains the entries alone; without
    palettes both are the same, and for codebooks of vectors (dim > 1), which keep their codes.
    """

    name: ClassVar[str] = "dkm"
    summary: ClassVar[str] = "train palettes: their entries and which weight has which (differentiable k-means)"

    softness: float = 0.05  # tau in mean distances between neighbouring entries
    rounds: int = 2  # of k-means in each step; it goes on from the step before

    def student(self, case: Case) -> Student:
        from hwopt.recover.torch.palettes import PaletteStudent

        student = PaletteStudent(case.graph, case.teacher, self)
        if not student.palettes:
            case.progress("dkm: no palette whose codes can be trained (codebooks of vectors keep theirs); entries alone", 0, 1)
        return student

    def conditions(self) -> tuple[tuple[str, bool], ...]:
        return (("softness", self.softness > 0), ("rounds", self.rounds >= 1))
