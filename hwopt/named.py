"""Functions that the command line names: `module:function`."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

from hwopt.errors import UsageError


def is_named(text: object) -> bool:
    """True for text that looks like module:function."""
    return isinstance(text, str) and re.fullmatch(r"[\w.]+:\w+", text) is not None


def named_function(text: str, use: str) -> Callable[..., Any]:
    """The function that the text names; raises UsageError, with what it is good for, if there is none."""
    module, _, name = text.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        hint = f"write {use}; the module must be in this folder or on PYTHONPATH"
        raise UsageError(f"cannot import {text!r} ({error})", hint=hint) from error
    if not callable(function):
        raise UsageError(f"{text!r} is no function", hint=use)
    return function


def takes_arguments(function: Callable[..., Any]) -> bool:
    """True if it cannot be called without any: a scoring function takes `run`, a function that gives data takes nothing."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins do not say
        return True
    return any(one.kind in kinds and one.default is inspect.Parameter.empty for one in found)
