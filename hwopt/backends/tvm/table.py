"""What is computed of one 8-bit value, element by element, as a table of its 256 results.

    DequantizeLinear -> Sigmoid -> Mul ... -> QuantizeLinear      table[x]

ONNX Runtime itself computes the table, so that every result is the oracle's.
"""

from __future__ import annotations

import dataclasses
import math
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from hwopt.analysis.qdq import dequantized, quantization
from hwopt.analysis.regions import ELEMENTWISE, Region
from hwopt.backends import ort
from hwopt.backends.tvm.kernels import lookup
from hwopt.backends.tvm.layout import OPAQUE, Expr, Values, constant, dims_of
from hwopt.backends.tvm.templates import Templates
from hwopt.ir import Graph, TensorType, infer_types
from hwopt.target import Target

# A few instructions each: in vectors they are faster than one look-up per element (HardSwish: half of its time, measured).
TRIVIAL = ("Relu", "Clip", "Add", "Sub", "Mul", "Min", "Max", "Abs", "Neg", "LeakyRelu", "HardSigmoid", "HardSwish")
TYPES = ("uint8", "int8")


class Lowering(Protocol):
    """What this module needs of hwopt.backends.tvm.lower.Lowering."""

    graph: Graph
    values: Values
    builder: Any
    templates: Templates


def emit(lowering: Lowering, region: Region) -> bool:
    """Emit the region as a table; False where it is none, or cheaper in vectors."""
    source = source_of(lowering.graph, region)
    if not source:
        return False
    last = lowering.values.is_last(source)
    data = lowering.values.get(source, last)
    table = table_of(lowering.graph, region, source)
    target = lowering.templates.target
    form = lookup.form_of(_features(target), 32 if str(target.tvm.get("mtriple", "")).startswith("arm") else 64)
    count = math.prod(dims_of(data))
    found = (
        _called(lowering, form, region, data, table) if form and count >= form.lanes else _plain(lowering, region, data, table)
    )
    lowering.values.put(region.output, found, last)
    return True


def _features(target: Target) -> frozenset[str]:
    """LLVM's names of what the target's code can use."""
    named = (str(name).removeprefix("+") for name in target.tvm.get("mattr", ()))
    return frozenset(named) | frozenset(name for micro in target.microkernels.values() for name in micro.features)


def _called(lowering: Lowering, form: lookup.Form, region: Region, data: Expr, table: np.ndarray) -> Expr:
    """A look-up of whole vectors."""
    from tvm import relax

    templates, dims = lowering.templates, dims_of(data)
    kinds = (str(data.ty.dtype), str(table.dtype))
    key = ("lookup", math.prod(dims), kinds)
    if key not in templates.row_kernels:
        symbol = f"table_{len(templates.row_kernels)}"
        built = lookup.build(math.prod(dims), kinds, form, templates.threads, symbol)
        marked = built.with_attr({"hwopt.template": 1, **OPAQUE})
        templates.row_kernels[key] = lowering.builder.add_func(marked, symbol)
    arguments = relax.Tuple([data, constant(table)])
    call = relax.call_tir(templates.row_kernels[key], arguments, relax.TensorType(dims, kinds[1]))
    found = lowering.builder.emit(call, f"table_{region.name}")
    templates.labels[found.name] = region.name
    return found


def _plain(lowering: Lowering, region: Region, data: Expr, table: np.ndarray) -> Expr:
    """A look-up of one byte after the other, fused with what only moves data."""
    from tvm import te

    def compute(tensor: Any, entries: Any) -> Any:
        byte = "uint8"  # the table is in the order of bytes: int8 values from -1 on stand behind the others
        return te.compute(tensor.shape, lambda *at: entries(tensor(*at).astype(byte).astype("int32")), "looked_up")

    return lowering.builder.emit_te(compute, data, constant(table), primfunc_name_hint=f"table_{region.anchor.op.lower()}")


def source_of(graph: Graph, region: Region) -> str:
    """The 8-bit value that the region is a function of, or ""."""
    nodes = (region.anchor, *region.epilogue)
    ends = nodes[-1].op == "QuantizeLinear" and len(region.outputs) == 1
    if not ends or region.kind != "elementwise" or all(node.op in TRIVIAL for node in nodes[:-1]):
        return ""
    made = {value for node in nodes for value in node.outputs}
    sources: set[str] = set()
    for node in nodes:
        if node.op not in ELEMENTWISE or node.domain:
            return ""
        for value in node.inputs:
            if not value or value in made:
                continue
            through = dequantized(graph, value)
            array = graph.constant(value)
            if through is not None and through[0] not in graph.params:
                sources.add(value)
            elif array is None or array.size != 1:
                return ""
    if len(sources) != 1:
        return ""
    value = sources.pop()
    found = dequantized(graph, value)
    same = graph.tensor(value).shape == graph.tensor(region.output).shape
    result = quantization(graph, nodes[-1])
    fits = result is not None and result.whole and result.dtype in TYPES
    return found[0] if found is not None and same and fits and graph.tensor(found[0]).dtype in TYPES else ""


def table_of(graph: Graph, region: Region, source: str) -> np.ndarray:
    """[256] results, in the order of the bytes."""
    dtype = graph.tensor(source).dtype
    readers = (graph.producer.get(value) for node in (region.anchor, *region.epilogue) for value in node.inputs)
    read = {node.name: node for node in readers if node is not None and node.op == "DequantizeLinear"}
    chosen = {**read, **{node.name: node for node in region.nodes}}
    nodes = tuple(node for node in graph.nodes if node.name in chosen)
    used = {value for node in nodes for value in node.inputs}
    kind = TensorType(dtype, (256,))
    types = {name: one for name, one in graph.types.items() if name not in {v for node in nodes for v in node.outputs}}
    part = dataclasses.replace(
        graph, inputs=(source,), outputs=(region.output,), nodes=nodes, types=MappingProxyType({**types, source: kind}),
        params=MappingProxyType({name: array for name, array in graph.params.items() if name in used}),
    )  # fmt: skip
    every = np.arange(256, dtype=np.uint8).view(dtype)
    return np.asarray(ort.run(infer_types(part), {source: every})[region.output])
