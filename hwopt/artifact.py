"""The bundle that ships: a folder with the library, the model, the plan and the report, and running it.

manifest.json names every file with its SHA-256, what the library needs of a machine, and how the model is called.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from hwopt.emit import Library, Tensor
from hwopt.emit.cpu import host_features, host_machine
from hwopt.emit.engine import CEngine, Engine, VmEngine
from hwopt.errors import ArtifactError, DataError, UsageError, did_you_mean
from hwopt.files import check_writable
from hwopt.ir import TensorType, numpy_dtype

FORMAT, FORMAT_VERSION = "hwopt-artifact", 1
MANIFEST = "manifest.json"

_PACKAGES = ("hwopt", "apache-tvm", "apache-tvm-ffi", "numpy", "onnx", "onnxruntime")


# ---------------------------------------------------------------------------------------------------------------- writing


def check_destination(folder: Path | str) -> None:
    """Raise ArtifactError unless an artifact may be written there: nothing is, or an empty folder, or an older artifact.

    A folder that holds anything else, be it one file more than the artifact's own, is somebody's and stays untouched.
    """
    folder = Path(folder)
    if not folder.exists():
        check_writable(folder)
        return
    if not folder.is_dir():
        raise ArtifactError("is a file", place=str(folder), hint="choose another folder for the artifact")
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    own = {MANIFEST, *_read_manifest(folder)["files"]} if MANIFEST in present else set()
    if present - own:
        some = ", ".join(sorted(present - own)[:3])
        raise ArtifactError(f"holds files that are not an artifact's: {some}", place=str(folder), hint="choose another folder")


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
    texts = {"plan.json": _json(plan), "report.json": _json(report), "graph.txt": graph.encode()}
    built = {name: library.folder / name for name in library.files}
    known = _facts(library) | {"target": target, "kind": kind, "reason": reason, "versions": package_versions()}
    return _bundle(Path(folder), {**built, "model.onnx": model, **texts, **(files or {})}, {**(facts or {}), **known})


def _bundle(folder: Path, files: Mapping[str, bytes | Path], facts: Mapping[str, Any]) -> Artifact:
    check_destination(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _sibling(folder) as made:
            for name, content in files.items():
                _write(made / name, content)
            digests = {name: _digest(made / name) for name in files}
            (made / MANIFEST).write_bytes(_json({**facts, "format": FORMAT, "version": FORMAT_VERSION, "files": digests}))
            _swap(made, folder)
    except OSError as error:
        raise ArtifactError(f"cannot be written: {error.strerror or error}", place=str(folder)) from error
    return Artifact(folder, foreign=True)


@contextmanager
def _sibling(folder: Path) -> Iterator[Path]:
    """A new folder next to `folder` that is gone afterwards, unless it was renamed."""
    made = folder.parent / f".{folder.name}.{secrets.token_hex(6)}"
    made.mkdir()
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _swap(made: Path, folder: Path) -> None:
    """Put `made` in the place of `folder`; whatever goes wrong, one of the two is there."""
    if not folder.exists():
        made.rename(folder)
        return
    with _sibling(folder) as attic:
        folder.rename(attic / "old")
        try:
            made.rename(folder)
        except BaseException:
            (attic / "old").rename(folder)
            raise


def _write(path: Path, content: bytes | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        shutil.copyfile(content, path)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _facts(library: Library) -> dict[str, Any]:
    return {
        "name": library.name,
        "library": library.shared,
        "machine": library.machine,
        "features": list(library.features),
        "variants": [list(one) for one in library.variants],  # of the features, best first, where there are several
        "threads": library.threads,
        "inputs": [_tensor_json(tensor) for tensor in library.inputs],
        "outputs": [_tensor_json(tensor) for tensor in library.outputs],
        "peak_activation_bytes": library.arena_bytes,
        "workspace_bytes": library.workspace_bytes,
        "weight_bytes": library.weight_bytes,
    }


def package_versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an artifact may be written, and run, without some of them
            continue
    return found


def _tensor_json(tensor: Tensor) -> dict[str, Any]:
    shape = tensor.type.shape
    return {"name": tensor.name, "dtype": tensor.type.dtype, "shape": None if shape is None else list(shape)}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------- reading


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, with the fields that everything here relies on; raises ArtifactError."""
    place = str(folder / MANIFEST)
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "not an artifact: it has no manifest.json" if folder.is_dir() else "no such artifact"
        raise ArtifactError(what, place=str(folder)) from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"damaged: {error}", place=place, hint="compile the model again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError("not an artifact's manifest", place=place)
    if manifest.get("version") != FORMAT_VERSION:
        hint = f"this hwopt reads version {FORMAT_VERSION}; compile the model again, or use the hwopt that wrote it"
        raise ArtifactError(f"artifact format {manifest.get('version')}", place=place, hint=hint)
    _check_fields(manifest, place)
    return manifest


_FIELDS: Mapping[str, type] = {
    "name": str, "kind": str, "reason": str, "library": str, "machine": str, "target": str, "features": list, "threads": int,
    "inputs": list, "outputs": list, "files": dict, "versions": dict,
}  # fmt: skip


def _check_fields(manifest: Mapping[str, Any], place: str) -> None:
    for name, kind in _FIELDS.items():
        if not isinstance(manifest.get(name), kind):
            raise ArtifactError(f"damaged: {name} is missing or no {kind.__name__}", place=place, hint="compile the model again")
    names = [name for name in (*manifest["files"], manifest["library"]) if name]
    outside = [name for name in names if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if outside or manifest["library"] not in ("", *manifest["files"]):
        raise ArtifactError(f"names a file outside of it: {', '.join(outside) or manifest['library']}", place=place)


def _check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError("damaged: the file is missing", place=str(path), hint="compile the model again")
        if _digest(path) != digest:
            raise ArtifactError("damaged: its SHA-256 is not the manifest's", place=str(path), hint="compile the model again")


def _foreign(manifest: Mapping[str, Any]) -> str:
    """Why this machine cannot run it, or nothing."""
    if manifest["machine"] != host_machine():
        return f"is for {manifest['machine']}, this machine is {host_machine()}"
    known = host_features()
    lacking = sorted(set(manifest["features"]) - known) if known else []
    return f"needs {', '.join(lacking)}, which this processor lacks" if lacking else ""


class Artifact:
    """A compiled model on disk. Reading it checks every file; `run` calls the library that ships.

    Raises ArtifactError for what is damaged or not an artifact, and for a machine that cannot run it, unless `foreign` is true:
    then plan and report can still be read. Safe to share between threads; the interpreter lock is released while the model runs.
    """

    def __init__(self, path: Path | str, *, foreign: bool = False) -> None:
        self.path = Path(path).resolve()
        self.manifest = _read_manifest(self.path)
        _check_files(self.path, self.manifest)
        self._reason = _foreign(self.manifest)
        self.inputs, self.outputs = (_tensors(self.manifest[name], str(self.path / MANIFEST)) for name in ("inputs", "outputs"))
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
        call, outputs = self._load().prepare(self._ordered(inputs))
        call()
        return {tensor.name: array for tensor, array in zip(self.outputs, outputs, strict=True)}

    def runner(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], None]:
        """One run on these inputs again and again, for timing; the outputs stay inside."""
        call, _ = self._load().prepare(self._ordered(inputs))
        return call

    def bench(
        self, inputs: Mapping[str, np.ndarray] | None = None, *, runs: int = 100, warmup: int = 10, threads: int | None = None
    ) -> dict[str, float]:
        """Wall-clock seconds of one run: median, iqr (interquartile range), min and mean over `runs`, after `warmup` others.

        Without inputs: normal random numbers for floats, zeros for integers (which may be indices).
        """
        if runs < 1 or warmup < 0:
            raise UsageError(f"{runs} runs after {warmup}", hint="at least 1 run, and a warm-up of 0 or more")
        call, _ = self._load().prepare(self._ordered(self.random_inputs() if inputs is None else inputs))
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
        random = np.random.default_rng(seed)
        made = {}
        for tensor in self.inputs:
            shape = [dim if isinstance(dim, int) else 1 for dim in tensor.type.shape or ()]
            floating = "float" in tensor.type.dtype
            values = random.standard_normal(shape) if floating else np.zeros(shape)
            made[tensor.name] = values.astype(numpy_dtype(tensor.type.dtype))
        return made

    def publish(
        self, folder: Path | str, *, plan: Mapping[str, Any] | None = None, report: Mapping[str, Any] | None = None
    ) -> Artifact:
        """Write this artifact to another folder, with a plan or a report that was made after it; returns the new one."""
        changed = {"plan.json": plan, "report.json": report}
        texts = {name: _json(value) for name, value in changed.items() if value is not None}
        return _bundle(Path(folder), {**{name: self.path / name for name in self.manifest["files"]}, **texts}, self.manifest)

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

    @contextmanager
    def _threads(self, threads: int | None) -> Iterator[int]:
        """Use this many threads for a while."""
        usual, engine = self.manifest["threads"], self._load()
        if threads is None or threads == usual:
            yield usual
            return
        if not isinstance(engine, CEngine):
            raise UsageError(
                f"the artifact runs in TVM's virtual machine with {usual} threads", hint="set TVM_NUM_THREADS instead"
            )
        engine.set_threads(threads)
        try:
            yield threads
        finally:
            engine.set_threads(usual)

    def _ordered(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        names = [tensor.name for tensor in self.inputs]
        for name in inputs:
            if name not in names:
                raise DataError(f"the model has no input {name!r}", place=self.manifest["name"], hint=did_you_mean(name, names))
        missing = [f"{tensor.name}: {tensor.type}" for tensor in self.inputs if tensor.name not in inputs]
        if missing:
            raise DataError(f"missing input {', '.join(missing)}", place=self.manifest["name"])
        return [_checked(np.asarray(inputs[tensor.name]), tensor) for tensor in self.inputs]


def _tensors(entries: Sequence[Mapping[str, Any]], place: str) -> tuple[Tensor, ...]:
    try:
        found = tuple(
            Tensor(e["name"], TensorType(e["dtype"], None if e["shape"] is None else tuple(e["shape"]))) for e in entries
        )
        for tensor in found:
            numpy_dtype(tensor.type.dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError("damaged: inputs and outputs mean nothing", place=place, hint="compile the model again") from error
    return found


def _checked(array: np.ndarray, tensor: Tensor) -> np.ndarray:
    wanted = tensor.type
    if array.dtype != numpy_dtype(wanted.dtype):
        hint = f"convert it with .astype({numpy_dtype(wanted.dtype).name!r})"
        raise DataError(f"input is {array.dtype}, the model takes {wanted}", place=tensor.name, hint=hint)
    fits = wanted.shape is None or (
        len(wanted.shape) == array.ndim
        and all(not isinstance(want, int) or want == have for want, have in zip(wanted.shape, array.shape, strict=True))
    )
    if not fits:
        raise DataError(f"input has the shape {list(array.shape)}, the model takes {wanted}", place=tensor.name)
    return array


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) * 1e-9
