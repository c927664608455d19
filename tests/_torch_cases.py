"""For every rule of the torch backend one or more small float64 calls: what gradcheck checks, in smooth places."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """One node; `inputs` are arrays (floats are checked), `writes` its outputs' element types."""

    op: str
    inputs: tuple[np.ndarray | None, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    writes: tuple[str, ...] = ("float64",)


def _random(op: str, *shape: int) -> np.ndarray:
    """Distinct numbers in -1 .. 1, none near a multiple of 1/4: no kink within reach of a difference quotient."""
    count = int(np.prod(shape))
    grid = (np.arange(count) - count / 2 + 0.37) / max(count, 4) * 2
    grid = np.where(np.abs(grid * 4 - np.round(grid * 4)) < 0.08, grid + 0.03, grid)
    return np.random.default_rng(zlib.crc32(op.encode())).permutation(grid).reshape(shape)


def _ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def _of(op: str, *inputs: Any, writes: tuple[str, ...] = ("float64",), **attrs: Any) -> Case:
    """A tuple as input stands for random floats of that shape."""
    arrays = tuple(_random(f"{op}{i}", *one) if isinstance(one, tuple) else one for i, one in enumerate(inputs))
    return Case(op, arrays, attrs, writes)


def _positive(op: str, *shape: int) -> np.ndarray:
    return np.abs(_random(op, *shape)) + 0.3


X = (2, 3)
IMAGE = (1, 2, 4, 5)
BOOL, INT = ("bool",), ("int64",)

UNARY = [
    "Abs", "Acos", "Asin", "Asinh", "Atan", "Ceil", "Celu", "Cos", "Cosh", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "Identity", "LeakyRelu", "Mish", "Neg", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh",
    "Softplus", "Softsign", "Swish", "Tan", "Tanh", "Dropout", "Softmax", "LogSoftmax", "Hardmax", "Atanh",
]  # fmt: skip

CASES: list[Case] = [
    *(_of(op, X) for op in UNARY),
    *(Case(op, (_positive(op, 2, 3),)) for op in ("Log", "Sqrt", "Reciprocal")),
    Case("Acosh", (_positive("Acosh", 2, 3) + 1,)),
    _of("Gelu", X, approximate="tanh"), _of("Celu", X, alpha=0.7), _of("Swish", X, alpha=1.5),
    _of("ThresholdedRelu", X, alpha=0.2), _of("PRelu", (2, 3, 2), (3, 1)), _of("Shrink", X, lambd=0.2, bias=0.1),
    _of("Clip", X, np.array(-0.4), np.array(0.4)), _of("Clip", X, None, np.array(0.1)),
    _of("IsNaN", X, writes=BOOL), _of("IsInf", X, writes=BOOL), _of("Not", np.array([True, False]), writes=BOOL),
    # arithmetic, with broadcasting
    *(_of(op, X, (3,)) for op in ("Add", "Sub", "Mul", "Max", "Min")),
    *(_of(op, X, (3,), (2, 1)) for op in ("Sum", "Mean", "Max")),
    Case("Div", (_random("Div", 2, 3), _positive("Div", 3))),
    Case("Pow", (_positive("Pow", 2, 3), _random("Pow", 3))),
    Case("Mod", (_random("Mod", 2, 3), _positive("Mod", 3) * 7.3), {"fmod": 1}),
    *(_of(op, X, (3,), writes=BOOL) for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")),
    *(_of(op, np.array([True, False]), np.array([True, True]), writes=BOOL) for op in ("And", "Or", "Xor")),
    *(_of(op, _ints(5, 3), _ints(6, 1), writes=INT) for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")),
    _of("BitwiseNot", _ints(5), writes=INT), _of("BitShift", _ints(5), _ints(1), direction="LEFT", writes=INT),
    _of("Where", np.array([[True], [False]]), X, (3,)),
    _of("Cast", X, to=11), _of("CastLike", X, (1,)),
    # reductions
    *(_of(op, (2, 3, 2), _ints(0, 2)) for op in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2",
                                                  "ReduceSumSquare", "ReduceLogSumExp")),
    _of("ReduceSum", (2, 3)), _of("ReduceMean", (2, 3), _ints(-1), keepdims=0),
    Case("ReduceLogSum", (_positive("ReduceLogSum", 2, 3), _ints(1))),
    Case("ReduceProd", (_positive("ReduceProd", 2, 3), _ints(1))),
    *(_of(op, X, axis=1, writes=INT) for op in ("ArgMax", "ArgMin")),
    _of("CumSum", X, np.array(1)), _of("CumSum", X, np.array(1), exclusive=1, reverse=1), _of("Softmax", (2, 3, 2), axis=1),
    # normalizations
    _of("LayerNormalization", (2, 3, 4), (4,), (4,)), _of("LayerNormalization", (2, 3, 4), (3, 4), axis=1),
    _of("RMSNormalization", (2, 3, 4), (4,)), _of("GroupNormalization", (2, 4, 3), (4,), (4,), num_groups=2),
    _of("InstanceNormalization", (2, 3, 4), (3,), (3,)),
    Case("BatchNormalization", (_random("b", 2, 3, 2), *(_random(f"b{i}", 3) for i in range(3)), _positive("b", 3))),
    Case("BatchNormalization", (_random("b", 2, 3, 2), *(_random(f"b{i}", 3) for i in range(3)), _positive("b", 3)),
         {"training_mode": 1}, ("float64",) * 3),
    _of("MeanVarianceNormalization", (2, 2, 2, 3)), _of("LpNormalization", (2, 3), axis=1), _of("LpNormalization", X, p=1),
    _of("LRN", (1, 5, 2, 2), size=3, alpha=0.2),
    # products and windows
    _of("Conv", (1, 2, 6), (3, 2, 3), (3,), pads=(1, 2), dilations=(2,)),
    _of("Conv", IMAGE, (4, 1, 3, 3), (4,), group=2, strides=(2, 1), pads=(0, 1, 2, 1)),
    _of("Conv", (1, 1, 3, 3, 3), (2, 1, 2, 2, 2)),
    _of("ConvTranspose", (1, 2, 3), (2, 2, 3), (2,), strides=(2,), pads=(1, 0), output_padding=(1,)),
    _of("ConvTranspose", (1, 2, 3, 3), (2, 1, 2, 2), group=2, dilations=(2, 1)),
    _of("Gemm", (3, 2), (3, 4), (4,), transA=1, alpha=0.5, beta=2.0), _of("Gemm", (2, 3), (4, 3), transB=1),
    _of("MatMul", (2, 2, 3), (3, 2)), _of("Einsum", (2, 3), (3, 4), equation="ij, jk -> ki"),
    _of("MaxPool", IMAGE, kernel_shape=(2, 2), strides=(2, 2), ceil_mode=1, pads=(0, 0, 0, 1)),
    _of("AveragePool", IMAGE, kernel_shape=(3, 3), strides=(2, 2), pads=(1, 1, 1, 1), ceil_mode=1),
    _of("AveragePool", (1, 2, 7), kernel_shape=(3,), dilations=(2,), pads=(1, 1), count_include_pad=1),
    Case("LpPool", (_positive("LpPool", 1, 2, 6),), {"kernel_shape": (2,), "p": 3}),
    _of("GlobalAveragePool", IMAGE), _of("GlobalMaxPool", IMAGE), _of("GlobalLpPool", IMAGE),
    # moves
    _of("Reshape", X, _ints(3, -1)), _of("Flatten", (2, 3, 2), axis=2), _of("Squeeze", (1, 3, 1), _ints(0)),
    _of("Unsqueeze", X, _ints(0, -1)), _of("Transpose", (2, 3, 4), perm=(2, 0, 1)), _of("Concat", X, (1, 3), axis=0),
    _of("Split", (4, 3), _ints(1, 3), axis=0, writes=("float64", "float64")),
    _of("Slice", (4, 5), _ints(3, 1), _ints(-9, 5), _ints(0, 1), _ints(-2, 2)),
    _of("Gather", (4, 3), _ints(-1, 0, 0), axis=0), _of("GatherElements", X, np.array([[0, -1, 1]]), axis=0),
    _of("GatherND", (2, 3, 2), np.array([[0, 1], [1, -1]])), _of("GatherND", (2, 3, 2), np.array([[1], [0]]), batch_dims=1),
    *(_of("ScatterElements", (3, 3), np.array([[0, 2, 0]]), (1, 3), axis=0, reduction=how) for how in ("none", "add", "mul")),
    *(_of("ScatterND", (4, 2), np.array([[0], [2]]), (2, 2), reduction=how) for how in ("none", "add", "max")),
    *(_of("Pad", X, _ints(0, 1, 1, 0), mode=mode) for mode in ("constant", "reflect", "edge", "wrap")),
    _of("Pad", X, _ints(-1, 2), None, _ints(1)), _of("Expand", (3, 1), _ints(2, 1, 4)), _of("Tile", X, _ints(2, 1)),
    _of("DepthToSpace", (1, 4, 2, 3), blocksize=2), _of("DepthToSpace", (1, 4, 2, 3), blocksize=2, mode="CRD"),
    _of("SpaceToDepth", (1, 1, 4, 2), blocksize=2), _of("Trilu", (3, 3), upper=0),
    _of("ReverseSequence", (3, 2, 2), _ints(2, 3)), _of("Shape", X, writes=INT), _of("Size", X, writes=INT),
    _of("ConstantOfShape", _ints(2), value=np.array([3.0]), writes=("float64",)), _of("EyeLike", (2, 3), k=1),
    _of("Range", np.array(0.5), np.array(2.2), np.array(0.5)), _of("OneHot", _ints(0, -1), np.array(3), (2,)),
    # interpolation
    *(_of("Resize", (1, 1, 3, 4), None, np.array([1.0, 1.0, 1.6, 0.6]), mode=mode, antialias=int(mode != "nearest"))
      for mode in ("nearest", "linear", "cubic")),
    _of("Resize", (1, 1, 3, 4), np.array([0.1, 0.2, 0.9, 1.2]), None, _ints(4, 5), mode="linear", axes=(2, 3),
        coordinate_transformation_mode="tf_crop_and_resize"),
    # quantization: without rounding (see the tests of the rounding itself)
    Case("QuantizeLinear", (_random("q", 2, 3) * 3, np.array([0.013, 0.011, 0.017]), np.array([3, 1, 2], np.uint8)),
         {"axis": 1}, ("uint8",)),
    Case("DequantizeLinear", (_random("dq", 2, 4) * 90, _positive("dq", 2, 2), None), {"axis": 1, "block_size": 2}, ("float64",)),
    Case("DynamicQuantizeLinear", (np.array([-1.0, 0.3, 2.0]),), {}, ("uint8", "float64", "uint8")),
    Case("MatMulInteger", (_random("mm", 2, 3) * 90, _random("mn", 3, 2) * 90, np.array(3, np.uint8)), {}, ("int32",)),
    Case("ConvInteger", (_random("ci", 1, 1, 4, 4) * 90, _random("cw", 2, 1, 3, 3) * 90, np.array(3, np.uint8)),
         {"pads": (1, 1, 1, 1)}, ("int32",)),
]  # fmt: skip
