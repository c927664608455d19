"""The files that a compilation reads: for build systems, which must know when to build again, and for the cache."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import onnx

from hwopt.files import write_whole
from hwopt.plan.plan import plan_from_json
from hwopt.plugins import find_target, plugin_files
from hwopt.recover import Recipe, parse_recipe
from hwopt.recover.recipe import files_read
from hwopt.sources import files_of
from hwopt.target import Target, table_of

COMPILERS = ("hwopt", "apache-tvm", "apache-tvm-ffi", "onnxruntime", "torch")  # the last two find errors of changes, and train
FILES = ("plan", "tuning_db", "calibrate", "evaluate", "train")  # options that may name one
DATA = ("calibrate", "evaluate", "train")  # options that may name a whole folder


def dependencies(model: Path, options: Mapping[str, Any]) -> tuple[Path, ...]:
    """The model with its external weights, the files that options name, and the compiler itself with all plug-ins; absolute.

    Of what compiles, releases are named by the files that say their version: another release is another compiler.
    """
    named = [options.get(name) for name in FILES] + str(options.get("target") or "").split(",")
    given = [path for value in named if (path := _file(value)) is not None]
    own = Path(__file__).parent
    sources = sorted(path for path in own.rglob("*") if path.suffix in (".py", ".c", ".h"))
    found = [model, *external_files(model), *given, *_prices(options.get("target")), *sources, *plugin_files(), *_releases()]
    data = [path for name in DATA for path in files_of(options.get(name))]
    data += [path for recipe in recipes(options) for path in files_read(recipe)]
    return tuple(dict.fromkeys(path.resolve() for path in (*found, *data)))


def recipes(options: Mapping[str, Any]) -> Iterator[Recipe]:
    """What trains: the recipe that is stated, and the one that a plan has on record."""
    if stated := options.get("recover"):
        yield parse_recipe(stated)
    plan = options.get("plan")
    if isinstance(plan, (str, Path)) and Path(plan).is_file():
        recorded = plan_from_json(Path(plan).read_text(), str(plan)).recovery
        yield from (parse_recipe(one.recipe) for one in (recorded,) if one)


def _releases() -> Iterator[Path]:
    for name in COMPILERS:
        with contextlib.suppress(PackageNotFoundError):
            for file in distribution(name).files or ():
                if file.name in ("METADATA", "PKG-INFO") and (path := Path(str(file.locate()))).is_file():
                    yield path


def _prices(target: Any) -> Iterator[Path]:
    """The tables that decide for the targets, the user's own among them."""
    known = find_target(target) if isinstance(target, str) else target
    for one in (known, *known.fallbacks) if isinstance(known, Target) else ():
        if (path := table_of(one.cost)) is not None:
            yield path


def _file(value: Any) -> Path | None:
    """The file behind an option: a path, or the module of `module:function`."""
    if not isinstance(value, str | Path):
        return None
    if re.fullmatch(r"[\w.]+:\w+", str(value)):
        module = importlib.import_module(str(value).partition(":")[0])
        return Path(module.__file__) if module.__file__ else None
    return Path(value) if Path(value).is_file() else None


def external_files(model: Path) -> Iterator[Path]:
    """Where an ONNX model keeps weights beside it."""
    if model.suffix != ".onnx":
        return
    graph = onnx.load(model, load_external_data=False).graph
    for tensor in graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                yield model.parent / entry.value


def write_depfile(path: Path, outputs: tuple[Path, ...], inputs: tuple[Path, ...]) -> None:
    """`outputs: inputs` as make reads it, written whole or not at all.

    Every input is a rule of its own, too, without which make does not go on where one of them is gone (gcc -MP does the same).
    """
    names = [escaped(path) for path in inputs]
    rules = "".join(f"{name}:\n" for name in names)
    write_whole(path, f"{' '.join(map(escaped, outputs))}: \\\n " + " \\\n ".join(names) + "\n" + rules)


def escaped(path: Path | str) -> str:
    """A path in a makefile: blanks, # and $ mean something there."""
    return re.sub(r"([ #])", r"\\\1", str(path)).replace("$", "$$")
