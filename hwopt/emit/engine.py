"""Calling a compiled model from Python: the library that ships, through ctypes, or TVM's virtual machine."""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hwopt.emit.array import FIELDS, simulated
from hwopt.errors import ArtifactError, UsageError
from hwopt.ir import numpy_dtype

ALIGNMENT = 64  # bytes: aligned tensors are used in place, others are copied by the library


class Engine(Protocol):
    """One way to run a model. `prepare` returns a call without arguments, and the arrays that hold the results after it.

    Arrays are in the manifest's order.
    """

    def prepare(self, inputs: Sequence[np.ndarray]) -> tuple[Callable[[], None], Sequence[np.ndarray]]: ...


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array on a 64-byte boundary."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


class _Simulation(ctypes.Structure):
    """hwopt_simulation of the library's hwopt_array.h."""

    _fields_ = [*((name, ctypes.c_uint64) for name in FIELDS), ("joules", ctypes.c_double)]


class CEngine:
    """The generated library through ctypes."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        library, name = _load_library(path), manifest["name"]
        self._run, self._error, self._set = (getattr(library, f"{name}_{what}") for what in ("run", "error", "set_threads"))
        self._run.argtypes = [ctypes.c_void_p] * (len(manifest["inputs"]) + len(manifest["outputs"]) + 1)
        self._error.restype = ctypes.c_char_p
        self._name, self._library = name, library
        self._workspace = 0 if manifest.get("heap", True) else int(manifest["workspace_bytes"])  # 0: the library has its own
        self._outputs = [(tuple(entry["shape"]), numpy_dtype(entry["dtype"])) for entry in manifest["outputs"]]
        weakref.finalize(self, getattr(library, f"{name}_release"))

    def prepare(self, inputs: Sequence[np.ndarray]) -> tuple[Callable[[], None], Sequence[np.ndarray]]:
        dense = [self._taken(array) for array in inputs]
        outputs = [aligned_empty(shape, dtype) for shape, dtype in self._outputs]
        own = [aligned_empty((self._workspace,), np.dtype(np.uint8))] if self._workspace else []
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (*dense, *outputs, *own)]  # these keep their arrays alive
        arguments = pointers if own else [*pointers, None]

        def call() -> None:
            code = self._run(*arguments)
            if code:
                raise ArtifactError(f"{self._name}_run: {self._error(code).decode()}", place=f"code {code}")

        return call, outputs

    def _taken(self, array: np.ndarray) -> np.ndarray:
        """The array as the library takes it: dense, without a heap on its boundary, too."""
        if not self._workspace or (array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0):
            return np.require(array, requirements="C")
        aligned = aligned_empty(array.shape, array.dtype)
        aligned[...] = array
        return aligned

    def simulation(self, restart: bool) -> dict[str, float] | None:
        """What the model of an array in the library has counted, since the last `restart`; None where there is no such model."""
        function = getattr(self._library, simulated(self._name), None)
        if function is None:
            return None
        found = _Simulation()
        function.restype = None
        function(ctypes.byref(found), int(restart))
        return {name: getattr(found, name) for name in (*FIELDS, "joules")}

    def set_threads(self, threads: int) -> None:
        if self._set(threads):
            raise UsageError(f"{threads} threads", hint="1 to 256")


def _load_library(path: Path) -> ctypes.CDLL:
    """Load it under a name of its own: the loader takes two libraries of one path for the same, even after a new compile."""
    with tempfile.TemporaryDirectory(prefix="hwopt-") as folder:
        link = Path(folder) / path.name
        link.symlink_to(path)
        try:
            return ctypes.CDLL(os.fspath(link))
        except OSError as error:
            raise ArtifactError(f"cannot be loaded: {error}", place=str(path)) from error


class VmEngine:
    """A library of TVM's Relax virtual machine; TVM is imported only here."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        try:
            import tvm
            from tvm.relax import VirtualMachine
        except ImportError as error:
            hint = f"pip install apache-tvm=={manifest['versions'].get('apache-tvm', '')}"
            raise ArtifactError("runs in TVM's virtual machine, which is not installed", place=str(path), hint=hint) from error
        self._tensor, self._device = tvm.runtime.tensor, tvm.cpu()
        self._machine = VirtualMachine(tvm.runtime.load_module(os.fspath(path)), self._device)
        self._lock = threading.Lock()  # the machine keeps its registers between calls

    def prepare(self, inputs: Sequence[np.ndarray]) -> tuple[Callable[[], None], Sequence[np.ndarray]]:
        tensors = [self._tensor(np.ascontiguousarray(array), self._device) for array in inputs]
        outputs: list[np.ndarray] = []

        def call() -> None:
            with self._lock:
                result = self._machine["main"](*tensors)
            outputs[:] = [tensor.numpy() for tensor in ([result] if hasattr(result, "numpy") else result)]

        return call, outputs
