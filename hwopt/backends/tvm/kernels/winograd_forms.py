"""The transforms of Winograd's algorithm for 3 x 3 kernels, along one dimension (Lavin and Gray 2016, arXiv:1509.09308).

    results = A^T [(G w G^T) . (B^T d B)] A

Integers take F(4 x 4): 36 products instead of 144, of 16-bit numbers. The fractions of G are multiplied out, by 24 a dimension,
so all sums are whole: G w G^T and B^T d B have 16 bits, the rest is computed modulo 2^32. The last step divides by 576 = 64 x 9:
a product with the inverse of 9 modulo 2^32 and a shift, exact where a result has at most 26 bits, which the weights tell
(`exact`).

Floats take F(2 x 2): 16 products instead of 36. Its factors are 1 and 1/2, so that rounding errors are those of the direct form;
larger tiles would lose digits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tvm import tirx

from hwopt.backends.tvm.kernels import modular
from hwopt.backends.tvm.kernels.code import Code, Value, splat
from hwopt.backends.tvm.kernels.spec import ConvSpec
from hwopt.backends.tvm.kernels.winograd_schedule import Shape, shape_of

Transform = Callable[[Code, Sequence[Value], int], list[Value]]  # vectors of so many lanes

INVERSE_OF_9 = 954437177  # modulo 2^32
MOST = 2**25  # magnitude of results that are divided exactly
LARGEST = 255  # of data


@dataclass(frozen=True)
class Form:
    """B^T d, G w and A^T m, and what is done last to the results."""

    shape: Shape
    data: Transform
    weights: Transform
    results: Transform
    last: Callable[[Value, int], Value]


def form_of(spec: ConvSpec) -> Form:
    if spec.accumulator == "int32":
        return Form(shape_of(spec), _integer_data, _integer_weights, _integer_results, _divided)
    return Form(shape_of(spec), _float_data, _float_weights, _float_results, lambda value, _: value)


def exact(weights: np.ndarray) -> bool:
    """Whether no data can make a sum of [out, in, 3, 3] integers that is too large; floats are not asked."""
    if weights.dtype.kind == "f":
        return True
    wide = weights.astype(np.int64).reshape(len(weights), -1)
    return bool(LARGEST * max(np.maximum(wide, 0).sum(1).max(), np.maximum(-wide, 0).sum(1).max()) < MOST)


def _float_data(code: Code, d: Sequence[Value], _: int) -> list[Value]:
    return _named(code, (d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]))


def _float_weights(code: Code, w: Sequence[Value], lanes: int) -> list[Value]:
    half = splat(0.5, lanes)
    ends, middle = code.bind("ends", (w[0] + w[2]) * half), code.bind("middle", w[1] * half)
    return _named(code, (w[0], ends + middle, ends - middle, w[2]))


def _float_results(code: Code, m: Sequence[Value], _: int) -> list[Value]:
    return _named(code, (m[0] + (m[1] + m[2]), (m[1] - m[2]) - m[3]))


def _integer_data(code: Code, d: Sequence[Value], lanes: int) -> list[Value]:
    times = _times(lanes)
    a, b, c, e = _named(code, (d[4] - times(4, d[2]), d[3] - times(4, d[1]), d[4] - d[2], times(2, d[3] - d[1])))
    first, last = times(4, d[0]) - times(5, d[2]) + d[4], times(4, d[1]) - times(5, d[3]) + d[5]
    return _named(code, (first, a + b, a - b, c + e, c - e, last))


def _integer_weights(code: Code, w: Sequence[Value], lanes: int) -> list[Value]:
    """24 G w, the last one halved: two of these factors times a byte stay within 16 bits.

    24 G = (6, 0, 0), (-4, -4, -4), (-4, 4, -4), (1, 2, 4), (1, -2, 4), (0, 0, 24)
    """
    times = _times(lanes)
    ends, middle, far, twice = _named(code, (times(-4, w[0] + w[2]), times(4, w[1]), w[0] + times(4, w[2]), times(2, w[1])))
    return _named(code, (times(6, w[0]), ends - middle, ends + middle, far + twice, far - twice, times(12, w[2])))


def _integer_results(code: Code, m: Sequence[Value], lanes: int) -> list[Value]:
    """The last of m counts twice."""

    def add(a: Value, b: Value, bits: int = 0) -> Value:
        """a + b x 2^bits"""
        return code.bind("s", modular.add(a, tirx.shift_left(b, splat(bits, lanes, "int32")) if bits else b, lanes))

    p, r = add(m[1], m[2]), add(m[3], m[4])
    q, s = (code.bind("s", modular.subtract(a, b, lanes)) for a, b in ((m[1], m[2]), (m[3], m[4])))
    return [add(add(m[0], p), r), add(q, s, 1), add(p, r, 2), add(add(q, s, 3), m[5], 1)]


def _divided(value: Value, lanes: int) -> Value:
    """A whole multiple of 576, modulo 2^32, by 576."""
    whole = modular.multiply(value, splat(INVERSE_OF_9, lanes, "int32"), lanes)
    return tirx.shift_right(whole, splat(6, lanes, "int32"))


def _named(code: Code, values: Sequence[Value]) -> list[Value]:
    return [code.bind("t", value) for value in values]


def _times(lanes: int) -> Callable[[int, Value], Value]:
    return lambda factor, value: value * splat(factor, lanes, "int16")
