"""Random networks to learn from: blocks of real families at sizes, widths and strides that pruning and other inputs make."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 21
SIDES = (7, 8, 10, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 112)
MACS = 200_000_000  # of one network, about: it must be quick to measure
LAYER_MACS = 120_000_000  # and its layers quicker than the slices of time that a busy machine gives
FAMILIES = ("residual", "bottleneck", "inverted", "plain", "transformer", "rows", "gated", "early")


def random_network(seed: int, family: str = "") -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """The network of that seed (of any family if none is named) and samples of its input, four batches."""
    net = _Net(seed, family or FAMILIES[seed % len(FAMILIES)])
    return net.build(), {"x": net.random.standard_normal((4 * net.shape[0], *net.shape[1:])).astype(np.float32)}


class _Net:
    """A graph that grows; `x` is its last value, of `shape`."""

    def __init__(self, seed: int, family: str) -> None:
        self.random, self.family = np.random.default_rng(seed), family
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.macs = 0
        self.shape = self._start()

    def _start(self) -> tuple[int, ...]:
        if self.family == "transformer":
            hidden = int(self.random.choice((64, 96, 128, 192, 256, 312, 384, 512, 768)))
            return (1, int(self.random.choice((16, 32, 49, 64, 96, 128, 196, 256))), hidden)
        if self.family == "rows":
            return (int(self.random.choice((1, 1, 1, 2, 4, 8, 16, 32))), self.width(16, 2048))
        if self.family == "early":  # first layers: few channels, large images
            side = int(self.random.choice((28, 32, 64, 96, 128, 160, 192, 224)))
            return (1, int(self.random.choice((1, 3, 3, 3))), side, side if self.random.random() < 0.8 else max(16, side // 4))
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
        for _ in range(5):
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
        self, x: str, shape: tuple[int, ...], out: int, kernel: int, stride: int = 1, deep: bool = False
    ) -> tuple[str, tuple]:
        inputs = 1 if deep else shape[1]
        if not deep and out != shape[1]:
            out = max(8, min(out, LAYER_MACS * stride * stride // (inputs * kernel * kernel * shape[2] * shape[3])))
        weight = self.normal(out, inputs, kernel, kernel, scale=(2 / (inputs * kernel * kernel)) ** 0.5)
        pad = kernel // 2
        value = self.add(
            "Conv", x, weight, self.normal(out), kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4,
            group=shape[1] if deep else 1,
        )  # fmt: skip
        sides = tuple((side + 2 * pad - kernel) // stride + 1 for side in shape[2:])
        self.macs += out * inputs * kernel * kernel * sides[0] * sides[1]
        return value, (shape[0], out, *sides)

    def activation(self, x: str, kind: str = "") -> str:
        kind = kind or str(self.random.choice(("Relu", "Relu", "Relu", "Clip", "HardSwish", "silu", "Sigmoid", "none")))
        if kind == "none":
            return x
        if kind == "Clip":
            return self.add("Clip", x, self.constant(np.float32(0)), self.constant(np.float32(6)))
        if kind == "silu":
            return self.add("Mul", x, self.add("Sigmoid", x))
        return self.add(kind, x)

    def _stride(self, shape: tuple[int, ...]) -> int:
        return 2 if min(shape[2:]) >= 14 and self.random.random() < 0.35 else 1

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
        inner, two = self.conv(self.activation(inner, function), one, wide, kernel, stride, deep=True)
        out = shape[1] if stride == 1 and self.random.random() < 0.5 else self.width(8, 384)
        inner, three = self.conv(self.activation(inner, function), two, out, 1)
        return (self.add("Add", inner, x) if three == shape else inner), three

    def _plain(self, x: str, shape: tuple[int, ...]) -> tuple[str, tuple]:
        kernel = int(self.random.choice((1, 1, 3, 3, 3, 5, 7)))
        x, shape = self.conv(x, shape, self.width(8, 512), kernel, self._stride(shape))
        x = self.activation(x)
        if min(shape[2:]) >= 8 and self.random.random() < 0.3:
            pool, size = str(self.random.choice(("MaxPool", "AveragePool"))), int(self.random.choice((2, 3)))
            pad = size // 2 if size == 3 else 0
            x = self.add(pool, x, kernel_shape=[size] * 2, strides=[2, 2], pads=[pad] * 4)
            shape = (*shape[:2], *((side + 2 * pad - size) // 2 + 1 for side in shape[2:]))
        return x, shape

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
        out = self.width(10, 2048)
        return self.activation(self.linear(x, shape[1], out, shape[0]), "Relu"), (shape[0], out)

    def _transformer(self, x: str, shape: tuple[int, ...]) -> tuple[str, tuple]:
        _, rows, hidden = shape
        heads = next((count for count in (12, 8, 6, 4, 3, 2) if hidden % count == 0 and hidden // count >= 16), 1)
        depth, inner = hidden // heads, self.width(hidden, 4 * hidden)
        parts = [
            self._split(self.linear(x, hidden, hidden, rows), rows, heads, depth, order) for order in ((0, 2, 1, 3), (0, 2, 3, 1))
        ]
        value = self._split(self.linear(x, hidden, hidden, rows), rows, heads, depth, (0, 2, 1, 3))
        scores = self.add("Div", self.add("MatMul", *parts), self.constant(np.float32(depth**0.5)))
        mixed = self.add("Transpose", self.add("MatMul", self.add("Softmax", scores, axis=-1), value), perm=[0, 2, 1, 3])
        joined = self.add("Reshape", mixed, self.constant(np.array((1, rows, hidden), np.int64)))
        x = self._norm(self.add("Add", self.linear(joined, hidden, hidden, rows), x), hidden)
        wide = self.add("Gelu", self.linear(x, hidden, inner, rows))
        return self._norm(self.add("Add", self.linear(wide, inner, hidden, rows), x), hidden), shape

    def _split(self, x: str, rows: int, heads: int, depth: int, order: tuple[int, ...]) -> str:
        shaped = self.add("Reshape", x, self.constant(np.array((1, rows, heads, depth), np.int64)))
        return self.add("Transpose", shaped, perm=list(order))

    def _norm(self, x: str, hidden: int) -> str:
        return self.add("LayerNormalization", x, self.normal(hidden, scale=1.0), self.normal(hidden), axis=-1)
