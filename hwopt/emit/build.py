"""Program -> a folder with the library, its header, and everything needed to build it again."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from hwopt.emit.check import check_objects, check_program, kernel_symbol
from hwopt.emit.cpu import check_code
from hwopt.emit.driver import Layout, Variant, arena_bytes, header, shared_features, source, workspace_bytes
from hwopt.emit.elf import read_object
from hwopt.emit.memory import plan_memory
from hwopt.emit.products import PARALLEL, Form, check_form, library_of, make_products
from hwopt.emit.program import Program
from hwopt.emit.toolchain import find_compiler
from hwopt.emit.weights import Weights, assembly, pack_shared
from hwopt.errors import HwoptError, UnsupportedError, UsageError, VerifyError
from hwopt.ir import TensorType

RUNTIME = ("hwopt_runtime.c", "hwopt_runtime.h", "hwopt_types.h")
FORM = Form()


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
    variants: tuple[tuple[str, ...], ...] = ()  # the features of each set of kernels, best first, where there are several
    heap: bool = True  # False: every run needs the caller's workspace


def build_library(
    program: Program,
    folder: Path | str,
    *,
    features: Sequence[str] = (),
    threads: int = 1,
    form: Form = FORM,
    fallbacks: Sequence[tuple[Program, Sequence[str]]] = (),
) -> Library:
    """Write `<name>.h` and what the form names (see products.py) into `folder`.

    `features` are checked when the library runs (names of /proc/cpuinfo); `threads` is what a run uses until somebody says
    otherwise. Without a heap a run lives in the caller's workspace alone, serially. `fallbacks` are the same model for processors
    that lack the features, with what they need themselves: the library runs the first that its processor can. The same program
    gives the same bytes. Nothing is written
    before everything is built. Raises UnsupportedError for what plain C cannot run, and ToolchainError without a C compiler.
    """
    _check_options(program, threads, form)
    programs = [program, *(other for other, _ in fallbacks)]
    machine = _machine(programs)
    compiler = () if set(form.emit) <= {"source", "array"} else find_compiler(machine)
    packed = pack_shared(programs)
    weights = packed[0]
    if len(weights.blob) >= 1 << 31:
        raise UnsupportedError(f"{len(weights.blob)} bytes of constants; a library holds 2 GB", place=program.name)
    needs = [features, *(needed for _, needed in fallbacks)]
    variants = tuple(
        _variant(one, found, needed, machine, form.heap, f"_{index}" if index else "")
        for index, (one, found, needed) in enumerate(zip(programs, packed, needs, strict=True))
    )
    _check_symbols(variants)
    folder = Path(folder)
    try:
        flags = (*PARALLEL[form.parallel], *(() if form.heap else ("-DHWOPT_NO_HEAP",)))
        files = _make(folder, variants, compiler, threads, flags, form.emit)
    except OSError as error:
        raise HwoptError(f"cannot be written: {error.strerror or error}", place=str(folder)) from error
    return Library(
        name=program.name, folder=folder, files=files, shared=library_of(program.name, form.emit), machine=machine,
        features=shared_features(variants), threads=threads, inputs=_tensors(program, program.inputs),
        outputs=_tensors(program, program.outputs), arena_bytes=arena_bytes(variants),
        workspace_bytes=workspace_bytes(variants), weight_bytes=weights.bytes,
        variants=tuple(one.features for one in variants) if fallbacks else (), heap=form.heap,
    )  # fmt: skip


def _machine(programs: Sequence[Program]) -> str:
    """What the programs are for; raises VerifyError where they are not one model for one family of processors."""
    first = programs[0]
    for program in programs:
        check_program(program)
        if _interface(program) != _interface(first):
            raise VerifyError("variants with different inputs or outputs", place=first.name)
    machines = {check_objects(program): None for program in programs}
    if len(machines) > 1:
        raise UsageError(f"one library for {' and '.join(machines)}", place=first.name, hint="compile it for each of them")
    return next(iter(machines))


def _check_symbols(variants: Sequence[Variant]) -> None:
    """Kernels of two variants must not be called the same: one of them would be linked into both."""
    known: set[str] = set()
    for one in variants:
        calls = {kernel_symbol(call, one.layout.symbols) for call in one.layout.program.calls}
        if twice := sorted(known & one.layout.symbols & calls):
            raise VerifyError(f"{', '.join(twice)} is in two variants", place=one.layout.program.name)
        known |= calls


def _interface(program: Program) -> list[tuple[str, str, tuple[int, ...]]]:
    ends = (*program.inputs, *program.outputs)
    return [(name, program.buffers[key].dtype, program.buffers[key].shape) for name, key in ends]


def _variant(program: Program, weights: Weights, features: Sequence[str], machine: str, heap: bool, suffix: str) -> Variant:
    symbols = frozenset(name for data in program.objects for name in read_object(data).functions)
    layout = Layout(program, plan_memory(program), weights, symbols, 0 if heap else program.scratch_bytes)
    return Variant(layout, tuple(sorted(features)), check_code(features, machine, f"supported{suffix}"), suffix)


def _check_options(program: Program, threads: int, form: Form) -> None:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", program.name):
        raise UsageError(f"{program.name!r} cannot begin the name of a C function", hint="use letters, digits and _")
    if not 1 <= threads <= 256:
        raise UsageError(f"{threads} threads", hint="1 to 256")
    check_form(form)


def _make(
    folder: Path,
    variants: Sequence[Variant],
    compiler: tuple[str, ...],
    threads: int,
    flags: tuple[str, ...],
    emit: Collection[str],
) -> tuple[str, ...]:
    """Build in a folder of its own next to `folder`, and move the files over once all of them are there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    name = variants[0].layout.program.name
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
        made = Path(work)
        sources = _write_sources(made, variants, threads)
        kernels = [file for file in sources if "_kernels" in file]
        own = variants[0].layout.program
        make_products(made, name, compiler, flags, kernels, emit, tuple(own.sources), own.exports)
        for file in () if "source" in emit else (file for file in sources if file != f"{name}.h"):
            (made / file).unlink()
        folder.mkdir(exist_ok=True)
        files = tuple(sorted(path.name for path in made.iterdir()))
        for file in files:
            (made / file).replace(folder / file)
    return files


def _write_sources(folder: Path, variants: Sequence[Variant], threads: int) -> list[str]:
    """Everything that a C compiler needs; the names of the files."""
    name = variants[0].layout.program.name
    objects = [data for one in variants for data in one.layout.program.objects]
    texts = {
        f"{name}.h": header(variants, threads), f"{name}.c": source(variants, threads), f"{name}_weights.S": assembly(name),
        **{file: Path(__file__).with_name(file).read_text() for file in RUNTIME}, **variants[0].layout.program.sources,
    }  # fmt: skip
    blobs = {f"{name}_weights.bin": variants[0].layout.weights.blob}
    blobs |= {f"{name}_kernels{index}.o": data for index, data in enumerate(objects)}
    for file, content in {**{file: text.encode() for file, text in texts.items()}, **blobs}.items():
        (folder / file).write_bytes(content)
    return [*texts, *blobs]


def _tensors(program: Program, values: Sequence[tuple[str, str]]) -> tuple[Tensor, ...]:
    buffers = [(name, program.buffers[key]) for name, key in values]
    return tuple(Tensor(name, TensorType(buffer.dtype, buffer.shape)) for name, buffer in buffers)
