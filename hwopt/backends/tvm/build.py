"""Relax IRModule -> fused and scheduled kernels -> object code -> hwopt.emit.program.Program."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hwopt.analysis.qdq import quantization
from hwopt.backends.tvm import kernels
from hwopt.backends.tvm.fold import folded
from hwopt.backends.tvm.generic import scheduled
from hwopt.backends.tvm.in_place import in_place
from hwopt.backends.tvm.indices import take
from hwopt.backends.tvm.kernels import loops, transpose
from hwopt.backends.tvm.lower import lower
from hwopt.backends.tvm.origins import fused_origins
from hwopt.backends.tvm.read import Reading, read
from hwopt.backends.tvm.scratch import scratch_bytes
from hwopt.backends.tvm.support import needs_runtime, refuse, refuse_unsupported
from hwopt.backends.tvm.templates import PLAIN, Choose
from hwopt.emit.program import Program
from hwopt.errors import HwoptError, ToolchainError, UnsupportedError
from hwopt.io.preprocess import notes_of
from hwopt.ir import Graph, of_op
from hwopt.target import Target


def compile_program(
    graph: Graph, target: Target, threads: int = 1, name: str = "model", choose: Choose = kernels.default_schedule,
    compact: bool = False,
) -> Program:  # fmt: skip
    """The graph as kernels in machine code for `target` and the calls that run them, in order.

    `choose` gives the schedules of template kernels: the analytical default, or a tuning database's (tune.database.Tuned).
    Weights that are stored as codes stay so where that is faster, with `compact` wherever a kernel can decode them.
    Raises UnsupportedError that lists every node TVM cannot run, or that only its runtime can (see compile_vm).
    """
    program = assemble(reading(graph, target, threads, choose, compact), target, name)
    return dataclasses.replace(program, notes={**quantized_ends(graph), **notes_of(graph)})


def quantized_ends(graph: Graph) -> dict[str, str]:
    """What the integers at the model's ends mean, where the model says so."""
    made = {node.inputs[0]: node for node in of_op(graph, "DequantizeLinear") if node.inputs[0] in graph.inputs}
    made |= {node.output: node for node in of_op(graph, "QuantizeLinear") if node.output in graph.outputs}
    found = {name: quantization(graph, node) for name, node in made.items()}
    return {name: f"real = (value - {one.zero_point}) * {one.scale}" for name, one in found.items() if one and one.whole}


def reading(
    graph: Graph, target: Target, threads: int = 1, choose: Choose = kernels.default_schedule, compact: bool = False
) -> Reading:
    """The graph as kernels still in TIR, and their calls."""
    if target.tvm.get("kind") != "llvm":
        raise UnsupportedError(f"{target.name} is no CPU: there are cost models for it but no kernels yet", place=graph.name)
    refuse_unsupported(graph)
    graph = folded(graph)
    refuse(graph, needs_runtime(graph), "compile it for the Relax VM")
    try:
        return in_place(read(fused(lower(graph, target, threads, choose, compact), target, threads, choose), graph))
    except HwoptError:
        raise
    except Exception as error:  # TVM's passes raise kinds of their own, without the node
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedError(f"TVM cannot lower it: {reason}", place=graph.name) from error


def fused(module: Any, target: Target, threads: int, choose: Choose = kernels.default_schedule) -> Any:
    """The module after TVM's fusion, with every kernel scheduled: `main` is a list of kernel calls and reshapes."""
    import tvm
    from tvm import relax, tirx

    passes = relax.transform
    # Polynomials for exp, tanh and erf, within 4e-7 of libm's and 10 to 40 times faster, as they become vector code.
    fast, legal = passes.FastMathTransform(), passes.LegalizeOps({"relax.take": take})
    ready = [fast, legal, passes.AnnotateTIROpPattern(), passes.FoldConstant()]
    views = passes.RewriteDataflowReshape()  # looks into kernels, as long as they are not scheduled
    with tvm_target(target):
        module = tvm.transform.Sequential(ready)(module)
        module = fused_origins(module, passes.FuseOps()(module))
        module = tvm.transform.Sequential([passes.FuseTIR(), views])(module)
        for variable, function in module.functions.items():
            if isinstance(function, tirx.PrimFunc) and not function.attrs.get("hwopt.template"):
                module.update_func(variable, _scheduled(function, str(variable.name_hint), target, threads, choose))
        return module


def _scheduled(function: Any, name: str, target: Target, threads: int, choose: Choose) -> Any:
    """A kernel that no template covers, as the default is or as `choose` says."""
    if matrices := transpose.spec_of(function):
        return transpose.build(matrices, threads, target.microkernels.get("float32", PLAIN["float32"]).lanes)
    spec = None if choose is kernels.default_schedule else loops.spec_of(function, name)
    if spec is None:
        return scheduled(function, threads)
    chosen = choose(spec, target.microkernels.get("float32", PLAIN["float32"]), threads)
    return loops.ordered(function, chosen)


def tvm_target(target: Target) -> Any:
    import tvm

    return tvm.target.Target(dict(target.tvm))


def assemble(reading: Reading, target: Target, name: str) -> Program:
    """Compile what was read."""
    program, functions = named(reading, name)
    scratch = max(map(scratch_bytes, functions.values()), default=0)
    return dataclasses.replace(program, objects=build_objects(functions, target), scratch_bytes=scratch)


def named(reading: Reading, name: str) -> tuple[Program, dict[str, Any]]:
    """The Program without its objects, and its kernels by symbol: a hash of what they compute, so equal ones are built once."""
    symbols = {key: f"{name}_{digest(function)}" for key, function in reading.functions.items()}
    functions = {symbols[key]: function for key, function in reading.functions.items()}
    return Program(name, reading.buffers, tuple(reading.renamed(symbols)), reading.inputs, reading.outputs, ()), functions


def digest(function: Any) -> str:
    """16 hexadecimal digits of a kernel's contents, the same in every process."""
    import tvm_ffi

    plain = function.without_attr("global_symbol") if function.attrs and "global_symbol" in function.attrs else function
    number = tvm_ffi.structural_hash(plain, map_free_vars=True)
    return hashlib.sha256(str(number).encode()).hexdigest()[:16]


# LLVM 22 vectorizes loops over a[i % n] wrongly for AVX-512 (a Tile of ONNX's node tests): such kernels stay as written.
AS_WRITTEN = ("-vectorize-loops:bool=false",)


def build_objects(functions: Mapping[str, Any], target: Target) -> tuple[bytes, ...]:
    """Compile PrimFuncs into relocatable objects, one each; raises ToolchainError with LLVM's message.

    A kernel that this process has compiled before is not compiled again: planning builds many variants of one model.
    """
    wrapping = [symbol for symbol in sorted(functions) if functions[symbol].attrs.get("hwopt.scalar", False)]
    plain = [symbol for symbol in sorted(functions) if symbol not in wrapping]

    def compiled(symbol: str) -> bytes:
        description = json.dumps(description_for(functions[symbol], target.tvm), sort_keys=True)
        return _compiled(Source(symbol, description, target.name, functions[symbol]))

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # LLVM works outside of Python's lock
        found = list(pool.map(compiled, plain))
    return (*found, *map(compiled, wrapping))  # such options are the process's: one after the other


def description_for(function: Any, description: Mapping[str, Any]) -> dict[str, Any]:
    """A TVM target with the options that a kernel needs."""
    if not function.attrs.get("hwopt.scalar", False):
        return dict(description)
    return {**description, "cl-opt": [*description.get("cl-opt", ()), *AS_WRITTEN]}


@dataclass(frozen=True)
class Source:
    """A kernel to compile. Equal ones have equal code: `symbol` hashes the function, `description` is all of TVM's target."""

    symbol: str
    description: str
    place: str = field(compare=False)
    function: Any = field(compare=False)


@functools.lru_cache(maxsize=2048)  # some 30 KB each
def _compiled(source: Source) -> bytes:
    return object_code({source.symbol: source.function}, json.loads(source.description), source.place)


def object_code(functions: Mapping[str, Any], description: Mapping[str, Any], place: str) -> bytes:
    """Compile PrimFuncs for a TVM target into one object; raises ToolchainError with LLVM's message."""
    import tvm

    named = {symbol: function.with_attr("global_symbol", symbol) for symbol, function in sorted(functions.items())}
    try:
        with tvm.transform.PassContext(config={"tirx.disable_assert": True}), tempfile.TemporaryDirectory() as folder:
            library = tvm.tirx.build(tvm.IRModule(named), target=tvm.target.Target(dict(description)))
            path = Path(folder) / "kernels.o"
            library.write_to_file(str(path))
            return path.read_bytes()
    except Exception as error:  # TVM raises kinds of its own
        raise ToolchainError(f"TVM cannot build the kernels: {error}", place=place) from error
