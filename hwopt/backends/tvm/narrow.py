"""Convolutions with fewer outputs than a vector has lanes: neighbouring results of a row count as channels of one.

    [h, w, n], a kernel k wide  ->  [h, w / p, p * n], a kernel k + p - 1 wide that moves on by p

Channels last both are the same memory. A tap that one of the p results does not read has the weight 0 there. Pictures as
results (super-resolution, segmentation, autoencoders) end in such layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from hwopt.backends.tvm.kernels.spec import Add, Bias, ConvSpec, Multiply, Scale, by_image
from hwopt.backends.tvm.layout import constant
from hwopt.backends.tvm.weighted import Kernel

WORTH = 0.8  # of the multiplications, those with idle lanes included: below, it pays


def broadened(kernel: Kernel, lanes: int) -> Kernel:
    """The kernel over several results at once where that saves work; itself otherwise."""
    spec = kernel.spec
    if not isinstance(spec, ConvSpec) or spec.groups != 1 or spec.dilations[1] != 1 or not isinstance(kernel.weights, np.ndarray):
        return kernel
    if by_image(spec.epilogue):
        return kernel
    count = _results(spec, lanes)
    if count == 1:
        return kernel
    width = spec.kernel[1] + (count - 1) * spec.strides[1]
    weights = np.zeros((count, *kernel.weights.shape[:3], width), kernel.weights.dtype)
    for place in range(count):
        first = place * spec.strides[1]
        weights[place, ..., first : first + spec.kernel[1]] = kernel.weights
    wide = dataclasses.replace(
        spec, out_channels=count * spec.out_channels, kernel=(spec.kernel[0], width),
        strides=(spec.strides[0], count * spec.strides[1]),
    )  # fmt: skip
    return dataclasses.replace(
        kernel, spec=wide, weights=weights.reshape(-1, *weights.shape[2:]), tensors=_repeated(kernel, count)
    )


def _results(spec: ConvSpec, lanes: int) -> int:
    """How many neighbours are computed at once: the number that makes the fewest multiplications, whole vectors each."""

    def work(count: int) -> float:
        vectors = -(-count * spec.out_channels // lanes)
        return vectors * (spec.kernel[1] + (count - 1) * spec.strides[1]) / count

    able = (count for count in range(1, lanes // spec.out_channels + 1) if spec.out_width % count == 0)
    best = min(able, key=work, default=1)
    return best if work(best) < WORTH * work(1) else 1


def _repeated(kernel: Kernel, count: int) -> tuple[Any, ...]:
    """The epilogue's tensors, those of one number per channel once for each neighbour."""
    found, given = [], iter(kernel.tensors)
    for step in kernel.spec.epilogue:
        rows = isinstance(step, Bias | Scale) or (isinstance(step, Multiply) and step.over == "channels")
        if rows:
            found.append(constant(np.tile(np.asarray(next(given).value.numpy()), count)))
        elif isinstance(step, Add | Multiply):
            found.append(next(given))
    return tuple(found)
