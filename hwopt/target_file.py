"""Targets in TOML files of the user's own: read, checked against the keys of their kind, and complained about by line.

A plug-in module behind `hwopt.targets` offers kinds of files as `FILES`, kind -> a dataclass whose fields are the keys: numbers
(which must be above zero), texts, truth values, Paths of files beside it, tuples of texts, and tuples of Memory for [[memories]]
tables. It has a method `target(name, summary)`.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from hwopt.errors import HwoptError, UsageError, did_you_mean
from hwopt.target import Memory, Target

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

COMMON = ("name", "kind", "summary")
COUNTS = ("rows", "columns", "pixels", "channels", "depth", "engines", "vector_lanes", "cores", "sms")
WITHIN = {  # by how a key ends: what hardware may have, so that a slip of the pen is no target
    **dict.fromkeys(COUNTS, (1, 4096)), "clock_hz": (1e3, 1e11), "bytes": (1, 1e15), "bytes_per_second": (1, 1e18),
}  # fmt: skip


class TargetFile(Protocol):
    """What a kind of file makes of its keys."""

    def target(self, name: str, summary: str) -> Target: ...


@dataclass(frozen=True)
class Source:
    """The text of a file, to say where in it something is wrong."""

    path: Path
    text: str

    def error(self, message: str, key: str = "", nth: int = 0, hint: str = "") -> UsageError:
        """An error at the line of a key (its nth occurrence), or at the whole file."""
        line = self.line(key, nth) if key else 0
        return UsageError(message, place=f"{self.path}:{line}: {key}" if line else str(self.path), hint=hint)

    def line(self, key: str, nth: int = 0) -> int:
        """The number of the line that sets a key or opens a table; 0 if none does. tomllib does not keep them."""
        name = rf"(?:\"{re.escape(key)}\"|'{re.escape(key)}'|{re.escape(key)})"
        pattern = re.compile(rf"^[^#]*?(?:(?:^|[{{,])\s*{name}\s*=|^\s*\[\[?\s*{name}\s*\]\]?)")
        found = [number for number, line in enumerate(self.text.splitlines(), 1) if pattern.search(line)]
        return found[min(nth, len(found) - 1)] if found else 0


def load_target(path: Path, kinds: Mapping[str, type]) -> Target:
    """The target that a file describes. Raises UsageError that names file, line and key."""
    source = _read(path)
    try:
        data = tomllib.loads(source.text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"is no TOML: {error}", place=str(path)) from error
    for key in ("name", "kind"):
        if not isinstance(data.get(key), str) or not data[key]:
            raise source.error(f"needs a text {key!r}", key, hint=f"kinds: {', '.join(sorted(kinds))}" if key == "kind" else "")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", data["name"]):
        raise source.error(f"{data['name']!r} is no name", "name", hint="use letters, digits, - and _")
    if data["kind"] not in kinds:
        raise source.error(f"unknown kind {data['kind']!r}", "kind", hint=did_you_mean(data["kind"], kinds))
    if not isinstance(data.get("summary", ""), str):
        raise source.error("needs a text", "summary")
    values = {key: value for key, value in data.items() if key not in COMMON}
    made = cast(TargetFile, _filled(kinds[data["kind"]], values, source))
    try:
        return made.target(data["name"], data.get("summary") or f"{data['kind']} described in {path.name}")
    except HwoptError as error:
        place = source.error("", error.place).place if error.place else str(path)
        raise UsageError(error.message, place=place, hint=error.hint) from error


def _read(path: Path) -> Source:
    try:
        return Source(path, path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError("no such target file", place=str(path), hint="hwopt targets lists those that need no file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot be read: {error}", place=str(path)) from error


def _filled(kind: type, values: Mapping[str, Any], source: Source, nth: int = 0) -> object:
    """The dataclass with its fields from the file, each checked."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in fields:
            raise source.error("unknown key", key, nth, hint=did_you_mean(key, [*fields, *(() if nth else COMMON)]))
    missing = [name for name, field in fields.items() if name not in values and _required(field)]
    if missing:
        raise source.error(f"lacks {', '.join(missing)}", "memories" if kind is Memory else "kind", nth)
    return kind(**{key: _value(hints[key], value, source, key, nth) for key, value in values.items()})


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(kind: Any, value: Any, source: Source, key: str, nth: int) -> Any:
    """The value as the field's type; raises with the line if it is none."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        if value not in arguments:
            raise source.error(f"{value!r} is not one of {', '.join(map(str, arguments))}", key, nth)
        return value
    if origin is tuple:
        return _items(arguments[0], value, source, key)
    if origin is types.UnionType:
        kind = next(one for one in arguments if one is not type(None))
    if kind is Path:
        return _beside(value, source, key, nth)
    good = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not good:
        raise source.error(f"needs {_named(kind)}, not {value!r}", key, nth)
    if kind in (int, float) and not 0 < value < float("inf"):
        raise source.error(f"needs a number above zero, not {value!r}", key, nth)
    low, high = next((limits for end, limits in WITHIN.items() if re.search(rf"(^|_){end}$", key)), (0.0, float("inf")))
    if kind in (int, float) and not low <= value <= high:
        raise source.error(f"{value!r} is not within {low:g} to {high:g}", key, nth)
    return kind(value)


def _beside(value: Any, source: Source, key: str, nth: int) -> Path:
    """A file that lies where the target file does, if its path is not absolute."""
    path = source.path.parent / str(value)
    if not isinstance(value, str) or not path.is_file():
        raise source.error(f"no file {value!r}", key, nth)
    return path


def _items(kind: Any, value: Any, source: Source, key: str) -> tuple:
    if not isinstance(value, list):
        raise source.error("needs a list", key)
    if kind is not Memory:
        return tuple(_value(kind, item, source, key, 0) for item in value)
    if not value or not all(isinstance(item, dict) for item in value):
        raise source.error("needs tables", key, hint="write [[memories]] with name, bytes and bytes_per_second")
    found = tuple(cast(Memory, _filled(Memory, item, source, nth)) for nth, item in enumerate(value))
    return _ordered(found, source)


def _ordered(found: Sequence[Memory], source: Source) -> tuple[Memory, ...]:
    for nth in range(1, len(found)):
        if found[nth].bytes < found[nth - 1].bytes:
            raise source.error("memories stand nearest first: this one is smaller than the one before", "memories", nth)
    return tuple(found)


def _named(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(kind, kind.__name__)
