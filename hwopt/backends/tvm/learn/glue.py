"""What stands between the products of real networks, each as a kernel of its own: pools, gates, moves, reductions, steps.

Every kernel reads a source that several read, so that none becomes the epilogue of the product in front; their results are
summed up and joined, so that the network has one output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hwopt.backends.tvm.learn.networks import Net

Found = tuple[str, tuple[int, ...]]
Op = Callable[["Net", str, tuple[int, ...]], Found]
KERNELS = 9  # of one source
NARROW = 8  # channels of the products behind them
MOST = 600_000  # elements of a source
UNARY = (
    "Relu",
    "Sigmoid",
    "HardSigmoid",
    "HardSwish",
    "Tanh",
    "Gelu",
    "Erf",
    "Exp",
    "Clip",
    "LeakyRelu",
    "Neg",
    "Abs",
    "Softplus",
)


def images(net: Net, x: str, shape: tuple[int, ...]) -> Found:
    """Kernels on an image of many channels, which a small convolution makes."""
    x, shape = net.conv(x, shape, net.width(8, max(16, min(512, MOST // (shape[2] * shape[3])))), 1)
    leaves = [_fenced(net, *_pick(net, IMAGE_OPS)(net, x, shape)) for _ in range(KERNELS)]
    return _joined(net, leaves)


def pools(net: Net, x: str, shape: tuple[int, ...]) -> Found:
    """Windows and means over such an image."""
    x, shape = net.conv(x, shape, net.width(8, max(16, min(512, MOST // (shape[2] * shape[3])))), 1)
    leaves = [_fenced(net, *_pick(net, (_pool, _pool, _pool, _mean))(net, x, shape)) for _ in range(KERNELS)]
    return _joined(net, leaves)


def sequences(net: Net, x: str, shape: tuple[int, ...]) -> Found:
    """Kernels on (batch, rows, features), which a small product makes."""
    wide = net.width(16, max(32, min(1024, MOST // shape[1])))
    x, shape = net.linear(x, shape[2], wide, shape[1]), (*shape[:2], wide)
    leaves = [_fenced(net, *_pick(net, SEQUENCE_OPS)(net, x, shape)) for _ in range(KERNELS)]
    return _joined(net, leaves)


def _pick(net: Net, ops: tuple[Op, ...]) -> Op:
    return ops[int(net.random.integers(len(ops)))]


def _fenced(net: Net, value: str, shape: tuple[int, ...]) -> Found:
    """A small product behind the leaf, so that it is known whose time is whose, and the mean of that."""
    if len(shape) == 4 and net.family in ("images", "pools"):
        value, shape = net.conv(value, shape, NARROW, 1)
        return net.add("Flatten", net.add("GlobalAveragePool", value), axis=1), (1, NARROW)
    value = net.linear(value, shape[-1], NARROW, int(np.prod(shape[:-1])))
    axes = net.constant(np.arange(1, len(shape) - 1))
    return (net.add("ReduceMean", value, axes, keepdims=0) if len(shape) > 2 else value), (1, NARROW)


def _joined(net: Net, leaves: list[Found]) -> Found:
    total = sum(shape[1] for _, shape in leaves)
    return net.add("Concat", *(value for value, _ in leaves), axis=1), (1, total)


# --------------------------------------------------------------------------------------------------------------- steps


def _unary(net: Net, x: str, shape: tuple[int, ...]) -> Found:
    kind = str(net.random.choice(UNARY))
    if kind == "Clip":
        return net.add("Clip", x, net.constant(np.float32(0)), net.constant(np.float32(6))), shape
    return net.add(kind, x), shape


def _silu(net: Net, x: str, shape: tuple[int, ...]) -> Found:
    return net.add("Mul", x, net.add("Sigmoid", x)), shape


def _other(net: Net, shape: tuple[int, ...]) -> str:
    """A second operand: one number, one for each channel, or as many as the first has."""
    channel = (1, shape[1], 1, 1) if len(shape) == 4 else (shape[-1],)
    form: Any = ((), channel, channel, (1, *shape[1:]))[int(net.random.integers(4))]
    return net.constant((0.5 + net.random.random(form)).astype(np.float32))


def _binary(net: Net, x: str, shape: tuple[int, ...]) -> Found:
    return net.add(str(net.random.choice(("Add", "Mul", "Sub", "Div", "Max"))), x, _other(net, shape)), shape


def _scaled(net: Net, x: str, shape: tuple[int, ...]) -> Found:
    """A normalization that could not be folded, with a function behind it."""
    x = net.add("Add", net.add("Mul", x, _other(net, shape)), _other(net, shape))
    return (net.add(str(net.random.choice(("Relu", "Sigmoid", "HardSwish"))), x) if net.random.random() < 0.6 else x), shape


def _twice(net: Net, x: str, shape: tuple[int, ...]) -> Found:
    """Two full operands."""
    first = net.add("Relu", x) if net.random.random() < 0.3 else x
    return net.add(str(net.random.choice(("Add", "Mul"))), net.add("Neg", first), net.add("Abs", x)), shape


def _norm(net: Net, x: str, shape: tuple[int, ...]) -> Found:
    x = net.add("Add", x, _other(net, shape)) if net.random.random() < 0.4 else x
    return net.add("LayerNormalization", x, net.normal(shape[-1]), net.normal(shape[-1]), axis=-1), shape


def _softmax(net: Net, x: str, shape: tuple[int, ...]) -> Found:
    x = net.add("Mul", x, net.constant(np.float32(0.125))) if net.random.random() < 0.4 else x
    return net.add("Softmax", x, axis=-1), shape


def _root_mean_square(net: Net, x: str, shape: tuple[int, ...]) -> Found:
    """Zhang and Sennrich, 2019, as exporters write it."""
    mean = net.add("ReduceMean", net.add("Mul", x, x), net.constant(np.array([-1])), keepdims=1)
    root = net.add("Sqrt", net.add("Add", mean, net.constant(np.float32(1e-5))))
    return net.add("Mul", net.add("Div", x, root), net.normal(shape[-1])), shape


def _gate(net: Net, x: str, shape: tuple[int, ...]) -> Found:
    """Channels scaled by what they are on average."""
    return net.add("Mul", x, net.add("Sigmoid", net.add("GlobalAveragePool", x))), shape


# -------------------------------------------------------------------------------------------------- pools, reductions, moves


def _pool(net: Net, x: str, shape: tuple[int, ...]) -> Found:
    kind, size = str(net.random.choice(("MaxPool", "AveragePool"))), int(net.random.choice((2, 2, 3, 3, 5)))
    stride, pad = int(net.random.choice((1, 2, 2))), (size // 2 if size != 2 else 0)
    if min(shape[2:]) < 2 * size:
        return net.add("Relu", x), shape
    x = net.add(kind, x, kernel_shape=[size] * 2, strides=[stride] * 2, pads=[pad] * 4)
    return x, (*shape[:2], *((side + 2 * pad - size) // stride + 1 for side in shape[2:]))


def _mean(net: Net, x: str, shape: tuple[int, ...]) -> Found:
    return net.add("GlobalAveragePool", x), (*shape[:2], 1, 1)


def _reduced(net: Net, x: str, shape: tuple[int, ...]) -> Found:
    op = str(net.random.choice(("ReduceMean", "ReduceSum", "ReduceMax")))
    axis = int(net.random.choice((1, 2)))
    return net.add(op, x, net.constant(np.array([axis])), keepdims=0), tuple(s for i, s in enumerate(shape) if i != axis)


def _order(net: Net, x: str, shape: tuple[int, ...]) -> Found:
    order = [int(one) for one in net.random.permutation(np.arange(1, len(shape)))]
    order = [0, *order] if order != sorted(order) else [0, 2, 1, *range(3, len(shape))]
    return net.add("Transpose", x, perm=order), tuple(shape[one] for one in order)


def _heads(net: Net, x: str, shape: tuple[int, ...]) -> Found:
    heads = next((count for count in (12, 8, 6, 4, 3, 2) if shape[2] % count == 0), 1)
    order = ((0, 2, 1, 3), (0, 2, 3, 1))[int(net.random.integers(2))]
    there = (shape[0], shape[1], heads, shape[2] // heads)
    x = net.add("Transpose", net.add("Reshape", x, net.constant(np.array(there))), perm=list(order))
    return x, tuple(there[one] for one in order)


def _shuffled(net: Net, x: str, shape: tuple[int, ...]) -> Found:
    """Channels of groups interleaved (Zhang et al., 2018)."""
    groups = next((count for count in (3, 4, 2) if shape[1] % count == 0), 1)
    split = net.constant(np.array((shape[0], groups, shape[1] // groups, *shape[2:])))
    x = net.add("Transpose", net.add("Reshape", x, split), perm=[0, 2, 1, 3, 4])
    return net.add("Reshape", x, net.constant(np.array(shape))), shape


def _concat(net: Net, x: str, shape: tuple[int, ...]) -> Found:
    axis = 1 if len(shape) == 4 else int(net.random.choice((1, 2)))
    parts = [x, net.add("Relu", x)] if net.random.random() < 0.5 else [x, x]
    there = list(shape)
    there[axis] *= 2
    return net.add("Concat", *parts, axis=axis), tuple(there)


def _slice(net: Net, x: str, shape: tuple[int, ...]) -> Found:
    axis = int(net.random.integers(1, len(shape)))
    first, last = 0, max(1, shape[axis] // 2)
    if net.random.random() < 0.5:
        first, last = last // 2, last // 2 + last
    ends = (net.constant(np.array([one])) for one in (first, last, axis))
    return net.add("Slice", x, *ends), (*shape[:axis], last - first, *shape[axis + 1 :])


def _pad(net: Net, x: str, shape: tuple[int, ...]) -> Found:
    ends = [0] * (2 * len(shape))
    ends[-1] = ends[-2] = ends[len(shape) - 1] = 1
    there = (*shape[:-2], shape[-2] + 1, shape[-1] + 2)
    return net.add("Pad", x, net.constant(np.array(ends))), there


def _resized(net: Net, x: str, shape: tuple[int, ...]) -> Found:
    kind = str(net.random.choice(("nearest", "nearest", "linear")))
    scales = net.constant(np.array((1, 1, 2, 2), np.float32))
    x = net.add(
        "Resize", x, "", scales, mode=kind, coordinate_transformation_mode="asymmetric" if kind == "nearest" else "half_pixel"
    )
    return x, (*shape[:2], 2 * shape[2], 2 * shape[3])


def _spaced(net: Net, x: str, shape: tuple[int, ...]) -> Found:
    batch, channels, height, width = shape
    if channels % 4 == 0 and net.random.random() < 0.5:
        return net.add("DepthToSpace", x, blocksize=2), (batch, channels // 4, 2 * height, 2 * width)
    if height % 2 or width % 2:
        return net.add("Relu", x), shape
    return net.add("SpaceToDepth", x, blocksize=2), (batch, 4 * channels, height // 2, width // 2)


def _looked_up(net: Net, x: str, shape: tuple[int, ...]) -> Found:
    """Some rows, chosen by constant indices."""
    rows = net.random.integers(0, shape[1], max(1, shape[1] // 2))
    return net.add("Gather", x, net.constant(rows), axis=1), (shape[0], len(rows), shape[2])


IMAGE_OPS: tuple[Op, ...] = (
    _unary, _unary, _silu, _binary, _binary, _scaled, _scaled, _twice, _gate, _gate, _pool, _pool, _pool, _pool, _order,
    _shuffled, _concat, _concat, _slice, _pad, _resized, _spaced,
)  # fmt: skip
SEQUENCE_OPS: tuple[Op, ...] = (
    _unary, _unary, _silu, _binary, _binary, _scaled, _twice, _norm, _norm, _norm, _softmax, _softmax, _root_mean_square,
    _reduced, _reduced, _order, _heads, _heads, _heads, _concat, _slice, _looked_up,
)  # fmt: skip
