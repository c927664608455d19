"""What happens to an accumulator between the last product and memory: the spec's steps, on vectors of output channels.

Where a chain ends in Quantize, its 1 / scale is moved backwards through everything that it commutes with (relu, clip, leaky
relu, additions, products) into the first factor, so that requantization costs no multiplication of its own. Rounding is the
addition of 1.5 x 2**23 + zero point: the low byte of the result is the quantized value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx

from hwopt.backends.tvm.kernels import bfloat16
from hwopt.backends.tvm.kernels.code import Code, Value, cast, load, splat, vector
from hwopt.backends.tvm.kernels.functions import FUNCTIONS, QUICK, ROUND, Maths
from hwopt.backends.tvm.kernels.spec import Activation, Add, Bias, Multiply, Quantize, Scale, Step
from hwopt.target import MicroKernel

LIMITS = {"uint8": (0, 255), "int8": (-128, 127)}
HOMOGENEOUS = ("relu", "clip", "leaky_relu")  # gain * f(x) = f'(gain * x) with the bounds of clip scaled

LOST = 0.04  # of a quantization step: an approximation with this error moves one result in fifty, by one step (measured)
TRANSCENDENTAL = ("sigmoid", "silu", "scaled_silu", "tanh", "gelu", "gelu_tanh")


@dataclass(frozen=True)
class Place:
    """Where a vector of results goes: `flat` index in the output, its first `channel`, and its batch element `image`."""

    flat: Value
    channel: Value
    image: Value = 0


class Epilogue:
    """The steps of one kernel with their tensors; `parameters` follow data and weights in the kernel's signature."""

    bias_row = 0  # the element at which the biases begin, where parts of the output have different ones

    def __init__(
        self,
        steps: Sequence[Step],
        accumulator: str,
        out_dtype: str,
        channels: int,
        images: int,
        size: int,
        fused: bool,
        micro: MicroKernel | None = None,
    ) -> None:
        self.steps, self.accumulator, self.out_dtype = _quick(steps), accumulator, out_dtype
        self.channels, self.images, self.size, self.fused = channels, images, size, fused
        self.micro = micro  # whose instructions round to bfloat16; none: in integer arithmetic
        self.tensors = [self._tensor(step, index) for index, step in enumerate(self.steps)]
        self.gains = _gains(self.steps)

    @property
    def heavy(self) -> bool:
        """Whether a step takes tens of instructions, so that unrolling it over a tile would be too much code."""
        return any(isinstance(step, Activation) and step.function in TRANSCENDENTAL for step in self.steps)

    @property
    def parameters(self) -> list[Value]:
        return [tensor for tensor in self.tensors if tensor is not None]

    def overwritten(self, dtype: str) -> int | None:
        """Which of the kernel's parameters has an element of `dtype` for each result, read right before that is written."""
        for index, step in enumerate(self.steps):
            if isinstance(step, Add) and step.dtype == dtype:
                return 2 + sum(tensor is not None for tensor in self.tensors[:index])
        return None

    def _tensor(self, step: Step, index: int) -> Value:
        if isinstance(step, Bias):
            return tirx.decl_buffer((self.channels,), "float32" if _scaled(self.steps, index) else self.accumulator, "bias")
        if isinstance(step, Scale):
            return tirx.decl_buffer((self.channels,), "float32", "scale")
        if isinstance(step, Add):
            return tirx.decl_buffer((self.size,), step.dtype, "addend")
        if isinstance(step, Multiply):
            size = {"channels": self.channels, "image": self.images * self.channels, "full": self.size}[step.over]
            return tirx.decl_buffer((size,), "float32", "factor")
        return None

    def _first(self, step: Step, channel: Value) -> Value:
        """Where the row of a step's tensor has this channel."""
        return channel + self.bias_row if isinstance(step, Bias) else channel

    def initial(self, code: Code, channel: Value, lanes: int) -> Value:
        """What the accumulators start from: a leading bias, else zero."""
        if self.steps and isinstance(self.steps[0], Bias):
            return code.bind("bias", load(self.tensors[0], self._first(self.steps[0], channel), lanes))
        return splat(0 if self.accumulator == "int32" else 0.0, lanes, self.accumulator)

    def per_channel(self, code: Code, channel: Value, lanes: int) -> list[Value]:
        """The vectors that all pixels of a tile share, one for each step (None where it has none)."""
        found: list[Value] = []
        for step, tensor, gain in zip(self.steps, self.tensors, self.gains, strict=True):
            shared = isinstance(step, Bias | Scale) or (isinstance(step, Multiply) and step.over == "channels")
            if not shared:
                found.append(None)
                continue
            value = load(tensor, self._first(step, channel), lanes)
            found.append(code.bind("shared", value if gain == 1.0 else value * splat(gain, lanes)))
        return found

    def apply(self, code: Code, value: Value, place: Place, shared: Sequence[Value], lanes: int, biased: bool) -> Value:
        """The output vector of `value`; `biased` says that a leading bias is in it already."""
        maths = Maths(code, lanes, self.fused)
        for index, (step, gain) in enumerate(zip(self.steps, self.gains, strict=True)):
            if isinstance(step, Bias):
                taken = (biased and index == 0) or _follows(self.steps, index)
                value = value if taken else value + shared[index]
            elif isinstance(step, Scale) and _follows(self.steps, index + 1):
                value = maths.fma(cast(value, "float32", lanes), shared[index], shared[index + 1])
            elif isinstance(step, Scale):
                value = cast(value, "float32", lanes) * shared[index]
            elif isinstance(step, Add):
                value = _add(maths, value, step, gain, load(self.tensors[index], place.flat, lanes))
            elif isinstance(step, Multiply):
                value = value * (shared[index] if step.over == "channels" else self._factor(step, index, place, lanes))
            elif isinstance(step, Activation):
                value = _activate(maths, value, step, gain)
            elif isinstance(step, Quantize):
                return _quantized(maths, value * splat(gain, lanes) if gain != 1.0 else value, step)
            value = code.bind("value", value)
        if self.out_dtype == "bfloat16":
            return bfloat16.narrow(value, lanes, self.micro is not None and bfloat16.converts(self.micro, lanes))
        return value

    def _factor(self, step: Multiply, index: int, place: Place, lanes: int) -> Value:
        at = place.flat if step.over == "full" else place.image * self.channels + place.channel
        factor = load(self.tensors[index], at, lanes)
        return factor if self.gains[index] == 1.0 else factor * splat(self.gains[index], lanes)


def _scaled(steps: Sequence[Step], index: int) -> bool:
    """Whether a Scale has made float32 of the accumulators before a step."""
    return any(isinstance(step, Scale) for step in steps[:index])


def _follows(steps: Sequence[Step], index: int) -> bool:
    """Whether a step is a Bias right behind a Scale, which adds it in the same instruction."""
    return 0 < index < len(steps) and isinstance(steps[index], Bias) and isinstance(steps[index - 1], Scale)


def _add(maths: Maths, value: Value, step: Add, gain: float, other: Value) -> Value:
    """value + gain x the dequantized addend."""
    if step.dtype == "bfloat16":
        other = maths.name(bfloat16.widen(other, maths.lanes))
    if step.dtype in ("float32", "bfloat16"):
        return value + other if gain == 1.0 else maths.fma(other, maths.constant(gain), value)
    scale = step.scale * gain
    shifted = value + maths.constant(-step.zero_point * scale) if step.zero_point else value
    return maths.fma(maths.floats(cast(other, "int32", maths.lanes)), maths.constant(scale), shifted)


def _activate(maths: Maths, value: Value, step: Activation, gain: float) -> Value:
    """gain x f(value / gain) for homogeneous functions, whose input has the gain already, else gain x f(value)."""
    function = FUNCTIONS[step.function]
    if step.function == "clip":
        low, high = step.parameters
        return function(maths, value, low * gain, high * gain)
    result = function(maths, value, *step.parameters)
    return result if step.function in HOMOGENEOUS or gain == 1.0 else result * maths.constant(gain)


def _quick(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps, with a polynomial for a gate that is quantized at once, where its error is lost in the rounding."""
    found = tuple(steps)
    if len(found) < 2 or not isinstance(found[-1], Quantize) or not isinstance(found[-2], Activation):
        return found
    quick = QUICK.get(found[-2].function)
    if quick is None or quick.error > LOST * found[-1].scale:
        return found
    return (*found[:-2], Activation(f"quick_{found[-2].function}"), found[-1])


def _gains(steps: Sequence[Step]) -> list[float]:
    """The factor that each step applies to what it adds, scales or bounds, walking back from Quantize.

    A product takes all of it (its factor is scaled), so steps before it see 1; where nothing takes it, Quantize multiplies.
    """
    gains = [1.0] * len(steps)
    if not steps or not isinstance(steps[-1], Quantize):
        return gains
    gain = 1.0 / steps[-1].scale
    for index in range(len(steps) - 2, -1, -1):
        step = steps[index]
        if isinstance(step, Bias) and not _scaled(steps, index):
            break
        gains[index] = gain
        if isinstance(step, Scale | Multiply) or (isinstance(step, Activation) and step.function not in HOMOGENEOUS):
            return gains
    return [1.0] * (len(steps) - 1) + [gain]


def _quantized(maths: Maths, value: Value, step: Quantize) -> Value:
    """saturate(round_half_even(value) + zero_point); 8 low bits of a float whose unit is the mantissa's last bit."""
    low, high = LIMITS[step.dtype]
    low, high = low - step.zero_point, high - step.zero_point
    clipped = tirx.Min(tirx.Max(value, maths.constant(low)), maths.constant(high))
    moved = maths.name(clipped + maths.constant(ROUND + step.zero_point))
    return cast(tirx.reinterpret(vector("int32", maths.lanes), moved), step.dtype, maths.lanes)
