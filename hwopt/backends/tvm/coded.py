"""Regions whose weights are stored as codes -> one call of a kernel that decodes them, where the target gains by it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from hwopt.analysis.compressed import Compressed
from hwopt.analysis.held import undecodable
from hwopt.analysis.regions import Region, integer_operands, regions
from hwopt.analysis.workload import coded_weights, workload
from hwopt.backends.tvm.kernels import spec as step
from hwopt.backends.tvm.kernels.decode import Coding
from hwopt.backends.tvm.kernels.packed import Codes, PackedSpec
from hwopt.backends.tvm.layout import Expr, Values, constant
from hwopt.backends.tvm.weighted import Fused, bias_and_scale, fused_epilogue, is_row
from hwopt.ir import Graph
from hwopt.target import Target


@dataclass(frozen=True, eq=False)
class CodedKernel:
    """What a kernel with coded weights is asked for, with its operands; as weighted.Kernel."""

    spec: PackedSpec
    data: Expr
    weights: Codes
    tensors: tuple[Expr, ...]
    shape: tuple[int, ...]
    dtype: str
    last: bool


def expanded_because(graph: Graph, region: Region, target: Target, threads: int, compact: bool = False) -> str:
    """Why the weights of a region with coded weights are decoded when they are packed; "" if its kernel decodes them.

    `compact` asks for the smaller form even where it is slower.
    """
    weight = coded_weights(graph, region)
    if weight is None:
        return "its weights are not coded"
    reason = undecodable(graph, region, weight)
    if reason or compact:
        return reason
    work = workload(graph, region)
    either = target.cost.estimate(work, threads).seconds
    plain = target.cost.estimate(dataclasses.replace(work, coded=None), threads).seconds
    return "" if either < plain else f"decoding in the kernel is not faster for {work.m} rows of {work.k} x {work.n} weights"


def expanded_layers(graph: Graph, target: Target, threads: int, compact: bool = False) -> dict[str, str]:
    """Every layer whose weights are stored as codes, with the reason why the library holds them decoded; "" where it does not."""
    found = (region for region in regions(graph) if coded_weights(graph, region) is not None)
    return {region.name: expanded_because(graph, region, target, threads, compact) for region in found}


def coded_kernel(graph: Graph, region: Region, values: Values) -> CodedKernel | None:
    """The kernel that decodes the weights, or None where the epilogue or the bias does not fit it."""
    weight = coded_weights(graph, region)
    if weight is None:
        return None
    node, operands = region.anchor, integer_operands(graph, region.anchor) if region.integer else None
    data = operands.data if operands else node.inputs[0]
    last = node.op == "Conv"
    out = graph.tensor(node.output).dims
    beta = node.attr("beta", 1.0) if node.op == "Gemm" else 1.0
    if len(node.inputs) > 2 and node.inputs[2] and not last and not is_row(values, node.inputs[2], len(weight.codes), beta):
        return None
    fused = Fused()
    if weight.scales is not None and weight.per_channel and operands is None:
        fused.add(step.Multiply("channels"), constant(weight.scales[:, 0]))
    rows_first = operands is None or last or bool(node.attr("transB", 0))
    decoded = weight.codes if operands is None or operands.weight is None else operands.weight
    bias_and_scale(region, values, operands, decoded, 0 if rows_first else decoded.ndim - 1, fused, beta)
    fused_epilogue(graph, region, values, fused, 1 if last else len(out) - 1, last)
    if step.by_image(fused.steps) and out[0] > 1:
        return None
    books = _numbers(weight) if operands and weight.books is None else weight.books
    blocked = operands is None and weight.scales is not None and not weight.per_channel
    spec = PackedSpec(
        m=math.prod(out) // len(weight.codes), n=len(weight.codes), k=weight.codes.shape[1], coding=_coding(weight, books),
        block=weight.block if blocked else 0, zeros=blocked and weight.zeros is not None,
        data_dtype=graph.tensor(data).dtype, out_dtype=graph.tensor(region.output).dtype, epilogue=tuple(fused.steps),
    )  # fmt: skip
    codes = Codes(weight.codes, books, *((weight.scales, weight.zeros) if blocked else ()))
    shape = (out[0], *out[2:], out[1]) if last else graph.tensor(region.output).dims
    return CodedKernel(spec, values.get(data, last), codes, tuple(fused.tensors), shape, spec.out_dtype, last)


def _coding(weight: Compressed, books: np.ndarray | None) -> Coding:
    return Coding(weight.bits, 0 if books is None else len(books))


def _numbers(weight: Compressed) -> np.ndarray:
    """Signed numbers as a codebook, [1, 2^bits]: integers are looked up, as no instruction multiplies less than bytes."""
    codes = np.arange(2**weight.bits)
    return np.where(codes < 2 ** (weight.bits - 1), codes, codes - 2**weight.bits).astype(np.float32)[None]
