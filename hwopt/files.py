"""Files that appear whole or not at all: whoever stops or fails in between leaves the old one."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hwopt.errors import UsageError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what takes the place of `path` at the end; of an attempt that fails nothing is left.

    Whoever writes the same file at the same time writes elsewhere: neither takes the other's half for whole.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        yield part
        part.replace(path)
    except OSError as error:  # people know the file that they named
        if error.filename is not None and Path(os.fspath(error.filename)) == part:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with suppress(OSError):
            part.unlink()


def check_writable(path: Path) -> None:
    """Before long work: raise UsageError unless something can be made where `path`, which does not exist yet, shall be."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", place=str(path), hint=f"check {folder}") from error


def write_whole(path: Path, text: str) -> None:
    """The text as a file."""
    with replacing(path) as part:
        part.write_text(text)
