"""Rules of the torch backend for operators that work element by element: activations, arithmetic, comparisons, casts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.nn import functional

from hwopt.backends._torch_call import FLOATS, Call, Rule, Tensor, is_carried, landed, straight
from hwopt.ir.types import dtype_name


def _unary(function: Callable[[Tensor], Tensor]) -> Rule:
    return lambda _, x: function(x)


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    return lambda _, left, right: function(left, right)


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    return lambda _, *inputs: functools.reduce(function, inputs)


def _div(_: Call, left: Tensor, right: Tensor) -> Tensor:
    return left / right if left.is_floating_point() else torch.div(left, right, rounding_mode="trunc")


def _mod(call: Call, left: Tensor, right: Tensor) -> Tensor:
    return torch.fmod(left, right) if call.attr("fmod", 0) else torch.remainder(left, right)


def _pow(_: Call, base: Tensor, exponent: Tensor) -> Tensor:
    return torch.pow(base, exponent).to(base.dtype)


def _mean(_: Call, *inputs: Tensor) -> Tensor:
    return functools.reduce(torch.add, inputs) / len(inputs)


def _clip(_: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """The borders themselves pass gradients: values on a grid are often exactly there."""
    if low is None and high is None:
        return x
    return torch.clamp(x, min=None if low is None else low.to(x.dtype), max=None if high is None else high.to(x.dtype))


def _relu(_: Call, x: Tensor) -> Tensor:
    return torch.clamp(x, min=0) if not x.is_floating_point() else torch.relu(x)


def _leaky_relu(call: Call, x: Tensor) -> Tensor:
    return functional.leaky_relu(x, call.attr("alpha", 0.01))


def _prelu(_: Call, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x > 0, x, x * slope)


def _thresholded_relu(call: Call, x: Tensor) -> Tensor:
    return torch.where(x > call.attr("alpha", 1.0), x, torch.zeros_like(x))


def _elu(call: Call, x: Tensor) -> Tensor:
    return functional.elu(x, call.attr("alpha", 1.0))


def _celu(call: Call, x: Tensor) -> Tensor:
    return functional.celu(x, call.attr("alpha", 1.0))


def _selu(call: Call, x: Tensor) -> Tensor:
    alpha, gamma = call.attr("alpha", 1.6732632423543772), call.attr("gamma", 1.0507009873554805)
    return gamma * functional.elu(x, alpha)


def _gelu(call: Call, x: Tensor) -> Tensor:
    return functional.gelu(x, approximate=call.attr("approximate", "none"))


def _hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    return torch.clamp(call.attr("alpha", 0.2) * x + call.attr("beta", 0.5), 0, 1)


def _hard_swish(_: Call, x: Tensor) -> Tensor:
    return x * torch.clamp(x / 6 + 0.5, 0, 1)


def _swish(call: Call, x: Tensor) -> Tensor:
    return x * torch.sigmoid(call.attr("alpha", 1.0) * x)


def _shrink(call: Call, x: Tensor) -> Tensor:
    bias, limit = call.attr("bias", 0.0), call.attr("lambd", 0.5)
    moved = torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, torch.zeros_like(x)))
    return moved.to(x.dtype)


def _is_infinite(call: Call, x: Tensor) -> Tensor:
    above = torch.isposinf(x) if call.attr("detect_positive", 1) else torch.zeros_like(x, dtype=torch.bool)
    return above | torch.isneginf(x) if call.attr("detect_negative", 1) else above


def _bit_shift(call: Call, x: Tensor, count: Tensor) -> Tensor:
    return x << count if call.attr("direction") == "LEFT" else x >> count


def _where(_: Call, condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(condition, yes, no)


def _dropout(call: Call, x: Tensor, *_: Tensor | None) -> Any:
    """Inference: nothing is dropped."""
    return (x, torch.ones_like(x, dtype=torch.bool)) if len(call.writes) > 1 else x


def _cast(call: Call, x: Tensor) -> Tensor:
    return converted(call, x, dtype_name(int(call.attr("to"))))


def _cast_like(call: Call, x: Tensor, _: Tensor) -> Tensor:
    return converted(call, x, call.reads[1])


def converted(call: Call, x: Tensor, dtype: str) -> Tensor:
    """Towards floats gradients go straight through, a narrower float is carried; towards integers they end."""
    wanted, source = call.held(dtype), call.reads[0]
    if dtype in FLOATS:
        if not x.is_floating_point() or wanted.itemsize >= x.dtype.itemsize:
            return x.to(wanted)
        return straight(x, x.detach().to(wanted).to(x.dtype))
    if is_carried(x, source, precise=call.precise):
        x = landed(x, source, precise=call.precise)
    return (x != 0) if dtype == "bool" else x.detach().to(wanted)


RULES: Mapping[str, Rule] = MappingProxyType({
    "Abs": _unary(torch.abs), "Acos": _unary(torch.acos), "Acosh": _unary(torch.acosh), "Asin": _unary(torch.asin),
    "Asinh": _unary(torch.asinh), "Atan": _unary(torch.atan), "Atanh": _unary(torch.atanh), "Ceil": _unary(torch.ceil),
    "Cos": _unary(torch.cos), "Cosh": _unary(torch.cosh), "Erf": _unary(torch.erf), "Exp": _unary(torch.exp),
    "Floor": _unary(torch.floor), "Identity": _unary(lambda x: x), "IsNaN": _unary(torch.isnan), "Log": _unary(torch.log),
    "Mish": _unary(functional.mish), "Neg": _unary(torch.neg), "Not": _unary(torch.logical_not),
    "Reciprocal": _unary(torch.reciprocal), "Round": _unary(torch.round), "Sigmoid": _unary(torch.sigmoid),
    "Sign": _unary(torch.sign), "Sin": _unary(torch.sin), "Sinh": _unary(torch.sinh), "Softplus": _unary(functional.softplus),
    "Softsign": _unary(functional.softsign), "Sqrt": _unary(torch.sqrt), "Tan": _unary(torch.tan), "Tanh": _unary(torch.tanh),
    "BitwiseNot": _unary(torch.bitwise_not), "Relu": _relu, "LeakyRelu": _leaky_relu, "PRelu": _prelu,
    "ThresholdedRelu": _thresholded_relu, "Elu": _elu, "Celu": _celu, "Selu": _selu, "Gelu": _gelu, "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish, "Swish": _swish, "Shrink": _shrink, "IsInf": _is_infinite, "Clip": _clip, "Dropout": _dropout,
    "Add": _binary(torch.add), "Sub": _binary(torch.sub), "Mul": _binary(torch.mul), "Div": _div, "Mod": _mod, "Pow": _pow,
    "And": _binary(torch.logical_and), "Or": _binary(torch.logical_or), "Xor": _binary(torch.logical_xor),
    "Equal": _binary(torch.eq), "Greater": _binary(torch.gt), "GreaterOrEqual": _binary(torch.ge), "Less": _binary(torch.lt),
    "LessOrEqual": _binary(torch.le), "BitwiseAnd": _binary(torch.bitwise_and), "BitwiseOr": _binary(torch.bitwise_or),
    "BitwiseXor": _binary(torch.bitwise_xor), "BitShift": _bit_shift,
    "Max": _folded(torch.maximum), "Min": _folded(torch.minimum), "Sum": _folded(torch.add), "Mean": _mean,
    "Where": _where, "Cast": _cast, "CastLike": _cast_like,
})  # fmt: skip
# Exact on carried values: these only move, compare or convert them.
CARRIES = frozenset({"Identity", "Relu", "Clip", "Max", "Min", "Where", "Cast", "CastLike", "Dropout"})
