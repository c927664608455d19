"""Runs compiled programs on the processor they are for: directly where this machine has its features, else under qemu-user."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hwopt.emit.build import Library
from hwopt.emit.cpu import host_features, host_machine
from hwopt.emit.toolchain import CROSS
from hwopt.ir import numpy_dtype

C_TYPES = {"float32": "float", "int32": "int32_t", "uint8": "uint8_t", "int8": "int8_t", "int64": "int64_t"}
EMULATORS = {"x86_64": "qemu-x86_64", "aarch64": "qemu-aarch64", "arm": "qemu-arm", "riscv": "qemu-riscv64"}


@dataclass(frozen=True)
class Machine:
    """A processor family and, where it is emulated, which model of it; "" runs on this machine itself."""

    family: str
    cpu: str = ""

    @property
    def compiler(self) -> str:
        return "cc" if self.family == host_machine() else f"{CROSS[self.family]}-gcc"

    @property
    def command(self) -> list[str]:
        if not self.cpu:
            return []
        root = [] if self.family == host_machine() else ["-L", f"/usr/{CROSS[self.family]}"]
        return [EMULATORS[self.family], "-cpu", self.cpu, *root]

    def missing(self, features: tuple[str, ...] = ()) -> str:
        """Why programs that need these features cannot run, or ""."""
        absent = [tool for tool in (self.compiler, *self.command[:1]) if not shutil.which(tool)]
        if absent:
            return f"{' and '.join(absent)} not installed"
        if self.cpu:
            return ""
        if self.family != host_machine():
            return f"this machine is no {self.family}"
        lacking = sorted(set(features) - host_features())
        return f"this machine lacks {', '.join(lacking)}" if lacking else ""


def execute(library: Library, machine: Machine, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One run of a library that `build_library` made; raises RunError with what the run returned."""
    folder, name = library.folder, library.name
    (folder / "main.c").write_text(_main(library))
    command = [machine.compiler, "-O1", "main.c", "-L.", f"-l{name}", "-Wl,-rpath,$ORIGIN", "-o", "run"]
    subprocess.run(command, cwd=folder, check=True)
    data = b"".join(np.ascontiguousarray(feeds[one.name], numpy_dtype(one.type.dtype)).tobytes() for one in library.inputs)
    done = subprocess.run([*machine.command, str(folder / "run")], input=data, capture_output=True, check=False)
    if done.returncode:
        raise RunError(done.returncode, done.stderr.decode())
    found, at = {}, 0
    for one in library.outputs:
        array = np.frombuffer(done.stdout, numpy_dtype(one.type.dtype), int(np.prod(one.type.dims)), at)
        found[one.name], at = array.reshape(one.type.dims), at + array.nbytes
    assert at == len(done.stdout)
    return found


class RunError(Exception):
    """The program ended with `status`: 256 minus the library's error code, or what killed it (negative)."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"{status} {said}")
        self.status = status


def _main(library: Library) -> str:
    tensors = [*library.inputs, *library.outputs]
    declared = "\n".join(
        f"static {C_TYPES[one.type.dtype]} t{index}[{int(np.prod(one.type.dims))}] __attribute__((aligned(64)));"
        for index, one in enumerate(tensors)
    )
    count = len(library.inputs)
    reads = "\n".join(f"  if (fread(t{i}, sizeof t{i}, 1, stdin) != 1) return 99;" for i in range(count))
    writes = "\n".join(f"  fwrite(t{i}, sizeof t{i}, 1, stdout);" for i in range(count, len(tensors)))
    given = ", ".join(f"t{i}" for i in range(len(tensors)))
    return f"""#include <stdio.h>
#include "{library.name}.h"
{declared}
int main(void) {{
{reads}
  int status = {library.name}_run({given}, NULL);
  if (status) return status & 255;
{writes}
  return 0;
}}
"""
