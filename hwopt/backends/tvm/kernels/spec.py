"""What a kernel template is asked for: shapes, dtypes and the epilogue that is fused behind the accumulators.

Data is channels-last ([batch, height, width, channels]; a matmul is [rows, channels]). Every template has the same form:

    pack(spec, weights, micro) -> the weights as the kernel reads them, done once at compile time
    default_schedule(spec, micro, target) -> blocking chosen by a small analytical model, no search
    build(spec, schedule, micro, symbol) -> tirx.PrimFunc(data, packed weights, *epilogue tensors, out)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Bias:
    """Adds a [channels] tensor of the accumulator's dtype; for integers the zero-point correction is folded into it.

    Behind a Scale it adds float32: integers would round the bias to steps of the accumulator.
    """


@dataclass(frozen=True)
class Scale:
    """int32 accumulator -> float32, times a [channels] float32 tensor (activation scale x weight scale)."""


@dataclass(frozen=True)
class Add:
    """Adds a tensor shaped like the output; a quantized one stands for (value - zero_point) * scale, bfloat16 is widened."""

    dtype: str = "float32"
    scale: float = 1.0
    zero_point: int = 0


@dataclass(frozen=True)
class Multiply:
    """Multiplies by a float32 tensor: `channels` ([channels]), `image` ([batch, 1, 1, channels]) or `full` (like the output)."""

    over: str = "full"


@dataclass(frozen=True)
class Activation:
    """relu, clip(low, high), leaky_relu(slope), hard_swish, hard_sigmoid(alpha, beta), sigmoid, silu, tanh, gelu, gelu_tanh.

    scaled_silu(a) is x * sigmoid(a x).
    """

    function: str
    parameters: tuple[float, ...] = ()


@dataclass(frozen=True)
class Quantize:
    """float32 -> saturate(round_half_even(x / scale) + zero_point) as `dtype` (uint8 or int8); the last step, or before Mean."""

    scale: float
    zero_point: int
    dtype: str


@dataclass(frozen=True)
class Mean:
    """The mean over the image of what the steps before make (global pooling); the result has one position.

    Behind a Quantize, whose integers are summed up, they stand for (value - zero_point) * scale. Only Quantize may follow.
    """

    scale: float = 1.0
    zero_point: int = 0


Step = Bias | Scale | Add | Multiply | Activation | Quantize | Mean


def by_image(steps: Iterable[Step]) -> bool:
    """Whether steps treat the images of a batch differently."""
    return any(isinstance(step, Mean) or (isinstance(step, Multiply) and step.over == "image") for step in steps)


class Product:
    """What convolutions and matmuls have in common."""

    weight_dtype: str

    @property
    def accumulator(self) -> str:
        return "int32" if self.weight_dtype in ("int8", "uint8") else "float32"


class Windowed:
    """A window that moves over an image: the extents of its results."""

    height: int
    width: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    pads: tuple[int, int, int, int]

    @property
    def out_height(self) -> int:
        return _extent(self.height + self.pads[0] + self.pads[2], self.kernel[0], self.strides[0], self.dilations[0])

    @property
    def out_width(self) -> int:
        return _extent(self.width + self.pads[1] + self.pads[3], self.kernel[1], self.strides[1], self.dilations[1])


@dataclass(frozen=True)
class ConvSpec(Product, Windowed):
    """A convolution of [batch, height, width, groups * k] with [groups * n, k, kernel...] weights.

    `pads` are top, left, bottom, right; padded places hold `pad_value` (the zero point of quantized data).
    `data_dtype` is float32, bfloat16, uint8 or int8; `weight_dtype` float32, bfloat16 or int8; the accumulator is float32 or
    int32. Depthwise kernels multiply bfloat16 data with float32 weights. An `out_dtype` of bfloat16 is rounded to at the end.
    `narrow` is of constant weights: how many pairs of products add up in 16 bits, which some micro-kernels need.
    """

    batch: int
    height: int
    width: int
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    groups: int = 1
    data_dtype: str = "float32"
    weight_dtype: str = "float32"
    out_dtype: str = "float32"
    pad_value: int = 0
    epilogue: tuple[Step, ...] = ()
    narrow: int = 0

    @property
    def macs(self) -> int:
        taps = self.kernel[0] * self.kernel[1]
        pixels = self.batch * self.out_height * self.out_width
        return pixels * self.out_channels * (self.in_channels // self.groups) * taps


@dataclass(frozen=True)
class ConvTransposeSpec(Product):
    """The transpose of a convolution: [batch, height, width, groups * k] with [groups * k, n, kernel...] weights.

    `pads` are what is cut off at the top and left; what is cut off or added at the other ends is in the output's extents.
    Every Bias has a row for each phase (see `phases`), as integers need: the taps whose zero points it corrects differ.
    """

    batch: int
    height: int
    width: int
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    out_height: int
    out_width: int
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int] = (0, 0)
    groups: int = 1
    data_dtype: str = "float32"
    weight_dtype: str = "float32"
    out_dtype: str = "float32"
    pad_value: int = 0
    epilogue: tuple[Step, ...] = ()

    @property
    def macs(self) -> int:
        """Products of an input pixel with every tap, those that are cut off included."""
        taps = self.kernel[0] * self.kernel[1]
        return self.batch * self.height * self.width * self.in_channels * (self.out_channels // self.groups) * taps


@dataclass(frozen=True)
class MatmulSpec(Product):
    """[batch, m, k] x [batch or 1, k, n] -> [batch, m, n]. `constant` weights are packed at compile time.

    With `transposed`, a non-constant right side lies as [batch, n, k]. The sides named by `beside` ("data", "right", "out") have
    the products of `heads` lying beside one another: [batch / heads, m, heads, k], as the layers around an attention have them.
    """

    batch: int
    m: int
    n: int
    k: int
    constant: bool = True
    transposed: bool = False
    shared: bool = False  # one right side for the whole batch
    heads: int = 1
    beside: tuple[str, ...] = ()
    data_dtype: str = "float32"
    weight_dtype: str = "float32"
    out_dtype: str = "float32"
    epilogue: tuple[Step, ...] = ()
    narrow: int = 0

    @property
    def macs(self) -> int:
        return self.batch * self.m * self.n * self.k


@dataclass(frozen=True)
class PoolSpec(Windowed):
    """Maximum or average over windows of [batch, height, width, channels]; padded places never count, unless `include_pads`.

    Quantized data stand for (value - zero_point) x scale. An epilogue works on float32 results; without one, and with the same
    dtype on both sides, a maximum passes values through as they are. A global pool is a window as large as the image.
    """

    batch: int
    height: int
    width: int
    channels: int
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    function: str = "max"  # or "average"
    include_pads: bool = False
    data_dtype: str = "float32"
    out_dtype: str = "float32"
    scale: float = 1.0
    zero_point: int = 0
    epilogue: tuple[Step, ...] = ()

    @property
    def reads(self) -> int:
        """Elements that the windows look at."""
        return self.batch * self.out_height * self.out_width * self.channels * self.kernel[0] * self.kernel[1]

    def taps(self, axis: int) -> list[int]:
        """How many taps of a window lie in the image, for each position along the axis (0: down, 1: across)."""
        size, count = ((self.height, self.out_height), (self.width, self.out_width))[axis]
        starts = (place * self.strides[axis] - self.pads[axis] for place in range(count))
        reach = range(0, self.kernel[axis] * self.dilations[axis], self.dilations[axis])
        return [sum(0 <= start + tap < size for tap in reach) for start in starts]


def _extent(size: int, kernel: int, stride: int, dilation: int) -> int:
    return (size - (kernel - 1) * dilation - 1) // stride + 1
