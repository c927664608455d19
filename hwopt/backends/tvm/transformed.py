"""Convolutions that take fewer products by Winograd's algorithm: the same numbers, sooner."""

from __future__ import annotations

import dataclasses

import numpy as np

from hwopt.backends.tvm.kernels.spec import ConvSpec
from hwopt.backends.tvm.kernels.winograd_forms import exact
from hwopt.backends.tvm.kernels.winograd_schedule import pays, winograd_spec
from hwopt.backends.tvm.weighted import Kernel
from hwopt.target import MicroKernel


def transformed(kernel: Kernel, micro: MicroKernel) -> Kernel:
    """The kernel by that algorithm where it pays and is exact for these weights; itself otherwise."""
    spec = kernel.spec
    if not isinstance(spec, ConvSpec) or not isinstance(kernel.weights, np.ndarray) or not pays(spec, micro):
        return kernel
    return dataclasses.replace(kernel, spec=winograd_spec(spec)) if exact(kernel.weights) else kernel
