"""The fallback: Relax's virtual machine, for dynamic shapes and operators that need TVM's runtime (sorting, sizes from data).

What comes before those is computed by the same kernels as elsewhere (see halves.py).
Such a library loads into TVM's runtime (libtvm_runtime and libtvm_ffi, 6 MB), not into a plain C program.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hwopt.backends.tvm.build import description_for, tvm_target
from hwopt.backends.tvm.fold import folded
from hwopt.backends.tvm.halves import halves, joined
from hwopt.backends.tvm.support import needs_runtime, refuse_unsupported
from hwopt.backends.tvm.suppression import bounded_suppressions
from hwopt.emit.toolchain import find_compiler, run_compiler
from hwopt.errors import HwoptError, ToolchainError, UnsupportedError
from hwopt.io.proto import to_model
from hwopt.ir import Graph
from hwopt.target import Target


def reasons(graph: Graph) -> tuple[str, ...]:
    """Why a graph needs the virtual machine, one line for each such node; empty where the plain C driver does it all."""
    return tuple(f"node {node.name} ({node.op}): {reason}" for node, reason in needs_runtime(folded(graph)))


def compile_vm(graph: Graph, target: Target, threads: int = 1) -> bytes:
    """A shared library for TVM's virtual machine; raises UnsupportedError or ToolchainError."""
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    refuse_unsupported(graph)
    graph = bounded_suppressions(folded(graph))
    parts = halves(graph)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the importer prints what it could not convert
            behind = from_onnx(to_model(parts.behind), sanitize_input_names=True)
        module = joined(graph, parts, behind, target, threads)
        machine = _machine(module, target)
        pipeline = relax.backend.cpu_generic.get_default_pipeline(machine)
        executable = relax.build(module, machine, relax_pipeline=pipeline)
    except HwoptError:
        raise
    except Exception as error:  # the importer raises whatever its converters do
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UnsupportedError(f"TVM cannot compile it for its virtual machine: {reason}", place=graph.name) from error
    return _exported(executable, target)


def _machine(module: Any, target: Target) -> Any:
    """TVM's target, with the options that one of the kernels needs for all of them: they become one object."""
    import tvm

    wraps = [one for one in module.functions.values() if one.attrs and one.attrs.get("hwopt.scalar", False)]
    return tvm.target.Target(description_for(wraps[0], target.tvm)) if wraps else tvm_target(target)


def _exported(executable: Any, target: Target) -> bytes:
    def link(output: str, objects: list[str], **_: Any) -> None:
        run_compiler([*find_compiler(), "-shared", "-fPIC", "-o", output, *objects], Path(output).parent)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.so"
        try:
            executable.export_library(str(path), fcompile=link)
        except (RuntimeError, ValueError) as error:
            raise ToolchainError(f"TVM cannot export the library: {error}", place=target.name) from error
        return path.read_bytes()


class Machine:
    """A loaded library of `compile_vm`; outputs come in the order of the graph's."""

    def __init__(self, library: bytes, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        import tvm
        from tvm import relax

        self.inputs, self.outputs = inputs, outputs
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.so"
            path.write_bytes(library)
            self._machine = relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name."""
        import tvm

        arguments = [tvm.runtime.tensor(np.array(feeds[name], order="C")) for name in self.inputs]
        found = self._machine["main"](*arguments)
        results = [found] if hasattr(found, "numpy") else list(found)
        return {name: result.numpy() for name, result in zip(self.outputs, results, strict=True)}
