"""What one pass, or one way to recover, can be told: its fields with types, usual values and known words, and what it does."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any

from hwopt.pipeline import Pass, printed_value
from hwopt.recover import Recipe


def knobs_of(kind: type[Pass] | type[Recipe]) -> list[dict[str, Any]]:
    """A row for each option of a pass, or of a way to recover, in the order of its fields."""
    hints = typing.get_type_hints(kind)
    choices, searched = (getattr(kind, name, {}) for name in ("choices", "knobs"))
    return [
        {
            "option": field.name,
            "type": type_name(hints[field.name]),
            "default": printed_value(field.default),
            "choices": ", ".join(choices.get(field.name, ())),
            "searched": ", ".join(map(printed_value, searched.get(field.name, ()))),
        }
        for field in dataclasses.fields(kind)
    ]


def type_name(kind: Any) -> str:
    """As a user would say it: `integer or word`, `words, joined by +`."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return f"{type_name(arguments[0])}s, joined by +"
    if arguments:
        return " or ".join(type_name(one) for one in arguments if one is not type(None))
    return {int: "integer", float: "number", str: "word", bool: "true or false"}.get(kind, getattr(kind, "__name__", str(kind)))


def described(kind: type[Pass] | type[Recipe]) -> str:
    """The docstring, which says what the pass does, where it applies and what its options mean."""
    return inspect.getdoc(kind) or kind.summary
