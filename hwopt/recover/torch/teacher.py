"""What the student shall say: the float model's outputs, computed once for samples that come again."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from hwopt.backends.torch import Module, to_array
from hwopt.ir import Graph
from hwopt.recover.case import Progress
from hwopt.recover.data import Arrays, Batch, Source, pieces

Tensor = torch.Tensor
MEMORY = 2**28  # bytes of outputs that are remembered at most
BLOCK = 256  # samples that are computed at once to be remembered: always the same ones, whichever of them are wanted, so that
# runs that are resumed, replayed or shorter see the same bits


class Teacher:
    """A model that is only asked. `size` is how many samples it takes at once (0: any number).

    `answers` is what it said about all samples of a source, for the trainings of a job that follow: the newest source's alone.
    """

    def __init__(self, graph: Graph, answers: dict[str, Mapping[str, Tensor]] | None = None) -> None:
        self.module = Module(graph).requires_grad_(False)
        self.size = 0
        self._answers = {} if answers is None else answers
        self._known: Mapping[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, batch: Batch, features: tuple[str, ...] = ()) -> Mapping[str, Tensor]:
        """Outputs and features by name."""
        if self._known and batch.rows is not None and not features:
            rows = torch.from_numpy(batch.rows)
            return {name: known[rows] for name, known in self._known.items()}
        parts = [self.module(piece.feeds, observe=features) for piece in pieces(batch, self.size)]
        return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def remembers(self, source: Source) -> bool:
        """True if the outputs over all samples of a source can be kept."""
        if not isinstance(source, Arrays):
            return False
        count = max(self.size, 1)
        outputs = self(Batch({name: array[:count] for name, array in source.samples.arrays.items()}))
        whole = sum(one.element_size() * one.numel() for one in outputs.values()) // count * len(source.samples)
        return whole <= MEMORY and all(one.ndim > 0 and len(one) == count for one in outputs.values())

    def recall(self, source: Source) -> None:
        """Take up what an earlier training asked about this source."""
        self._known = self._answers.get(self._name(source), {})

    def remember(self, source: Source, rows: np.ndarray, progress: Progress) -> None:
        """Compute what samples at these places will be compared with, and the others of their blocks."""
        if self._known or not isinstance(source, Arrays) or not len(rows) or not self.remembers(source):
            return
        known: dict[str, np.ndarray] = {}
        block, every = max(BLOCK // max(self.size, 1), 1) * max(self.size, 1), np.arange(len(source.samples))
        wanted = np.unique(rows // block)
        for place, number in enumerate(wanted):
            progress("asking the float model", place, len(wanted))
            chosen = every[number * block : (number + 1) * block]
            chosen = np.resize(chosen, -(-len(chosen) // max(self.size, 1)) * max(self.size, 1))  # whole batches
            for name, one in self(source.at(chosen)).items():
                whole = known.setdefault(name, np.zeros((len(source.samples), *one.shape[1:]), to_array(one).dtype))
                whole[chosen] = to_array(one)
        self._known = {name: torch.from_numpy(array) for name, array in known.items()}
        if len(wanted) * block >= len(source.samples):
            self._answers.clear()
            self._answers[self._name(source)] = self._known

    def _name(self, source: Source) -> str:
        """Whoever answers other samples, or in other pieces, may say other bits."""
        return f"{self.module.graph.digest} {source.digest} {self.size}"
