"""Float32 functions outside of the kernel templates, for every input: NaN stays NaN, large values saturate, nothing wraps.

TVM's own take NaN for zero, overflow early, or call libm once per element. These are polynomials that become vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hwopt.analysis.bfloat16 import narrows
from hwopt.backends.tvm.layout import OPAQUE, Expr
from hwopt.ir import Graph, Node

Scalar = Any  # a tirx expression
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
SELU = (1.67326319217681884765625, 1.05070102214813232421875)
EXTREMES = ("ReduceMax", "ReduceMin", "ArgMax", "ArgMin")


def number(value: float) -> Scalar:
    from tvm import tirx

    return tirx.const(value, "float32")


def select(condition: Scalar, yes: Scalar, no: Scalar) -> Scalar:
    from tvm import tirx

    return tirx.Select(condition, yes, no)


def exp(x: Scalar) -> Scalar:
    """Within 2 units in the last place (Cephes expf, Moshier); 2**n in two factors, to overflow and vanish where it should."""
    from tvm import tirx

    low, high = number(-104.0), number(89.0)
    safe = tirx.Min(select(x > low, x, low), high)  # NaN becomes a number, whose power of two is one
    kept = select(x < low, low, select(x > high, high, x))  # NaN stays, and so gets into the result
    power = tirx.floor(safe * number(math.log2(math.e)) + number(0.5))
    rest = kept - power * number(0.693359375) + power * number(2.12194440e-4)  # ln 2 in two parts
    polynomial = _horner(rest, EXP) * rest * rest + rest + number(1.0)
    whole = power.astype("int32")
    half = whole >> 1
    return polynomial * _power_of_two(half) * _power_of_two(whole - half)


def _horner(x: Scalar, coefficients: tuple[float, ...]) -> Scalar:
    result = number(coefficients[0])
    for coefficient in coefficients[1:]:
        result = result * x + number(coefficient)
    return result


def _power_of_two(exponent: Scalar) -> Scalar:
    from tvm import tirx

    return tirx.reinterpret("float32", (exponent + tirx.const(127, "int32")) << 23)


def sigmoid(x: Scalar) -> Scalar:
    return number(1.0) / (number(1.0) + exp(number(0.0) - x))


def erf(x: Scalar) -> Scalar:
    """Abramowitz and Stegun 7.1.26, absolute error 1.5e-7."""
    size = select(x < number(0.0), number(0.0) - x, x)
    t = number(1.0) / (number(1.0) + number(0.3275911) * size)
    value = number(1.0) - _horner(t, ERF) * t * exp(number(0.0) - size * size)
    return select(x < number(0.0), number(0.0) - value, value)


def gelu(x: Scalar) -> Scalar:
    return x * number(0.5) * (number(1.0) + erf(x * number(math.sqrt(0.5))))


def gelu_tanh(x: Scalar) -> Scalar:
    """x * (1 + tanh(u)) / 2 = x * sigmoid(2 u)."""
    return x * sigmoid(number(2 * math.sqrt(2 / math.pi)) * x * (number(1.0) + number(0.044715) * x * x))


def elu(x: Scalar, alpha: float, factor: float) -> Scalar:
    return number(factor) * select(x < number(0.0), number(alpha) * (exp(x) - number(1.0)), x)


def hard_sigmoid(x: Scalar, alpha: float, beta: float) -> Scalar:
    line = x * number(alpha) + number(beta)
    return select(line < number(0.0), number(0.0), select(line > number(1.0), number(1.0), line))


def sinh(x: Scalar) -> Scalar:
    """(e**x - e**-x) / 2, near zero by Taylor's series."""
    square, half = x * x, number(math.log(2))
    series = x * (_horner(square, (1 / 362880, 1 / 5040, 1 / 120, 1 / 6)) * square + number(1.0))
    whole = exp(x - half) - exp(number(0.0) - x - half)
    return select(square < number(1.0), series, whole)


def cosh(x: Scalar) -> Scalar:
    half = number(math.log(2))
    return exp(x - half) + exp(number(0.0) - x - half)


def sign(x: Scalar) -> Scalar:
    return select(x > number(0.0), number(1.0), select(x < number(0.0), number(-1.0), x))


def ordered(x: Scalar) -> Scalar:
    """A float32 as an int32 of the same order, infinities included (TVM's maximum of floats starts at a finite number)."""
    from tvm import tirx

    bits = tirx.reinterpret("int32", x)
    return bits ^ ((bits >> 31) & tirx.const(0x7FFFFFFF, "int32"))


def disordered(key: Scalar) -> Scalar:
    """The inverse of `ordered`."""
    from tvm import tirx

    return tirx.reinterpret("float32", key ^ ((key >> 31) & tirx.const(0x7FFFFFFF, "int32")))


def function_of(node: Node) -> Callable[[Scalar], Scalar] | None:
    """What an elementwise node of one float32 operand computes; None where TVM's own operator is right and fast."""
    plain = {
        "Exp": exp, "Sigmoid": sigmoid, "Erf": erf, "Sign": sign, "Sinh": sinh, "Cosh": cosh,
        "Gelu": gelu_tanh if node.attr("approximate", "none") == "tanh" else gelu,
        "Relu": lambda x: select(x < number(0.0), number(0.0), x),
    }  # fmt: skip
    if node.op in plain:
        return plain[node.op]
    if node.op == "Elu":
        return lambda x: elu(x, node.attr("alpha", 1.0), 1.0)
    if node.op == "Selu":
        return lambda x: elu(x, node.attr("alpha", SELU[0]), node.attr("gamma", SELU[1]))
    if node.op == "HardSigmoid":
        return lambda x: hard_sigmoid(x, node.attr("alpha", 0.2), node.attr("beta", 0.5))
    if node.op == "ThresholdedRelu":
        return lambda x: select(x > number(node.attr("alpha", 1.0)), x, number(0.0))
    return None


CHEAP = ("Relu", "Sign", "HardSigmoid", "ThresholdedRelu")
ELSEWHERE = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Softmax", "LayerNormalization", "MaxPool", "AveragePool", "Resize")
LOOKED_AT = 16  # nodes before a function that may end up in one kernel with it


def is_deep(graph: Graph, node: Node) -> bool:
    """Whether another long expression may be fused in front of this one.

    TVM writes the operand of a fused function wherever the function reads it, several times: two such functions in a row are
    already an expression of tens of thousands of nodes.
    """
    waiting, seen = list(node.reads), 0
    while waiting and seen < LOOKED_AT:
        before = graph.producer.get(waiting.pop())
        if before is None or before.op in ELSEWHERE:
            continue
        if narrows(graph, before) or (function_of(before) is not None and before.op not in CHEAP):
            return True
        waiting.extend(before.reads)
        seen += 1
    return False


def floor_mod(remainder: Expr, divisor: Expr) -> Expr:
    """numpy.mod of floats from fmod's remainder, which has the dividend's sign."""
    from tvm import relax

    zero = relax.const(0.0, str(remainder.ty.dtype))
    less, both, either = relax.op.less, relax.op.logical_and, relax.op.logical_or
    below = both(less(remainder, zero), less(zero, divisor))
    moves = either(below, both(less(zero, remainder), less(divisor, zero)))
    return relax.op.where(moves, relax.op.add(remainder, divisor), remainder)


def mapped(builder: Any, data: Expr, function: Callable[[Scalar], Scalar], name: str, alone: bool = False) -> Expr:
    """The function of every element; `alone`: in a kernel of its own."""
    from tvm import te

    def compute(tensor: Any) -> Any:
        return te.compute(tensor.shape, lambda *index: function(tensor(*index)), name)

    return builder.emit_te(compute, data, primfunc_name_hint=name, primfunc_attrs=OPAQUE if alone else None)
