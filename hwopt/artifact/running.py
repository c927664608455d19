"""The bundle that ships: a folder with the library, the model, the plan and the report, and running it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hwopt.artifact.bundle import write_bundle
from hwopt.artifact.inputs import ordered, random_inputs, read_tensors
from hwopt.artifact.manifest import MANIFEST, check_files, facts_of, foreign_reason, json_bytes, package_versions, read_manifest
from hwopt.emit import Library
from hwopt.emit.engine import CEngine, Engine, VmEngine
from hwopt.errors import ArtifactError, UsageError


def write_artifact(
    folder: Path | str,
    library: Library,
    *,
    target: str,
    model: bytes | Path,
    plan: Mapping[str, Any],
    report: Mapping[str, Any],
    graph: str,
    kind: str = "c",
    reason: str = "",
    files: Mapping[str, bytes | Path] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Artifact:
    """Write the artifact under a temporary name and rename it, so that it is there whole or not at all; returns it.

    `kind` is "c" (the generated driver) or "vm" (a Relax VM library, `reason` says why). `files` adds more by name,
    `facts` what the manifest says beside that.
    """
    texts = {"plan.json": json_bytes(plan), "report.json": json_bytes(report), "graph.txt": graph.encode()}
    built = {name: library.folder / name for name in library.files}
    known = facts_of(library) | {"target": target, "kind": kind, "reason": reason, "versions": package_versions()}
    write_bundle(Path(folder), {**built, "model.onnx": model, **texts, **(files or {})}, {**(facts or {}), **known})
    return Artifact(folder, foreign=True)


class Artifact:
    """A compiled model on disk. Reading it checks every file; `run` calls the library that ships.

    Raises ArtifactError for what is damaged or not an artifact, and for a machine that cannot run it, unless `foreign` is true:
    then plan and report can still be read. Safe to share between threads; the interpreter lock is released while the model runs.
    """

    def __init__(self, path: Path | str, *, foreign: bool = False) -> None:
        self.path = Path(path).resolve()
        self.manifest = read_manifest(self.path)
        check_files(self.path, self.manifest)
        self._reason = foreign_reason(self.manifest)
        self.inputs, self.outputs = (
            read_tensors(self.manifest[name], str(self.path / MANIFEST)) for name in ("inputs", "outputs")
        )
        self._engine: Engine | None = None
        self._lock = threading.Lock()
        if not foreign:
            self._check_machine()

    def __repr__(self) -> str:
        ends = (", ".join(f"{tensor.name}: {tensor.type}" for tensor in group) for group in (self.inputs, self.outputs))
        return f"Artifact({self.manifest['name']}, {self.manifest['target']}, {' -> '.join(ends)})"

    @property
    def kind(self) -> str:
        """ "c": the generated driver; "vm": TVM's virtual machine, for the reason in the manifest."""
        return self.manifest["kind"]

    @property
    def plan(self) -> dict[str, Any]:
        return self._read_json("plan.json")

    @property
    def report(self) -> dict[str, Any]:
        return self._read_json("report.json")

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. Raises DataError for inputs that are not the model's; nothing is cast or reshaped silently."""
        call, outputs = self._prepared(inputs)
        call()
        return {tensor.name: array for tensor, array in zip(self.outputs, outputs, strict=True)}

    def runner(self, inputs: Mapping[str, np.ndarray], threads: int | None = None) -> Callable[[], None]:
        """One run on these inputs again and again, for timing; the outputs stay inside. `threads` is set before each run."""
        call, _ = self._prepared(inputs)
        if threads is None:
            return call
        engine = self._changeable()

        def run() -> None:
            engine.set_threads(threads)
            call()

        return run

    def bench(
        self, inputs: Mapping[str, np.ndarray] | None = None, *, runs: int = 100, warmup: int = 10, threads: int | None = None
    ) -> dict[str, float]:
        """Wall-clock seconds of one run: median, iqr (interquartile range), min and mean over `runs`, after `warmup` others.

        Without inputs: normal random numbers for floats, zeros for integers (which may be indices).
        """
        if runs < 1 or warmup < 0:
            raise UsageError(f"{runs} runs after {warmup}", hint="at least 1 run, and a warm-up of 0 or more")
        call, _ = self._load().prepare(
            ordered(self.manifest["name"], self.inputs, self.random_inputs() if inputs is None else inputs)
        )
        with self._threads(threads) as used:
            for _ in range(warmup):
                call()
            seconds = np.array([_timed(call) for _ in range(runs)])
        low, median, high = np.percentile(seconds, (25, 50, 75))
        return {
            "median_seconds": float(median), "iqr_seconds": float(high - low), "min_seconds": float(seconds.min()),
            "mean_seconds": float(seconds.mean()), "runs": runs, "threads": used,
        }  # fmt: skip

    def simulation(self, inputs: Mapping[str, np.ndarray] | None = None) -> dict[str, float] | None:
        """Cycles, DRAM bytes and joules of one run on a simulated array; None for artifacts of other targets.

        Counted by the C model in the library while it computes; what runs on the controller beside the array is not in it.
        """
        engine = self._load()
        if not isinstance(engine, CEngine) or engine.simulation(True) is None:
            return None
        self.run(self.random_inputs() if inputs is None else inputs)
        return engine.simulation(True)

    def random_inputs(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Inputs of the right names, shapes and dtypes; a dimension that is not static is 1."""
        return random_inputs(self.inputs, seed)

    def publish(
        self, folder: Path | str, *, plan: Mapping[str, Any] | None = None, report: Mapping[str, Any] | None = None
    ) -> Artifact:
        """Write this artifact to another folder, with a plan or a report that was made after it; returns the new one."""
        changed = {"plan.json": plan, "report.json": report}
        texts = {name: json_bytes(value) for name, value in changed.items() if value is not None}
        write_bundle(Path(folder), {**{name: self.path / name for name in self.manifest["files"]}, **texts}, self.manifest)
        return Artifact(folder, foreign=True)

    def _read_json(self, name: str) -> dict[str, Any]:
        return json.loads((self.path / name).read_bytes())

    def _check_machine(self) -> None:
        if self._reason:
            hint = f"it was compiled for the target {self.manifest['target']}"
            raise ArtifactError(self._reason, place=str(self.path / self.manifest["library"]), hint=hint)

    def _load(self) -> Engine:
        with self._lock:
            if self._engine is None:
                self._check_machine()
                if not self.manifest["library"]:
                    raise ArtifactError("holds no shared library to run", place=str(self.path), hint="compile with --emit shared")
                engine: type[CEngine] | type[VmEngine] = CEngine if self.kind == "c" else VmEngine
                self._engine = engine(self.path / self.manifest["library"], self.manifest)
            return self._engine

    def _prepared(self, inputs: Mapping[str, np.ndarray]) -> tuple[Callable[[], None], Sequence[np.ndarray]]:
        return self._load().prepare(ordered(self.manifest["name"], self.inputs, inputs))

    def _changeable(self) -> CEngine:
        """The engine, if its number of threads can be set."""
        engine = self._load()
        if not isinstance(engine, CEngine):
            text = f"the artifact runs in TVM's virtual machine with {self.manifest['threads']} threads"
            raise UsageError(text, hint="set TVM_NUM_THREADS instead")
        return engine

    @contextmanager
    def _threads(self, threads: int | None) -> Iterator[int]:
        """Use this many threads for a while."""
        usual = self.manifest["threads"]
        if threads is None or threads == usual:
            yield usual
            return
        engine = self._changeable()
        engine.set_threads(threads)
        try:
            yield threads
        finally:
            engine.set_threads(usual)


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) * 1e-9
