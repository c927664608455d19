"""Random small models with static shapes, for property tests: CNNs, transformers and mixtures of the two.

    graph = random_graph(seed)                  any kind; the same seed gives the same bytes
    graph = random_graph(seed, kind="cnn")      or "transformer", "mixed"
    graph = random_graph(seed, messy=True)      with what exporters leave behind: Identity, Dropout, twins, exploded LayerNorm ...
    feeds = random_feeds(graph, seed)           one run's inputs, standard normal (token numbers for integer inputs)
    samples = random_samples(graph, seed, 8)    calibration data
    @given(graphs(kind="cnn"))                  the same as a hypothesis strategy; it shrinks towards seed 0

Weights are scaled by fan-in and batch norms have variances around 1, so that values stay near 1 through the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from hypothesis import strategies

from hwopt.ir import Graph, Node, TensorType, frozen, infer_types
from hwopt.samples import Samples

OPSET = 21
VOCABULARY = 17
Shape = tuple[int, ...]


def random_graph(seed: int, *, kind: str = "", messy: bool = False, opset: int = OPSET) -> Graph:
    """A valid Graph with 5 to 80 nodes and one or two outputs; the batch is 1 or 2."""
    rng = np.random.default_rng([seed, 7])
    kind = kind or str(rng.choice(["cnn", "cnn", "transformer", "mixed"]))
    build = Builder(rng, messy=messy)
    {"cnn": _cnn, "transformer": _transformer, "mixed": _mixed}[kind](build)
    return build.graph(f"{kind}_{seed}", opset)


def graphs(kind: str = "", messy: bool = False) -> strategies.SearchStrategy[Graph]:
    """The hypothesis strategy over random_graph."""
    return strategies.builds(
        random_graph, strategies.integers(0, 10_000), kind=strategies.just(kind), messy=strategies.just(messy)
    )


def random_feeds(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs for one run."""
    rng = np.random.default_rng([seed, 11])
    return {name: _random_input(graph.tensor(name), graph.tensor(name).dims, rng) for name in graph.inputs}


def random_samples(graph: Graph, seed: int = 0, count: int = 8) -> Samples:
    """`count` samples by input name, as calibration takes them."""
    rng = np.random.default_rng([seed, 13])
    arrays = {name: _random_input(graph.tensor(name), (count, *graph.tensor(name).dims[1:]), rng) for name in graph.inputs}
    return Samples(MappingProxyType(arrays), None, "random")


def _random_input(kind: TensorType, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    if kind.dtype == "float32":
        return rng.standard_normal(shape).astype(np.float32)
    return rng.integers(0, VOCABULARY, shape).astype(kind.dtype)


@dataclass
class Builder:
    """Collects nodes and parameters and knows every value's shape. Usable by itself for hand-made test graphs."""

    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    messy: bool = False
    nodes: list[Node] = field(default_factory=list)
    params: dict[str, np.ndarray] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    inputs: dict[str, TensorType] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)

    def graph(self, name: str = "graph", opset: int = OPSET) -> Graph:
        params = MappingProxyType({key: frozen(value) for key, value in self.params.items()})
        outputs = tuple(dict.fromkeys(self.outputs))
        types = MappingProxyType(dict(self.inputs))
        return infer_types(
            Graph(name, tuple(self.inputs), outputs, tuple(self.nodes), types, params, MappingProxyType({"": opset}))
        )

    def input(self, shape: Shape, dtype: str = "float32", name: str = "") -> str:
        name = name or f"x{len(self.inputs)}"
        self.inputs[name], self.shapes[name] = TensorType(dtype, shape), shape
        return name

    def param(self, array: np.ndarray, name: str = "") -> str:
        name = name or f"p{len(self.params)}"
        self.params[name], self.shapes[name] = array, array.shape
        return name

    def floats(self, *values: float) -> str:
        """A one-dimensional parameter; a scalar for one value."""
        return self.param(np.array(values[0] if len(values) == 1 else values, np.float32))

    def ints(self, *values: int) -> str:
        return self.param(np.array(values, np.int64))

    def weight(self, *shape: int, fan_in: int) -> str:
        return self.param((self.rng.standard_normal(shape) * fan_in**-0.5).astype(np.float32))

    def vector(self, size: int, mean: float = 0.0) -> str:
        return self.param((mean + 0.2 * self.rng.standard_normal(size)).astype(np.float32))

    def op(self, op: str, inputs: Sequence[str], shape: Shape, outputs: int = 1, **attrs: Any) -> str:
        """Append a node whose outputs all have this shape; returns the first output (the others are called _1, _2 ...)."""
        name = f"{op.lower()}{len(self.nodes)}"
        values = tuple(f"{name}_out" + (f"_{i}" if i else "") for i in range(outputs))
        self.nodes.append(Node(op, tuple(inputs), values, name, MappingProxyType(attrs)))
        self.shapes.update(dict.fromkeys(values, shape))
        return values[0]

    def same(self, op: str, *inputs: str, **attrs: Any) -> str:
        """An elementwise operator: the result has the first input's shape."""
        return self.op(op, inputs, self.shapes[inputs[0]], **attrs)

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def pick(self, *options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]


# Feature maps [n, c, h, w]


def conv(build: Builder, x: str, channels: int, kernel: int = 3, *, groups: int = 1, stride: int = 1, dilation: int = 1) -> str:
    """Conv that keeps the size (up to the stride), with asymmetric pads now and then, and often without bias."""
    batch, depth, height, width = build.shapes[x]
    total = dilation * (kernel - 1)
    before = build.pick(total // 2, total // 2, total // 2, 0)
    pads = (before, before, total - before, total - before)
    taps = kernel * kernel * depth // groups
    inputs = [x, build.weight(channels, depth // groups, kernel, kernel, fan_in=taps)]
    if build.chance(0.5):
        inputs.append(build.vector(channels))
    shape = (batch, channels, (height - 1) // stride + 1, (width - 1) // stride + 1)
    attrs = {"kernel_shape": (kernel, kernel), "pads": pads, "strides": (stride, stride)}
    return build.op("Conv", inputs, shape, group=groups, dilations=(dilation, dilation), **attrs)


def _any_conv(build: Builder, x: str, channels: int = 0, stride: int = 0) -> str:
    """Dense, pointwise, grouped, dilated or strided, then often BatchNormalization and an activation."""
    depth = build.shapes[x][1]
    channels = channels or build.pick(4, 6, 8, 12)
    groups = 2 if depth % 2 == 0 and channels % 2 == 0 and build.chance(0.2) else 1
    stride = stride or (2 if min(build.shapes[x][2:]) >= 6 and build.chance(0.2) else 1)
    kernel = build.pick(1, 3, 3)
    dilation = 2 if kernel == 3 and stride == 1 and build.chance(0.15) else 1
    return activation(build, norm(build, conv(build, x, channels, kernel, groups=groups, stride=stride, dilation=dilation)))


def norm(build: Builder, x: str) -> str:
    if build.chance(0.4):
        return x
    channels = build.shapes[x][1]
    variance = build.param((0.5 + build.rng.random(channels)).astype(np.float32))
    inputs = [x, build.vector(channels, 1.0), build.vector(channels), build.vector(channels), variance]
    return build.op("BatchNormalization", inputs, build.shapes[x], epsilon=1e-5)


def activation(build: Builder, x: str) -> str:
    kind = build.pick("", "Relu", "Relu", "Clip", "Sigmoid", "HardSwish", "LeakyRelu", "SiLU")
    if kind == "Clip":
        return build.same("Clip", x, build.floats(0.0), build.floats(6.0))
    if kind == "SiLU":
        return build.same("Mul", x, build.same("Sigmoid", x))
    return build.same(kind, x) if kind else x


def _depthwise(build: Builder, x: str) -> str:
    channels = build.shapes[x][1]
    return _any_conv(build, activation(build, norm(build, conv(build, x, channels, 3, groups=channels))))


def _residual(build: Builder, x: str) -> str:
    channels = build.shapes[x][1]
    return activation(build, build.same("Add", x, _any_conv(build, _any_conv(build, x, stride=1), channels, stride=1)))


def _squeeze_excite(build: Builder, x: str) -> str:
    batch, channels = build.shapes[x][:2]
    pooled = build.op("GlobalAveragePool", [x], (batch, channels, 1, 1))
    hidden = build.same("Relu", conv(build, pooled, 4, 1))
    return build.same("Mul", x, build.same("Sigmoid", conv(build, hidden, channels, 1)))


def _concat(build: Builder, x: str) -> str:
    branches = [_any_conv(build, x, stride=1), x if build.chance(0.3) else _any_conv(build, x, stride=1)]
    shapes = [build.shapes[branch] for branch in branches]
    return build.op("Concat", branches, (shapes[0][0], shapes[0][1] + shapes[1][1], *shapes[0][2:]), axis=1)


def _split(build: Builder, x: str) -> str:
    batch, channels, height, width = build.shapes[x]
    if channels % 2:
        return x
    half = (batch, channels // 2, height, width)
    first = build.op("Split", [x, build.ints(channels // 2, channels // 2)], half, outputs=2, axis=1)
    return build.op("Concat", [_any_conv(build, first, channels // 2, stride=1), f"{first}_1"], build.shapes[x], axis=1)


def _slice(build: Builder, x: str) -> str:
    shape = list(build.shapes[x])
    axis = build.pick(1, 2, 3)
    if shape[axis] < 4:
        return x
    start = build.pick(0, 1)
    shape[axis] = shape[axis] - 1 - start
    inputs = [x, build.ints(start), build.ints(start + shape[axis]), build.ints(axis), build.ints(1)]
    return build.op("Slice", inputs, tuple(shape))


def _pad(build: Builder, x: str) -> str:
    batch, channels, height, width = build.shapes[x]
    value = build.floats(0.0)
    return build.op("Pad", [x, build.ints(0, 0, 1, 0, 0, 0, 1, 2), value], (batch, channels, height + 2, width + 2))


def _pool(build: Builder, x: str) -> str:
    batch, channels, height, width = build.shapes[x]
    if min(height, width) < 4:
        return x
    shape = (batch, channels, height // 2, width // 2)
    return build.op(build.pick("MaxPool", "AveragePool"), [x], shape, kernel_shape=(2, 2), strides=(2, 2))


def _shuffle(build: Builder, x: str) -> str:
    """ShuffleNet's channel shuffle with two groups."""
    batch, channels, height, width = build.shapes[x]
    if channels % 2:
        return x
    shape = (batch, 2, channels // 2, height, width)
    groups = build.op("Reshape", [x, build.ints(*shape)], shape)
    turned = build.op("Transpose", [groups], (batch, channels // 2, 2, height, width), perm=(0, 2, 1, 3, 4))
    return build.op("Reshape", [turned, build.ints(*build.shapes[x])], build.shapes[x])


def _channels_last_norm(build: Builder, x: str) -> str:
    batch, channels, height, width = build.shapes[x]
    last = build.op("Transpose", [x], (batch, height, width, channels), perm=(0, 2, 3, 1))
    return build.op("Transpose", [layer_norm(build, last)], build.shapes[x], perm=(0, 3, 1, 2))


def _shared(build: Builder, x: str) -> str:
    """One convolution's weights used twice in a row."""
    channels = build.shapes[x][1]
    first = conv(build, x, channels, 3)
    node = build.nodes[-1]
    return build.op("Conv", [build.same("Relu", first), *node.inputs[1:]], build.shapes[first], **node.attrs)


STEPS: tuple[Callable[[Builder, str], str], ...] = (
    _any_conv, _any_conv, _any_conv, _depthwise, _depthwise, _residual, _residual, _squeeze_excite, _concat, _split, _slice, _pad,
    _pool, _shuffle, _channels_last_norm, _shared,
)  # fmt: skip


def _trunk(build: Builder) -> str:
    size = (build.pick(1, 2), build.pick(1, 3, 4), build.pick(8, 10, 13), build.pick(8, 11, 12))
    x = _any_conv(build, build.input(size))
    for _ in range(int(build.rng.integers(1, 6))):
        x = _mess(build, build.pick(*STEPS)(build, x))
    return x


def _cnn(build: Builder) -> None:
    x = _trunk(build)
    if build.chance(0.2):
        build.outputs.append(x)
    batch, channels = build.shapes[x][:2]
    if build.chance(0.6):
        x = build.op("GlobalAveragePool", [x], (batch, channels, 1, 1))
    x = build.op("Flatten", [x], (batch, int(np.prod(build.shapes[x][1:]))), axis=1)
    _head(build, x)


def gemm(build: Builder, x: str, width: int) -> str:
    """Gemm on [n, k], weights transposed or not."""
    batch, depth = build.shapes[x]
    transposed = int(build.chance(0.5))
    weight = build.weight(*((width, depth) if transposed else (depth, width)), fan_in=depth)
    return build.op("Gemm", [x, weight, build.vector(width)], (batch, width), transB=transposed)


def _head(build: Builder, x: str) -> None:
    if build.chance(0.5):
        x = build.same("Relu", gemm(build, x, 12))
    logits = gemm(build, x, build.pick(5, 10))
    build.outputs.append(build.same("Softmax", logits, axis=-1) if build.chance(0.3) else logits)


# Token sequences [n, t, d]


def linear(build: Builder, x: str, width: int) -> str:
    """MatMul and Add on the last axis."""
    shape = (*build.shapes[x][:-1], width)
    product = build.op("MatMul", [x, build.weight(build.shapes[x][-1], width, fan_in=build.shapes[x][-1])], shape)
    return build.same("Add", product, build.vector(width)) if build.chance(0.8) else product


def layer_norm(build: Builder, x: str) -> str:
    """One node, or in messy graphs the nine that exporters wrote before opset 17."""
    width = build.shapes[x][-1]
    scale, bias = build.vector(width, 1.0), build.vector(width)
    if not (build.messy and build.chance(0.7)):
        return build.op("LayerNormalization", [x, scale, bias], build.shapes[x], axis=-1, epsilon=1e-5)
    narrow = (*build.shapes[x][:-1], 1)
    centred = build.same("Sub", x, build.op("ReduceMean", [x, build.ints(-1)], narrow, keepdims=1))
    square = build.same("Pow", centred, build.floats(2.0)) if build.chance(0.5) else build.same("Mul", centred, centred)
    variance = build.same("Add", build.op("ReduceMean", [square, build.ints(-1)], narrow, keepdims=1), build.floats(1e-5))
    normal = build.same("Div", centred, build.same("Sqrt", variance))
    return build.same("Add", build.same("Mul", normal, scale), bias)


def gelu(build: Builder, x: str) -> str:
    if not (build.messy and build.chance(0.7)):
        return build.same("Gelu", x)
    erf = build.same("Erf", build.same("Div", x, build.floats(2**0.5)))
    return build.same("Mul", build.same("Mul", x, build.same("Add", erf, build.floats(1.0))), build.floats(0.5))


def attention(build: Builder, x: str, heads: int = 2) -> str:
    """Multi-head self-attention without masks, q k v in one product or in three."""
    batch, tokens, width = build.shapes[x]
    if build.chance(0.5):
        joint = linear(build, x, 3 * width)
        query = build.op("Split", [joint, build.ints(width, width, width)], (batch, tokens, width), outputs=3, axis=-1)
        parts = [query, f"{query}_1", f"{query}_2"]
    else:
        parts = [linear(build, x, width) for _ in range(3)]
    four, size = (batch, tokens, heads, width // heads), width // heads
    split = [build.op("Reshape", [part, build.ints(*four)], four) for part in parts]
    turned = (batch, heads, tokens, size)
    query, value = (build.op("Transpose", [split[i]], turned, perm=(0, 2, 1, 3)) for i in (0, 2))
    key = build.op("Transpose", [split[1]], (batch, heads, size, tokens), perm=(0, 2, 3, 1))
    scores = build.op("MatMul", [query, key], (batch, heads, tokens, tokens))
    if build.chance(0.5):
        scores = build.same("Mul", scores, build.floats(size**-0.5))
    else:
        scores = build.same("Div", scores, build.floats(size**0.5))
    mixed = build.op("MatMul", [build.same("Softmax", scores, axis=-1), value], turned)
    joined = build.op("Transpose", [mixed], four, perm=(0, 2, 1, 3))
    flat = build.op("Reshape", [joined, build.ints(batch, tokens, width)], (batch, tokens, width))
    return linear(build, flat, width)


def _block(build: Builder, x: str) -> str:
    """Pre-norm transformer block."""
    width = build.shapes[x][-1]
    x = build.same("Add", x, attention(build, layer_norm(build, x)))
    hidden = linear(build, layer_norm(build, x), 2 * width)
    hidden = gelu(build, hidden) if build.chance(0.6) else activation(build, hidden)
    return build.same("Add", x, linear(build, hidden, width))


def _pooled_head(build: Builder, x: str) -> None:
    batch, _, width = build.shapes[x]
    x = build.op("ReduceMean", [x, build.ints(1)], (batch, width), keepdims=0)
    _head(build, x)


def _transformer(build: Builder) -> None:
    batch, tokens, width = build.pick(1, 2), build.pick(4, 5, 8), build.pick(8, 12)
    if build.chance(0.4):
        x = build.input((batch, tokens), "int64")
        x = build.op("Gather", [build.weight(VOCABULARY, width, fan_in=1), x], (batch, tokens, width), axis=0)
    else:
        x = linear(build, build.input((batch, tokens, 6)), width)
    for _ in range(build.pick(1, 2)):
        x = _mess(build, _block(build, x))
    if build.chance(0.2):
        build.outputs.append(x)
    _pooled_head(build, layer_norm(build, x))


def _mixed(build: Builder) -> None:
    """A CNN whose pixels become tokens."""
    x = conv(build, _trunk(build), 8, 1)
    batch, width, height, columns = build.shapes[x]
    x = build.op("Reshape", [x, build.ints(batch, width, -1)], (batch, width, height * columns))
    x = build.op("Transpose", [x], (batch, height * columns, width), perm=(0, 2, 1))
    _pooled_head(build, _block(build, x))


# What exporters leave behind


def _mess(build: Builder, x: str) -> str:
    if not build.messy:
        return x
    kind = build.pick("", "Identity", "Dropout", "twins", "Reshape", "casts", "constants", "zero", "affine")
    if kind in ("Identity", "Dropout"):
        return build.same(kind, x)
    if kind == "twins":  # the same sum twice, from two copies of one parameter
        copies = [build.same("Add", x, build.floats(0.25)) for _ in range(2)]
        return build.same("Mul", build.same("Tanh", copies[0]), build.same("Tanh", copies[1]))
    if kind == "Reshape":
        return build.same("Reshape", x, build.ints(*build.shapes[x]))
    if kind == "casts":
        return build.same("Cast", build.same("Cast", x, to=11), to=1)  # float64 and back
    if kind == "constants":
        return build.same("Add", x, build.same("Sqrt", build.floats(0.04)))
    if kind == "zero":
        return build.same("Add", build.same("Mul", x, build.floats(1.0)), build.floats(0.0))
    if kind == "affine" and len(build.shapes[x]) == 4:
        scale = build.param((0.8 + 0.4 * build.rng.random((build.shapes[x][1], 1, 1))).astype(np.float32))
        return build.same("Mul", x, scale)
    return x
