"""manifest.json of an artifact: every file with its SHA-256, what the library needs of a machine, how the model is called."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

from hwopt.emit import Library, Tensor
from hwopt.emit.cpu import host_features, host_machine
from hwopt.errors import ArtifactError

FORMAT, FORMAT_VERSION = "hwopt-artifact", 1
MANIFEST = "manifest.json"

_PACKAGES = ("hwopt", "apache-tvm", "apache-tvm-ffi", "numpy", "onnx", "onnxruntime")


def facts_of(library: Library) -> dict[str, Any]:
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
        "heap": library.heap,
        "weight_bytes": library.weight_bytes,
    }


def _tensor_json(tensor: Tensor) -> dict[str, Any]:
    shape = tensor.type.shape
    return {"name": tensor.name, "dtype": tensor.type.dtype, "shape": None if shape is None else list(shape)}


def package_versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an artifact may be written, and run, without some of them
            continue
    return found


def json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
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


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError("damaged: the file is missing", place=str(path), hint="compile the model again")
        if digest_of(path) != digest:
            raise ArtifactError("damaged: its SHA-256 is not the manifest's", place=str(path), hint="compile the model again")


def foreign_reason(manifest: Mapping[str, Any]) -> str:
    """Why this machine cannot run it, or nothing."""
    if manifest["machine"] != host_machine():
        return f"is for {manifest['machine']}, this machine is {host_machine()}"
    known = host_features()
    lacking = sorted(set(manifest["features"]) - known) if known else []
    return f"needs {', '.join(lacking)}, which this processor lacks" if lacking else ""
