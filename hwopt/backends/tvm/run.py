"""Runs a Program in this process through TVM's runtime: for tests and debugging; what ships runs by the generated C driver."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hwopt.emit.cpu import request_tiles
from hwopt.emit.program import Program
from hwopt.emit.toolchain import find_compiler, run_compiler
from hwopt.errors import DataError
from hwopt.ir import numpy_dtype


class Loaded:
    """A Program whose object code is in memory, with its buffers allocated."""

    def __init__(self, program: Program, library: Any | None = None) -> None:
        import tvm

        self.program = program
        loaded: Any = library or load_objects(program.objects)
        self._arrays: dict[str, Any] = {}
        for buffer in program.buffers.values():
            if buffer.alias:
                continue
            if buffer.data is not None:
                self._arrays[buffer.name] = tvm.runtime.tensor(np.array(buffer.data, order="C"))
            else:
                self._arrays[buffer.name] = tvm.runtime.empty(buffer.shape, buffer.dtype)
        for buffer in program.buffers.values():
            if buffer.alias:
                self._arrays[buffer.name] = self._arrays[buffer.alias]._create_view(buffer.shape, buffer.dtype)
        self._calls = [(loaded[call.symbol], [self._arrays[name] for name in call.args]) for call in program.calls]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name."""
        for name, buffer in self.program.inputs:
            array, wanted = feeds[name], self.program.buffers[buffer]
            if tuple(array.shape) != wanted.shape:
                raise DataError(f"has shape {list(array.shape)}, not {list(wanted.shape)}", place=f"input {name!r}")
            self._arrays[buffer].copyfrom(np.array(array, numpy_dtype(wanted.dtype), order="C"))
        for function, arguments in self._calls:
            function(*arguments)
        return {name: self._arrays[buffer].numpy() for name, buffer in self.program.outputs}

    def times(self, repeat: int = 5) -> list[tuple[float, str]]:
        """Seconds of each call (the least of `repeat` runs) with its label."""
        best = [float("inf")] * len(self._calls)
        for _ in range(repeat):
            for index, (function, arguments) in enumerate(self._calls):
                started = time.perf_counter()
                function(*arguments)
                best[index] = min(best[index], time.perf_counter() - started)
        return [(seconds, call.label) for seconds, call in zip(best, self.program.calls, strict=True)]


def run_program(program: Program, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One run, outputs by name; keep a Loaded for several."""
    return Loaded(program).run(feeds)


def load_objects(objects: tuple[bytes, ...]) -> Any | None:
    """Link object code into a shared library and load it; None if there is no code."""
    import tvm

    if not objects:
        return None
    request_tiles()
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for index, data in enumerate(objects):
            paths.append(Path(folder) / f"kernels_{index}.o")
            paths[-1].write_bytes(data)
        library = Path(folder) / "kernels.so"
        run_compiler([*find_compiler(), "-shared", "-o", str(library), *map(str, paths), "-lm"], Path(folder))
        return tvm.runtime.load_module(str(library))
