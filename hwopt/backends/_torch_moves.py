"""Rules of the torch backend for operators that move values, look them up, or make shapes and indices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from hwopt.backends._torch_call import Call, Rule, Tensor, numbers
from hwopt.ir.types import dtype_name


def _reshape(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    sizes = call.stacked(numbers(shape), x)
    if not call.attr("allowzero", 0):
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(call: Call, x: Tensor) -> Tensor:
    axis = call.attr("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1) if x.numel() else x.reshape(math.prod(x.shape[:axis]), 0)


def _squeeze(_: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    named = numbers(axes) if axes is not None else [axis for axis, size in enumerate(x.shape) if size == 1]
    gone = {axis % x.ndim for axis in named}
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in gone])


def _unsqueeze(_: Call, x: Tensor, axes: Tensor) -> Tensor:
    rank = x.ndim + axes.numel()
    for axis in sorted(axis % rank for axis in numbers(axes)):
        x = x.unsqueeze(axis)
    return x


def _transpose(call: Call, x: Tensor) -> Tensor:
    return x.permute(tuple(call.attr("perm", tuple(reversed(range(x.ndim))))))


def _concat(call: Call, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs, call.attr("axis"))


def _split(call: Call, x: Tensor, sizes: Tensor | None = None) -> Any:
    axis, parts = call.attr("axis", 0), len(call.writes)
    size = math.ceil(x.shape[axis] / parts)
    found = torch.split(x, size if sizes is None else numbers(sizes), axis)
    empty = x.narrow(axis, 0, 0)
    return (*found, *[empty] * (parts - len(found))) if parts > 1 else found[0]


def _slice(_: Call, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
    count = starts.numel()
    where = numbers(axes) if axes is not None else list(range(count))
    strides = numbers(steps) if steps is not None else [1] * count
    for start, end, axis, step in zip(numbers(starts), numbers(ends), where, strides, strict=True):
        first, last, stride = slice(start, end, step).indices(x.shape[axis])
        if stride > 0:
            cut = [slice(None)] * x.ndim
            cut[axis] = slice(first, max(first, last), stride)
            x = x[tuple(cut)]
        else:
            x = x.index_select(axis, torch.tensor(range(first, last, stride), dtype=torch.int64))
    return x


def _wrapped(indices: Tensor, size: int) -> Tensor:
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


def _gather(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.attr("axis", 0) % x.ndim
    found = x.index_select(axis, _wrapped(indices, x.shape[axis]).reshape(-1))
    return found.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _gather_elements(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.attr("axis", 0)
    return torch.gather(x, axis, _wrapped(indices, x.shape[axis]))


def _coordinates(indices: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """[..., k] of an index tuple as k tensors that torch indexes with."""
    return tuple(_wrapped(indices[..., axis], shape[axis]) for axis in range(indices.shape[-1]))


def _gather_nd(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    batch = call.attr("batch_dims", 0)
    if not batch:
        return x[_coordinates(indices, tuple(x.shape))]
    rows = math.prod(x.shape[:batch])
    data, wanted = x.reshape(rows, *x.shape[batch:]), indices.reshape(rows, *indices.shape[batch:])
    found = [data[row][_coordinates(wanted[row], tuple(data.shape[1:]))] for row in range(rows)]
    whole = torch.stack(found)
    return whole.reshape(*x.shape[:batch], *whole.shape[1:])


def _scatter_elements(call: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    axis, how = call.attr("axis", 0), call.attr("reduction", "none")
    where = _wrapped(indices, x.shape[axis])
    if how == "none":
        return x.scatter(axis, where, updates)
    names = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    return x.scatter_reduce(axis, where, updates, names[how])


def _scatter_nd(call: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Through flat positions of rows: [rows of x, elements of a row]."""
    depth, how = indices.shape[-1], call.attr("reduction", "none")
    row = math.prod(x.shape[depth:])
    position = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for axis, one in enumerate(_coordinates(indices, tuple(x.shape))):
        position = position + one * math.prod(x.shape[axis + 1 : depth])
    where = position.reshape(-1, 1).expand(-1, row)
    data, new = x.reshape(-1, row), updates.reshape(-1, row)
    if how == "none":
        return data.scatter(0, where, new).reshape(x.shape)
    names = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    return data.scatter_reduce(0, where, new, names[how]).reshape(x.shape)


def _pad(call: Call, x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
    mode, amounts = call.attr("mode", "constant"), numbers(pads)
    where = [axis % x.ndim for axis in numbers(axes)] if axes is not None else list(range(x.ndim))
    sides = dict(zip(where, zip(amounts[: len(where)], amounts[len(where) :], strict=True), strict=True))
    if mode == "constant":
        flat = [pad for axis in reversed(range(x.ndim)) for pad in sides.get(axis, (0, 0))]
        return functional.pad(x, flat, value=0 if value is None or not value.numel() else value.item())
    for axis, (before, behind) in sides.items():
        x = x.narrow(axis, -min(before, 0), x.shape[axis] + min(before, 0) + min(behind, 0))
        widths, modes = (max(before, 0), max(behind, 0)), {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}
        indices = np.pad(np.arange(x.shape[axis]), widths, modes[mode])  # type: ignore[call-overload]
        x = x.index_select(axis, torch.from_numpy(indices))
    return x


def _expand(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    sizes = numbers(shape)
    sizes = call.stacked(sizes, x) if len(sizes) == x.ndim else sizes
    return x.expand(torch.broadcast_shapes(tuple(x.shape), tuple(sizes)))


def _tile(_: Call, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(numbers(repeats))


def _depth_to_space(call: Call, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    block = call.attr("blocksize")
    if call.attr("mode", "DCR") == "DCR":
        parts = x.reshape(batch, block, block, channels // block**2, height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        parts = x.reshape(batch, channels // block**2, block, block, height, width).permute(0, 1, 4, 2, 5, 3)
    return parts.reshape(batch, channels // block**2, height * block, width * block)


def _space_to_depth(call: Call, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    block = call.attr("blocksize")
    parts = x.reshape(batch, channels, height // block, block, width // block, block)
    parts = parts.permute(0, 3, 5, 1, 2, 4) if call.attr("mode", "DCR") == "DCR" else parts.permute(0, 1, 3, 5, 2, 4)
    return parts.reshape(batch, channels * block**2, height // block, width // block)


def _trilu(call: Call, x: Tensor, k: Tensor | None = None) -> Tensor:
    shift = 0 if k is None else int(k)
    return torch.triu(x, shift) if call.attr("upper", 1) else torch.tril(x, shift)


def _reverse_sequence(call: Call, x: Tensor, lengths: Tensor) -> Tensor:
    time, batch = call.attr("time_axis", 0), call.attr("batch_axis", 1)
    moved = x.movedim((batch, time), (0, 1))
    rows = [torch.cat([row[:count].flip(0), row[count:]]) for row, count in zip(moved, numbers(lengths), strict=True)]
    return torch.stack(rows).movedim((0, 1), (batch, time))


def _shape(call: Call, x: Tensor) -> Tensor:
    return torch.tensor(tuple(x.shape)[call.attr("start", 0) : call.attr("end", x.ndim)], dtype=torch.int64)


def _size(_: Call, x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64)


def _constant_of_shape(call: Call, shape: Tensor) -> Tensor:
    value = call.attr("value")
    number = 0.0 if value is None else np.asarray(value).reshape(-1)[0].item()
    return torch.full(numbers(shape), number, dtype=call.result)


def _range(_: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    count = max(0, math.ceil((limit.item() - start.item()) / delta.item()))
    return start.reshape(()) + torch.arange(count, dtype=start.dtype) * delta.reshape(())


def _eye_like(call: Call, x: Tensor) -> Tensor:
    kind = call.held(dtype_name(int(call.attr("dtype")))) if call.attr("dtype") is not None else x.dtype
    rows, columns = x.shape
    shift = call.attr("k", 0)
    return (torch.arange(columns)[None] - torch.arange(rows)[:, None] == shift).to(kind)


def _one_hot(call: Call, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    count = int(depth.reshape(-1)[0])
    axis = call.attr("axis", -1)
    axis = axis + indices.ndim + 1 if axis < 0 else axis
    hot = _wrapped(indices, count).unsqueeze(axis) == torch.arange(count).reshape(-1, *(1,) * (indices.ndim - axis))
    return torch.where(hot, values[1], values[0])


RULES: Mapping[str, Rule] = MappingProxyType({
    "Reshape": _reshape, "Flatten": _flatten, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze, "Transpose": _transpose,
    "Concat": _concat, "Split": _split, "Slice": _slice, "Gather": _gather, "GatherElements": _gather_elements,
    "GatherND": _gather_nd, "ScatterElements": _scatter_elements, "ScatterND": _scatter_nd, "Pad": _pad, "Expand": _expand,
    "Tile": _tile, "DepthToSpace": _depth_to_space, "SpaceToDepth": _space_to_depth, "Trilu": _trilu,
    "ReverseSequence": _reverse_sequence, "Shape": _shape, "Size": _size, "ConstantOfShape": _constant_of_shape,
    "Range": _range, "EyeLike": _eye_like, "OneHot": _one_hot,
})  # fmt: skip
CARRIES = frozenset(set(RULES) - {"Range", "EyeLike", "ConstantOfShape"})
