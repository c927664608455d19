"""Looking at a student on samples that it is not trained on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from hwopt.backends.torch import to_array
from hwopt.errors import DataError
from hwopt.recover.case import Check, Run
from hwopt.recover.data import Batch, pieces
from hwopt.recover.torch.losses import OWN_LOSS, Distance, Loss, Tensors, check_classes
from hwopt.recover.torch.student import Student
from hwopt.recover.torch.teacher import MEMORY, Teacher


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """The loss over the held-out batches, which is to be small, and a score to look at; with the user's `score` minus that."""

    student: Student
    teacher: Teacher
    loss: Loss
    batches: Sequence[Batch]
    size: int  # samples at once; 0: any number
    score: Callable[[Run], float | np.ndarray] | None = None
    known: dict[int, Tensors] = dataclasses.field(default_factory=dict)  # what the teacher said, by the batch's place

    @property
    def samples(self) -> int:
        return sum(map(len, self.batches))

    @torch.no_grad()
    def look(self, step: int) -> Check:
        """The state as it is; without held-out samples the last one is the best."""
        if self.score is not None:
            score = float(np.mean(self.score(self._run)))
            return Check(step, -score if math.isfinite(score) else math.inf, score)
        if not self.batches:
            return Check(step, -float(step), math.nan)
        every = (piece for batch in self.batches for piece in pieces(batch, self.size))
        found = [self._piece(piece, self._wanted(place, piece)) for place, piece in enumerate(every)]
        counts = [count for count, _, _ in found]
        value = float(np.average([value for _, value, _ in found], weights=counts))
        score = float(np.average([score for _, _, score in found], weights=counts))
        return Check(step, value if math.isfinite(value) else math.inf, score)

    @property
    def _features(self) -> tuple[str, ...]:
        return self.loss.features if isinstance(self.loss, Distance) else ()

    def _wanted(self, place: int, batch: Batch) -> Tensors:
        """What the teacher says: it is asked once, while that takes little memory."""
        if place in self.known:
            return self.known[place]
        wanted = self.teacher(dataclasses.replace(batch, rows=None), self._features)
        if sum(one.nbytes for known in (wanted, *self.known.values()) for one in known.values()) <= MEMORY:
            self.known[place] = wanted
        return wanted

    def _piece(self, batch: Batch, wanted: Tensors) -> tuple[int, float, float]:
        found = self.student(batch.feeds, observe=self._features)
        labels = None if batch.labels is None else torch.from_numpy(np.array(batch.labels))
        value = float(self.loss(found, wanted, labels))
        return len(batch), value, self._score(found, wanted, labels, value)

    def _score(self, found: Tensors, wanted: Tensors, labels: torch.Tensor | None, value: float) -> float:
        """Accuracy, agreement with the teacher without labels, minus the loss for what is no classifier."""
        if not isinstance(self.loss, Distance) or next(iter(self.loss.kinds.values())) == "values":
            return -value
        name = next(iter(self.loss.kinds))
        answers = found[name].argmax(1)
        if labels is not None and labels.shape != answers.shape:
            reason = f"labels {list(labels.shape)} for answers {list(answers.shape)}"
            raise DataError(reason, place="training data", hint=f"give a class for each; {OWN_LOSS}")
        if labels is not None:
            check_classes(labels)
        target = wanted[name].argmax(1) if labels is None else labels
        return float((answers == target).double().mean())

    def _run(self, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return {name: to_array(one) for name, one in self.student(feeds).items()}
