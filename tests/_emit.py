"""A built library as the tests of the emitter call it."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

from hwopt.emit import Program, build_library
from hwopt.emit.engine import aligned_empty

SYSTEM = {"libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}  # the loader: for thread-local storage
NULL, ALIGNMENT, MEMORY, CPU, KERNEL, OVERLAP = -1, -2, -3, -4, -5, -6


class Model:
    """A built library, called with arrays and an explicit workspace."""

    def __init__(self, made: Program, folder: Path, **options) -> None:
        self.built = build_library(made, folder, **options)
        self.c = ctypes.CDLL(str(folder / self.built.shared))
        self.program = made

    def run(self, *arrays, workspace=None) -> int:
        pointers = [None if a is None else ctypes.c_void_p(a.ctypes.data) for a in (*arrays, workspace)]
        return getattr(self.c, f"{self.program.name}_run")(*pointers)

    def outputs(self, *inputs, workspace=None) -> list[np.ndarray]:
        made = [aligned_empty(t.type.dims, np.dtype(t.type.dtype)) for t in self.built.outputs]
        assert self.run(*inputs, *made, workspace=workspace) == 0
        return made


def ramp(size: int = 40, start: float = 0) -> np.ndarray:
    array = aligned_empty((size,), np.dtype("float32"))
    array[:] = np.arange(size) + start
    return array


def unaligned(size: int = 40) -> np.ndarray:
    return aligned_empty((size + 1,), np.dtype("float32"))[1:]
