"""Program -> a folder with the library, its header, and everything needed to build it again."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from hwopt.emit.check import check_objects, check_program
from hwopt.emit.cpu import check_code
from hwopt.emit.driver import Layout, header, source
from hwopt.emit.elf import read_object
from hwopt.emit.memory import plan_memory
from hwopt.emit.products import Form, library_of, make_products
from hwopt.emit.program import Program
from hwopt.emit.toolchain import find_compiler
from hwopt.emit.weights import assembly, pack_weights
from hwopt.errors import HwoptError, UnsupportedError, UsageError
from hwopt.ir import TensorType

RUNTIME = ("hwopt_runtime.c", "hwopt_runtime.h", "hwopt_types.h")
FORM = Form()
PARALLEL = {"pthread": ("-DHWOPT_PTHREAD", "-pthread"), "openmp": ("-DHWOPT_OPENMP", "-fopenmp"), "serial": ("-DHWOPT_SERIAL",)}


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
    shared: str  # the file in `folder` to load, if there is one
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
    form: Form = FORM,
) -> Library:
    """Write `<name>.h` and what the form names (see products.py) into `folder`.

    `features` are checked when the library runs (names of /proc/cpuinfo); `threads` is what a run uses until somebody says
    otherwise. Without a heap a run lives in the caller's
    workspace alone, serially. The same program gives the same bytes. Nothing is written before everything
    is built. Raises UnsupportedError for what plain C cannot run, and ToolchainError without a C compiler.
    """
    _check_options(program, threads, form)
    check_program(program)
    machine = check_objects(program)
    compiler = () if set(form.emit) <= {"source"} else find_compiler(machine)
    weights = pack_weights(program)
    if len(weights.blob) >= 1 << 31:
        raise UnsupportedError(f"{len(weights.blob)} bytes of constants; a library holds 2 GB", place=program.name)
    symbols = frozenset(name for data in program.objects for name in read_object(data).functions)
    layout = Layout(program, plan_memory(program), weights, symbols, 0 if form.heap else program.scratch_bytes)
    folder, check = Path(folder), check_code(features, machine)
    try:
        flags = (*PARALLEL[form.parallel], *(() if form.heap else ("-DHWOPT_NO_HEAP",)))
        files = _make(folder, layout, compiler, (threads, check, tuple(sorted(features))), flags, form.emit)
    except OSError as error:
        raise HwoptError(f"cannot be written: {error.strerror or error}", place=str(folder)) from error
    return Library(
        name=program.name, folder=folder, files=files, shared=library_of(program.name, form.emit), machine=machine,
        features=tuple(sorted(features)), threads=threads, inputs=_tensors(program, program.inputs),
        outputs=_tensors(program, program.outputs), arena_bytes=layout.memory.arena_bytes,
        workspace_bytes=layout.workspace_bytes, weight_bytes=weights.bytes,
    )  # fmt: skip


def _check_options(program: Program, threads: int, form: Form) -> None:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", program.name):
        raise UsageError(f"{program.name!r} cannot begin the name of a C function", hint="use letters, digits and _")
    if not 1 <= threads <= 256:
        raise UsageError(f"{threads} threads", hint="1 to 256")
    if form.parallel not in PARALLEL:
        raise UsageError(f"unknown way to run threads: {form.parallel!r}", hint=f"known: {', '.join(sorted(PARALLEL))}")
    if not form.heap and form.parallel != "serial":
        raise UsageError("worker threads need a heap", hint="without a heap, run serially: --parallel serial")


def _make(
    folder: Path,
    layout: Layout,
    compiler: tuple[str, ...],
    facts: tuple[int, str, tuple[str, ...]],
    flags: tuple[str, ...],
    emit: Collection[str],
) -> tuple[str, ...]:
    """Build in a folder of its own next to `folder`, and move the files over once all of them are there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    name = layout.program.name
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
        made = Path(work)
        sources = _write_sources(made, layout, *facts)
        kernels = [file for file in sources if "_kernels" in file]
        make_products(made, name, compiler, flags, kernels, emit)
        for file in () if "source" in emit else (file for file in sources if file != f"{name}.h"):
            (made / file).unlink()
        folder.mkdir(exist_ok=True)
        files = tuple(sorted(path.name for path in made.iterdir()))
        for file in files:
            (made / file).replace(folder / file)
    return files


def _write_sources(folder: Path, layout: Layout, threads: int, check: str, features: tuple[str, ...]) -> list[str]:
    """Everything that a C compiler needs; the names of the files."""
    name = layout.program.name
    texts = {
        f"{name}.h": header(layout), f"{name}.c": source(layout, threads, check, features), f"{name}_weights.S": assembly(name),
        **{file: Path(__file__).with_name(file).read_text() for file in RUNTIME},
    }  # fmt: skip
    blobs = {f"{name}_weights.bin": layout.weights.blob}
    blobs |= {f"{name}_kernels{index}.o": data for index, data in enumerate(layout.program.objects)}
    for file, content in {**{file: text.encode() for file, text in texts.items()}, **blobs}.items():
        (folder / file).write_bytes(content)
    return [*texts, *blobs]


def _tensors(program: Program, values: Sequence[tuple[str, str]]) -> tuple[Tensor, ...]:
    buffers = [(name, program.buffers[key]) for name, key in values]
    return tuple(Tensor(name, TensorType(buffer.dtype, buffer.shape)) for name, buffer in buffers)
