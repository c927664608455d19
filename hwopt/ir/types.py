"""The type of a value: element type and shape, in ONNX's terms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx

Dim = int | str | None  # a size, a named symbol, or unknown


@dataclass(frozen=True)
class TensorType:
    """A dense tensor: `float32[1,3,224,224]`. `shape` is None when even the rank is unknown."""

    dtype: str
    shape: tuple[Dim, ...] | None

    @property
    def static(self) -> bool:
        """True if every dimension is a number."""
        return self.shape is not None and all(isinstance(dim, int) for dim in self.shape)

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape as numbers; only for static types (raises ValueError)."""
        if self.shape is None or not self.static:
            raise ValueError(f"{self} is not static")
        return tuple(dim for dim in self.shape if isinstance(dim, int))

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of a static tensor as it lies packed in memory (two int4 to the byte)."""
        return (self.elements * bits_of(self.dtype) + 7) // 8

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.dtype}[...]"
        return f"{self.dtype}[{','.join('?' if dim is None else str(dim) for dim in self.shape)}]"


@dataclass(frozen=True)
class OpaqueType:
    """A sequence, optional, map or sparse type: carried through untouched, as ONNX's serialized TypeProto."""

    proto: bytes

    def __str__(self) -> str:
        return str(onnx.TypeProto.FromString(self.proto).WhichOneof("value") or "untyped")


ValueType = TensorType | OpaqueType

_SUB_BYTE = {"int4": 4, "uint4": 4, "int2": 2, "uint2": 2, "float4e2m1": 4}


def bits_of(dtype: str) -> int:
    """Bits of one element when packed."""
    return _SUB_BYTE.get(dtype) or numpy_dtype(dtype).itemsize * 8


def numpy_dtype(dtype: str) -> np.dtype:
    """The numpy (or ml_dtypes) element type of an hwopt dtype name."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(onnx_dtype(dtype)))


def onnx_dtype(dtype: str) -> int:
    """ONNX's TensorProto.DataType of an hwopt dtype name; the names are ONNX's own, in small letters, `float` -> `float32`."""
    spelled = {"float32": "FLOAT", "float64": "DOUBLE"}.get(dtype, dtype.upper())
    return int(onnx.TensorProto.DataType.Value(spelled))


def dtype_name(onnx_type: int) -> str:
    """The inverse of `onnx_dtype`."""
    name = str(onnx.TensorProto.DataType.Name(onnx_type)).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def type_of(array: np.ndarray) -> TensorType:
    """The type of a parameter."""
    return TensorType(dtype_name(onnx.helper.np_dtype_to_tensor_dtype(array.dtype)), array.shape)
