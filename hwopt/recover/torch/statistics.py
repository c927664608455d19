"""Statistics of batch normalizations that are still there, estimated again on the changed graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from hwopt.ir import of_op
from hwopt.recover.torch.student import Student

ENOUGH = 32  # runs


@torch.no_grad()
def estimate(student: Student, feeds: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Mean and variance of what each BatchNormalization reads, over all samples and places, first layers first: what a layer
    reads depends on the statistics of those before it.
    """
    batches = [one for one, _ in zip(feeds, range(ENOUGH), strict=False)]
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
