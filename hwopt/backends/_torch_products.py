"""Rules of the torch backend for convolutions, matrix products and pools, in one, two and three dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch.nn import functional

from hwopt.backends._torch_call import Call, Rule, Tensor

CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
MAX_POOL = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}


class Window:
    """The sliding window of a node: kernel, strides, dilations, and the pads in front of and behind each axis of x."""

    def __init__(self, call: Call, x: Tensor, kernel: Sequence[int]) -> None:
        rank = x.ndim - 2
        self.kernel = tuple(kernel)
        self.strides = tuple(call.attr("strides", (1,) * rank))
        self.dilations = tuple(call.attr("dilations", (1,) * rank))
        self.spans = tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))
        self.begin, self.end = self._pads(call, x, rank)
        self.outputs = tuple(self._outputs(x, axis, bool(call.attr("ceil_mode", 0))) for axis in range(rank))

    def _pads(self, call: Call, x: Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        auto = call.attr("auto_pad", "NOTSET")
        if auto not in ("SAME_UPPER", "SAME_LOWER"):
            pads = tuple(call.attr("pads", (0,) * 2 * rank)) if auto == "NOTSET" else (0,) * 2 * rank
            return pads[:rank], pads[rank:]
        sizes = zip(x.shape[2:], self.strides, self.spans, strict=True)
        whole = [max(0, (math.ceil(size / stride) - 1) * stride + span - size) for size, stride, span in sizes]
        small, large = tuple(pad // 2 for pad in whole), tuple(pad - pad // 2 for pad in whole)
        return (small, large) if auto == "SAME_UPPER" else (large, small)

    def _outputs(self, x: Tensor, axis: int, up: bool) -> int:
        """Windows along one axis; one that would begin in the padding behind the data does not count."""
        size, stride = x.shape[2 + axis], self.strides[axis]
        room = size + self.begin[axis] + self.end[axis] - self.spans[axis]
        count = (math.ceil(room / stride) if up else room // stride) + 1
        return count - 1 if up and (count - 1) * stride >= size + self.begin[axis] else count

    def padded(self, x: Tensor, value: float = 0.0) -> Tensor:
        """x with exactly what the windows cover; rows behind the last window are cut off."""
        pads: list[int] = []
        for axis in reversed(range(x.ndim - 2)):
            covered = (self.outputs[axis] - 1) * self.strides[axis] + self.spans[axis]
            pads += [self.begin[axis], covered - x.shape[2 + axis] - self.begin[axis]]
        return functional.pad(x, pads, value=value) if any(pads) else x


def _conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    window = Window(call, x, weight.shape[2:])
    symmetric = window.begin == window.end
    data, padding = (x, window.begin) if symmetric else (window.padded(x), (0,) * (x.ndim - 2))
    return CONV[x.ndim - 2](data, weight, bias, window.strides, padding, window.dilations, call.attr("group", 1))


def _conv_transpose(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The whole result, cut by the pads; what output_padding adds behind it holds nothing but the bias."""
    rank = x.ndim - 2
    strides, dilations = (tuple(call.attr(key, (1,) * rank)) for key in ("strides", "dilations"))
    whole = TRANSPOSED[rank](x, weight, None, strides, 0, 0, call.attr("group", 1), dilations)
    extra = tuple(call.attr("output_padding", (0,) * rank))
    begin, end = _transposed_pads(call, whole, extra, x, strides)
    cuts = [cut for axis in reversed(range(rank)) for cut in (-begin[axis], extra[axis] - end[axis])]
    result = functional.pad(whole, cuts)
    return result if bias is None else result + bias.reshape(-1, *(1,) * rank)


def _transposed_pads(
    call: Call, whole: Tensor, extra: Sequence[int], x: Tensor, strides: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    rank, auto = x.ndim - 2, call.attr("auto_pad", "NOTSET")
    wanted = call.attr("output_shape")
    if wanted is None and auto in ("SAME_UPPER", "SAME_LOWER"):
        wanted = tuple(size * stride for size, stride in zip(x.shape[2:], strides, strict=True))
    if wanted is None:
        pads = tuple(call.attr("pads", (0,) * 2 * rank))
        return pads[:rank], pads[rank:]
    sizes = zip(whole.shape[2:], extra, tuple(wanted)[-rank:], strict=True)
    totals = [size + more - want for size, more, want in sizes]
    small, large = tuple(total // 2 for total in totals), tuple(total - total // 2 for total in totals)
    return (small, large) if auto == "SAME_UPPER" else (large, small)


def _gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a, b = a.T if call.attr("transA", 0) else a, b.T if call.attr("transB", 0) else b
    alpha, beta = call.attr("alpha", 1.0), call.attr("beta", 1.0)
    product = a @ b
    product = product if alpha == 1 else (product * alpha).to(a.dtype)
    if c is None:
        return product
    return product + (c if beta == 1 else (c * beta).to(a.dtype))


def _matmul(_: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


def _einsum(call: Call, *inputs: Tensor) -> Tensor:
    return torch.einsum(call.attr("equation").replace(" ", ""), *inputs)


def _max_pool(call: Call, x: Tensor) -> Tensor:
    window = Window(call, x, call.attr("kernel_shape"))
    data = x if x.is_floating_point() else x.to(torch.float64)
    data = window.padded(data, -math.inf)
    pooled = MAX_POOL[x.ndim - 2](data, window.kernel, window.strides, 0, window.dilations)
    return pooled.to(x.dtype)


def _window_sums(x: Tensor, window: Window) -> Tensor:
    """Sums over the windows: a convolution of every channel with ones."""
    flat = window.padded(x).flatten(0, 1).unsqueeze(1)
    ones = torch.ones((1, 1, *window.kernel), dtype=x.dtype)
    sums = CONV[x.ndim - 2](flat, ones, None, window.strides, 0, window.dilations)
    return sums.reshape(*x.shape[:2], *sums.shape[2:])


def _average_pool(call: Call, x: Tensor) -> Tensor:
    window = Window(call, x, call.attr("kernel_shape"))
    counted = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype)
    if call.attr("count_include_pad", 0):
        pads = [pad for axis in reversed(range(x.ndim - 2)) for pad in (window.begin[axis], window.end[axis])]
        whole = functional.pad(counted, pads, value=1.0)
        moved = Window(call, x, window.kernel)
        moved.begin = (0,) * (x.ndim - 2)
        return _window_sums(x, window) / _window_sums(whole, moved)
    return _window_sums(x, window) / _window_sums(counted, window)


def _lp_pool(call: Call, x: Tensor) -> Tensor:
    power = call.attr("p", 2)
    return _window_sums(x.abs() ** power, Window(call, x, call.attr("kernel_shape"))) ** (1 / power)


def _global(function: Callable[[Tensor, tuple[int, ...]], Tensor]) -> Rule:
    return lambda _, x: function(x, tuple(range(2, x.ndim)))


def _global_lp(call: Call, x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, call.attr("p", 2), tuple(range(2, x.ndim)), keepdim=True)


RULES: Mapping[str, Rule] = MappingProxyType({
    "Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm, "MatMul": _matmul, "Einsum": _einsum, "MaxPool": _max_pool,
    "AveragePool": _average_pool, "LpPool": _lp_pool, "GlobalLpPool": _global_lp,
    "GlobalAveragePool": _global(lambda x, axes: x.mean(axes, keepdim=True)),
    "GlobalMaxPool": _global(lambda x, axes: x.amax(axes, keepdim=True)),
})  # fmt: skip
CARRIES = frozenset({"MaxPool", "GlobalMaxPool"})
