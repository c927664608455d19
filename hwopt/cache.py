"""Artifacts kept by what they were made from: a build system that asks for the same again gets a copy.

Only builds that measure nothing are kept: they alone give the same bytes every time. Entries are written under another name
and renamed, so that parallel builds share one cache; an entry that another process removes while it is read is a miss.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hwopt.artifact import Artifact, package_versions
from hwopt.emit.cpu import host_features, host_machine
from hwopt.errors import ArtifactError


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """$HWOPT_CACHE_DIR, else hwopt in $XDG_CACHE_HOME, else ~/.cache/hwopt."""
    if environment.get("HWOPT_CACHE_DIR"):
        return Path(environment["HWOPT_CACHE_DIR"]).expanduser()
    base = environment.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hwopt"


@dataclass(frozen=True)
class Entry:
    """One artifact of the cache."""

    key: str
    path: Path
    bytes: int
    used: float  # seconds since the epoch


@dataclass(frozen=True)
class Cache:
    """A folder of artifacts, each under the SHA-256 of what it depends on."""

    folder: Path

    def find(self, key: str) -> Artifact | None:
        """The artifact, its files checked; what is damaged is removed."""
        path = self.folder / "artifacts" / key
        try:
            found = Artifact(path, foreign=True)
            os.utime(path)
        except (ArtifactError, OSError):
            if path.exists():
                _remove(path)
            return None
        return found

    def keep(self, key: str, artifact: Path) -> None:
        """A copy of the artifact; nothing where the disk is full or another process was faster."""
        path = self.folder / "artifacts" / key
        part = path.with_name(f".{key}.{secrets.token_hex(6)}")
        try:
            shutil.copytree(artifact, part)
            part.rename(path)
        except OSError:
            shutil.rmtree(part, ignore_errors=True)

    def entries(self) -> Iterator[Entry]:
        """Least recently used first."""
        found = []
        for path in (self.folder / "artifacts").glob("[0-9a-f]*"):
            try:
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                found.append(Entry(path.name, path, size, path.stat().st_mtime))
            except OSError:  # removed by another process
                continue
        yield from sorted(found, key=lambda entry: (entry.used, entry.key))

    def prune(self, most_bytes: float | None = None, most_seconds: float | None = None) -> int:
        """Remove the least recently used entries until both bounds hold; returns the bytes that became free."""
        entries = list(self.entries())
        left, freed, now = sum(entry.bytes for entry in entries), 0, time.time()
        for entry in entries:
            old = most_seconds is not None and now - entry.used > most_seconds
            if old or (most_bytes is not None and left > most_bytes):
                _remove(entry.path)
                left, freed = left - entry.bytes, freed + entry.bytes
        for part in (self.folder / "artifacts").glob(".*"):  # left by a process that was killed
            if now - part.stat().st_mtime > 3600:
                shutil.rmtree(part, ignore_errors=True)
        return freed


def _remove(path: Path) -> None:
    """Out of sight first, so that nobody reads a half-removed entry."""
    gone = path.with_name(f".gone.{secrets.token_hex(6)}")
    try:
        path.rename(gone)
    except OSError:
        return
    shutil.rmtree(gone, ignore_errors=True)


def key_of(files: tuple[Path, ...], options: Mapping[str, Any], compiler: str) -> str:
    """SHA-256 of the contents of the files, the options, the versions, the C compiler and this machine (the target `host`)."""
    digest = hashlib.sha256()
    facts = {
        "options": options,
        "versions": package_versions(),
        "compiler": compiler,
        "machine": [host_machine(), *sorted(host_features())],
    }
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for path in files:
        digest.update(f"\0{path.name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
