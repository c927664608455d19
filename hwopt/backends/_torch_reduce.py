"""Rules of the torch backend for reductions, softmax and normalizations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.nn import functional

from hwopt.backends._torch_call import Call, Rule, Tensor, numbers

Reduce = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _reduction(function: Reduce, single: Callable[[Tensor], Tensor] = lambda x: x) -> Rule:
    """`single` is the same for one element: what is left where there are no axes and that means none."""

    def rule(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
        named = numbers(axes) if axes is not None else list(call.attr("axes", ()))
        if not named and call.attr("noop_with_empty_axes", 0):
            return single(x)
        chosen = tuple(sorted(axis % max(x.ndim, 1) for axis in named)) if named else tuple(range(x.ndim))
        return function(x, chosen, bool(call.attr("keepdims", 1)))

    return rule


def _sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep, dtype=x.dtype) if axes else x


def _average(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keepdim=keep) if axes else x
    return torch.div(_sum(x, axes, keep), math.prod(x.shape[axis] for axis in axes), rounding_mode="trunc")


def _extreme(function: Callable, empty: float) -> Reduce:
    def reduce(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
        if axes and any(x.shape[axis] == 0 for axis in axes):
            shape = [1 if axis in axes else size for axis, size in enumerate(x.shape) if keep or axis not in axes]
            return torch.full(shape, empty, dtype=x.dtype)
        return function(x, axes, keepdim=keep) if axes else x

    return reduce


def _product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in reversed(axes):
        x = x.prod(axis, keepdim=keep, dtype=x.dtype)
    return x


def _norm_one(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x.abs(), axes, keep)


def _norm_two(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    """Zero has the gradient zero."""
    if not axes:
        return x.abs()
    if x.is_floating_point():
        return torch.linalg.vector_norm(x, 2, axes, keepdim=keep)
    return _sum(x * x, axes, keep).double().sqrt().to(x.dtype)


def _log_sum_exp(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.logsumexp(x, axes, keepdim=keep) if axes else x


def _arg(function: Callable) -> Rule:
    def rule(call: Call, x: Tensor) -> Tensor:
        axis, keep = call.attr("axis", 0), bool(call.attr("keepdims", 1))
        if not call.attr("select_last_index", 0):
            return function(x, axis, keepdim=keep)
        return x.shape[axis] - 1 - function(x.flip(axis), axis, keepdim=keep)

    return rule


def _cumulated(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    where = int(axis)
    x = x.flip(where) if call.attr("reverse", 0) else x
    total = torch.cumsum(x, where, dtype=x.dtype)
    total = total - x if call.attr("exclusive", 0) else total
    return total.flip(where) if call.attr("reverse", 0) else total


def _softmax(call: Call, x: Tensor) -> Tensor:
    return functional.softmax(x, call.attr("axis", -1))


def _log_softmax(call: Call, x: Tensor) -> Tensor:
    return functional.log_softmax(x, call.attr("axis", -1))


def _hardmax(call: Call, x: Tensor) -> Tensor:
    axis = call.attr("axis", -1)
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1)


def _standardized(x: Tensor, axes: tuple[int, ...], epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) / sqrt(var + epsilon), the mean, and 1 / sqrt(..)."""
    mean = x.mean(axes, keepdim=True)
    centered = x - mean
    inverse = torch.rsqrt((centered * centered).mean(axes, keepdim=True) + epsilon)
    return centered * inverse, mean, inverse


def _layer_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
    axes = tuple(range(call.attr("axis", -1) % x.ndim, x.ndim))
    wide = x.float() if x.dtype.itemsize < 4 else x  # stash_type
    normal, mean, inverse = _standardized(wide, axes, call.attr("epsilon", 1e-5))
    result = normal.to(x.dtype) * scale
    result = result if bias is None else result + bias
    return (result, mean, inverse)[: len(call.writes)] if len(call.writes) > 1 else result


def _rms_norm(call: Call, x: Tensor, scale: Tensor) -> Tensor:
    axes = tuple(range(call.attr("axis", -1) % x.ndim, x.ndim))
    wide = x.float() if x.dtype.itemsize < 4 else x
    normal = wide * torch.rsqrt((wide * wide).mean(axes, keepdim=True) + call.attr("epsilon", 1e-5))
    return normal.to(x.dtype) * scale


def _group_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = call.attr("num_groups")
    parts = x.reshape(x.shape[0], groups, -1)
    normal, _, _ = _standardized(parts, (2,), call.attr("epsilon", 1e-5))
    if scale.numel() != x.shape[1]:  # before opset 21 one number for each group
        scale, bias = (one.repeat_interleave(x.shape[1] // groups) for one in (scale, bias))
    return normal.reshape(x.shape) * along_channels(scale, x) + along_channels(bias, x)


def _instance_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    normal, _, _ = _standardized(x, tuple(range(2, x.ndim)), call.attr("epsilon", 1e-5))
    return normal * along_channels(scale, x) + along_channels(bias, x)


def _batch_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Any:
    epsilon, momentum = call.attr("epsilon", 1e-5), call.attr("momentum", 0.9)
    if not call.attr("training_mode", 0):
        factor = scale * torch.rsqrt(var + epsilon)
        return (x - along_channels(mean, x)) * along_channels(factor, x) + along_channels(bias, x)
    axes = (0, *range(2, x.ndim))
    here, spread = x.mean(axes), x.var(axes, unbiased=False)
    factor = scale * torch.rsqrt(spread + epsilon)
    result = (x - along_channels(here, x)) * along_channels(factor, x) + along_channels(bias, x)
    running = mean * momentum + here * (1 - momentum), var * momentum + spread * (1 - momentum)
    return (result, *running)[: len(call.writes)] if len(call.writes) > 1 else result


def along_channels(vector: Tensor, x: Tensor) -> Tensor:
    """[channels] in the shape that lines up with the second axis of x."""
    return vector.reshape(-1, *(1,) * (x.ndim - 2))


def _mean_variance(call: Call, x: Tensor) -> Tensor:
    axes = tuple(call.attr("axes", (0, 2, 3)))
    centered = x - x.mean(axes, keepdim=True)
    return centered / ((centered * centered).mean(axes, keepdim=True).sqrt() + 1e-9)


def _lp_normalization(call: Call, x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, call.attr("p", 2), call.attr("axis", -1), keepdim=True)
    return x / torch.where(norm == 0, torch.ones_like(norm), norm)


def _local_response(call: Call, x: Tensor) -> Tensor:
    size = call.attr("size")
    before = (size - 1) // 2
    squares = functional.pad((x * x).movedim(1, -1), (before, size - 1 - before))
    sums = squares.unfold(-1, size, 1).sum(-1).movedim(-1, 1)
    return x / (call.attr("bias", 1.0) + call.attr("alpha", 1e-4) / size * sums) ** call.attr("beta", 0.75)


RULES: Mapping[str, Rule] = MappingProxyType({
    "ReduceSum": _reduction(_sum), "ReduceMean": _reduction(_average), "ReduceMax": _reduction(_extreme(torch.amax, -math.inf)),
    "ReduceMin": _reduction(_extreme(torch.amin, math.inf)), "ReduceProd": _reduction(_product),
    "ReduceL1": _reduction(_norm_one, torch.abs), "ReduceL2": _reduction(_norm_two, torch.abs),
    "ReduceLogSum": _reduction(lambda x, axes, keep: _sum(x, axes, keep).log(), torch.log),
    "ReduceLogSumExp": _reduction(_log_sum_exp),
    "ReduceSumSquare": _reduction(lambda x, axes, keep: _sum(x * x, axes, keep), torch.square),
    "ArgMax": _arg(torch.argmax), "ArgMin": _arg(torch.argmin), "CumSum": _cumulated, "Softmax": _softmax,
    "LogSoftmax": _log_softmax, "Hardmax": _hardmax, "LayerNormalization": _layer_norm, "RMSNormalization": _rms_norm,
    "GroupNormalization": _group_norm, "InstanceNormalization": _instance_norm, "BatchNormalization": _batch_norm,
    "MeanVarianceNormalization": _mean_variance, "LpNormalization": _lp_normalization, "LRN": _local_response,
})  # fmt: skip
CARRIES: frozenset[str] = frozenset()
