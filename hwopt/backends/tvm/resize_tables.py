"""What an output position of ONNX's Resize reads: input positions and weights, computed as ONNX Runtime does, in float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hwopt.ir import Graph, Node

MODES = ("nearest", "linear", "cubic")
COORDINATES = (
    "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_half_pixel_for_nn",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Table:
    """places and shares: [output positions, taps] of one axis; the shares of a position add up to one."""

    places: np.ndarray
    shares: np.ndarray

    @property
    def taps(self) -> int:
        return self.places.shape[1]


def tables_of(graph: Graph, node: Node) -> list[Table] | None:
    """The tables of the axes behind batch and channels; None where the template has no form for the node."""
    data, out = graph.tensor(node.inputs[0]), graph.tensor(node.output)
    if not data.static or not out.static or len(data.dims) not in (3, 4) or 0 in out.dims or data.dims[:2] != out.dims[:2]:
        return None
    mode = "linear" if node.attr("mode", "nearest") == "bilinear" else node.attr("mode", "nearest")
    coordinates = node.attr("coordinate_transformation_mode", "half_pixel") if node.op == "Resize" else "asymmetric"
    plain = not node.attr("antialias", 0) and node.attr("keep_aspect_ratio_policy", "stretch") == "stretch"
    if mode not in MODES or coordinates not in COORDINATES or not plain:
        return None
    scales = _scales(graph, node)
    if scales is None or np.any(scales[:2] != 1):
        return None
    return [_table(node, mode, coordinates, data.dims[axis], out.dims[axis], scales[axis]) for axis in range(2, len(data.dims))]


def _scales(graph: Graph, node: Node) -> np.ndarray | None:
    """One for each axis; None where they are computed."""
    data, out = (np.array(graph.tensor(value).dims, np.float32) for value in (node.inputs[0], node.output))
    index = 2 if node.op == "Resize" else 1
    given = node.attr("scales")
    if given is None and len(node.inputs) > index and node.inputs[index]:
        given = graph.constant(node.inputs[index])
        if given is None:
            return None
    if given is None or np.size(given) == 0:
        return np.asarray(out / data)
    axes = [axis % len(data) for axis in node.attr("axes", range(len(data)))]
    scales = np.ones(len(data), np.float32)
    scales[axes] = np.asarray(given, np.float32)
    return scales


def _table(node: Node, mode: str, coordinates: str, size: int, out: int, scale: np.float32) -> Table:
    if size == out and scale == 1:
        return Table(np.arange(out, dtype=np.int32)[:, None], np.ones((out, 1), np.float32))
    at = _origin(coordinates, size, out, scale)
    if mode == "nearest":
        whole = _nearest(node.attr("nearest_mode", "round_prefer_floor") if node.op == "Resize" else "floor", at)
        return Table(whole.clip(0, size - 1).astype(np.int32)[:, None], np.ones((out, 1), np.float32))
    if mode == "linear":
        at = at.clip(0, size - 1)
        low = np.floor(at).astype(np.int32)
        share = (at - low).astype(np.float32)
        return Table(np.stack([low, np.minimum(low + 1, size - 1)], 1), np.stack([1 - share, share], 1))
    return _cubic(at, size, np.float32(node.attr("cubic_coeff_a", -0.75)), bool(node.attr("exclude_outside", 0)))


def _origin(coordinates: str, size: int, out: int, scale: np.float32) -> np.ndarray:
    """The input coordinate of every output position."""
    x, half, one = np.arange(out, dtype=np.float32), np.float32(0.5), np.float32(1)
    if coordinates == "asymmetric":
        return np.asarray(x / scale)
    if coordinates == "align_corners":
        return np.asarray(x * np.float32(size - 1) / np.float32(out - 1)) if out > 1 else np.zeros(1, np.float32)
    if coordinates == "pytorch_half_pixel" and out == 1:
        return np.zeros(1, np.float32)
    if coordinates == "tf_half_pixel_for_nn":
        return np.asarray((x + half) / scale)
    centered = (x + half) / scale - half
    if coordinates == "half_pixel_symmetric":
        adjusted = np.float32(out) / (scale * np.float32(size))
        return np.asarray(np.float32(size) / 2 * (one - adjusted) + centered)
    return np.asarray(centered)


def _nearest(rounding: str, at: np.ndarray) -> np.ndarray:
    if rounding in ("floor", "ceil"):
        return np.asarray(getattr(np, rounding)(at))
    half = np.float32(0.5)
    return np.ceil(at - half) if rounding == "round_prefer_floor" else np.floor(at + half)


def _cubic(at: np.ndarray, size: int, a: np.float32, exclude: bool) -> Table:
    """Keys, "Cubic convolution interpolation for digital image processing", 1981."""
    low = np.floor(at).astype(np.int32)
    places = low[:, None] + np.arange(-1, 3, dtype=np.int32)
    far = np.abs(at[:, None] - places).astype(np.float64)
    near = ((a + 2) * far - (a + 3)) * far * far + 1
    shares = np.where(far <= 1, near, ((a * far - 5 * a) * far + 8 * a) * far - 4 * a)
    if exclude:
        shares = np.where((places >= 0) & (places < size), shares, 0)
        shares /= shares.sum(1, keepdims=True)
    return Table(places.clip(0, size - 1), shares.astype(np.float32))
