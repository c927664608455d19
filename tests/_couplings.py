"""Small networks, one for each way in which channels hang together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hwopt.ir import Graph
from tests.random_graphs import Builder, conv, linear

Build = Callable[[Builder], None]


def made(build: Build, opset: int = 21) -> Graph:
    builder = Builder()
    build(builder)
    return builder.graph(opset=opset)


def image(b: Builder, channels: int = 3, size: int = 6) -> str:
    return b.input((1, channels, size, size))


def head(b: Builder, x: str) -> None:
    """A product that reads x, so that its channels may go; its own output stays."""
    b.outputs.append(conv(b, x, 2, 1))


def between(op: Callable[[Builder, str], str], channels: int = 8) -> Build:
    """conv -> op -> conv"""

    def build(b: Builder) -> None:
        head(b, op(b, conv(b, image(b), channels)))

    return build


def residual(b: Builder) -> None:
    x = conv(b, image(b), 8)
    head(b, b.same("Add", b.same("Relu", conv(b, x, 8)), x))


def concatenated(b: Builder) -> None:
    x = image(b)
    head(b, b.op("Concat", [conv(b, x, 4), conv(b, x, 6)], (1, 10, 6, 6), axis=1))


def split_and_added(b: Builder) -> None:
    x = conv(b, image(b), 8)
    half = b.op("Split", [x, b.ints(4, 4)], (1, 4, 6, 6), outputs=2, axis=1)
    head(b, b.same("Mul", half, b.same("Sigmoid", f"{half}_1")))


def split_apart(b: Builder) -> None:
    x = conv(b, image(b), 8)
    part = b.op("Split", [x], (1, 4, 6, 6), outputs=2, axis=1, num_outputs=2)
    head(b, part)
    head(b, f"{part}_1")


def split_to_output(b: Builder) -> None:
    x = conv(b, image(b), 8)
    part = b.op("Split", [x, b.ints(3, 5)], (1, 3, 6, 6), outputs=2, axis=1)
    b.outputs.append(part)
    b.shapes[f"{part}_1"] = (1, 5, 6, 6)
    head(b, f"{part}_1")


def grouped(groups: int, channels: int) -> Build:
    return between(lambda b, x: conv(b, x, channels, groups=groups), channels)


def transposed_conv(groups: int) -> Build:
    def op(b: Builder, x: str) -> str:
        weight = b.weight(8, 8 // groups, 2, 2, fan_in=32)
        return b.op("ConvTranspose", [x, weight, b.vector(8)], (1, 8, 12, 12), strides=(2, 2), group=groups)

    return between(op)


def flattened(b: Builder) -> None:
    x = b.op("MaxPool", [conv(b, image(b), 8)], (1, 8, 3, 2), kernel_shape=(2, 3), strides=(2, 2))
    flat = b.op("Flatten", [x], (1, 48), axis=1)
    b.outputs.append(b.op("Gemm", [flat, b.weight(5, 48, fan_in=48)], (1, 5), transB=1))


def flattened_channels_last(b: Builder) -> None:
    last = b.op("Transpose", [conv(b, image(b), 8)], (1, 6, 6, 8), perm=(0, 2, 3, 1))
    flat = b.op("Reshape", [last, b.ints(0, -1)], (1, 288))
    b.outputs.append(b.op("Gemm", [flat, b.weight(288, 5, fan_in=288)], (1, 5)))


def unclear_reshape(b: Builder, x: str) -> str:
    return b.op("Reshape", [x, b.ints(1, 6, 8, 6)], (1, 6, 8, 6))


def channels_last(b: Builder, x: str) -> str:
    last = b.op("Transpose", [x], (1, 6, 6, 8), perm=(0, 2, 3, 1))
    return b.op("Transpose", [linear(b, last, 8)], (1, 8, 6, 6), perm=(0, 3, 1, 2))


def batch_norm(b: Builder, x: str) -> str:
    variance = b.param(np.linspace(0.5, 1.5, 8, dtype=np.float32))
    return b.same("BatchNormalization", x, b.vector(8, 1.0), b.vector(8), b.vector(8), variance)


def exported_group_norm(b: Builder, x: str) -> str:
    grouped = b.op("Reshape", [x, b.ints(0, 4, -1)], (1, 4, 72))
    normal = b.same("InstanceNormalization", grouped, b.vector(4, 1.0), b.vector(4))
    back = b.op("Reshape", [normal, b.ints(1, 8, 6, 6)], (1, 8, 6, 6))
    return b.same("Mul", back, b.param(np.linspace(0.5, 1.5, 8, dtype=np.float32).reshape(8, 1, 1)))


def padded_shortcut(b: Builder) -> None:
    narrow = conv(b, image(b), 4)
    wide = b.op("Pad", [narrow, b.ints(0, 2, 0, 0, 0, 2, 0, 0)], (1, 8, 6, 6))
    head(b, b.same("Add", conv(b, narrow, 8), wide))


def sliced(step: int) -> Build:
    def op(b: Builder, x: str) -> str:
        return b.op("Slice", [x, b.ints(-7), b.ints(100), b.ints(1), b.ints(step)], (1, -(-7 // step), 6, 6))

    return between(op)


def resized(b: Builder, x: str) -> str:
    return b.op("Resize", [x, "", "", b.ints(1, 8, 12, 12)], (1, 8, 12, 12), mode="nearest")


def gate(b: Builder, x: str) -> str:
    pooled = b.op("ReduceMean", [x, b.ints(2, 3)], (1, 8, 1, 1), keepdims=1)
    return b.same("Mul", x, b.same("HardSigmoid", conv(b, b.same("Relu", conv(b, pooled, 4, 1)), 8, 1)))


def permuted(b: Builder, x: str) -> str:
    return b.op("Gather", [x, b.ints(7, -2, 5, 0, 1, 2, 4, 3)], (1, 8, 6, 6), axis=1)


def shuffled(b: Builder, x: str) -> str:
    two = b.op("Reshape", [x, b.ints(1, 2, 4, 6, 6)], (1, 2, 4, 6, 6))
    turned = b.op("Transpose", [two], (1, 4, 2, 6, 6), perm=(0, 2, 1, 3, 4))
    return b.op("Reshape", [turned, b.ints(1, 8, 6, 6)], (1, 8, 6, 6))


def quantized(b: Builder) -> None:
    codes = b.param(b.rng.integers(-127, 127, (8, 3, 1, 1)).astype(np.int8))
    scale, zero = b.param(np.linspace(0.01, 0.02, 8, dtype=np.float32)), b.param(np.zeros(8, np.int8))
    x = b.op("Conv", [image(b), b.same("DequantizeLinear", codes, scale, zero, axis=0)], (1, 8, 6, 6))
    grid = [b.floats(0.05), b.param(np.array(3, np.uint8))]
    integer = b.op("QuantizeLinear", [x, *grid], (1, 8, 6, 6))
    head(b, b.same("DequantizeLinear", integer, *grid))


def per_channel_activations(b: Builder, x: str) -> str:
    grid = [b.param(np.linspace(0.04, 0.05, 8, dtype=np.float32)), b.param(np.arange(8, dtype=np.uint8))]
    return b.same("DequantizeLinear", b.same("QuantizeLinear", x, *grid, axis=1), *grid, axis=1)


def embedded(b: Builder) -> None:
    x = b.op("Gather", [b.weight(17, 8, fan_in=1), b.input((1, 5), "int64")], (1, 5, 8), axis=0)
    b.outputs.append(linear(b, b.same("Tanh", x), 3))


def weights_left(b: Builder) -> None:
    x = b.op("MatMul", [b.weight(8, 6, fan_in=6), b.input((6, 5))], (8, 5))
    b.outputs.append(b.op("Gemm", [b.same("Relu", x), b.weight(3, 8, fan_in=8)], (5, 3), transA=1, transB=1))


def einsum(b: Builder) -> None:
    x = b.op("Einsum", [b.input((1, 5, 6)), b.weight(6, 4, 3, fan_in=6)], (1, 4, 5, 3), equation="btd,dhk->bhtk")
    b.outputs.append(b.op("Einsum", [x, b.weight(4, 3, 7, fan_in=4)], (1, 5, 7), equation="bhtk,hko->bto"))


def shared(b: Builder) -> None:
    x = conv(b, image(b, 8), 8, 1)
    first = b.nodes[-1]
    head(b, b.op("Conv", [b.same("Relu", x), *first.inputs[1:]], (1, 8, 6, 6), **first.attrs))


def heads(b: Builder, x: str, count: int, size: int, turned: bool = False) -> str:
    _, tokens, _ = b.shapes[x]
    four = b.op("Reshape", [x, b.ints(0, tokens, count, size)], (1, tokens, count, size))
    perm, shape = ((0, 2, 3, 1), (1, count, size, tokens)) if turned else ((0, 2, 1, 3), (1, count, tokens, size))
    return b.op("Transpose", [four], shape, perm=perm)


def attend(b: Builder, query: str, key: str, value: str) -> str:
    _, count, tokens, size = b.shapes[query]
    scores = b.op("MatMul", [query, key], (1, count, tokens, tokens))
    mixed = b.op("MatMul", [b.same("Softmax", scores, axis=-1), value], (1, count, tokens, size))
    joined = b.op("Transpose", [mixed], (1, tokens, count, size), perm=(0, 2, 1, 3))
    return b.op("Reshape", [joined, b.ints(1, tokens, count * size)], (1, tokens, count * size))


def multi_head(b: Builder) -> None:
    x = b.input((1, 5, 6))
    query, key, value = (heads(b, linear(b, x, 12), 4, 3, turned) for turned in (False, True, False))
    b.outputs.append(linear(b, attend(b, query, key, value), 6))


def joint_heads(b: Builder) -> None:
    """One product for q, k and v, seen as [3, heads, width]: the heads are in the middle."""
    joint = b.op("Reshape", [linear(b, b.input((1, 5, 6)), 36), b.ints(1, 5, 3, 4, 3)], (1, 5, 3, 4, 3))
    turned = b.op("Transpose", [joint], (3, 1, 4, 5, 3), perm=(2, 0, 3, 1, 4))
    query, key, value = (b.op("Gather", [turned, b.param(np.array(i))], (1, 4, 5, 3), axis=0) for i in range(3))
    key = b.op("Transpose", [key], (1, 4, 3, 5), perm=(0, 1, 3, 2))
    b.outputs.append(linear(b, attend(b, query, key, value), 6))


def grouped_queries(b: Builder) -> None:
    """Four query heads on two key heads: a key head goes with its two query heads."""
    x = b.input((1, 5, 6))
    query = heads(b, linear(b, x, 12), 4, 3)
    key, value = (repeated(b, heads(b, linear(b, x, 6), 2, 3)) for _ in range(2))
    key = b.op("Transpose", [key], (1, 4, 3, 5), perm=(0, 1, 3, 2))
    b.outputs.append(linear(b, attend(b, query, key, value), 6))


def repeated(b: Builder, x: str) -> str:
    five = b.op("Unsqueeze", [x, b.ints(2)], (1, 2, 1, 5, 3))
    wide = b.op("Expand", [five, b.ints(1, 2, 2, 5, 3)], (1, 2, 2, 5, 3))
    return b.op("Reshape", [wide, b.ints(1, 4, 5, 3)], (1, 4, 5, 3))


def one_head(b: Builder) -> None:
    x = b.input((1, 5, 6))
    query, key, value = (linear(b, x, 8) for _ in range(3))
    key = b.op("Transpose", [key], (1, 8, 5), perm=(0, 2, 1))
    weights = b.same("Softmax", b.op("MatMul", [query, key], (1, 5, 5)), axis=-1)
    b.outputs.append(linear(b, b.op("MatMul", [weights, value], (1, 5, 8)), 6))


def layer_norm_of_all(b: Builder, x: str) -> str:
    return b.same("LayerNormalization", x, b.param(np.ones((8, 6, 6), np.float32)), axis=1)


def depth_to_space(mode: str) -> Build:
    return between(lambda b, x: b.op("DepthToSpace", [x], (1, 2, 12, 12), blocksize=2, mode=mode))


def pooled_and_expanded(b: Builder, x: str) -> str:
    pooled = b.op("GlobalAveragePool", [x], (1, 8, 1, 1))
    flat = b.op("Squeeze", [pooled, b.ints(2, 3)], (1, 8))
    back = b.op("Unsqueeze", [flat, b.ints(2, 3)], (1, 8, 1, 1))
    return b.op("Expand", [back, b.ints(8, 6, 6)], (1, 8, 6, 6))


def chosen(b: Builder, x: str) -> str:
    return b.op("Where", [b.op("Greater", [x, b.floats(0.0)], (1, 8, 6, 6)), x, b.floats(0.5)], (1, 8, 6, 6))


def joined_with_constants(b: Builder, x: str) -> str:
    return b.op("Concat", [b.weight(1, 4, 6, 6, fan_in=1), x], (1, 12, 6, 6), axis=1)


def padded_channels(b: Builder, x: str) -> str:
    return b.op("Pad", [x, b.ints(2, 3, 1, 0), b.floats(0.5), b.ints(-3, -1)], (1, 11, 6, 9))
