"""Small numbers packed into bytes, and the standard operators that unpack them and look them up in codebooks."""

from __future__ import annotations

import numpy as np

from hwopt.ir import Edit, Node, onnx_dtype, part

BIT_OPERATORS = 18  # brought BitwiseAnd and BitwiseOr


def planes_of(bits: int) -> tuple[int, ...]:
    """The widths that indices are stored in, lowest bits last: every one divides a byte."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def decode(
    edit: Edit, node: Node, shape: tuple[int, ...], books: np.ndarray, indices: np.ndarray, bits: int, channels_last: bool
) -> str:
    """The nodes that compute the weights of `shape` from codebooks and packed indices."""

    def emit(op: str, *inputs: str, **attrs: object) -> str:
        return edit.emit(op, inputs, attrs=attrs, name=part(node, "decode"), like=node)

    def param(hint: str, array: np.ndarray) -> str:
        return edit.param(part(node, hint), array)

    def plane(width: int, offset: int) -> str:
        """Flat indices of one plane, shifted to its place."""
        packed = param("indices", pack(indices.ravel() >> offset & (2**width - 1), width))
        if width == 8:
            return packed
        shifts = param("shifts", np.arange(0, 8, width, dtype=np.uint8))
        bare = emit("BitwiseAnd", emit("BitShift", packed, shifts, direction="RIGHT"), param("mask", _byte(2**width - 1)))
        flat = emit("Reshape", bare, param("flat", np.array([-1])))
        if indices.size * width % 8:
            flat = emit("Slice", flat, param("first", np.array([0])), param("end", np.array([indices.size])))
        return emit("BitShift", flat, param("offset", _byte(offset)), direction="LEFT") if offset else flat

    codes, offset = "", 0
    for width in reversed(planes_of(bits)):
        codes, offset = emit("BitwiseOr", codes, plane(width, offset)) if codes else plane(width, offset), offset + width
    codes = emit("Cast", codes, to=onnx_dtype("int32"))
    if len(books) == 1:
        values = emit("Gather", param("codebook", books[0]), codes)
        return emit("Reshape", values, param("shape", np.array(shape)))
    codes = emit("Reshape", codes, param("shape", np.array(indices.shape)))
    values = emit("GatherElements", param("codebooks", books), codes, axis=1)
    if not channels_last:
        return emit("Reshape", values, param("shape", np.array(shape)))
    return emit("Transpose", emit("Reshape", values, param("shape", np.array(shape[::-1]))), perm=(1, 0))


def pack(indices: np.ndarray, width: int) -> np.ndarray:
    """Indices below 2^width, 8 / width to the byte, the first in the lowest bits: [bytes, 1], or [elements] for width 8."""
    if width == 8:
        return indices.astype(np.uint8)
    per_byte = 8 // width
    padded = np.pad(indices, (0, -len(indices) % per_byte)).reshape(-1, per_byte).astype(np.uint8)
    return np.bitwise_or.reduce(padded << np.arange(0, 8, width, dtype=np.uint8), axis=1, keepdims=True)


def _byte(value: int) -> np.ndarray:
    return np.array([value], np.uint8)
