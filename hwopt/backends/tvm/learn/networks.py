"""Random networks to learn from: blocks of real families at sizes, widths and strides that pruning and other inputs make."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hwopt.backends.tvm.learn import glue

OPSET = 21
SIDES = (7, 8, 10, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 112)
MACS = 200_000_000  # of one network, about: it must be quick to measure
LAYER_MACS = 120_000_000  # and its layers quicker than the slices of time that a busy machine gives
MOBILE = (
    (112, (16, 24, 32)),
    (56, (24, 32, 40, 48)),
    (28, (32, 40, 64, 80)),
    (14, (64, 80, 96, 112, 128)),
    (7, (128, 160, 192, 320)),
)
GLUE = ("images", "sequences", "pools")
FAMILIES = (
    "residual", "bottleneck", "inverted", "plain", "transformer", "rows", "gated", "early", "fire", "mobile", "square",
    *GLUE, "images", "sequences", "single", "mobile", "transformer", "gated",
)  # fmt: skip


def random_network(seed: int, family: str = "") -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """The network of that seed (of any family if none is named) and samples of its input, four batches."""
    net = Net(seed, family or FAMILIES[seed % len(FAMILIES)])
    return net.build(), {"x": net.random.standard_normal((4 * net.shape[0], *net.shape[1:])).astype(np.float32)}


class Net:
    """A graph that grows; `x` is its last value, of `shape`."""

    def __init__(self, seed: int, family: str) -> None:
        self.random, self.family = np.random.default_rng(seed), family
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.macs = 0
        self.shape = self._start()

    def _start(self) -> tuple[int, ...]:
        if self.family == "transformer":
            hidden = int(self.random.choice((64, 96, 120, 128, 192, 240, 256, 312, 384, 512, 768)))
            return (1, int(self.random.choice((16, 32, 40, 49, 64, 80, 96, 128, 196, 256))), hidden)
        if self.family == "sequences":
            return (1, int(self.random.choice((16, 40, 64, 100, 128, 196, 256, 512))), 16)
        if self.family in ("images", "pools"):
            side = int(self.random.choice(SIDES))
            return (1, 8, side, side if self.random.random() < 0.7 else int(self.random.choice(SIDES)))
        if self.family == "rows":
            return (int(self.random.choice((1, 1, 1, 2, 4, 8, 16, 32))), self.width(16, 2048))
        if self.family == "single":  # one row: layers wait for their weights, from whichever cache they lie in
            return (1, self.width(128, 2048))
        if self.family == "early":  # first layers: few channels, large images
            side = int(self.random.choice((28, 32, 64, 96, 128, 160, 192, 224)))
            wide = int(self.random.choice((max(16, side // 4), 2 * side, 320)))
            return (
                1,
                int(self.random.choice((1, 3, 3, 3))),
                min(side, 96) if wide > side else side,
                wide if wide != side and self.random.random() < 0.25 else side,
            )
        if self.family == "mobile":  # where most depthwise layers are
            side, widths = MOBILE[int(self.random.integers(len(MOBILE)))]
            return (1, int(self.random.choice(widths)), side, side)
        side = int(self.random.choice(SIDES))
        other = side if self.random.random() < 0.8 else int(self.random.choice(SIDES))
        return (1, self.width(8, max(16, min(1024, 60_000 // side))), side, other)

    def width(self, low: int, high: int) -> int:
        """Log-uniform; mostly a multiple of 16 or 8, as designers and pruning choose."""
        found = float(np.exp(self.random.uniform(np.log(low), np.log(high))))
        granule = int(self.random.choice((1, 2, 4, 8, 8, 16, 16, 16, 32)))
        return max(low if low < granule else granule, round(found / granule) * granule)

    def build(self) -> onnx.ModelProto:
        first = helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)
        value, shape = "x", self.shape
        for _ in range(1 if self.family in GLUE else 5):
            value, shape = getattr(self, f"_{self.family}")(value, shape)
            if self.macs > MACS:
                break
        if len(shape) == 4 and self.random.random() < 0.6:
            value, shape = self._head(value, shape)
        last = helper.make_tensor_value_info(value, TensorProto.FLOAT, shape)
        graph = helper.make_graph(self.nodes, "sample", [first], [last], self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def constant(self, values: np.ndarray | np.generic) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(values), f"w{len(self.weights)}"))
        return str(self.weights[-1].name)

    def normal(self, *shape: int, scale: float = 0.1) -> str:
        return self.constant((self.random.standard_normal(shape) * scale).astype(np.float32))

    def conv(
        self, x: str, shape: tuple[int, ...], out: int, kernel: int | tuple[int, int], stride: int | tuple[int, int] = 1,
        deep: bool = False,
    ) -> tuple[str, tuple]:  # fmt: skip
        inputs = 1 if deep else shape[1]
        kernels, strides = ((one, one) if isinstance(one, int) else one for one in (kernel, stride))
        taps = kernels[0] * kernels[1]
        if not deep and out != shape[1]:
            out = max(8, min(out, LAYER_MACS * strides[0] * strides[1] // (inputs * taps * shape[2] * shape[3])))
        weight = self.normal(out, inputs, *kernels, scale=(2 / (inputs * taps)) ** 0.5)
        low = high = [size // 2 for size in kernels]
        if max(strides) > 1 and max(kernels) > 1 and self.random.random() < 0.2:  # as TensorFlow pads to the same size
            low = [max(0, size - step) // 2 for size, step in zip(kernels, strides, strict=True)]
            high = [max(0, size - step) - one for size, step, one in zip(kernels, strides, low, strict=True)]
        value = self.add(
            "Conv", x, weight, self.normal(out), kernel_shape=list(kernels), strides=list(strides), pads=[*low, *high],
            group=shape[1] if deep else 1,
        )  # fmt: skip
        sides = tuple((shape[2 + i] + low[i] + high[i] - kernels[i]) // strides[i] + 1 for i in (0, 1))
        self.macs += out * inputs * taps * sides[0] * sides[1]
        return value, (shape[0], out, *sides)

    def activation(self, x: str, kind: str = "") -> str:
        kind = kind or str(self.random.choice(("Relu", "Relu", "Relu", "Clip", "HardSwish", "silu", "Sigmoid", "none")))
        if kind == "none":
            return x
        if kind == "Clip":
            return self.add("Clip", x, self.constant(np.float32(0)), self.constant(np.float32(6)))
        if kind == "silu":
            return self.add("Mul", x, self.add("Sigmoid", x))
        value = self.add(kind, x)
        if kind == "HardSwish" and self.random.random() < 0.3:  # with a learned scale and shift, as in PP-LCNetV3
            value = self.add("Mul", value, self.constant(np.float32(1.2)))
            return self.add("Add", value, self.constant(np.float32(0.1)))
        return value

    def _stride(self, shape: tuple[int, ...]) -> int:
        return 2 if min(shape[2:]) >= 14 and self.random.random() < 0.35 else 1

    def _uneven(self, stride: int) -> int | tuple[int, int]:
        """Now and then a stride along one axis alone, as networks that read lines of text have."""
        choices: tuple[Any, ...] = ((2, 1), (1, 2), stride, stride, stride, stride, stride, stride)
        return choices[int(self.random.integers(len(choices)))] if stride > 1 else stride

    def _residual(self, x: str, shape: tuple[int, ...]) -> tuple[str, tuple]:
        stride, out = self._stride(shape), self._bounded(self.width(16, 512), shape)
        short, there = self.conv(x, shape, out, 1, stride)
        inner, between = self.conv(x, shape, out, 3, stride)
        inner, _ = self.conv(self.activation(inner, "Relu"), between, out, 3)
        return self.activation(self.add("Add", inner, short), "Relu"), there

    def _bounded(self, width: int, shape: tuple[int, ...]) -> int:
        """A width whose 3 x 3 convolutions are not too large."""
        most = LAYER_MACS / (9 * shape[2] * shape[3])
        return max(8, int(min(width, most**0.5, most / shape[1])) // 8 * 8)

    def _bottleneck(self, x: str, shape: tuple[int, ...]) -> tuple[str, tuple]:
        width, stride = self._bounded(self.width(16, 512), shape), self._stride(shape)
        inner, one = self.conv(x, shape, width, 1)
        inner, two = self.conv(self.activation(inner, "Relu"), one, width, 3, stride)
        inner, three = self.conv(self.activation(inner, "Relu"), two, shape[1] if stride == 1 else min(4 * width, 2048), 1)
        return self.activation(self.add("Add", inner, x) if three == shape else inner, "Relu"), three

    def _inverted(self, x: str, shape: tuple[int, ...]) -> tuple[str, tuple]:
        function = str(self.random.choice(("Clip", "Clip", "Relu", "HardSwish", "silu")))
        kernel, stride = int(self.random.choice((3, 3, 3, 5, 5, 7))), self._stride(shape)
        wide = self.width(16, min(1280, 6 * shape[1] + 16))
        wide = max(16, min(wide, LAYER_MACS // (shape[1] * shape[2] * shape[3])))
        inner, one = self.conv(x, shape, wide, 1)
        inner, two = self.conv(self.activation(inner, function), one, wide, kernel, self._uneven(stride), deep=True)
        out = shape[1] if stride == 1 and self.random.random() < 0.5 else self.width(8, 384)
        inner, three = self.conv(self.activation(inner, function), two, out, 1)
        return (self.add("Add", inner, x) if three == shape else inner), three

    def _mobile(self, x: str, shape: tuple[int, ...]) -> tuple[str, tuple]:
        """Inverted bottlenecks as designers choose them: widened four or six times, one activation."""
        kernel, stride = int(self.random.choice((3, 3, 5))), self._stride(shape)
        wide = shape[1] * int(self.random.choice((3, 4, 6, 6)))
        inner, one = self.conv(x, shape, wide, 1)
        inner, two = self.conv(self.activation(inner, "Clip"), one, one[1], kernel, stride, deep=True)
        out = (
            shape[1] if stride == 1 and self.random.random() < 0.6 else round(shape[1] * float(self.random.uniform(1, 2)) / 8) * 8
        )
        inner, three = self.conv(self.activation(inner, "Clip"), two, max(8, out), 1)
        return (self.add("Add", inner, x) if three == shape else inner), three

    def _plain(self, x: str, shape: tuple[int, ...]) -> tuple[str, tuple]:
        kernels: tuple[Any, ...] = (1, 1, 3, 3, 3, 5, 7, (1, 3), (1, 5), (3, 1))
        kernel = kernels[int(self.random.integers(len(kernels)))]
        x, shape = self.conv(x, shape, self.width(8, 512), kernel, self._uneven(self._stride(shape)))
        x = self.activation(x)
        if min(shape[2:]) >= 8 and self.random.random() < 0.3:
            pool, size = str(self.random.choice(("MaxPool", "AveragePool"))), int(self.random.choice((2, 3)))
            pad = size // 2 if size == 3 else 0
            x = self.add(pool, x, kernel_shape=[size] * 2, strides=[2, 2], pads=[pad] * 4)
            shape = (*shape[:2], *((side + 2 * pad - size) // 2 + 1 for side in shape[2:]))
        return x, shape

    def _square(self, x: str, shape: tuple[int, ...]) -> tuple[str, tuple]:
        """Square filters one behind the other, as detectors and super-resolution have them."""
        inner, there = self.conv(x, shape, self._bounded(self.width(16, 384), shape), 3)
        inner = self.activation(inner, str(self.random.choice(("Relu", "Relu", "silu", "LeakyRelu", "none"))))
        return (self.add("Add", inner, x) if there == shape and self.random.random() < 0.5 else inner), there

    def _fire(self, x: str, shape: tuple[int, ...]) -> tuple[str, tuple]:
        """Squeeze, then two kinds of filters beside each other (Iandola et al., 2016); factored layers are such pairs, too."""
        x, shape = self.conv(x, shape, self.width(8, 128), 1)
        x = self.activation(x, "Relu") if self.random.random() < 0.7 else x
        one, there = self.conv(x, shape, self.width(16, 256), 1)
        if self.random.random() < 0.5:
            return self.activation(one, "Relu"), there
        other, beside = self.conv(x, shape, there[1], 3)
        joined = self.add("Concat", self.activation(one, "Relu"), self.activation(other, "Relu"), axis=1)
        return joined, (there[0], there[1] + beside[1], *there[2:])

    def _images(self, x: str, shape: tuple[int, ...]) -> tuple[str, tuple]:
        return glue.images(self, x, shape)

    def _pools(self, x: str, shape: tuple[int, ...]) -> tuple[str, tuple]:
        return glue.pools(self, x, shape)

    def _sequences(self, x: str, shape: tuple[int, ...]) -> tuple[str, tuple]:
        return glue.sequences(self, x, shape)

    def _early(self, x: str, shape: tuple[int, ...]) -> tuple[str, tuple]:
        if shape[1] > 3:
            return getattr(self, str(self.random.choice(("_inverted", "_plain", "_residual"))))(x, shape)
        x, shape = self.conv(x, shape, self.width(8, 64), int(self.random.choice((3, 3, 5, 7))), 2)
        return self.activation(x), shape

    def _gated(self, x: str, shape: tuple[int, ...]) -> tuple[str, tuple]:
        """Squeeze and excitation behind a depthwise convolution (Hu et al., 2018)."""
        x, shape = self.conv(x, shape, shape[1], int(self.random.choice((3, 5))), self._stride(shape), deep=True)
        x = self.activation(x, str(self.random.choice(("silu", "HardSwish", "Relu"))))
        gate, small = self.conv(self.add("GlobalAveragePool", x), (*shape[:2], 1, 1), self.width(8, 64), 1)
        gate, _ = self.conv(self.activation(gate, "Relu"), small, shape[1], 1)
        x = self.add("Mul", x, self.add(str(self.random.choice(("Sigmoid", "HardSigmoid"))), gate))
        x, shape = self.conv(x, shape, self.width(16, 256), 1)
        return self.activation(x), shape

    def _head(self, x: str, shape: tuple[int, ...]) -> tuple[str, tuple]:
        flat = self.add("Flatten", self.add("GlobalAveragePool", x), axis=1)
        out = self.width(10, 1000)
        return self.add("Gemm", flat, self.normal(out, shape[1]), self.normal(out), transB=1), (shape[0], out)

    def linear(self, x: str, inputs: int, out: int, rows: int) -> str:
        self.macs += rows * inputs * out
        return self.add("Add", self.add("MatMul", x, self.normal(inputs, out, scale=inputs**-0.5)), self.normal(out))

    def _rows(self, x: str, shape: tuple[int, ...]) -> tuple[str, tuple]:
        out = self.width(10, 8192 if self.random.random() < 0.2 else 2048)
        return self.activation(self.linear(x, shape[1], out, shape[0]), "Relu"), (shape[0], out)

    def _single(self, x: str, shape: tuple[int, ...]) -> tuple[str, tuple]:
        out = self.width(16, 4096 if self.random.random() < 0.2 else 2048)
        self.macs += shape[1] * out
        weight = self.normal(out, shape[1], scale=shape[1] ** -0.5)
        kind = "Relu" if self.random.random() < 0.7 else ""
        return self.activation(self.add("Gemm", x, weight, self.normal(out), transB=1), kind), (1, out)

    def _transformer(self, x: str, shape: tuple[int, ...]) -> tuple[str, tuple]:
        _, rows, hidden = shape
        heads = next((count for count in (12, 8, 6, 4, 3, 2) if hidden % count == 0 and hidden // count >= 16), 1)
        depth, inner = hidden // heads, self.width(hidden, 4 * hidden)
        parts = [
            self._split(self.linear(x, hidden, hidden, rows), rows, heads, depth, order) for order in ((0, 2, 1, 3), (0, 2, 3, 1))
        ]
        value = self._split(self.linear(x, hidden, hidden, rows), rows, heads, depth, (0, 2, 1, 3))
        scores = self.add("Div", self.add("MatMul", *parts), self.constant(np.float32(depth**0.5)))
        if self.random.random() < 0.4:
            scores = self.add("Add", scores, self._mask(x, rows))
        mixed = self.add("Transpose", self.add("MatMul", self.add("Softmax", scores, axis=-1), value), perm=[0, 2, 1, 3])
        joined = self.add("Reshape", mixed, self.constant(np.array((1, rows, hidden), np.int64)))
        x = self._norm(self.add("Add", self.linear(joined, hidden, hidden, rows), x), hidden)
        wide = self.add("Gelu", self.linear(x, hidden, inner, rows))
        return self._norm(self.add("Add", self.linear(wide, inner, hidden, rows), x), hidden), shape

    def _mask(self, x: str, rows: int) -> str:
        """Scores to add that are computed from the data, large and negative for the last quarter of the rows."""
        largest = self.add("ReduceMax", x, self.constant(np.array([2])), keepdims=0)
        unused = np.where(np.arange(rows) >= rows - rows // 4, -1e4, 0).astype(np.float32)
        return self.add("Mul", self.add("Reshape", largest, self.constant(np.array((1, 1, 1, rows)))), self.constant(unused))

    def _split(self, x: str, rows: int, heads: int, depth: int, order: tuple[int, ...]) -> str:
        shaped = self.add("Reshape", x, self.constant(np.array((1, rows, heads, depth), np.int64)))
        return self.add("Transpose", shaped, perm=list(order))

    def _norm(self, x: str, hidden: int) -> str:
        return self.add("LayerNormalization", x, self.normal(hidden, scale=1.0), self.normal(hidden), axis=-1)
