"""Rules of the torch backend for quantization. Integers are carried as floats, so that gradients reach data, scales, codebooks.

With rounding straight through behind the clip, what autograd finds for the scale of a QuantizeLinear followed by its
DequantizeLinear is that of learned step sizes: q - x / s where x / s is in the range, the border outside (LSQ,
arXiv:1902.08153, equation 3). The borders themselves count as inside: the largest weight of a channel lies on one.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from hwopt.backends._torch_call import RANGES, Call, Rule, Tensor, rounded
from hwopt.backends._torch_products import CONV, Window

HAIR = 1e-3  # steps by which a value on the border may miss it in float32
ROUND_TRIP = "QuantizeLinear-DequantizeLinear"  # one step that does what both do


def _spread(call: Call, vector: Tensor | None, x: Tensor) -> Tensor | float:
    """A scale or zero point in a shape that multiplies x: for the whole tensor, along an axis, or in blocks along it."""
    if vector is None:
        return 0.0
    if vector.numel() == 1:
        return vector.reshape(())
    axis = call.attr("axis", 1) % x.ndim
    if vector.ndim == 1:
        return vector.reshape(-1, *(1,) * (x.ndim - 1 - axis))
    block = call.attr("block_size", 0) or -(-x.shape[axis] // vector.shape[axis])
    return vector.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])


def _wide(x: Tensor) -> Tensor:
    return x if x.is_floating_point() and x.dtype.itemsize >= 4 else x.to(torch.float32)


class Steps(torch.autograd.Function):
    """clip(round(x / s) + z) and its gradients straight through the rounding: the composed rule's, in a third of its time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor | float, low: int, high: int) -> Tensor:
        steps = x / scale
        inside = ((steps + offset) - (low + high) / 2).abs_() <= (high - low) / 2 + HAIR
        ctx.save_for_backward(x, scale, inside)
        return steps.round_().add_(offset).clamp_(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, inside = ctx.saved_tensors
        slope = (gradients[0] * inside).div_(scale)
        if not ctx.needs_input_grad[1]:
            return slope, None, None, None, None
        change = (slope * x).sum_to_size(scale.shape) / -scale
        return slope, change, None, None, None


class Rounded(torch.autograd.Function):
    """s * clip(round(x / s)), what QuantizeLinear and its DequantizeLinear are together, with the gradients of both, in half of
    their time: for every value that a layer reads, that is most of what training adds to it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
        steps = x / scale
        result = torch.clamp_(steps.round(), low, high)  # type: ignore[arg-type]
        ctx.save_for_backward(x, scale, steps, result)
        ctx.range = (low, high)
        return result * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, steps, result = ctx.saved_tensors
        slope = _within(gradients[0], steps, *ctx.range)
        if not ctx.needs_input_grad[1]:
            return slope, None, None, None
        change = _shared(gradients[0], result, scale) - _shared(slope, x, scale) / scale
        return slope, change, None, None


def _within(gradient: Tensor, steps: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """The gradient where nothing was clipped."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return gradient * ((steps >= low - HAIR) & (steps <= high + HAIR))
    return torch.ops.aten.hardtanh_backward(gradient, steps, low - HAIR, high + HAIR)


def _shared(one: Tensor, other: Tensor, scale: Tensor) -> Tensor:
    """The products of two tensors, summed over what has the same scale."""
    if scale.numel() == 1:
        return torch.dot(one.reshape(-1), other.reshape(-1)).reshape(scale.shape)
    return (one * other).sum_to_size(scale.shape)


def round_trip(call: Call, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """The rule of a ROUND_TRIP; its attribute `grid` is the type of the integers."""
    low, high = RANGES[call.attr("grid")]
    step, offset = _spread(call, _wide(scale), x), _spread(call, zero_point, x)
    if isinstance(offset, Tensor):
        offset = offset.to(step.dtype) if offset.ndim else float(offset)  # type: ignore[union-attr]
    return Rounded.apply(_wide(x), step, low - offset, high - offset).to(call.result)


def _quantize(call: Call, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    low, high = RANGES[call.writes[0]]
    step, offset = _spread(call, _wide(scale), x), _spread(call, zero_point, x)
    if call.rounding is rounded:
        return Steps.apply(_wide(x), step, offset, low, high)
    return torch.clamp(call.rounding(_wide(x) / step) + offset, low, high)


def _dequantize(call: Call, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    offset = _spread(call, zero_point, x)
    wide = x if x.is_floating_point() else x.to(_wide(scale).dtype)
    return ((wide - offset) * _spread(call, _wide(scale), x)).to(call.result)


def _dynamic(call: Call, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 over the range of this very tensor, widened to hold zero."""
    zero = torch.zeros((), dtype=x.dtype)
    low, high = torch.minimum(x.amin(), zero), torch.maximum(x.amax(), zero)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    offset = torch.clamp(call.rounding(-low / scale), 0, 255)
    return torch.clamp(call.rounding(x / scale) + offset, 0, 255), scale, offset


def _centered(x: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
    """The integers without their offset, in float64: exact for every sum of products that int32 holds."""
    wide = x.to(torch.float64)
    if zero_point is None:
        return wide
    offset = zero_point.to(torch.float64)
    if offset.ndim == 1 and offset.numel() > 1:
        offset = offset.reshape([-1 if one == axis % x.ndim else 1 for one in range(x.ndim)])
    return wide - (offset.reshape(()) if offset.numel() == 1 else offset)


def _matmul_integer(_: Call, a: Tensor, b: Tensor, a_offset: Tensor | None = None, b_offset: Tensor | None = None) -> Tensor:
    return torch.matmul(_centered(a, a_offset, a.ndim - 2), _centered(b, b_offset, b.ndim - 1))


def _conv_integer(
    call: Call, x: Tensor, weight: Tensor, x_offset: Tensor | None = None, w_offset: Tensor | None = None
) -> Tensor:
    """Padding has the value of the zero point: zero once that is subtracted."""
    window = Window(call, x, weight.shape[2:])
    data, kernel = window.padded(_centered(x, x_offset, 1)), _centered(weight, w_offset, 0)
    return CONV[x.ndim - 2](data, kernel, None, window.strides, 0, window.dilations, call.attr("group", 1))


RULES: Mapping[str, Rule] = MappingProxyType({
    "QuantizeLinear": _quantize, "DequantizeLinear": _dequantize, "DynamicQuantizeLinear": _dynamic,
    "MatMulInteger": _matmul_integer, "ConvInteger": _conv_integer,
})  # fmt: skip
CARRIES = frozenset({"DequantizeLinear", "MatMulInteger", "ConvInteger"})
