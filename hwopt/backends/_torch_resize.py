"""The Resize rule of the torch backend: along each axis a product with a matrix of interpolation weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from hwopt.backends._torch_call import Call, Rule, Tensor, numbers

NEAREST: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5), "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor, "ceil": np.ceil,
}  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """How one axis changes: `size` elements become `wanted`; `begin` and `end` are the region of tf_crop_and_resize."""

    size: int
    wanted: int
    scale: float
    begin: float = 0.0
    end: float = 1.0


def _resize(
    call: Call, x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    where = [axis % x.ndim for axis in call.attr("axes", range(x.ndim))]
    for axis, how in zip(where, _axes(call, x, where, roi, scales, sizes), strict=True):
        if how.wanted != how.size or how.scale != 1.0 or call.attr("coordinate_transformation_mode") == "tf_crop_and_resize":
            x = _along(call, x, axis, how)
    return x


def _axes(call: Call, x: Tensor, where: list[int], roi: Tensor | None, scales: Tensor | None, sizes: Tensor | None) -> list[Axis]:
    given = [x.shape[axis] for axis in where]
    if sizes is not None and sizes.numel():
        wanted = numbers(sizes)
        factors = [want / size for want, size in zip(wanted, given, strict=True)]
        policy = call.attr("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            factor = min(factors) if policy == "not_larger" else max(factors)
            factors, wanted = [factor] * len(given), [math.floor(size * factor + 0.5) for size in given]
    else:
        factors = [] if scales is None else [float(one) for one in scales.tolist()]
        wanted = [int(np.floor(np.float32(size) * np.float32(factor))) for size, factor in zip(given, factors, strict=True)]
    if roi is None or not roi.numel():
        return [Axis(*one) for one in zip(given, wanted, factors, strict=True)]
    region = [float(one) for one in roi.tolist()]
    begin, end = region[: len(where)], region[len(where) :]
    return [Axis(*one) for one in zip(given, wanted, factors, begin, end, strict=True)]


def _along(call: Call, x: Tensor, axis: int, how: Axis) -> Tensor:
    places = _places(call.attr("coordinate_transformation_mode", "half_pixel"), how)
    mode = call.attr("mode", "nearest")
    if mode == "nearest":
        nearest = NEAREST[call.attr("nearest_mode", "round_prefer_floor")](places)
        indices = np.clip(nearest, 0, how.size - 1).astype(np.int64)
        result = x.index_select(axis, torch.from_numpy(indices))
    else:
        weights = torch.from_numpy(_weights(call, mode, places, how))
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        result = (x.movedim(axis, -1).to(kind) @ weights.to(kind).T).movedim(-1, axis).to(x.dtype)
    if call.attr("coordinate_transformation_mode") != "tf_crop_and_resize":
        return result
    outside = torch.from_numpy((places < 0) | (places > how.size - 1)).reshape(-1, *(1,) * (x.ndim - 1 - axis))
    return torch.where(outside, torch.full_like(result, call.attr("extrapolation_value", 0.0)), result)


def _places(mode: str, how: Axis) -> np.ndarray:
    """Where each output element lies on the input's axis; in float32 as in ONNX Runtime, where 7 / 0.7 is 10 and no more."""
    at = np.arange(how.wanted, dtype=np.float32)
    last = how.size - 1
    if mode == "asymmetric":
        return at / how.scale
    if mode == "align_corners":
        return at * last / (how.wanted - 1) if how.wanted > 1 else at
    if mode == "tf_crop_and_resize":
        if how.wanted > 1:
            return how.begin * last + at * (how.end - how.begin) * last / (how.wanted - 1)
        return at + 0.5 * (how.begin + how.end) * last
    if mode == "pytorch_half_pixel" and how.wanted == 1:
        return at
    half = (at + 0.5) / how.scale - 0.5
    if mode == "half_pixel_symmetric":
        return how.size / 2 * (1 - how.wanted / (how.scale * how.size)) + half
    return half


def _weights(call: Call, mode: str, places: np.ndarray, how: Axis) -> np.ndarray:
    """float64 [wanted, size]: each row the weights of the neighbours of one output element."""
    stretch = min(how.scale, 1.0) if call.attr("antialias", 0) else 1.0
    reach = 1 if mode == "linear" else 2
    first = math.floor(-reach / stretch) + 1
    taps = np.arange(first, 2 - first)
    base = np.floor(places)
    distance = np.abs(taps[None] - (places - base)[:, None]) * stretch
    found = np.clip(1 - distance, 0, 1) if mode == "linear" else _cubic(distance, call.attr("cubic_coeff_a", -0.75))
    indices = (base[:, None] + taps[None]).astype(np.int64)
    if call.attr("exclude_outside", 0):
        found = np.where((indices >= 0) & (indices < how.size), found, 0.0)
    found = found / found.sum(1, keepdims=True)
    matrix = np.zeros((how.wanted, how.size))
    rows = np.broadcast_to(np.arange(how.wanted)[:, None], indices.shape)
    np.add.at(matrix, (rows, np.clip(indices, 0, how.size - 1)), found)
    return matrix


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel (Keys 1981)."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))


RULES: Mapping[str, Rule] = MappingProxyType({"Resize": _resize})
CARRIES: frozenset[str] = frozenset()
