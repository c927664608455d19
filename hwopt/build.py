"""One graph into one library that can be run, timed and shipped."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwopt.analysis.liveness import peak_activation_bytes
from hwopt.analysis.size import weight_bytes
from hwopt.artifact import Artifact, write_artifact
from hwopt.emit.array import FUNCTIONS, array_sources, simulated
from hwopt.emit.build import Library, Tensor, build_library
from hwopt.emit.cpu import host_machine
from hwopt.emit.cuda import build_cuda_library
from hwopt.emit.products import Form
from hwopt.emit.program import Program
from hwopt.errors import UnsupportedError
from hwopt.io.preprocess import KEY
from hwopt.io.proto import to_model
from hwopt.ir import Graph, to_text
from hwopt.pipeline import Refusal
from hwopt.plan.backend import CUDA
from hwopt.plan.plan import Plan
from hwopt.plugins import find_target
from hwopt.target import Array, Target

if TYPE_CHECKING:
    from hwopt.backends.tvm.tune.database import Database


FORM = Form()


@dataclass(frozen=True, eq=False)
class Built:
    """A compiled graph: the library's files, and the same library loaded, for scoring and timing.

    `kind` is "c" (the generated driver) or "vm" (TVM's virtual machine, for `reason`).
    """

    library: Library
    graph: Graph
    target: Target
    kind: str
    reason: str
    artifact: Artifact
    tuning: str = ""  # how many of its kernels were tuned
    coded: Mapping[str, str] = field(default_factory=dict)  # layer with weights stored as codes -> why they are decoded, or ""

    @property
    def coded_note(self) -> str:
        """How much of the weights that the model stores as codes is as small in the library; "" where it stores none."""
        reasons = [reason for reason in self.coded.values() if reason]
        kept = len(self.coded) - len(reasons)
        if not reasons:
            return f"the weights of {kept} layers stay codes in the library: kernels decode them" if kept else ""
        told = f"the library holds the weights of {len(reasons)} layers decoded ({reasons[0]}"
        return f"{told}, ...; see hwopt explain), {kept} layers decode them in their kernels"

    def write(self, out: Path | str, plan: Plan, report: Mapping[str, Any]) -> Artifact:
        """The artifact that ships. Its plan says for which layers the library holds more than the model does.

        The manifest names the preprocessing in the model, and the original, which the report knows.
        """
        expanded = tuple(Refusal("decode-in-kernel", layer, reason) for layer, reason in self.coded.items() if reason)
        plan = dataclasses.replace(plan, refused=(*plan.refused, *expanded))
        model = to_model(self.graph).SerializeToString(deterministic=True)
        text = to_text(self.graph, history=True)
        return write_artifact(
            out, self.library, target=self.target.name, model=model, plan=plan.to_data(), report=report, graph=text,
            kind=self.kind, reason=self.reason,
            facts={"preprocess": self.graph.metadata.get(KEY, ""), "original": report.get("original", {})},
        )  # fmt: skip


def build(
    graph: Graph, target: Target, threads: int, folder: Path, database: Database | None = None, form: Form = FORM,
    compact: bool = False,
) -> Built:  # fmt: skip
    """Compile one graph into `folder`: plain C where that can be, else for TVM's virtual machine (a shared library only).

    Schedules come from the tuning database where it knows better ones than the default. `compact` keeps coded weights small
    even where decoding them in the kernels costs time.
    """
    if target.tvm["kind"] == CUDA:
        return _gpu_built(graph, target, folder, form)
    from hwopt.backends.tvm.build import compile_program
    from hwopt.backends.tvm.coded import expanded_layers
    from hwopt.backends.tvm.kernels import default_schedule
    from hwopt.backends.tvm.tune.database import Tuned
    from hwopt.backends.tvm.vm import reasons

    reason = "; ".join(reasons(graph))
    if reason and form != FORM:
        raise UnsupportedError(
            f"runs in TVM's virtual machine only: {reason}", place=graph.name, hint="leave out --emit and --parallel"
        )
    if reason and target.fallbacks:
        raise UnsupportedError(f"runs in TVM's virtual machine only: {reason}", place=graph.name, hint="name one target")
    tuned = Tuned(database, target) if database is not None else None
    if reason:
        library = _machine_library(graph, target, threads, folder / "library")
    else:
        name = identifier(graph.name)
        target = _code_for(target)
        program = compile_program(graph, target, threads, name, tuned or default_schedule, compact)
        program = _with_array(program, target.array)
        fallbacks = []
        for index, other in enumerate(target.fallbacks, 1):  # under other names: the same kernel has other code there
            choose = Tuned(database, other) if database is not None else default_schedule
            fallbacks.append((compile_program(graph, other, threads, f"{name}_{index}", choose, compact), other.features))
        library = build_library(
            program, folder / "library", features=target.features, threads=threads, form=form, fallbacks=fallbacks
        )
    kind = "vm" if reason else "c"
    artifact = write_artifact(
        folder / "artifact", library, target=target.name, model=b"", plan={}, report={}, graph="", kind=kind, reason=reason
    )
    coded = {} if reason else expanded_layers(graph, target, threads, compact)
    return Built(library, graph, target, kind, reason, artifact, tuned.note() if tuned else "", coded)


def _gpu_built(graph: Graph, target: Target, folder: Path, form: Form) -> Built:
    """Kernels in a cubin and a host in C. What is built for comparison only (the default form) is not linked."""
    from hwopt.backends.tvm.cuda import compile_cuda

    made = compile_cuda(graph, target, identifier(graph.name))
    library = build_cuda_library(made, folder / "library", Form(("source",)) if form == FORM else form)
    artifact = write_artifact(folder / "artifact", library, target=target.name, model=b"", plan={}, report={}, graph="")
    return Built(library, graph, target, "c", "", artifact)


def _code_for(target: Target) -> Target:
    """The target itself; for an array with a model in C: this machine, which calls the model as the array's controller would."""
    if target.array is None:
        return target
    host = find_target("host")
    kernels = {dtype: kernel for dtype, kernel in host.microkernels.items() if dtype != "int8"}
    kernels["int8"] = target.array.microkernel()
    return dataclasses.replace(target, tvm=host.tvm, features=host.features, microkernels=kernels)


def _with_array(program: Program, array: Array | None) -> Program:
    """The program with the model of the array that its kernels call."""
    if array is None:
        return program
    sources = array_sources(array, program.name)
    return dataclasses.replace(program, sources=sources, provides=FUNCTIONS, exports=(simulated(program.name),))


def _machine_library(graph: Graph, target: Target, threads: int, folder: Path) -> Library:
    """The library of `compile_vm`; its activations are an estimate, the machine allocates as it runs."""
    from hwopt.backends.tvm.vm import compile_vm

    name = identifier(graph.name)
    folder.mkdir(parents=True)
    (folder / f"{name}.so").write_bytes(compile_vm(graph, target, threads))
    peak, size = peak_activation_bytes(graph), weight_bytes(graph)
    return Library(
        name=name, folder=folder, files=(f"{name}.so",), shared=f"{name}.so", machine=host_machine(),
        features=tuple(sorted(target.features)), threads=threads, inputs=_tensors(graph, graph.inputs),
        outputs=_tensors(graph, graph.outputs), arena_bytes=peak, workspace_bytes=0, weight_bytes=size,
    )  # fmt: skip


def _tensors(graph: Graph, values: tuple[str, ...]) -> tuple[Tensor, ...]:
    return tuple(Tensor(value, graph.tensor(value)) for value in values)


def identifier(name: str) -> str:
    """A model's name as the beginning of a C function's."""
    word = re.sub(r"\W", "_", name, flags=re.ASCII).strip("_") or "model"
    return word if word[0].isalpha() else f"model_{word}"
