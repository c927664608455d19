"""How much memory a kernel asks its runtime for while it runs."""

from __future__ import annotations

import math
from typing import Any

STACK = 1024  # bytes: TVM puts smaller buffers on the stack (kMaxStackAlloca)
ALIGNMENT = 64


def scratch_bytes(function: Any) -> int:
    """An upper bound for a PrimFunc that runs serially: all its buffers at once, each on a 64-byte boundary."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in map(_bytes, _allocated(function.body)) if size > STACK)


def _allocated(body: Any) -> list[Any]:
    import tvm_ffi
    from tvm import s_tir, tirx

    buffers: list[Any] = []
    visitors = [
        (tirx.AllocBuffer, lambda node: buffers.append(node.buffer)),
        (s_tir.SBlock, lambda node: buffers.extend(node.alloc_buffers)),
    ]
    tvm_ffi.structural_walk(body, visitors)
    return buffers


def _bytes(buffer: Any) -> int:
    bits = buffer.dtype.bits * buffer.dtype.lanes if hasattr(buffer.dtype, "bits") else 64
    return -(-math.prod(int(dim) for dim in buffer.shape) * int(bits) // 8)
