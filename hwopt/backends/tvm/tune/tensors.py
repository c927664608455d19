"""Arguments of TVM's kernels without TVM: DLPack tensors in tvm-ffi's slots, memory on 64-byte boundaries."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

ALIGNMENT = 64
TENSOR = 7  # kTVMFFIDLTensorPtr
CODES = {"i": 0, "u": 1, "f": 2, "b": 6}  # DLPack's type codes by numpy's kind


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


class FFIAny(ctypes.Structure):
    _fields_ = [("type_index", ctypes.c_int32), ("padding", ctypes.c_uint32), ("value", ctypes.c_void_p)]


def tensor_at(address: int, shape: Sequence[int], code: int, bits: int) -> DLTensor:
    """A tensor in memory that the caller keeps."""
    sizes = (ctypes.c_int64 * max(1, len(shape)))(*shape)
    return DLTensor(address, 1, 0, len(shape), code, bits, 1, sizes, None, 0)  # the pointer keeps its array


def slots_of(tensors: Sequence[DLTensor]) -> ctypes.Array[FFIAny]:
    """Arguments of a call; the tensors must outlive them."""
    return (FFIAny * len(tensors))(*(FFIAny(TENSOR, 0, ctypes.addressof(one)) for one in tensors))


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy of a flat array on a 64-byte boundary, with room behind it."""
    space = np.zeros(array.nbytes + 2 * ALIGNMENT, np.uint8)
    start = -space.ctypes.data % ALIGNMENT
    copy = space[start : start + array.nbytes].view(array.dtype)
    copy[:] = array
    return copy
