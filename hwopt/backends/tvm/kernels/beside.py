"""Where the products of a batched matmul lie: one behind the other, or beside one another at every position.

[batch, m, k]                       one behind the other
[batch / heads, m, heads, k]        beside: an attention's heads, as the layers before and after it have them
"""

from __future__ import annotations

from typing import Protocol

from hwopt.backends.tvm.kernels.code import Value
from hwopt.backends.tvm.kernels.schedule import split


class Layout(Protocol):
    """A MatmulSpec or its Geometry."""

    @property
    def heads(self) -> int: ...

    @property
    def beside(self) -> tuple[str, ...]: ...


def stride(layout: Layout, side: str, size: int) -> int:
    """Elements between neighbouring positions of `side`, which have `size` elements each."""
    return size * layout.heads if side in layout.beside else size


def begin(layout: Layout, side: str, image: Value, positions: int, size: int) -> Value:
    """The element of `side` where an image of `positions` x `size` elements begins."""
    if side not in layout.beside:
        return image * (positions * size)
    head, group = split(image, layout.heads)
    return group * (positions * layout.heads * size) + head * size
