"""The C compiler of this machine: found, asked, and its complaints passed on."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from hwopt.emit.cpu import host_machine
from hwopt.errors import ToolchainError

COMPILERS = ("cc", "gcc", "clang")

# machine -> the prefix of its GNU cross compiler
CROSS: Mapping[str, str] = {
    "aarch64": "aarch64-linux-gnu",
    "arm": "arm-linux-gnueabihf",
    "riscv": "riscv64-linux-gnu",
    "x86_64": "x86_64-linux-gnu",
    "i386": "i686-linux-gnu",
}


def find_compiler(machine: str = "", environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The command that compiles C for a machine ("" is this one): $CC, which may hold options, else a usual name.

    Raises ToolchainError that says what to install.
    """
    chosen = tuple(shlex.split(environment.get("CC", "")))
    foreign = bool(machine) and machine != host_machine()
    usual = (f"{CROSS.get(machine, machine)}-gcc",) if foreign else COMPILERS
    for command in [chosen] if chosen else [(name,) for name in usual]:
        if shutil.which(command[0], path=environment.get("PATH")):
            return command
    if chosen:
        raise ToolchainError(f"no C compiler {chosen[0]!r}, which CC asks for", hint="unset CC or correct it")
    package = f"gcc-{CROSS.get(machine, machine)}" if foreign else "gcc"
    raise ToolchainError(
        f"no C compiler ({', '.join(usual)}) in PATH", hint=f"install one (apt install {package}) or name one in CC"
    )


def binutil(compiler: Sequence[str], name: str) -> str:
    """`ar` or `objcopy` for what this compiler makes: its own, else the one with its prefix.

    Raises ToolchainError that says what to install.
    """
    try:
        asked = subprocess.run(
            [*compiler, f"-print-prog-name={name}"], capture_output=True, text=True, check=False
        ).stdout.strip()
    except OSError as error:
        raise ToolchainError(f"cannot run {compiler[0]}: {error.strerror}") from error
    prefix = compiler[0].rpartition("-")[0]
    for found in (asked, f"{prefix}-{name}" if prefix else name, name):
        if found and shutil.which(found):
            return found
    raise ToolchainError(f"no {name} for {compiler[0]}", hint="install its binutils (apt install binutils)")


def run_compiler(command: Sequence[str], folder: Path) -> None:
    """One step of a build, inside `folder`; raises ToolchainError with what the compiler said."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise ToolchainError(f"cannot run {command[0]}: {error.strerror}") from error
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[:20])
        raise ToolchainError(f"{shlex.join(command)} failed with {done.returncode}:\n{said}")
