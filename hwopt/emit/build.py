"""Program -> a folder with the library, its header, and everything needed to build it again."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hwopt.emit.check import check_objects, check_program
from hwopt.emit.cpu import check_code
from hwopt.emit.driver import Layout, header, source
from hwopt.emit.elf import read_object
from hwopt.emit.memory import plan_memory
from hwopt.emit.program import Program
from hwopt.emit.toolchain import find_compiler, run_compiler
from hwopt.emit.weights import assembly, pack_weights
from hwopt.errors import HwoptError, UnsupportedError, UsageError
from hwopt.ir import TensorType

RUNTIME = ("hwopt_runtime.c", "hwopt_runtime.h", "hwopt_types.h")
PARALLEL = {"pthread": ("-DHWOPT_PTHREAD", "-pthread"), "openmp": ("-DHWOPT_OPENMP", "-fopenmp"), "serial": ("-DHWOPT_SERIAL",)}
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic")


@dataclass(frozen=True)
class Tensor:
    """An input or output of a compiled model, by its name there."""

    name: str
    type: TensorType


@dataclass(frozen=True)
class Library:
    """A library that was built: what is in `folder`, and what it takes to run."""

    name: str
    folder: Path
    files: tuple[str, ...]
    shared: str  # the file in `folder` to load
    machine: str
    features: tuple[str, ...]
    threads: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    arena_bytes: int  # peak activation memory
    workspace_bytes: int
    weight_bytes: int


def build_library(
    program: Program,
    folder: Path | str,
    *,
    features: Sequence[str] = (),
    threads: int = 1,
    parallel: str = "pthread",
    scratch_bytes: int = 0,
) -> Library:
    """Write `<name>.h`, `<name>.c`, the weights, the kernels, the runtime and `lib<name>.so` into `folder`.

    `features` are checked when the library runs (names of /proc/cpuinfo); `threads` is what a run uses until somebody says
    otherwise; `scratch_bytes` is room in the workspace for what kernels allocate. The same program gives the same bytes.
    Nothing is written before everything is built. Raises UnsupportedError for what plain C cannot run, and ToolchainError
    without a C compiler.
    """
    _check_options(program, threads, parallel)
    check_program(program)
    machine = check_objects(program)
    compiler = find_compiler(machine)
    weights = pack_weights(program)
    if len(weights.blob) >= 1 << 31:
        raise UnsupportedError(f"{len(weights.blob)} bytes of constants; a library holds 2 GB", place=program.name)
    symbols = frozenset(name for data in program.objects for name in read_object(data).functions)
    layout = Layout(program, plan_memory(program), weights, symbols, scratch_bytes)
    folder, check = Path(folder), check_code(features, machine)
    try:
        files = _make(folder, layout, compiler, (threads, check, tuple(sorted(features))), PARALLEL[parallel])
    except OSError as error:
        raise HwoptError(f"cannot be written: {error.strerror or error}", place=str(folder)) from error
    return Library(
        name=program.name, folder=folder, files=files, shared=f"lib{program.name}.so", machine=machine,
        features=tuple(sorted(features)), threads=threads, inputs=_tensors(program, program.inputs),
        outputs=_tensors(program, program.outputs), arena_bytes=layout.memory.arena_bytes,
        workspace_bytes=layout.workspace_bytes, weight_bytes=weights.bytes,
    )  # fmt: skip


def _check_options(program: Program, threads: int, parallel: str) -> None:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", program.name):
        raise UsageError(f"{program.name!r} cannot begin the name of a C function", hint="use letters, digits and _")
    if not 1 <= threads <= 256:
        raise UsageError(f"{threads} threads", hint="1 to 256")
    if parallel not in PARALLEL:
        raise UsageError(f"unknown way to run threads: {parallel!r}", hint=f"known: {', '.join(sorted(PARALLEL))}")


def _make(
    folder: Path, layout: Layout, compiler: tuple[str, ...], facts: tuple[int, str, tuple[str, ...]], parallel: tuple[str, ...]
) -> tuple[str, ...]:
    """Build in a folder of its own next to `folder`, and move the files over once all of them are there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
        made = Path(work)
        _write_sources(made, layout, *facts)
        _compile(made, layout.program, compiler, parallel)
        folder.mkdir(exist_ok=True)
        files = tuple(sorted(path.name for path in made.iterdir()))
        for name in files:
            (made / name).replace(folder / name)
    return files


def _write_sources(folder: Path, layout: Layout, threads: int, check: str, features: tuple[str, ...]) -> None:
    name = layout.program.name
    (folder / f"{name}.h").write_text(header(layout))
    (folder / f"{name}.c").write_text(source(layout, threads, check, features))
    (folder / f"{name}_weights.S").write_text(assembly(name))
    (folder / f"{name}_weights.bin").write_bytes(layout.weights.blob)
    for index, data in enumerate(layout.program.objects):
        (folder / f"{name}_kernels{index}.o").write_bytes(data)
    for file in RUNTIME:
        shutil.copyfile(Path(__file__).with_name(file), folder / file)
    exports = "; ".join(f"{name}_{function}" for function in ("run", "info", "set_threads", "release", "error"))
    (folder / f"{name}.map").write_text(f"{{ global: {exports}; local: *; }};\n")


def _compile(folder: Path, program: Program, compiler: tuple[str, ...], parallel: tuple[str, ...]) -> None:
    """Relative names only, so that no path gets into the bytes."""
    name = program.name
    flags = ("-std=c11", "-O2", "-fPIC", *WARNINGS, *parallel)
    made = []
    for file in (f"{name}.c", "hwopt_runtime.c", f"{name}_weights.S"):
        made.append(f"{Path(file).stem}.tmp.o")
        run_compiler([*compiler, *flags, "-c", file, "-o", made[-1]], folder)
    kernels = [f"{name}_kernels{index}.o" for index in range(len(program.objects))]
    link = [
        "-shared",
        f"-Wl,--version-script={name}.map",
        "-Wl,--build-id=none",
        "-Wl,-S",
        "-Wl,-z,noexecstack",
        "-Wl,--no-undefined",
    ]
    run_compiler([*compiler, *link, *parallel, "-o", f"lib{name}.so", *made, *kernels, "-lm"], folder)
    for file in made:
        (folder / file).unlink()


def _tensors(program: Program, values: Sequence[tuple[str, str]]) -> tuple[Tensor, ...]:
    buffers = [(name, program.buffers[key]) for name, key in values]
    return tuple(Tensor(name, TensorType(buffer.dtype, buffer.shape)) for name, buffer in buffers)
