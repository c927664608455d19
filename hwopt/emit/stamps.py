"""A program as a library that times itself: its kernels where they stand, and the driver around them (hwopt_stamps.c).

It is loaded by TVM, here or on a device, and not shipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hwopt.emit.build import Tensor, build_library
from hwopt.emit.products import Form
from hwopt.emit.program import Program
from hwopt.emit.toolchain import find_compiler, run_compiler

VISIBLE = "{ global: __tvm_ffi_hwopt_*; local: *; };\n"
FLAGS = ("-std=c11", "-O2", "-fPIC", "-shared", "-pthread", "-DHWOPT_PTHREAD", "-Wl,--version-script=visible.map")


@dataclass(frozen=True)
class Stamped:
    """The library, and the tensors that its functions take: first the model's inputs, then its outputs."""

    path: Path
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    calls: int


def build_stamped(program: Program, folder: Path, features: Sequence[str] = (), threads: int = 1) -> Stamped:
    """Compile the program with the timing loops around it into `folder`; raises as build_library does."""
    made = build_library(program, folder, features=features, threads=threads, form=Form(("source",)))
    name, count = program.name, len(program.inputs) + len(program.outputs)
    source = Path(__file__).with_name("hwopt_stamps.c").read_text()
    arguments = ", ".join([*(f"data[{place}]" for place in range(count)), "workspace"])
    head = f'#define HWOPT_STAMPED "{name}.c"\n#define HWOPT_STAMPED_TENSORS {count}\n'
    head += f"#define HWOPT_STAMPED_RUN(data, workspace) {name}_run({arguments})\n"
    (folder / "stamps.c").write_text(head + source)
    (folder / "visible.map").write_text(VISIBLE)
    kernels = [file for file in made.files if "_kernels" in file]
    own = [file for file in program.sources if file.endswith(".c")]
    command = [*find_compiler(made.machine), *FLAGS, "-o", "stamped.so", "stamps.c", *own, f"{name}_weights.S", *kernels, "-lm"]
    run_compiler(command, folder)
    return Stamped(folder / "stamped.so", made.inputs, made.outputs, len(program.calls))
