"""Compiling inside of a build system: a file that lists the inputs, and a cache of what was built before."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from hwopt.artifact import Artifact, check_destination
from hwopt.cache import Cache, key_of
from hwopt.depends import dependencies, recipes, write_depfile
from hwopt.device.build import machine_of_target
from hwopt.emit.cuda import find_nvcc
from hwopt.emit.toolchain import find_compiler
from hwopt.errors import HwoptError, UsageError
from hwopt.files import replacing
from hwopt.plan.backend import CUDA
from hwopt.plan.plan import interrupted
from hwopt.plugins import find_target

UNKEYED = ("progress", "checkpoints", "workers")  # arguments that change nothing in the result


def deliver(
    model: Path,
    out: Path,
    *,
    install: Path | None = None,
    depfile: Path | None = None,
    cache: Cache | None = None,
    **options: Any,
) -> tuple[Artifact, bool]:
    """compile_model for build systems; the artifact, and whether it came from the cache.

    Libraries and header are copied to `install`, the files that were read listed in `depfile`. A build that measures nothing
    (`measure=False`) is looked up in `cache` first and kept there afterwards, unless somebody interrupted it.
    """
    for folder in (install, depfile.parent if depfile else None):
        if folder is not None and not folder.is_dir():
            raise UsageError("the folder does not exist", place=str(folder), hint="make it first")
    key = _key(model, options) if cache is not None and not options.get("measure", True) else ""
    kept = cache.find(key) if cache is not None and key else None
    if kept is not None:
        check_destination(out)
        artifact = kept.publish(out)
    else:
        from hwopt.compiler import compile_model  # TVM takes seconds to import: only for what the cache does not hold

        artifact = compile_model(model, out=out, **options)
        if cache is not None and key and not interrupted(artifact.plan["note"]):
            cache.keep(key, artifact.path)
    if install is not None:
        for name in products(artifact):
            with replacing(install / name) as part:
                shutil.copyfile(artifact.path / name, part)
    if depfile is not None:
        outputs = tuple((install or out) / name for name in products(artifact))
        write_depfile(depfile, outputs, dependencies(model, options))
    return artifact, kept is not None


def products(artifact: Artifact) -> tuple[str, ...]:
    """The files that a build system links or installs, the library first."""
    name = artifact.manifest["name"]
    known = (f"lib{name}.a", f"{name}.o", f"lib{name}.so", f"{name}.h", f"{name}.c", f"{name}.pc")
    return tuple(file for file in known if file in artifact.manifest["files"])


def _key(model: Path, options: Mapping[str, Any]) -> str:
    """The cache's key; nothing where time decides, or an input cannot be read (compiling says what is wrong with it)."""
    stated = {name: _plain(value) for name, value in options.items() if name not in UNKEYED}
    try:
        trained = tuple(recipes(options))
        if any(one.minutes for one in trained):  # how far it comes depends on the time
            return ""
        stated["cores"] = [psutil.cpu_count() for one in trained if not one.threads]
        return key_of(dependencies(model, options), {**stated, "model": model.name}, compiler_of(options.get("target", "host")))
    except (OSError, ValueError, ImportError, HwoptError):
        return ""


def _plain(value: Any) -> Any:
    """Paths by name: their contents are in the key."""
    if isinstance(value, Path):
        return value.name if "," not in str(value) else str(value)  # with options, as data have them
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def compiler_of(target: Any) -> str:
    """What $CC, or the compiler found for the target's machine, says of itself."""
    hardware = find_target(target) if isinstance(target, str) else target
    if hardware.tvm["kind"] == CUDA:
        machine = str(hardware.tvm["host"]["mtriple"]).partition("-")[0]
        return f"{_said(find_compiler(machine))} {_said(find_nvcc())}"
    return _said(find_compiler(machine_of_target(hardware) if hardware.array is None else "")).partition("\n")[0]


def _said(command: tuple[str, ...]) -> str:
    shown = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
    return f"{shlex.join(command)} {shown}"
