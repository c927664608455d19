"""Regions [Add ->] Softmax [-> 0 for NaN] or LayerNormalization [-> QuantizeLinear, or Cast to bfloat16] -> one row kernel."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import numpy as np

from hwopt.analysis.bfloat16 import widened
from hwopt.analysis.qdq import dequantized, quantization
from hwopt.analysis.regions import ROWS, Region, by_rows, nan_guard
from hwopt.backends.tvm.kernels import layer_norm, softmax
from hwopt.backends.tvm.kernels.rows import RowsSpec
from hwopt.backends.tvm.kernels.spec import Add, Quantize
from hwopt.backends.tvm.layout import OPAQUE, Expr, Values, constant, dims_of
from hwopt.backends.tvm.templates import PLAIN, Templates
from hwopt.ir import Graph, Node

BUILDERS = {"Softmax": ("softmax", softmax.build), "LayerNormalization": ("layer_norm", layer_norm.build)}


class Lowering(Protocol):
    """What this module needs of hwopt.backends.tvm.lower.Lowering."""

    graph: Graph
    values: Values
    templates: Templates
    constant: frozenset[str]

    def provide(self, node: Node) -> None: ...


def emit(lowering: Lowering, region: Region) -> bool:
    """Emit the region; False where it is none of these, or not over axes that lie together."""
    graph, nodes = lowering.graph, (region.anchor, *region.epilogue)
    node = next((one for one in nodes[:2] if one.op in ROWS), None)
    if node is None or node.name in lowering.constant:
        return False
    behind = nodes[nodes.index(node) + 1 :]
    guard = bool(behind) and nan_guard(graph, node)[:1] == behind[:1]
    if len(behind) > 1 + 2 * guard:
        return False
    last = node.op == "Softmax" and node is region.anchor and lowering.values.is_last(node.inputs[0])
    if not (_over_channels(graph, node) if last else by_rows(graph, node)):
        return False
    parameters = _parameters(lowering.values, graph, node)
    if parameters is None:
        return False
    data, added = _operands(lowering, region.anchor, node, last)
    add, addend, addend_dims = added if added else (None, None, ())
    found = quantization(graph, nodes[-1]) if nodes[-1] is not node else None
    steps = (Quantize(float(found.scale), int(found.zero_point), found.dtype),) if found else ()
    dims = dims_of(data)
    axis = len(dims) - 1 if node.op == "Softmax" else node.attr("axis", -1) % len(dims)
    spec = RowsSpec(
        BUILDERS[node.op][0], (*dims[:axis], math.prod(dims[axis:])), add, addend_dims, float(node.attr("epsilon", 1e-5)),
        graph.tensor(region.output).dtype, steps, guard,
    )  # fmt: skip
    arguments = [data, *([addend] if add else []), *parameters]
    lowering.values.put(region.output, _called(lowering.templates, spec, (node.op, region.name), arguments, dims), last)
    return True


def _over_channels(graph: Graph, node: Node) -> bool:
    """True for a softmax over axis 1, the last one where channels lie last."""
    kind = graph.tensor(node.output)
    fits = kind.dtype == "float32" and kind.static and 0 not in kind.dims and graph.opsets.get("", 0) >= 13
    return fits and node.attr("axis", -1) % len(kind.dims) == 1


def _operands(lowering: Lowering, anchor: Node, node: Node, last: bool) -> tuple[Expr, tuple[Add, Expr, tuple[int, ...]] | None]:
    """The data and what is added to them, read as integers where it is quantized."""
    graph, values = lowering.graph, lowering.values
    if anchor is node:
        lowering.provide(node)
        return values.get(node.inputs[0], last), None
    full = graph.tensor(anchor.output).dims

    def stored(value: str) -> bool:
        """True if the value lies in memory as something narrower than float32."""
        return dequantized(graph, value) is not None or widened(graph, value) != ""

    data, other = sorted(anchor.inputs, key=lambda value: (graph.tensor(value).dims != full, stored(value)))
    through = dequantized(graph, other)
    step = Add(through[1].dtype, float(through[1].scale), int(through[1].zero_point)) if through else Add()
    narrow = widened(graph, other)
    step = Add("bfloat16") if narrow else step
    lowering.provide(dataclasses.replace(anchor, inputs=(data,) if through else (data, other)))
    shape = graph.tensor(other).dims
    addend = values.get(through[0] if through else narrow or other)
    return values.get(data), (step, addend, (1,) * (len(full) - len(shape)) + shape)


def _parameters(values: Values, graph: Graph, node: Node) -> list[Any] | None:
    """The scale of a softmax, gamma and beta of a layer norm; None where they are broadcast."""
    if node.op == "Softmax":
        return [constant(np.ones(1, np.float32))]
    dims = graph.tensor(node.output).dims
    size = math.prod(dims[node.attr("axis", -1) % len(dims) :])
    given = [values.constant(value) if value else None for value in (*node.inputs[1:3], "")[:2]]
    found = [np.zeros(size, np.float32) if array is None else array.astype(np.float32).reshape(-1) for array in given]
    return [constant(array) for array in found] if all(array.size == size for array in found) else None


def _called(templates: Templates, spec: RowsSpec, called: tuple[str, str], arguments: list[Expr], dims: list[int]) -> Expr:
    from tvm import relax

    op, label = called
    name, build = BUILDERS[op]
    if spec not in templates.row_kernels:
        symbol = f"{name}_{len(templates.row_kernels)}"
        micro = templates.target.microkernels.get("float32", PLAIN["float32"])
        built = build(spec, micro, templates.threads, symbol).with_attr({"hwopt.template": 1, **OPAQUE})
        templates.row_kernels[spec] = templates.builder.add_func(built, symbol)
    call = relax.call_tir(templates.row_kernels[spec], relax.Tuple(arguments), relax.TensorType(dims, spec.out_dtype))
    found = templates.builder.emit(call, label)
    templates.labels[found.name] = label
    return found
