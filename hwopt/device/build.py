"""The daemon for a machine: cross-compiled here, in one folder with TVM's runtime, to be copied to the device as it is."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

from hwopt.emit.cpu import host_machine
from hwopt.emit.toolchain import CROSS, run_compiler
from hwopt.errors import ToolchainError, UnsupportedError, UsageError
from hwopt.files import replacing
from hwopt.target import Target

DAEMON = "hwopt-deviced"
RUNTIME = ("libtvm_runtime.so", "libtvm_ffi.so")
WHEELS = {"aarch64": "manylinux_2_28_aarch64", "x86_64": "manylinux_2_28_x86_64"}  # the machines that TVM publishes wheels for
SOURCES = Path(__file__).parent


def machine_of_target(target: Target) -> str:
    """A target's processor family in the words of emit.elf; raises UnsupportedError for what no daemon runs on."""
    triple = str(target.tvm.get("mtriple", ""))
    if not triple and target.runs_here:
        return host_machine()
    family = triple.partition("-")[0]
    for known in CROSS:
        if family == known or family.startswith(known):
            return known
    raise UnsupportedError(f"no daemon for {triple or target.kind}", place=f"target {target.name}")


def build_daemon(machine: str, folder: Path, runtime: Path | None = None) -> Path:
    """Write the daemon and what it needs into `folder`; returns the program.

    `runtime` holds TVM's two libraries for that machine; without it they are this installation's, or, for another machine,
    those of the wheels that pip downloads. Raises ToolchainError that says what is missing.
    """
    compiler = _compiler(machine)
    folder.mkdir(parents=True, exist_ok=True)
    if runtime is not None:
        _copy([runtime / name for name in RUNTIME], folder)
    elif machine == host_machine():
        _copy(_own_runtime(), folder)
    else:
        _download(machine, folder)
    flags = [
        "-std=c++17",
        "-O2",
        "-Wall",
        "-Wextra",
        "-isystem",
        str(_headers()),
        "-L.",
        "-Wl,--no-as-needed",
        "-Wl,-rpath,$ORIGIN",
    ]
    links = ["-ltvm_runtime", "-ltvm_ffi", "-ldl", "-pthread"]
    part = f".{DAEMON}.part"  # a daemon that runs keeps its file
    run_compiler([*compiler, *flags, str(SOURCES / "daemon.cc"), "-o", part, *links], folder.resolve())
    return (folder / part).replace(folder / DAEMON)


def _compiler(machine: str) -> list[str]:
    """The command that compiles C++ for a machine."""
    usual = [f"{CROSS.get(machine, machine)}-g++"] if machine != host_machine() else ["g++", "c++", "clang++"]
    for name in usual:
        if shutil.which(name):
            return [name]
    package = f"g++-{CROSS.get(machine, machine)}" if machine != host_machine() else "g++"
    raise ToolchainError(f"no C++ compiler ({', '.join(usual)}) in PATH", hint=f"install one (apt install {package})")


def _headers() -> Path:
    import tvm_ffi

    return Path(tvm_ffi.__file__).parent / "include"


def _own_runtime() -> list[Path]:
    import tvm
    import tvm_ffi

    return [Path(tvm.__file__).parent / "lib" / RUNTIME[0], Path(tvm_ffi.__file__).parent / "lib" / RUNTIME[1]]


def _copy(files: list[Path], folder: Path) -> None:
    for file in files:
        if not file.is_file():
            raise UsageError(f"no {file.name}", place=str(file.parent), hint="it holds TVM's libraries for the device")
        with replacing(folder / file.name) as part:
            shutil.copyfile(file, part)


def _download(machine: str, folder: Path) -> None:
    """TVM's two libraries out of the wheels of this installation's versions."""
    if machine not in WHEELS:
        hint = "build libtvm_runtime.so and libtvm_ffi.so for it and name their folder: --runtime FOLDER"
        raise ToolchainError(f"TVM publishes no libraries for {machine}", hint=hint)
    wanted = [f"{name}=={version(name)}" for name in ("apache-tvm", "apache-tvm-ffi")]
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    with tempfile.TemporaryDirectory(prefix="hwopt-device-") as wheels:
        command = [
            sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--platform", WHEELS[machine],
            "--python-version", python, "--implementation", "cp", "-d", wheels, *wanted,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:] or ["pip failed"]
            hint = f"fetch it elsewhere ({shlex.join(command[3:8])} ...) and use --runtime FOLDER"
            raise ToolchainError(f"cannot download {' '.join(wanted)} for {machine}: {said[0]}", hint=hint)
        for wheel in Path(wheels).glob("*.whl"):
            _unpack(wheel, folder)
    missing = [name for name in RUNTIME if not (folder / name).is_file()]
    if missing:
        raise ToolchainError(f"the wheels hold no {' and '.join(missing)}", place=machine)


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            name = member.rpartition("/")[2]
            if name in RUNTIME:
                with replacing(folder / name) as part:
                    part.write_bytes(archive.read(member))
