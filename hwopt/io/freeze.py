"""Freezing input dimensions and binding inputs to constants: what makes a model static."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from hwopt.errors import UsageError, did_you_mean
from hwopt.io.guard import check_inference
from hwopt.ir import Graph, TensorType, infer_types, numpy_dtype
from hwopt.ir.types import Dim


def freeze(graph: Graph, shapes: Mapping[str, Sequence[int]]) -> Graph:
    """Give the inputs these shapes; a symbol (`batch`) fixed at one input is fixed at all, and types are inferred anew.

    Raises UsageError that names the input and shows the option if a dimension (`?`, 0, unnamed or named) stays free,
    contradicts the model, or belongs to no input.
    """
    for name in shapes:
        if name not in graph.inputs:
            raise UsageError(f"{graph.name} has no input {name!r}", place="--shape", hint=did_you_mean(name, graph.inputs))
    symbols: dict[str, int] = {}
    for name, shape in shapes.items():
        _learn(name, _tensor(graph, name), tuple(shape), symbols)
    types = dict(graph.types)
    for name in graph.inputs:
        kind = types.get(name)
        if isinstance(kind, TensorType):
            types[name] = TensorType(kind.dtype, _frozen(kind, shapes.get(name), symbols))
    _check_static(graph, {name: kind for name, kind in types.items() if name not in shapes})
    kept = {
        name: kind for name, kind in types.items() if name in graph.inputs or name in graph.params or _is_foreign(graph, name)
    }
    bare = dataclasses.replace(graph, types=MappingProxyType(kept))
    check_inference(bare, graph.name)
    return _with_output_types(graph, infer_types(bare))


def _tensor(graph: Graph, name: str) -> TensorType:
    kind = graph.types.get(name)
    if not isinstance(kind, TensorType):
        raise UsageError(f"input {name} is a {kind or 'value of unknown type'}, which has no shape", place="--shape")
    return kind


def _learn(name: str, kind: TensorType, shape: tuple[int, ...], symbols: dict[str, int]) -> None:
    """Check a given shape against the model's and collect what it says about named dimensions."""
    if kind.shape is not None and len(kind.shape) != len(shape):
        raise UsageError(f"input {name} is {kind}: it has {len(kind.shape)} dimensions, not {len(shape)}", place="--shape")
    if any(not isinstance(size, int) or isinstance(size, bool) or size < 0 for size in shape):
        raise UsageError(f"input {name}: a dimension must be a whole number, not {shape}", place="--shape")
    for axis, (dim, size) in enumerate(zip(kind.shape or (), shape, strict=False)):
        known = symbols.setdefault(dim, size) if isinstance(dim, str) and _named(dim) else dim
        if not _free(known) and known != size:
            known_as = f" ({dim})" if isinstance(dim, str) else ""
            raise UsageError(f"input {name} is {kind}: axis {axis}{known_as} is {known}, not {size}", place="--shape")


def _named(dim: Dim) -> bool:
    """`?` stands for an unknown size; equal question marks are not equal sizes."""
    return isinstance(dim, str) and dim not in ("", "?")


def _free(dim: Dim) -> bool:
    return not isinstance(dim, int) or dim < 1


def _frozen(kind: TensorType, given: Sequence[int] | None, symbols: Mapping[str, int]) -> tuple[Dim, ...] | None:
    if given is not None:
        return tuple(given)
    return None if kind.shape is None else tuple(symbols.get(dim, dim) if isinstance(dim, str) else dim for dim in kind.shape)


def _check_static(graph: Graph, types: Mapping[str, Any]) -> None:
    """Raise UsageError for all inputs whose size is still open, with the option that closes them."""
    open_inputs = [name for name in graph.inputs if _is_open(types.get(name))]
    if not open_inputs:
        return
    stated = ", ".join(f"{name} is {types[name]}" for name in open_inputs)
    option = " ".join(f"--shape {name}={','.join(_example(types[name]))}" for name in open_inputs)
    raise UsageError(f"{graph.name} leaves sizes open: {stated}", place="--shape", hint=f"give the sizes, such as: {option}")


def _is_open(kind: object) -> bool:
    return isinstance(kind, TensorType) and (kind.shape is None or any(_free(dim) for dim in kind.shape))


def _example(kind: TensorType) -> Iterator[str]:
    """The option's value with 1 for each open size: what can be pasted and then changed."""
    if kind.shape is None:
        yield "1,..."
    for dim in kind.shape or ():
        yield "1" if _free(dim) else str(dim)


def _is_foreign(graph: Graph, value: str) -> bool:
    """ONNX cannot infer what operators of other domains put out: the model's word is all there is."""
    node = graph.producer.get(value)
    return node is not None and node.domain not in ("", "ai.onnx")


def _with_output_types(before: Graph, after: Graph) -> Graph:
    """Outputs that inference says nothing about keep their element type and rank."""
    types = dict(after.types)
    for name in after.outputs:
        stated = before.types.get(name)
        if name not in types and isinstance(stated, TensorType):
            types[name] = TensorType(stated.dtype, None)
        elif name not in types and stated is not None:
            types[name] = stated
    return dataclasses.replace(after, types=MappingProxyType(types))


def bind(graph: Graph, values: Mapping[str, Any]) -> Graph:
    """Turn inputs into constants: `{"sr": 16000}`; text is read as the input's type. Raises UsageError."""
    edit = graph.edit()
    for name, value in values.items():
        if name not in graph.inputs:
            raise UsageError(f"{graph.name} has no input {name!r}", place="--bind", hint=did_you_mean(name, graph.inputs))
        edit.bind(name, _constant(name, _tensor(graph, name), value))
    return edit.finish("bind")


def _constant(name: str, kind: TensorType, value: Any) -> np.ndarray:
    """The value as an array of the input's type and shape, if nothing is lost on the way."""
    array = _parsed(value, kind) if isinstance(value, str) and kind.dtype != "string" else np.asarray(value)
    dtype = numpy_dtype(kind.dtype)
    if array.dtype.kind == "O" and dtype.kind != "O":
        raise UsageError(f"{name} is {kind}, and {value!r} is not", place="--bind")
    try:
        cast = array.astype(dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"{name} is {kind}, and {value!r} is not", place="--bind") from error
    if array.dtype.kind in "biuf" and dtype.kind in "biu" and not np.array_equal(cast, array):
        raise UsageError(f"{name} is {kind}, which cannot hold {value!r}", place="--bind")
    shape = kind.shape
    if shape is None or (len(shape) == cast.ndim and all(_free(d) or d == s for d, s in zip(shape, cast.shape, strict=True))):
        return cast
    if cast.size == 1 and not any(_free(dim) for dim in shape):
        return np.full([int(dim) for dim in shape if isinstance(dim, int)], cast.reshape(()))
    raise UsageError(f"{name} is {kind}, and the value has the shape {list(cast.shape)}", place="--bind")


def _parsed(text: str, kind: TensorType) -> np.ndarray:
    """`16000`, `0.5,1` or `true`."""
    words = [word.strip() for word in text.split(",")]
    try:
        items = [_number(word) for word in words]
    except ValueError as error:
        raise UsageError(f"{text!r} is no {kind.dtype}", place="--bind") from error
    return np.array(items[0] if len(items) == 1 else items)


def _number(word: str) -> bool | int | float:
    truths = {"true": True, "false": False}
    if word.lower() in truths:
        return truths[word.lower()]
    return float(word) if any(mark in word.lower() for mark in (".", "e", "n")) else int(word)
