"""Finding passes and targets: in-tree ones and anybody else's, all by the same entry points."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType, ModuleType

from hwopt.errors import UsageError, did_you_mean
from hwopt.pipeline import Pass
from hwopt.target import Target
from hwopt.target_file import load_target


@functools.cache
def find_passes() -> Mapping[str, type[Pass]]:
    """Name -> pass class. A package behind the entry point group `hwopt.passes` gives every Pass in its modules.

    They come in the order in which they run: by phase, by `order` within it, by name.
    """
    found: dict[str, type[Pass]] = {}
    for module in _modules("hwopt.passes"):
        for _, value in inspect.getmembers(module, inspect.isclass):
            if issubclass(value, Pass) and value.name and value.__module__ == module.__name__:
                _add(found, value.name, value)
    return MappingProxyType(dict(sorted(found.items(), key=lambda item: (item[1].phase, item[1].order, item[0]))))


@functools.cache
def find_targets() -> Mapping[str, Target]:
    """Name -> target. A module behind the group `hwopt.targets` gives `TARGET`, a Target or a function that returns one."""
    found: dict[str, Target] = {}
    for module in _modules("hwopt.targets"):
        value = getattr(module, "TARGET", None)
        target = value() if callable(value) else value
        if isinstance(target, Target):
            _add(found, target.name, target)
    return MappingProxyType(dict(sorted(found.items())))


def find_target(name: str) -> Target:
    """The target of that name, or that a .toml file describes.

    Several CPUs, best first and separated by commas, are one whose library runs on each of them.
    """
    first, *others = (_one_target(part.strip()) for part in name.split(","))
    if not others:
        return first
    for target in (first, *others):
        if target.kind != "cpu":
            raise UsageError(f"{target.name} is no CPU: its kernels cannot share a library", place=name)
    here = any(target.runs_here for target in (first, *others))
    return dataclasses.replace(first, name=name, runs_here=here, fallbacks=tuple(others))


def _one_target(name: str) -> Target:
    if name.endswith(".toml"):
        return load_target(Path(name), find_target_files())
    targets = find_targets()
    if name not in targets:
        raise UsageError(f"unknown target {name!r}", hint=did_you_mean(name, targets))
    return targets[name]


@functools.cache
def find_target_files() -> Mapping[str, type]:
    """Kind of TOML file -> what reads it. A module behind the group `hwopt.targets` gives them as `FILES`."""
    found: dict[str, type] = {}
    for module in _modules("hwopt.targets"):
        for kind, reader in getattr(module, "FILES", {}).items():
            _add(found, kind, reader)
    return MappingProxyType(dict(sorted(found.items())))


def plugin_files() -> tuple[Path, ...]:
    """The sources of all plug-ins and of the helpers beside them."""
    packages = [entry.load() for group in ("hwopt.passes", "hwopt.targets") for entry in entry_points(group=group)]
    files = [Path(str(package.__file__)) for package in packages]
    found = [path for file in files for path in (file.parent.rglob("*") if file.name == "__init__.py" else (file,))]
    return tuple(sorted({path for path in found if path.is_file() and path.suffix != ".pyc"}))


def _add(found: dict, name: str, value: object) -> None:
    if name in found and found[name] is not value:
        raise UsageError(f"two plug-ins are called {name!r}", hint="uninstall one of them")
    found[name] = value


def _modules(group: str) -> Iterator[ModuleType]:
    """The modules of every package an entry point of the group names; names that start with _ are helpers, not plug-ins."""
    for entry in sorted(entry_points(group=group), key=lambda e: e.name):
        with _told_apart(entry):
            package = entry.load()
        if not hasattr(package, "__path__"):
            yield package
            continue
        for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda i: i.name):
            if not info.name.startswith("_"):
                with _told_apart(entry):
                    module = importlib.import_module(f"{package.__name__}.{info.name}")
                yield module


@contextmanager
def _told_apart(entry: EntryPoint) -> Iterator[None]:
    """Whatever a plug-in raises while it is imported is its own mistake, and says whose."""
    try:
        yield
    except Exception as error:
        owner = entry.dist.name if entry.dist else entry.value
        message = f"plug-in {entry.value} cannot be imported: {type(error).__name__}: {error}"
        raise UsageError(message, place=owner, hint=f"mend it, or pip uninstall {owner}") from error
