"""Whole programs in the measuring process: every call timed where it stands, with the caches as the calls before left them.

A command: {"library", "buffers": [[dtype, shape, place, offset, low, high], ...], "calls": [[symbol, [buffer, ...]], ...],
"blob": file with the constants, "arena": bytes, "threads", "seconds", "seed", "evict"}. A place is blob, arena or own. Between
two passes, `evict` bytes of other memory are read: then weights are as cold as in a larger model. Answers: {"at": i} now and
then; at last {"passes": [[seconds of each call], ...], "clock": seconds of the reference, "units": of the one that others
on the same core slow down}, or {"failed": call}.
"""

from __future__ import annotations

import _ctypes
import ctypes
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hwopt.backends.tvm.tune.tensors import CODES, DLTensor, FFIAny, aligned, slots_of, tensor_at
from hwopt.ir import numpy_dtype

LEAST, MOST = 12, 400  # runs of the whole program
USUAL = 25  # percentile of the reference's times
BFLOAT16_CODE = 4
INTEGERS_BELOW = 2  # of inputs: indices and masks of real models may be as small


class Timed(ctypes.Structure):
    _fields_ = [("kernel", ctypes.c_void_p), ("arguments", ctypes.POINTER(FFIAny)), ("count", ctypes.c_int32)]


class Memory:
    """The program's buffers: constants from a file, temporaries in one arena as the driver lays them out, the rest random."""

    def __init__(self, command: Mapping[str, Any]) -> None:
        self.blob = aligned(np.fromfile(command["blob"], np.uint8))
        self.arena = aligned(np.zeros(command["arena"], np.uint8))
        self.random = np.random.default_rng(command["seed"])
        self.kept: list[Any] = []

    def tensor(self, dtype: str, shape: list[int], place: str, offset: int) -> DLTensor:
        base = {"blob": self.blob, "arena": self.arena}.get(place)
        address = (self._own(dtype, shape) if base is None else base).ctypes.data + offset
        kind = numpy_dtype(dtype)
        code = BFLOAT16_CODE if dtype == "bfloat16" else CODES[kind.kind]
        return tensor_at(address, shape, code, 8 * kind.itemsize)

    def _own(self, dtype: str, shape: list[int]) -> np.ndarray:
        kind = numpy_dtype(dtype)
        values = self.random.standard_normal(shape) if kind.kind not in "iub" else self.random.integers(0, INTEGERS_BELOW, shape)
        made = aligned(np.frombuffer(np.asarray(values).astype(kind).tobytes(), np.uint8))
        self.kept.append(made)
        return made


def time_program(command: Mapping[str, Any], say: Callable[[Mapping[str, Any]], None]) -> None:
    """Run the program until its time is over; every answer says that it is alive."""
    say({"at": 0})
    library = ctypes.CDLL(command["library"])
    library.hwopt_time_clock.restype = library.hwopt_time_units.restype = ctypes.c_double
    memory = Memory(command)
    buffers = [memory.tensor(*buffer) for buffer in command["buffers"]]
    calls = (Timed * len(command["calls"]))()
    for place, (symbol, arguments) in enumerate(command["calls"]):
        slots = slots_of([buffers[one] for one in arguments])
        memory.kept.append(slots)
        kernel = ctypes.cast(getattr(library, f"__tvm_ffi_{symbol}"), ctypes.c_void_p)
        calls[place] = Timed(kernel, slots, len(arguments))
    passes: list[list[float]] = []
    others = np.ones(command.get("evict", 0) // 8, np.int64)
    seconds, clock, units = (ctypes.c_double * len(calls))(), float("inf"), []
    end = time.perf_counter() + command["seconds"]
    while len(passes) < LEAST or (time.perf_counter() < end and len(passes) < MOST):
        say({"at": len(passes)})
        if len(others):
            others.sum()
            memory.arena.sum()  # what a model writes and reads again is warm all the same
        if library.hwopt_time_calls(calls, len(calls), command["threads"], seconds):
            say({"failed": True})
            return
        passes.append(list(seconds))
        clock = min(clock, library.hwopt_time_clock())
        units.append(library.hwopt_time_units())
    _ctypes.dlclose(library._handle)
    say({"passes": passes[1:], "clock": clock, "units": float(np.percentile(units, USUAL))})
