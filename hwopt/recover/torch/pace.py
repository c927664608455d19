"""How many steps fit into a stated time."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from hwopt.recover.data import Batch, Source, first
from hwopt.recover.torch.student import Student
from hwopt.recover.torch.teacher import Teacher

TIMED = 4  # steps; the first ones warm up
Learn = Callable[[Batch], None]


def affordable(
    seconds: float, wanted: int, source: Source, batch: int, student: Student, teacher: Teacher, learn: Learn,
    looked_at: tuple[int, int],
) -> int:  # fmt: skip
    """Steps of `wanted` that can be done in so many seconds, at least one; `looked_at` are the samples that are judged
    besides, and how often.

    A few steps are done and undone again.
    """
    kept = {name: one.detach().clone() for name, one in student.named_parameters()}
    teaching, learning = [], []
    for one in first(source.epoch(0, batch, 0), TIMED):
        moments = [time.perf_counter()]
        for action in (teacher, learn):
            action(one)
            moments.append(time.perf_counter())
        teaching.append(moments[1] - moments[0])
        learning.append(moments[2] - moments[1])
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(kept[name])
            parameter.grad = None
    ask, step = min(teaching), min(learning)
    judged, looks = looked_at
    left = seconds - judged / batch * (ask + looks * step / 3)  # the teacher is asked once
    if not teacher.remembers(source):
        return max(min(wanted, int(left / step)), 1)  # a step asks the teacher itself
    per_epoch = source.steps(batch)
    if left < per_epoch * (ask + step):
        return max(min(wanted, int(left / (ask + step))), 1)
    return max(min(wanted, int((left - per_epoch * ask) / step)), 1)
