"""The size of a model's weights: the one number that plans and reports use."""

from __future__ import annotations

import numpy as np

from hwopt.ir import Graph, type_of


def weight_bytes(graph: Graph) -> int:
    """Bytes of all parameters as the ONNX file stores them, sub-byte types packed; strings by their UTF-8 length."""
    return sum(param_bytes(array) for array in graph.params.values())


def param_bytes(array: np.ndarray) -> int:
    """Bytes of one parameter as stored."""
    if array.dtype == object:
        return sum(len(text if isinstance(text, bytes) else str(text).encode()) for text in array.ravel())
    return type_of(array).bytes
