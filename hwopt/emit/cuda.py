"""A model for NVIDIA GPUs as files: kernels that nvcc compiled into a cubin, embedded beside the weights, and a host in C.

What is compiled here is inspected, not run: every kernel must be a function of the cubin, which is for the architecture that was
asked for. Programs link the library with libcuda, the driver's, where they run.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hwopt.emit.build import Library, Tensor
from hwopt.emit.check import check_program
from hwopt.emit.driver import TYPES_HEADER, document, identifier, parameter_names, quoted, signature, tensor_tables
from hwopt.emit.elf import functions_of
from hwopt.emit.memory import bytes_of, plan_memory, root_of, rounded
from hwopt.emit.products import Form, make_products
from hwopt.emit.program import Program
from hwopt.emit.toolchain import find_compiler, run_compiler
from hwopt.emit.weights import Weights, assembly, pack_weights
from hwopt.errors import ToolchainError, UsageError, VerifyError
from hwopt.ir import TensorType

RUNTIME = ("hwopt_cuda.c", "hwopt_cuda.h", "hwopt_types.h")
EM_CUDA = 190  # e_machine of a cubin


@dataclass(frozen=True)
class Launch:
    """One kernel: its name in the cubin, blocks and threads (x, y, z), and the buffers whose addresses it takes."""

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    args: tuple[str, ...]
    label: str = ""


@dataclass(frozen=True, eq=False)
class CudaProgram:
    """A Program whose calls are launches, its kernels in CUDA C, the architecture (sm_75) and LLVM's triple of the host."""

    program: Program
    launches: tuple[Launch, ...]
    source: str
    arch: str
    host: str


def build_cuda_library(made: CudaProgram, folder: Path, form: Form) -> Library:
    """Write header, host, kernels and what `form` names into `folder`; raises ToolchainError without nvcc."""
    if "shared" in form.emit:
        raise UsageError("a library for CUDA is linked with libcuda where it runs", place="--emit", hint="--emit static,source")
    check_program(made.program)
    machine = made.host.partition("-")[0]
    name, weights, places = made.program.name, pack_weights(made.program), _places(made.program)
    folder.mkdir(parents=True, exist_ok=True)
    compiler = () if set(form.emit) <= {"source"} else find_compiler(machine)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
        inside = Path(work)
        sources = _sources(made, weights, places)
        for file, data in sources.items():
            (inside / file).write_bytes(data)
        (inside / f"{name}.cubin").write_bytes(compiled(made, inside))
        flags = ("-pthread",)
        make_products(inside, name, compiler, flags, (), form.emit, runtime="hwopt_cuda.c", links=("-lcuda",))
        for file in () if "source" in form.emit else set(sources) - {f"{name}.h"}:
            (inside / file).unlink()
        files = tuple(sorted(path.name for path in inside.iterdir()))
        for file in files:
            (inside / file).replace(folder / file)
    return Library(
        name=name, folder=folder, files=files, shared="", machine=machine, features=(), threads=1,
        inputs=_tensors(made.program, made.program.inputs), outputs=_tensors(made.program, made.program.outputs),
        arena_bytes=plan_memory(made.program).arena_bytes, workspace_bytes=0, weight_bytes=weights.bytes,
    )  # fmt: skip


def find_nvcc(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """CUDA's compiler: $CUDACXX, else nvcc; raises ToolchainError that says what to install."""
    command = tuple(shlex.split(environment.get("CUDACXX", ""))) or ("nvcc",)
    if shutil.which(command[0], path=environment.get("PATH")):
        return command
    raise ToolchainError(f"no {command[0]} in PATH", hint="install CUDA's compiler, or name one in CUDACXX")


def compiled(made: CudaProgram, folder: Path) -> bytes:
    """The cubin of the kernels, inspected: for the architecture, with every kernel in it."""
    source = folder / f"{made.program.name}.cu"
    command = [*find_nvcc(), "-x", "cu", f"-arch={made.arch}", "-std=c++17", "-cubin", source.name, "-o", "kernels.tmp.cubin"]
    run_compiler(command, folder)
    data = (folder / "kernels.tmp.cubin").read_bytes()
    (folder / "kernels.tmp.cubin").unlink()
    machine, functions = functions_of(data)
    missing = [one.kernel for one in made.launches if one.kernel not in functions]
    if machine != EM_CUDA or missing:
        raise VerifyError(f"the cubin lacks {', '.join(missing) or 'CUDA code'}", place=made.program.name)
    return data


@dataclass(frozen=True)
class _Places:
    """Where every root buffer lies in the memory on the GPU: weights, activations, inputs, outputs; and its size."""

    offsets: Mapping[str, int]
    bytes: int


def _places(program: Program) -> _Places:
    weights, memory = pack_weights(program), plan_memory(program)
    offsets, at = dict(weights.offsets), rounded(len(weights.blob))
    offsets |= {name: at + offset for name, offset in memory.offsets.items()}
    at += rounded(memory.arena_bytes)
    for _, name in (*program.inputs, *program.outputs):
        root = root_of(program, name)
        if root not in offsets:
            offsets[root], at = at, at + rounded(bytes_of(program.buffers[root]))
    return _Places(offsets, at)


def _sources(made: CudaProgram, weights: Weights, places: _Places) -> dict[str, bytes]:
    name = made.program.name
    embedded = assembly(name) + assembly(name).replace(f"{name}_weights", f"{name}_cubin").replace("_cubin.bin", ".cubin")
    texts = {f"{name}.h": _header(made, places), f"{name}.c": _host(made, places, len(weights.blob)), f"{name}.cu": made.source}
    texts |= {f"{name}_weights.S": embedded, **{file: Path(__file__).with_name(file).read_text() for file in RUNTIME}}
    return {f"{name}_weights.bin": weights.blob, **{file: text.encode() for file, text in texts.items()}}


def _header(made: CudaProgram, places: _Places) -> str:
    program, upper = made.program, made.program.name.upper()
    return f"""/* {program.name}: a model compiled by hwopt for NVIDIA GPUs ({made.arch}). This file is generated.
 *
{document(program)}
 * The kernels were compiled and inspected, not run. Tensors are dense, in C order, in the host's memory; a run copies them to the
 * first GPU and back and takes {places.bytes} bytes there. Threads take turns. Link with -lcuda.
 */
#ifndef {upper}_H
#define {upper}_H
{TYPES_HEADER.read_text()}
#ifdef __cplusplus
extern "C" {{
#endif

/* Runs the model once; `workspace` is not used. Returns HWOPT_OK or an error code. */
{signature(program)};

/* Names, shapes and sizes; never NULL. */
const hwopt_info *{program.name}_info(void);

/* Gives back what runs keep on the GPU. */
void {program.name}_release(void);

/* What an error code means, in English. */
const char *{program.name}_error(int code);

#ifdef __cplusplus
}}
#endif
#endif
"""


def _host(made: CudaProgram, places: _Places, blob: int) -> str:
    program, name = made.program, made.program.name
    parameters, count = parameter_names(program), len(program.inputs)
    offset = {buffer: places.offsets[root_of(program, buffer)] for buffer in _used(made)}
    arguments: list[str] = []
    launches = []
    for one in made.launches:
        grid, block = (", ".join(map(str, sizes)) for sizes in (one.grid, one.block))
        row = f'{{"{one.kernel}", {{{grid}}}, {{{block}}}, {len(arguments)}u, {len(one.args)}u}}'
        launches.append(f"{row} /* {identifier(one.label)} */")
        arguments += [f"{offset[buffer]}u" for buffer in one.args]
    ends = [[f"{offset[buffer]}u" for _, buffer in values] for values in (program.inputs, program.outputs)]
    most = max((len(one.args) for one in made.launches), default=0)
    weights, arena = pack_weights(program).bytes, plan_memory(program).arena_bytes
    return f"""#include "{name}.h"
#include "hwopt_cuda.h"

__attribute__((visibility("hidden"))) extern const unsigned char {name}_weights[], {name}_cubin[];
{tensor_tables(program)}static const char *const sets[] = {{""}};
static const hwopt_info info = {{
    {quoted(name)}, "", {count}u, {len(program.outputs)}u, inputs, outputs, {arena}u, 0u, {weights}u, 1u, sets}};
static const hwopt_launch launches[] = {{
    {_table(launches, "{0}")}}};
static const uint64_t arguments[] = {{{_table(arguments)}}};
static const uint64_t input_offsets[] = {{{_table(ends[0])}}}, output_offsets[] = {{{_table(ends[1])}}};
static hwopt_gpu *gpu;
static const hwopt_cuda_model model = {{
    &info, {name}_weights, {name}_cubin, launches, arguments, input_offsets, output_offsets,
    {len(launches)}u, {most}u, {blob}u, {max(places.bytes, 1)}u, &gpu}};

{signature(program)} {{
  const void *in[] = {{{", ".join(parameters[:count]) or "NULL"}}};
  void *out[] = {{{", ".join(parameters[count:])}}};
  (void)workspace;
  return hwopt_cuda_run(&model, in, out);
}}
const hwopt_info *{name}_info(void) {{ return &info; }}
void {name}_release(void) {{ hwopt_cuda_release(&model); }}
const char *{name}_error(int code) {{ return hwopt_cuda_error_text(code); }}
"""


def _used(made: CudaProgram) -> Iterable[str]:
    ends = (*made.program.inputs, *made.program.outputs)
    return {*(buffer for _, buffer in ends), *(buffer for one in made.launches for buffer in one.args)}


def _table(rows: Sequence[str], nothing: str = "0") -> str:
    """C knows no empty arrays."""
    return ",\n    ".join(rows) or nothing


def _tensors(program: Program, values: Sequence[tuple[str, str]]) -> tuple[Tensor, ...]:
    buffers = [(name, program.buffers[key]) for name, key in values]
    return tuple(Tensor(name, TensorType(buffer.dtype, buffer.shape)) for name, buffer in buffers)
