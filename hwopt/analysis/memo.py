"""Remembering what was computed for an array or a graph while it lives: planners ask the same thing hundreds of times."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def remembered(function: Callable[..., T]) -> Callable[..., T]:
    """Caches a function of immutable arguments; arrays, graphs and samples count by identity and are held weakly.

    Sound because parameters are read-only and Graph and Samples are frozen. The result must not refer to the arguments.
    """
    results: dict[tuple[Any, ...], tuple[T, tuple[Any, ...]]] = {}

    @functools.wraps(function)
    def call(*arguments: Any) -> T:
        key = tuple(id(one) if _by_identity(one) else one for one in arguments)
        if key not in results:
            result = function(*arguments)
            watched = (one for one in arguments if _by_identity(one))
            results[key] = (result, tuple(weakref.ref(one, lambda _: results.pop(key, None)) for one in watched))
        return results[key][0]

    return call


def _by_identity(argument: Any) -> bool:
    return not isinstance(argument, (str, bytes, int, float, bool, tuple, frozenset, type(None)))
