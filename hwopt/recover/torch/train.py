"""Training the parameters of a changed graph towards its teacher; the best state of the held-out samples is kept."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from hwopt.backends.torch import to_array
from hwopt.errors import DataError, UsageError
from hwopt.evaluate import check_labels
from hwopt.recover.case import Case, Check, Outcome
from hwopt.recover.data import Arrays, Batch, divided, first, pieces, some_labels, source_of
from hwopt.recover.recipe import Recipe
from hwopt.recover.torch import checkpoint
from hwopt.recover.torch.judge import Judge
from hwopt.recover.torch.losses import Distance, Loss, checked_number, kinds_of, loss_name, shared_features, user_loss
from hwopt.recover.torch.pace import affordable
from hwopt.recover.torch.schedule import check_steps, make_optimizer, rate, settled
from hwopt.recover.torch.statistics import estimate
from hwopt.recover.torch.student import written
from hwopt.recover.torch.teacher import Teacher
from hwopt.samples import batch_of


def train(case: Case, recipe: Recipe) -> Outcome:
    """Train `case.graph` and write what was learned back into it, stamped with the recipe that makes it again.

    The untrained state counts as well: the graph comes back as it was unless a check found it improved. With `until` exactly
    that many steps are done and nothing is chosen. Ctrl-C ends with the best state so far. Raises UnsupportedError for
    operators without gradients, DataError for data that do not fit.
    """
    with settled(recipe) as threads:
        return _Training(case, recipe, threads).run()


def look(case: Case, recipe: Recipe) -> Check:
    """The graph as it is on the samples that a training with this recipe would not see."""
    recipe = dataclasses.replace(recipe, statistics=Recipe.statistics)
    with settled(recipe) as threads:
        return _Training(dataclasses.replace(case, checkpoints=None), recipe, threads).judge.look(0)


class _Training:
    """One run: the student with its optimizer, the data, and the best state so far."""

    def __init__(self, case: Case, recipe: Recipe, threads: int) -> None:
        self.case, self.recipe, self.threads = case, recipe, threads
        self.started, self.earlier = time.perf_counter(), 0.0
        given = None if case.held_out is None else source_of(case.graph, case.held_out)
        own, whole = batch_of(case.graph), source_of(case.graph, case.data)
        self.source, held_out = divided(whole, given, recipe.holdout, max(recipe.batch // own, 1) * own, own)
        self.student, self.teacher = recipe.student(case), Teacher(case.teacher, case.answers)
        self.size = self.teacher.size = self._size(own)
        self.teacher.recall(self.source)
        self.batch = self._batch()
        self.loss = self._loss()
        self.judge = Judge(self.student, self.teacher, self.loss, held_out, self.size, case.score)
        self.given = self._estimated()
        self.optimizer = make_optimizer(self.student, recipe)
        self.step, self.total, self.finished = 0, 0, False
        self.checks: list[Check] = []
        self.best: dict[str, torch.Tensor] = {}  # parameters of the best check
        self.path = checkpoint.checkpoint_path(case, recipe, whole)
        self._resume(checkpoint.restore(self.path))
        self.total = self.total or self._planned()

    def run(self) -> Outcome:
        """All steps that are left."""
        try:
            self._steps()
        except KeyboardInterrupt:
            self.case.progress("interrupted: the best state so far is taken", 0, 1)
            return self._outcome(interrupted=True)
        return self._outcome()

    # --- before the first step ---

    def _estimated(self) -> Check | None:
        """Estimate statistics where the recipe says so: the first change of the graph, which is looked at before."""
        if self.recipe.statistics != "estimated":
            return None
        given = None if self.recipe.until else self.judge.look(0)
        batches = self.source.epoch(0, self.batch, self.recipe.seed)
        estimate(self.student, (piece.feeds for batch in batches for piece in pieces(batch, self.size)))
        return given

    def _size(self, own: int) -> int:
        """Samples in one run; 0 where both graphs take any number."""
        most = max(own, batch_of(self.case.teacher))
        probe = next(iter(self.source.epoch(0, 2 * most, self.recipe.seed)), None)
        if probe is None:
            raise DataError("holds too few samples for two batches", place="training data")
        if len(probe) > most and all(one.stacks(probe.feeds) for one in (self.student, self.teacher.module)):
            return 0
        if own != batch_of(self.case.teacher):
            raise DataError("the models have different batches", place="training", hint="load both with the same shapes")
        return own

    def _batch(self) -> int:
        """Samples per step, whole runs of the graph; all there are where those are fewer."""
        wanted = min(self.recipe.batch, len(self.source.samples)) if isinstance(self.source, Arrays) else self.recipe.batch
        return max(wanted // self.size, 1) * self.size if self.size else wanted

    def _loss(self) -> Loss:
        if self.case.loss is not None or self.recipe.loss:
            return self.case.loss or user_loss(self.recipe.loss)
        batch = first(self.source.epoch(0, self.batch, self.recipe.seed), 1)[0]
        if batch.labels is None and self.recipe.hard and self.recipe.logits:
            hint = "leave hard out, or give data with labels"
            raise UsageError(f"hard={self.recipe.hard} needs labels, the data have none", place=str(self.recipe), hint=hint)
        if self.recipe.hard:
            check_labels(self.case.teacher, some_labels(self.source), "training data")
        outputs = self.teacher(batch)
        kinds = kinds_of({name: to_array(one) for name, one in outputs.items()}, self.case.teacher)
        return Distance(self.recipe, kinds, shared_features(self.case.graph, self.case.teacher) if self.recipe.features else ())

    @property
    def _features(self) -> tuple[str, ...]:
        return self.loss.features if isinstance(self.loss, Distance) else ()

    def _planned(self) -> int:
        """Steps of the whole schedule; fewer where the minutes do not suffice for all."""
        wanted = self.recipe.steps or max(round(self.recipe.epochs * self.source.steps(self.batch)), 1)
        if not self.recipe.minutes or self.recipe.until:
            return wanted
        optimizer = make_optimizer(self.student, self.recipe)
        left = 60 * self.recipe.minutes - (time.perf_counter() - self.started)
        looked_at = self.judge.samples, self.recipe.checks + 1
        learn = lambda batch: self._learn(batch, optimizer)  # noqa: E731
        return affordable(left, wanted, self.source, self.batch, self.student, self.teacher, learn, looked_at)

    # --- steps ---

    def _steps(self) -> None:
        last, looks = self.recipe.until or self.total, check_steps(self.recipe, self.total)
        looks = frozenset() if self.recipe.until else looks
        if self.finished or self.recipe.until < 0:
            return
        if not self.recipe.until and not self.checks:
            self._check()
        if not self._features:
            self.teacher.remember(self.source, self._rows(last), self.case.progress)
        for batch in self._batches() if self.step < last else ():
            for group in self.optimizer.param_groups:
                group["lr"] = group["usual"] * rate(self.recipe, self.step, self.total)
            self._learn(batch, self.optimizer)
            self.step += 1
            if self.step in looks:
                self._check()
            if self.step == last or self.finished:
                break
        self.finished = True
        self._save()

    def _batches(self) -> Iterator[Batch]:
        """Epoch after epoch, from the step on that comes next."""
        epoch, skipped = divmod(self.step, max(self.source.steps(self.batch), 1))
        while True:
            count = 0
            for count, batch in enumerate(self.source.epoch(epoch, self.batch, self.recipe.seed), 1):
                if count > skipped:
                    yield batch
            if count <= skipped:
                raise DataError(f"epoch {epoch} has only {count} batches", place="training data")
            epoch, skipped = epoch + 1, 0

    def _rows(self, steps: int) -> np.ndarray:
        """Places of all samples that so many steps will see."""
        if not isinstance(self.source, Arrays) or steps >= self.source.steps(self.batch):
            return np.arange(len(self.source.samples) if isinstance(self.source, Arrays) else 0)
        seen = [batch.rows for batch in first(self.source.epoch(0, self.batch, self.recipe.seed), steps)]
        return np.sort(np.concatenate([rows for rows in seen if rows is not None]))

    def _learn(self, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        parts = list(pieces(batch, self.size))
        for part in parts:
            found = self.student(part.feeds, observe=self._features)
            labels = None if part.labels is None else torch.from_numpy(np.array(part.labels))
            value = checked_number(self.loss(found, self.teacher(part, self._features), labels))
            (value / len(parts)).backward()
        optimizer.step()
        self.student.constrain()

    def _check(self) -> None:
        """Look at the held-out samples; keep the state if it is the best one."""
        check = self.given if self.given and not self.step else self.judge.look(self.step)
        if not self.checks or check.value < min(one.value for one in self.checks):
            self.best = {name: one.detach().clone() for name, one in self.student.named_parameters()}
        self.checks.append(check)
        self.case.progress(f"recovering: held-out score {check.score:.4f}, loss {check.value:.4g}", self.step, self.total)
        values = [one.value for one in self.checks]
        waited = len(values) - 1 - values.index(min(values))
        seconds = self.earlier + time.perf_counter() - self.started
        late = bool(self.recipe.minutes) and seconds > 60 * self.recipe.minutes
        self.finished = late or 0 < self.recipe.patience <= waited
        self._save()
        self.case.watch(check)

    # --- afterwards ---

    def _outcome(self, *, interrupted: bool = False) -> Outcome:
        seconds = self.earlier + time.perf_counter() - self.started
        recipe, chosen = self.recipe, None
        if self.checks:
            chosen = min(self.checks, key=lambda one: one.value)
            self._set(self.best)
            holdout = recipe.holdout if self.case.held_out is None else 0.0  # given samples hold nothing out of the others
            usual = type(recipe)()
            recipe = dataclasses.replace(
                recipe, epochs=usual.epochs, minutes=usual.minutes, steps=self.total, until=chosen.step or -1, holdout=holdout
            )
        if self.case.loss is not None and not recipe.loss:
            recipe = dataclasses.replace(recipe, loss=loss_name(self.case.loss))
        recipe = dataclasses.replace(recipe, threads=self.threads)
        untrained = chosen.step == 0 if chosen else self.step < max(recipe.until, 1)
        arrays = {} if untrained else self.student.arrays() | self._statistics()
        graph = written(self.case.graph, arrays, str(recipe))
        before = self.checks[0] if self.checks else None
        return Outcome(graph, recipe, seconds, tuple(self.checks), before, chosen, interrupted)

    def _statistics(self) -> dict[str, np.ndarray]:
        """Those of batch normalizations, where they were estimated."""
        nodes = self.case.graph.nodes if self.recipe.statistics == "estimated" else ()
        names = [name for node in nodes if node.op == "BatchNormalization" for name in node.inputs[3:5]]
        return {name: to_array(self.student.value_of(name)) for name in names if name in self.case.graph.params}

    def _set(self, values: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, one in self.student.named_parameters():
                one.copy_(values[name])

    def _save(self) -> None:
        if self.path is None:
            return
        state = {
            "total": self.total, "step": self.step, "finished": self.finished, "best": self.best,
            "student": {name: one.detach() for name, one in self.student.named_parameters()},
            "optimizer": self.optimizer.state_dict(), "checks": [dataclasses.astuple(one) for one in self.checks],
            "seconds": self.earlier + time.perf_counter() - self.started,
        }  # fmt: skip
        checkpoint.save(self.path, state)

    def _resume(self, saved: Mapping[str, Any] | None) -> None:
        if saved is None:
            return
        self._set(saved["student"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.total, self.finished = saved["step"], saved["total"], saved["finished"]
        self.best, self.checks, self.earlier = dict(saved["best"]), [Check(*one) for one in saved["checks"]], saved["seconds"]
