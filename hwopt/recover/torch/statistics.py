"""Statistics of batch normalizations that are still there, estimated again on the changed graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from hwopt.ir import of_op
from hwopt.recover.torch.student import Student

ENOUGH = 256  # samples: every normalization takes a run over all of them


@torch.no_grad()
def estimate(student: Student, feeds: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Mean and variance of what each BatchNormalization reads, over ENOUGH samples and all places, first layers first: what a
    layer reads depends on the statistics of those before it.
    """
    batches: list[Mapping[str, np.ndarray]] = []
    for one in feeds:
        batches.append(one)
        if sum(len(next(iter(batch.values()))) for batch in batches) >= ENOUGH:
            break
    for node in of_op(student.graph, "BatchNormalization"):
        if node.attr("training_mode", 0) or any(name not in student.graph.params for name in node.inputs[3:5]):
            continue
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for one in batches:
            value = student(one, observe=[node.inputs[0]])[node.inputs[0]].double()
            axes = [axis for axis in range(value.ndim) if axis != 1]
            total, squares = total + value.sum(axes), squares + value.square().sum(axes)
            count += value.numel() // value.shape[1]
        mean = total / count
        student.value_of(node.inputs[3]).copy_(mean)
        student.value_of(node.inputs[4]).copy_((squares / count - mean.square()).clamp_min(0))
