"""What a compilation leaves behind, chosen by --emit, made by the C compiler and its binutils from the generated sources.

shared  lib<name>.so, which Python, C and everything else can load
static  lib<name>.a with the model's objects; several models in one program share one runtime
object  <name>.o, all of it in one relocatable object whose only global symbols are the model's functions
source  the generated C, the weights, the kernels' objects and the runtime, to be built by somebody else
pc      <name>.pc for pkg-config, which finds the library beside itself
array   <name>_weights.c, the weights as a C array, in place of <name>_weights.S for assemblers without .incbin
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from hwopt.emit.toolchain import binutil, run_compiler
from hwopt.emit.weights import weights_array
from hwopt.errors import UsageError, did_you_mean

PRODUCTS = ("shared", "static", "object", "source", "pc", "array")
DEFAULT = ("shared", "source")
PARALLEL = {"pthread": ("-DHWOPT_PTHREAD", "-pthread"), "openmp": ("-DHWOPT_OPENMP", "-fopenmp"), "serial": ("-DHWOPT_SERIAL",)}
FUNCTIONS = ("run", "info", "set_threads", "release", "error")
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic")
LINK = ("-shared", "-Wl,--build-id=none", "-Wl,-S", "-Wl,-z,noexecstack", "-Wl,--no-undefined")


@dataclass(frozen=True)
class Form:
    """In what form a model is delivered: products, how loops run in parallel, whether a run may use the heap."""

    emit: tuple[str, ...] = DEFAULT
    parallel: str = "pthread"  # openmp, serial
    heap: bool = True


def check_form(form: Form) -> None:
    """Raise UsageError for ways to run that do not go together."""
    if form.parallel not in PARALLEL:
        raise UsageError(f"unknown way to run threads: {form.parallel!r}", hint=f"known: {', '.join(sorted(PARALLEL))}")
    if not form.heap and form.parallel != "serial":
        raise UsageError("worker threads need a heap", hint="without a heap, run serially: --parallel serial")


def parse_emit(text: str) -> tuple[str, ...]:
    """`static,pc` -> ("static", "pc"); raises UsageError for unknown words."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in PRODUCTS:
            hint = did_you_mean(name, PRODUCTS) or f"known: {', '.join(PRODUCTS)}"
            raise UsageError(f"unknown product {name!r}", place="--emit", hint=hint)
    if not names:
        raise UsageError("nothing to emit", place="--emit", hint=f"known: {', '.join(PRODUCTS)}")
    if "array" in names and "source" not in names:
        raise UsageError("array goes with the source", place="--emit", hint="add source")
    if "pc" in names and not {"shared", "static"} & set(names):
        raise UsageError("pc describes a library", place="--emit", hint="add shared or static")
    return names


def exported(name: str) -> tuple[str, ...]:
    """The model's functions, all that others see of it."""
    return tuple(f"{name}_{function}" for function in FUNCTIONS)


def library_of(name: str, emit: Collection[str]) -> str:
    """The file that can be loaded, or nothing."""
    return f"lib{name}.so" if "shared" in emit else ""


def make_products(
    folder: Path, name: str, compiler: tuple[str, ...], flags: Sequence[str], kernels: Sequence[str], emit: Collection[str],
    more: Sequence[str] = (), exports: Sequence[str] = (), runtime: str = "hwopt_runtime.c", links: Sequence[str] = (),
) -> None:  # fmt: skip
    """Build what `emit` asks for inside `folder`, where the sources lie; relative names, so that no path gets into the bytes.

    `more` are further sources, `exports` functions in them that others may call, `links` what a program links with besides.
    """
    parts = _compiled(folder, name, compiler, flags, (runtime, *more)) if {"shared", "static", "object"} & set(emit) else []
    objects = [*parts, *kernels]
    if "shared" in emit:
        script = f"{name}.map.tmp"
        (folder / script).write_text(f"{{ global: {'; '.join((*exported(name), *exports))}; local: *; }};\n")
        command = [*compiler, *LINK, f"-Wl,--version-script={script}", *flags, "-o", f"lib{name}.so", *objects, "-lm"]
        run_compiler(command, folder)
    if "static" in emit:
        run_compiler([binutil(compiler, "ar"), "rcsD", f"lib{name}.a", *objects], folder)
    if "object" in emit:
        run_compiler([*compiler, "-r", "-nostdlib", "-o", f"{name}.o", *objects], folder)
        keep = [f"--keep-global-symbol={symbol}" for symbol in (*exported(name), *exports)]
        run_compiler([binutil(compiler, "objcopy"), "--strip-debug", *keep, f"{name}.o"], folder)
    if "pc" in emit:
        (folder / f"{name}.pc").write_text(_pkg_config(name, [*flags, *links]))
    if "array" in emit:
        (folder / f"{name}_weights.c").write_text(weights_array(name, (folder / f"{name}_weights.bin").read_bytes()))
    for path in folder.glob("*.tmp*"):
        path.unlink()


def _compiled(folder: Path, name: str, compiler: tuple[str, ...], flags: Sequence[str], more: Sequence[str]) -> list[str]:
    """The generated C and the weights as objects."""
    made = []
    for file in (f"{name}.c", f"{name}_weights.S", *(file for file in more if file.endswith(".c"))):
        made.append(f"{Path(file).stem}.tmp.o")
        run_compiler([*compiler, "-std=c11", "-O2", "-fPIC", *WARNINGS, *flags, "-c", file, "-o", made[-1]], folder)
    return made


def _pkg_config(name: str, flags: Sequence[str]) -> str:
    threads = [flag for flag in flags if flag in ("-pthread", "-fopenmp") or flag.startswith("-l")]
    return f"""Name: {name}
Description: a model compiled by hwopt
Version: 0
Cflags: -I${{pcfiledir}}
Libs: -L${{pcfiledir}} -l{name} {" ".join([*threads, "-lm"])}
"""
