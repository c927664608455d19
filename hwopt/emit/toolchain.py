"""The C compiler of this machine: found, asked, and its complaints passed on."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from hwopt.errors import ToolchainError

COMPILERS = ("cc", "gcc", "clang")


def find_compiler(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The command that compiles C: $CC (which may hold options), else the first of cc, gcc, clang; raises ToolchainError."""
    chosen = tuple(shlex.split(environment.get("CC", "")))
    path = environment.get("PATH")
    for command in [chosen] if chosen else [(name,) for name in COMPILERS]:
        if shutil.which(command[0], path=path):
            return command
    if chosen:
        raise ToolchainError(f"no C compiler {chosen[0]!r}, which CC asks for", hint="unset CC or correct it")
    hint = "install one: apt install gcc, dnf install gcc or xcode-select --install; or name one in CC"
    raise ToolchainError(f"no C compiler ({', '.join(COMPILERS)}) in PATH", hint=hint)


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
