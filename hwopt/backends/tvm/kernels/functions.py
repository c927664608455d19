"""Activation functions on float32 vectors, as polynomials: LLVM would call libm once per lane.

exp: Cody-Waite reduction and the polynomial of Cephes expf (Moshier), 2 units in the last place.
erf: an odd rational function, fitted by Lawson's reweighted least squares of the relative error, 7e-8 before rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tvm import tirx

from hwopt.backends.tvm.kernels.code import Code, Value, cast, splat, vector

ROUND = 12582912.0  # 1.5 x 2**23: adding it to a small float32 rounds half to even into the low mantissa bits
BIAS = 127  # of the exponents of float32
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
ERF = (  # numerator and denominator, in the square of x
    (1.911061e-8, -1.9423076e-6, 1.4728832e-4, 3.9906693e-3, 5.1525187e-2, 0.20712769, 1.1283791),
    (1.0211347e-3, 1.4958268e-2, 0.11797174, 0.51689339, 1.0),
)


class Maths:
    """Vector arithmetic of `lanes` float32 that binds its intermediate results in `code`."""

    def __init__(self, code: Code, lanes: int, fused: bool) -> None:
        self.code, self.lanes, self.fused = code, lanes, fused

    def constant(self, value: float) -> Value:
        return splat(float(value), self.lanes)

    def name(self, value: Value) -> Value:
        return self.code.bind("value", value)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, in one instruction where the target has it (elsewhere LLVM would call a library)."""
        if self.fused:
            return tirx.call_llvm_pure_intrin(vector("float32", self.lanes), "llvm.fma", a, b, c)
        return a * b + c

    def clip(self, x: Value, low: float | None, high: float | None) -> Value:
        """x within the bounds; NaN stays NaN, as both compare it with the bound first and take the second operand then."""
        if low is not None:
            x = self.name(tirx.Max(self.constant(low), x))
        if high is not None:
            x = self.name(tirx.Min(self.constant(high), x))
        return x

    def polynomial(self, x: Value, coefficients: Sequence[float]) -> Value:
        """Horner's scheme, highest power first."""
        result = self.constant(coefficients[0])
        for coefficient in coefficients[1:]:
            result = self.fma(result, x, self.constant(coefficient))
        return result

    def exp(self, x: Value) -> Value:
        """exp(x), infinity from 88.3 on: 1 / (1 + exp(-x)) vanishes exactly."""
        given = self.name(x)
        mantissa, rounded = self._powers(self.clip(given, -87.3, 88.3), ROUND)
        bits = tirx.reinterpret(vector("int32", self.lanes), mantissa) + self._exponents(rounded)
        found = tirx.reinterpret(vector("float32", self.lanes), bits)
        beyond = given + splat(tirx.infinity("float32"), self.lanes)  # NaN stays NaN
        return self.name(tirx.Select(tirx.LT(given, self.constant(88.3)), found, beyond))

    def decay(self, x: Value) -> Value:
        """exp(x) for x <= 0, exactly 0 from -88 on: numbers close to 0 that are no normal ones slow processors down."""
        mantissa, rounded = self._powers(self.clip(x, -88.0, None), ROUND + BIAS)
        return self.name(mantissa * tirx.reinterpret(vector("float32", self.lanes), self._exponents(rounded)))

    def _powers(self, x: Value, offset: float) -> tuple[Value, Value]:
        """m and n + offset of exp(x) = m x 2**n."""
        rounded = self.name(self.fma(x, self.constant(1.44269504), self.constant(offset)))
        power = self.name(self._whole(rounded, offset))
        rest = self.fma(power, self.constant(-0.693359375), x)  # ln 2 in two parts
        rest = self.name(self.fma(power, self.constant(2.12194440e-4), rest))
        return self.name(self.fma(self.polynomial(rest, EXP), rest * rest, rest + self.constant(1.0))), rounded

    def _exponents(self, rounded: Value) -> Value:
        """The low bits of a number that was added to a large one, where a float32 has its exponent."""
        return tirx.shift_left(tirx.reinterpret(vector("int32", self.lanes), rounded), splat(23, self.lanes, "int32"))

    def _whole(self, rounded: Value, offset: float = ROUND) -> Value:
        """The number that was added to the offset. Of a sum that is no intrinsic TVM would take that off without rounding."""
        return rounded - self.constant(offset) if self.fused else self._taken_off(rounded, offset)

    def _taken_off(self, rounded: Value, offset: float = ROUND) -> Value:
        """The same in integers, out of TVM's sight."""
        bits = int(np.float32(offset).view(np.int32))
        steps = tirx.reinterpret(vector("int32", self.lanes), rounded) - splat(bits, self.lanes, "int32")
        return cast(steps, "float32", self.lanes)

    def sigmoid(self, x: Value) -> Value:
        one = self.constant(1.0)
        return tirx.Div(one, one + self.exp(self.constant(0.0) - x))

    def tanh(self, x: Value) -> Value:
        return self.fma(self.constant(2.0), self.sigmoid(x + x), self.constant(-1.0))

    def erf(self, x: Value) -> Value:
        x = self.clip(x, -4.2, 4.2)  # where it is 3e-6 above 1: further out it is exactly 1
        square = self.name(x * x)
        above, below = (self.name(self.polynomial(square, some)) for some in ERF)
        return self.clip(tirx.Div(x * above, below), -1.0, 1.0)

    def hard_sigmoid(self, x: Value, alpha: float, beta: float) -> Value:
        return self.clip(self.fma(x, self.constant(alpha), self.constant(beta)), 0.0, 1.0)

    def round(self, x: Value) -> Value:
        """Round half to even, for |x| below 2**22."""
        return self._taken_off(self.name(x + self.constant(ROUND)))

    def floats(self, value: Value) -> Value:
        return cast(value, "float32", self.lanes)


def _clip(maths: Maths, x: Value, low: float, high: float) -> Value:
    return maths.clip(x, low if low > -3e38 else None, high if high < 3e38 else None)


def _gelu_tanh(maths: Maths, x: Value) -> Value:
    cube = maths.fma(x * x, maths.constant(0.044715), maths.constant(1.0))
    return x * maths.sigmoid(maths.name(x * cube * maths.constant(1.5957691216)))  # 2 sqrt(2 / pi)


@dataclass(frozen=True)
class Quick:
    """x * (1/2 + an odd polynomial of x), bounded at |x| = `limit`: within `error` of a gate, without exp and division.

    Coefficients by Lawson's reweighted least squares of the absolute error, highest power first.
    """

    error: float
    limit: float
    coefficients: tuple[float, ...]

    def __call__(self, maths: Maths, x: Value) -> Value:
        bound = maths.constant(self.limit)
        inner = maths.name(tirx.Max(tirx.Min(x, bound), maths.constant(-self.limit)))
        square = maths.name(inner * inner)
        return x * maths.fma(inner, maths.polynomial(square, self.coefficients), maths.constant(0.5))


QUICK = {
    "gelu": Quick(
        5.3e-4, 3.8, (3.0247306e-8, -1.9566654e-6, 5.4617005e-5, -8.7438217e-4, 9.0455412e-3, -6.5132288e-2, 0.3982564)
    ),
    "gelu_tanh": Quick(1.1e-3, 3.4, (1.0627166e-5, -4.1652207e-4, 6.7142973e-3, -5.9737457e-2, 0.39404691)),
    "silu": Quick(
        1.6e-3, 8.3,
        (9.695657e-15, -3.2587844e-12, 4.6697252e-10, -3.7340561e-8, 1.8365723e-6, -5.8117125e-5, 1.2209329e-3, -1.8053574e-2,
         0.24665294),
    ),
}  # fmt: skip


FUNCTIONS: dict[str, Callable[..., Value]] = {
    **{f"quick_{name}": quick for name, quick in QUICK.items()},
    "relu": lambda maths, x: maths.clip(x, 0.0, None),
    "clip": _clip,
    "leaky_relu": lambda maths, x, slope=0.01: tirx.Select(tirx.LT(x, maths.constant(0.0)), x * maths.constant(slope), x),
    "hard_sigmoid": lambda maths, x, alpha=0.2, beta=0.5: maths.hard_sigmoid(x, alpha, beta),
    "hard_swish": lambda maths, x: x * maths.hard_sigmoid(x, 1 / 6, 0.5),
    "sigmoid": lambda maths, x: maths.sigmoid(x),
    "silu": lambda maths, x: x * maths.sigmoid(x),
    "scaled_silu": lambda maths, x, slope: x * maths.sigmoid(maths.name(x * maths.constant(slope))),
    "tanh": lambda maths, x: maths.tanh(x),
    "gelu": lambda maths, x: x * maths.fma(maths.erf(x * maths.constant(0.70710678)), maths.constant(0.5), maths.constant(0.5)),
    "gelu_tanh": _gelu_tanh,
}
