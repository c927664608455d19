"""The measuring process: loads candidates, checks and times them. It may crash or hang; runner.py looks after it.

Commands and answers are JSON, one a line, on standard input and output. A command:

    {"library", "symbols", "signature": [[name, dtype, size, low, high], ...], "threads", "rounds", "turn", "seed"}

Symbol 0 is the reference. Answers: {"at": i} before anything runs candidate i; {"checked": i, "status"} after its first run;
at last {"times": {i: [seconds of each round]}}.
"""

from __future__ import annotations

import _ctypes
import ctypes
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hwopt.backends.tvm.tune.tensors import CODES, aligned, slots_of, tensor_at
from hwopt.backends.tvm.tune.whole import time_program
from hwopt.emit.cpu import request_tiles

BFLOAT16 = "bfloat16"  # numpy has none: arrays hold its bits
COLD = 4 << 20  # bytes of weights to go through before the first ones come again: beyond second level caches
WARM = 1 << 19  # the same of everything else: beyond first level caches, where the kernels around this one leave their own data
HOT = "hot"  # the name of a parameter that has one place only
COPIES = 64
KEEP = 1.3  # candidates slower than the best by more than that after SIFT rounds are not timed further
SIFT, FIRST = 4, 3


class Arguments:
    """Random inputs of a kernel, the same for every candidate; in several copies, as other kernels run in between in a model."""

    def __init__(self, signature: Sequence[Sequence[Any]], seed: int) -> None:
        generator = np.random.default_rng(seed)
        arrays = [random_array(generator, dtype, size, low, high) for _, dtype, size, low, high in signature]
        copies = [_copies(name, array.nbytes) for array, (name, *_) in zip(arrays, signature, strict=True)]
        self.out, self.count, self.sets = arrays[-1], len(arrays), max(copies)
        self._kept = [[array, *(aligned(array) for _ in range(1, many))] for array, many in zip(arrays, copies, strict=True)]
        chosen = (own[number % len(own)] for number in range(self.sets) for own in self._kept)
        self._tensors = [tensor_at(one.ctypes.data, (one.size,), CODES[one.dtype.kind], one.itemsize * 8) for one in chosen]
        self.slots = slots_of(self._tensors)


def _copies(name: str, size: int) -> int:
    """Of a parameter of so many bytes."""
    between = {"weights": COLD, HOT: 0}.get(name, WARM)
    return min(COPIES, max(1, between // max(size, 1)))


def random_array(generator: np.random.Generator, dtype: str, size: int, low: float, high: float) -> np.ndarray:
    made = generator.random(size, np.float32) * np.float32(high - low) + np.float32(low)
    if dtype == BFLOAT16:
        return aligned((made.view(np.uint32) >> 16).astype(np.uint16))
    kind = np.dtype(dtype)
    return aligned(made.astype(kind) if kind.kind == "f" else np.floor(made).astype(kind))


class Batch:
    """The candidates of one command."""

    def __init__(self, command: Mapping[str, Any], arguments: Arguments, say: Callable[[Mapping[str, Any]], None]) -> None:
        self.command, self.arguments, self.say = command, arguments, say
        self.library = ctypes.CDLL(command["library"])
        self.library.hwopt_time.restype = ctypes.c_double
        self.kernels = [getattr(self.library, f"__tvm_ffi_{symbol}") for symbol in command["symbols"]]

    def close(self) -> None:
        _ctypes.dlclose(self.library._handle)

    def run(self) -> None:
        once = self._check()
        times: dict[int, list[float]] = {index: [] for index in once}
        turns = {index: max(1, int(self.command["turn"] / max(seconds, 1e-7))) for index, seconds in once.items()}
        for number in range(self.command["rounds"]):
            for index in self._kept(times) if number >= SIFT else list(times):
                self.say({"at": index})
                times[index].append(self._time(index, turns[index]))
        self.say({"times": times})

    def _check(self) -> dict[int, float]:
        """Run every candidate: seconds of one run of those whose output is the reference's."""
        expected, once = np.empty(0), {}
        for index in range(len(self.kernels)):
            self.say({"at": index})
            first, found = self._first(index)
            expected = found if index == 0 else expected
            status = "failed" if first < 0 else "ok" if self._same(found, expected) else "wrong"
            if status == "ok":
                once[index] = min(self._time(index, 1) for _ in range(FIRST))
            self.say({"checked": index, "status": status})
        return once

    def _first(self, index: int) -> tuple[float, np.ndarray]:
        """Seconds of one run, and what it writes."""
        self.arguments.out.view(np.uint8)[:] = 0xA5  # whoever writes nothing is wrong
        return self._time(index, 1), self.arguments.out.copy()

    def _same(self, found: np.ndarray, expected: np.ndarray) -> bool:
        tolerance = 1e-4
        if self.command["signature"][-1][1] == BFLOAT16:
            found, expected = ((one.astype(np.uint32) << 16).view(np.float32) for one in (found, expected))
            tolerance = 2**-7  # sums in another order may be rounded to the neighbour
        elif found.dtype.kind != "f":
            return bool(np.array_equal(found, expected))
        real = np.isfinite(expected)  # roots of negative numbers are none, whatever the schedule
        largest = float(np.abs(expected[real]).max(initial=0.0))
        near = np.abs(found[real] - expected[real]).max(initial=0.0) <= tolerance * max(largest, 1e-6)  # false for NaN
        return bool(near and np.array_equal(found[~real], expected[~real], equal_nan=True))

    def _kept(self, times: Mapping[int, list[float]]) -> list[int]:
        """The reference, and whatever may still be the fastest."""
        best = {index: min(seconds) for index, seconds in times.items()}
        bound = KEEP * min(best.values())
        return [index for index, seconds in best.items() if seconds <= bound or index == 0]

    def _time(self, index: int, times: int) -> float:
        arguments = self.arguments
        return float(
            self.library.hwopt_time(
                self.kernels[index], arguments.slots, arguments.count, arguments.sets, self.command["threads"], times
            )
        )


def main() -> None:
    """Answer commands until the input ends."""
    request_tiles()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a kernel prints is no answer

    def say(answer: Mapping[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    known, arguments = "", None
    for line in sys.stdin:
        command = json.loads(line)
        if "cores" in command:
            os.sched_setaffinity(0, command["cores"])
            continue
        if "calls" in command:
            time_program(command, say)
            continue
        wanted = json.dumps([command["signature"], command["seed"]])
        if arguments is None or wanted != known:
            arguments, known = Arguments(command["signature"], command["seed"]), wanted
        batch = Batch(command, arguments, say)
        batch.run()
        batch.close()


if __name__ == "__main__":
    main()
