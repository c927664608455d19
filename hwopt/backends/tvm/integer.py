"""Integer kernels for quantized data outside of matrix products: residual adds, products, pools, concatenations, moves.

Requantization is a product with an integer and a shift (Jacob et al. 2018, section 2.2): a real factor m becomes
round(m * 2**shift), with the largest shift that cannot overflow, so that results differ from exact ones by rounding alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hwopt.analysis.qdq import Quantization, dequantized, quantization
from hwopt.analysis.regions import INTEGER_MOVES, Region
from hwopt.backends.tvm import resizing, windows
from hwopt.backends.tvm.convert import aligned
from hwopt.backends.tvm.kernels.functions import ROUND
from hwopt.backends.tvm.kernels.spec import Quantize
from hwopt.backends.tvm.layout import Expr, Values
from hwopt.ir import Graph, Node, scalar

LIMITS = {"uint8": (0, 255), "int8": (-128, 127)}
WIDEST = 255  # of |q - zero_point| for 8 bits
ROOM = 30  # bits of int32 without the sign and one for rounding


class Lowering(Protocol):
    """What this module needs of hwopt.backends.tvm.lower.Lowering."""

    graph: Graph
    values: Values
    builder: Any
    templates: Any

    def node(self, node: Node) -> None: ...


@dataclass(frozen=True)
class Result:
    """How a region ends: the output's quantization and the range that Relu and Clip leave, in quantized units."""

    scale: float
    zero_point: int
    low: int
    high: int
    dtype: str


def emit(lowering: Lowering, region: Region) -> bool:
    """Emit an integer region that is no convolution or matmul; False if it has no integer kernel."""
    anchor, graph = region.anchor, lowering.graph
    operands = [found for value in anchor.inputs if value and (found := dequantized(graph, value))]
    result = _result(graph, region)
    if result is None or not operands:
        return False
    if anchor.op == "Resize" and anchor.attr("mode", "nearest") != "nearest":
        return _resize(lowering, region, operands[0], result)
    if anchor.op in INTEGER_MOVES and anchor.op != "Concat":
        return _move(lowering, region, operands[0], result)
    emitters = {"Add": _sum, "Sub": _sum, "Mul": _product, "Relu": _sum, "Clip": _sum, "Concat": _concat}
    if anchor.op in emitters:
        return emitters[anchor.op](lowering, region, operands, result)
    return windows.emit_integer(lowering, region, *operands[0])


def _result(graph: Graph, region: Region) -> Result | None:
    """None if a bound of a Clip is not constant."""
    found = quantization(graph, region.epilogue[-1])
    if found is None:
        return None
    scale, zero_point = float(found.scale), int(found.zero_point)
    low, high = LIMITS[found.dtype]
    for node in (region.anchor, *region.epilogue[:-1]):
        bounds = _bounds(graph, node)
        if bounds is None:
            return None
        low = max(low, min(high, _rounded(bounds[0] / scale, zero_point)))
        high = min(high, max(low, _rounded(bounds[1] / scale, zero_point)))
    return Result(scale, zero_point, low, high, found.dtype)


def _rounded(value: float, zero_point: int) -> int:
    return round(max(-1e6, min(1e6, value))) + zero_point


def _bounds(graph: Graph, node: Node) -> tuple[float, float] | None:
    if node.op == "Relu":
        return 0.0, math.inf
    if node.op != "Clip":
        return -math.inf, math.inf
    found = [node.attr("min", -math.inf), node.attr("max", math.inf)]
    for index, value in enumerate(node.inputs[1:3]):
        if value:
            bound = scalar(graph, value)
            if bound is None:
                return None
            found[index] = bound
    return found[0], found[1]


def shift_for(largest: float) -> int:
    """The largest shift at which `largest` output units, times 2**shift, fit into int32 with room for rounding."""
    return max(0, min(ROOM, math.floor(ROOM - math.log2(max(largest, 1e-9)))))


def _emit(lowering: Lowering, region: Region, compute: Callable[..., Any], arguments: Sequence[Expr], last: bool) -> bool:
    expr = lowering.builder.emit_te(compute, *arguments, primfunc_name_hint=f"integer_{region.anchor.op.lower()}")
    lowering.values.put(region.output, expr, last)
    return True


def _saturated(value: Any, result: Result) -> Any:
    from tvm import tirx

    low, high = tirx.const(result.low, value.ty.dtype), tirx.const(result.high, value.ty.dtype)
    return tirx.max(tirx.min(value, high), low).astype(result.dtype)


def _laid_out(lowering: Lowering, region: Region, names: Sequence[str]) -> tuple[list[Expr], bool]:
    """The integer operands, all channels last if one of them already is."""
    rank = len(lowering.graph.tensor(region.output).dims)
    same = [name for name in names if len(lowering.graph.tensor(name).dims) == rank]
    last = rank >= 3 and any(lowering.values.has_last(name) for name in same)
    return [aligned(lowering.values, name, rank) if last else lowering.values.get(name) for name in names], last


def _at(operand: Any, index: Sequence[Any]) -> Any:
    """An operand's element for an index of the output, by broadcasting."""
    rank = len(operand.shape)
    own = index[len(index) - rank :]
    return operand(*(0 if int(dim) == 1 else place for dim, place in zip(operand.shape, own, strict=True)))


def _shape(operands: Sequence[Any]) -> list[int]:
    """The broadcast shape."""
    rank = max(len(operand.shape) for operand in operands)
    padded = [[1] * (rank - len(operand.shape)) + [int(dim) for dim in operand.shape] for operand in operands]
    return [next((dim for dim in dims if dim != 1), 1) for dims in zip(*padded, strict=True)]


def _sum(lowering: Lowering, region: Region, operands: Sequence[tuple[str, Quantization]], result: Result) -> bool:
    """saturate((q1 * m1 + q2 * m2 + c) >> shift); one operand for Relu and Clip, m2 < 0 for Sub."""
    expressions, last = _laid_out(lowering, region, [name for name, _ in operands])
    return _emit(lowering, region, _sum_of(region.anchor.op, [found for _, found in operands], result), expressions, last)


def _sum_of(op: str, found: Sequence[Quantization], result: Result) -> Callable[..., Any]:
    from tvm import te, tirx

    factors = [float(one.scale) / result.scale for one in found]
    shift = shift_for(WIDEST * sum(factors) + abs(result.zero_point) + WIDEST)
    signs = [1, -1 if op == "Sub" else 1]
    whole = [sign * round(factor * 2**shift) for sign, factor in zip(signs, factors, strict=False)]
    offset = (result.zero_point << shift) + ((1 << shift) >> 1)
    offset -= sum(factor * int(one.zero_point) for factor, one in zip(whole, found, strict=True))

    def compute(*tensors: Any) -> Any:
        def element(*index: Any) -> Any:
            total: Any = tirx.const(offset, "int32")
            for tensor, factor in zip(tensors, whole, strict=True):
                total = total + _at(tensor, index).astype("int32") * tirx.const(factor, "int32")
            return _saturated(total >> shift, result)

        return te.compute(_shape(tensors), element, "requantized")

    return compute


def _product(lowering: Lowering, region: Region, operands: Sequence[tuple[str, Quantization]], result: Result) -> bool:
    """saturate(round((q1 - z1) * (q2 - z2) * m) + zero point): the product is exact in float32, and m nearly is.

    (As an integer, m would keep about 14 bits beside a product of 16; networks with squeeze-and-excite amplify that.)
    """
    from tvm import te, tirx

    (_, left), (_, right) = operands
    factor = tirx.const(float(left.scale) * float(right.scale) / result.scale, "float32")

    def compute(*tensors: Any) -> Any:
        def element(*index: Any) -> Any:
            first, second = (
                _at(tensor, index).astype("int32") - tirx.const(int(one.zero_point), "int32")
                for tensor, (_, one) in zip(tensors, operands, strict=True)
            )
            steps = (first * second).astype("float32") * factor
            low, high = (tirx.const(float(bound - result.zero_point), "float32") for bound in (result.low, result.high))
            moved = tirx.max(tirx.min(steps, high), low) + tirx.const(ROUND, "float32")
            return (tirx.reinterpret("int32", moved) + tirx.const(result.zero_point, "int32")).astype(result.dtype)

        return te.compute(_shape(tensors), element, "requantized")

    expressions, last = _laid_out(lowering, region, [name for name, _ in operands])
    return _emit(lowering, region, compute, expressions, last)


def _requantized(lowering: Lowering, expr: Expr, found: Quantization, result: Result) -> Expr:
    """The same numbers in the result's quantization; the same expression if it is theirs already."""
    low, high = LIMITS[result.dtype]
    same = float(found.scale) == result.scale and int(found.zero_point) == result.zero_point and found.dtype == result.dtype
    if same and (result.low, result.high) == (low, high):
        return expr
    return lowering.builder.emit_te(_sum_of("Relu", [found], result), expr, primfunc_name_hint="integer_requantize")


def _move(lowering: Lowering, region: Region, operand: tuple[str, Quantization], result: Result) -> bool:
    """The anchor on the integers themselves."""
    values, anchor = lowering.values, region.anchor
    lowering.node(dataclasses.replace(anchor, inputs=(operand[0], *anchor.inputs[1:])))
    last = values.is_last(anchor.output)
    values.put(region.output, _requantized(lowering, values.get(anchor.output, last), operand[1], result), last)
    return True


def _resize(lowering: Lowering, region: Region, operand: tuple[str, Quantization], result: Result) -> bool:
    """Weighted sums of the integers in float32, quantized at the end."""
    node = dataclasses.replace(region.anchor, inputs=(operand[0], *region.anchor.inputs[1:]), outputs=(region.output,))
    read = float(operand[1].scale), int(operand[1].zero_point)
    steps = (Quantize(result.scale, result.zero_point, result.dtype),)
    return resizing.emit(lowering.graph, node, lowering.values, lowering.templates, read, steps)


def _concat(lowering: Lowering, region: Region, operands: Sequence[tuple[str, Quantization]], result: Result) -> bool:
    from tvm import relax

    expressions, last = _laid_out(lowering, region, [name for name, _ in operands])
    rank = len(lowering.graph.tensor(region.output).dims)
    axis = region.anchor.attr("axis", 0) % rank
    placed = (0 if axis == 0 else (axis - 2) % (rank - 1) + 1) if last else axis
    same = [_requantized(lowering, expr, found, result) for expr, (_, found) in zip(expressions, operands, strict=True)]
    lowering.values.put(region.output, lowering.builder.emit(relax.op.concat(same, placed)), last)
    return True
