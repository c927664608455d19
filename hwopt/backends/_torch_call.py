"""What a rule of the torch backend sees of its node, and how values that are no floats carry gradients.

Integers that come out of a QuantizeLinear, and float16 or bfloat16 numbers that come out of a Cast, are held as wider floats with
the very same values ("carried"), so that gradients pass the grid straight through (Bengio et al., arXiv:1308.3432). An
operator that only moves or compares values takes carried ones as they are, every other one gets the declared type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hwopt.ir import Attr, Node

Tensor = torch.Tensor
Rule = Callable[..., Any]  # rule(call, *inputs) -> Tensor, or a tuple of them; a left-out input is None
Round = Callable[[Tensor], Tensor]

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
# Types that torch computes with, and those that it only holds in a wider one.
INTEGERS = {"bool": torch.bool, "int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16,
            "int32": torch.int32, "int64": torch.int64}  # fmt: skip
WIDENED = {"int4": torch.int8, "uint4": torch.uint8, "int2": torch.int8, "uint2": torch.uint8, "uint16": torch.int32}
RANGES = {
    "int2": (-2, 1), "uint2": (0, 3), "int4": (-8, 7), "uint4": (0, 15), "int8": (-128, 127), "uint8": (0, 255),
    "int16": (-(2**15), 2**15 - 1), "uint16": (0, 2**16 - 1), "int32": (-(2**31), 2**31 - 1),
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One node with the element types that its inputs and outputs are declared to have."""

    node: Node
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    precise: bool  # float32 is held as float64
    rounding: Round
    leading: int = 0  # the leading dimension that the first input is declared to have; 0 if it is not static

    def attr(self, key: str, default: Attr = None) -> Attr:
        value = self.node.attrs.get(key, default)
        return value.decode() if isinstance(value, bytes) else value

    def held(self, dtype: str) -> torch.dtype:
        """The torch type that values of this element type are held in."""
        return held(dtype, precise=self.precise)

    def stacked(self, sizes: list[int], x: Tensor) -> list[int]:
        """A stated shape for as many samples as x really has: its leading dimension grows with the data's."""
        if not self.leading or not x.ndim or x.shape[0] == self.leading or not sizes or sizes[0] <= 0:
            return sizes
        return [sizes[0] * x.shape[0] // self.leading, *sizes[1:]]

    @property
    def result(self) -> torch.dtype:
        """The torch type of the first output."""
        return self.held(self.writes[0])


def held(dtype: str, *, precise: bool = False) -> torch.dtype:
    """The torch type that values of this element type are held in; KeyError for types that torch cannot hold."""
    if precise and dtype in FLOATS:
        return torch.float64
    return {**FLOATS, **INTEGERS, **WIDENED}[dtype]


class Straight(torch.autograd.Function):
    """Another value forward, the gradient of the first one backward."""

    @staticmethod
    def forward(_ctx: Any, _value: Tensor, replacement: Tensor) -> Tensor:
        return replacement.clone()

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight(value: Tensor, replacement: Tensor) -> Tensor:
    """`replacement`, with gradients as if it were `value`."""
    return Straight.apply(value, replacement)


def rounded(value: Tensor) -> Tensor:
    """Round half to even, gradient straight through."""
    return straight(value, torch.round(value.detach()))


def unrounded(value: Tensor) -> Tensor:
    """No rounding at all: the smooth function whose gradient the straight-through estimator takes (for checks)."""
    return value


def is_carried(value: Tensor, dtype: str, *, precise: bool) -> bool:
    """True if a value is held as a float wider than what it is declared to be."""
    return value.is_floating_point() and value.dtype != held(dtype, precise=precise)


def landed(value: Tensor, dtype: str, *, precise: bool) -> Tensor:
    """A carried value in its declared type; integers lose the gradient there."""
    if dtype in FLOATS:
        return value.to(held(dtype, precise=precise))
    return torch.round(value.detach()).to(held(dtype, precise=precise))


def numbers(value: Tensor | None) -> list[int]:
    """A shape, axes or bounds: the integers of a tensor."""
    return [] if value is None else [int(one) for one in value.reshape(-1).tolist()]
