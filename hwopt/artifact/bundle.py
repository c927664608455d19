"""Writing an artifact's folder: under a temporary name, then renamed, so that it is there whole or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hwopt.artifact.manifest import FORMAT, FORMAT_VERSION, MANIFEST, digest_of, json_bytes, read_manifest
from hwopt.errors import ArtifactError
from hwopt.files import check_writable


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
    own = {MANIFEST, *read_manifest(folder)["files"]} if MANIFEST in present else set()
    if present - own:
        some = ", ".join(sorted(present - own)[:3])
        raise ArtifactError(f"holds files that are not an artifact's: {some}", place=str(folder), hint="choose another folder")


def write_bundle(folder: Path, files: Mapping[str, bytes | Path], facts: Mapping[str, Any]) -> None:
    """The files, and a manifest that says `facts` beside their digests. Raises ArtifactError where that cannot be."""
    check_destination(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _sibling(folder) as made:
            for name, content in files.items():
                _write(made / name, content)
            digests = {name: digest_of(made / name) for name in files}
            (made / MANIFEST).write_bytes(json_bytes({**facts, "format": FORMAT, "version": FORMAT_VERSION, "files": digests}))
            _swap(made, folder)
    except OSError as error:
        raise ArtifactError(f"cannot be written: {error.strerror or error}", place=str(folder)) from error


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
