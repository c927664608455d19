"""What goes into an artifact: tensors as its manifest states them, and arrays held against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hwopt.emit import Tensor
from hwopt.errors import ArtifactError, DataError, did_you_mean
from hwopt.ir import TensorType, numpy_dtype


def read_tensors(entries: Sequence[Mapping[str, Any]], place: str) -> tuple[Tensor, ...]:
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


def ordered(model: str, tensors: Sequence[Tensor], inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The inputs as the model takes them. Raises DataError for a missing, an unknown and a wrong one."""
    names = [tensor.name for tensor in tensors]
    for name in inputs:
        if name not in names:
            raise DataError(f"the model has no input {name!r}", place=model, hint=did_you_mean(name, names))
    missing = [f"{tensor.name}: {tensor.type}" for tensor in tensors if tensor.name not in inputs]
    if missing:
        raise DataError(f"missing input {', '.join(missing)}", place=model)
    return [_checked(np.asarray(inputs[tensor.name]), tensor) for tensor in tensors]


def random_inputs(tensors: Sequence[Tensor], seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of the right names, shapes and dtypes; a dimension that is not static is 1."""
    random = np.random.default_rng(seed)
    made = {}
    for tensor in tensors:
        shape = [dim if isinstance(dim, int) else 1 for dim in tensor.type.shape or ()]
        floating = "float" in tensor.type.dtype
        values = random.standard_normal(shape) if floating else np.zeros(shape)
        made[tensor.name] = values.astype(numpy_dtype(tensor.type.dtype))
    return made
