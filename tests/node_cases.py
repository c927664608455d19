"""ONNX's own node tests, with feeding and fetching of every element type that ONNX Runtime knows."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime

from hwopt.ir import bits_of, numpy_dtype


@cache
def cases() -> tuple[Any, ...]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tuple(collect_testcases(None))


def feeds(case: Any) -> list[Any]:
    """The inputs of a case: arrays, lists of arrays (sequences) or None (empty optionals)."""
    return [_plain(value) for value in (case.data_sets[0][0] if case.data_sets else [])]


def _plain(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    if value is None or isinstance(value, (list, dict)):
        return value
    return np.asarray(value)


def run(model: onnx.ModelProto, values: list[Any]) -> list[Any]:
    """All outputs, unoptimized, for inputs in their order. ONNX Runtime's exceptions pass through."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = 1, 1, 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    native = not any("float8" in one.type or "bfloat16" in one.type for one in session.get_outputs())
    if native and not any(_is_foreign(value) for value in values):
        try:
            return session.run(None, dict(zip(names, values, strict=False)))
        except RuntimeError:  # an element type that numpy lacks comes out
            pass
    wrapped = {name: _wrapped(value) for name, value in zip(names, values, strict=False) if value is not None}
    return [_fetched(value) for value in session.run_with_ort_values(None, wrapped)]


def _is_foreign(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.isbuiltin != 1


def _wrapped(value: Any) -> onnxruntime.OrtValue:
    if not _is_foreign(value):
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(value))
    kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(value), kind)


def _fetched(value: onnxruntime.OrtValue) -> Any:
    text = value.data_type()
    if not text.startswith("tensor(") or text == "tensor(string)":
        return value.numpy()
    spelled = text.removeprefix("tensor(").removesuffix(")")
    name = {"float": "float32", "double": "float64"}.get(spelled, spelled)
    dtype, bits = numpy_dtype(name), bits_of(name)
    count = (int(np.prod(value.shape())) * bits + 7) // 8
    data = ctypes.string_at(value.data_ptr(), count) if count else b""
    if bits < 8:  # packed
        return np.frombuffer(data, np.uint8)
    return np.frombuffer(data, dtype).reshape(value.shape())


def same(left: Any, right: Any) -> bool:
    """Equal bit for bit, element types and shapes included."""
    if isinstance(left, (list, tuple)):
        return isinstance(right, (list, tuple)) and len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if left is None or right is None:
        return left is right
    left, right = np.asarray(left), np.asarray(right)
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return left.tolist() == right.tolist() if left.dtype == object else left.tobytes() == right.tobytes()


def runnable() -> Iterator[tuple[Any, list[Any], list[Any]]]:
    """Every case that ONNX Runtime runs: the case, its inputs, and what comes out."""
    for case in cases():
        values = feeds(case)
        try:
            yield case, values, run(case.model, values)
        except Exception:  # ONNX Runtime raises a kind of its own for every status code
            continue
