"""match-integers: quantized activations in the integers that the target multiplies."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from hwopt.analysis.qdq import INTEGERS, Quantization, quantization
from hwopt.ir import Graph, Node, of_op
from hwopt.pipeline import Context, Pass, Phase

SHIFT = 128  # uint8 = int8 + 128
MOVES = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Concat", "Expand", "Identity")
PRODUCTS = ("MatMul", "Gemm")


@dataclass(frozen=True)
class MatchIntegers(Pass):
    """QuantizeLinear(x, s, z: int8) -> DequantizeLinear  becomes  the same with z + 128: uint8, or the other way round.

    Instructions that add products of bytes take unsigned data on x86 (vpdpbusd) and signed data on Arm (sdot), and signed weights
    on both: models that were quantized for another processor would do without them. Both ends saturate alike, so nothing changes.
    Right operands of products that are computed become int8. For values inside of the graph that only DequantizeLinear reads.
    """

    name: ClassVar[str] = "match-integers"
    summary: ClassVar[str] = "quantized activations in the integers (int8 or uint8) that the target multiplies"
    phase: ClassVar[Phase] = Phase.CLEAN
    exact: ClassVar[bool] = True

    def run(self, graph: Graph, ctx: Context) -> Graph:
        self.check_site(graph)
        if ctx.target is None:
            return graph
        edit = graph.edit()
        for node in of_op(graph, "QuantizeLinear"):
            read = quantization(graph, node)
            if read is None or not self.covers(node) or node.inputs[0] in graph.params or not _inside(graph, node, read):
                continue
            wanted = _wanted(graph, node, ctx.target.activation)
            if wanted not in ("", read.dtype):
                point = edit.param(f"{node.output}_zero_point", _shifted(read.zero_point, wanted))
                kept = {key: value for key, value in node.attrs.items() if key != "output_dtype"}
                edit.replace(node, inputs=(*node.inputs[:2], point), attrs=MappingProxyType(kept))
                for reader in graph.users[node.output]:
                    edit.replace(reader, inputs=(*reader.inputs[:2], point))
        return edit.finish(str(self))


def _inside(graph: Graph, node: Node, read: Quantization) -> bool:
    """True if nobody but DequantizeLinear with the same grid sees the integers."""
    found = [quantization(graph, user) if user.op == "DequantizeLinear" else None for user in graph.users[node.output]]
    same = (one is not None and np.array_equal(one.zero_point, read.zero_point) for one in found)
    return read.dtype in INTEGERS and node.output not in graph.outputs and bool(found) and all(same)


def _wanted(graph: Graph, node: Node, activation: str) -> str:
    """The integers for a value: int8 where products read it as their right side only; "" where they read it as both sides."""
    sides = set()
    waiting, seen = [node.output], set[str]()
    while waiting:
        value = waiting.pop()
        for user in graph.users[value]:
            if user.op in PRODUCTS:
                sides |= {place for place, name in enumerate(user.inputs[:2]) if name == value}
            elif user.op in (*MOVES, "DequantizeLinear") and user.name not in seen:
                seen.add(user.name)
                waiting.extend(user.outputs)
    return "" if sides == {0, 1} else "int8" if sides == {1} else activation


def _shifted(zero_point: np.ndarray, dtype: str) -> np.ndarray:
    return (zero_point.astype(np.int32) + (SHIFT if dtype == "uint8" else -SHIFT)).astype(dtype)
