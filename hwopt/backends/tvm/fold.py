"""Computing at compile time what depends on nothing but parameters and static shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from hwopt.analysis.bfloat16 import widens
from hwopt.analysis.compressed import compressed
from hwopt.analysis.regions import constant_nodes
from hwopt.backends import ort
from hwopt.backends.tvm.mended import mended
from hwopt.ir import Graph, Node, numpy_dtype, of_op

LIMIT = 8  # rounds: a shape that depends on a folded shape needs another one


def folded(graph: Graph) -> Graph:
    """The graph as TVM computes it right, shapes and constant expressions as parameters; dequantized weights as written."""
    graph = mended(graph)
    for _ in range(LIMIT):
        after = _round(graph)
        if after is graph:
            break
        graph = after
    return graph


def constant_values(graph: Graph) -> Mapping[str, np.ndarray]:
    """The values of all nodes that depend on parameters only."""
    names = constant_nodes(graph)
    return _evaluated(graph, [node for node in graph.nodes if node.name in names])


def _round(graph: Graph) -> Graph:
    names = constant_nodes(graph)
    kept = decoding(graph)
    nodes = [
        node for node in graph.nodes if node.name in names - kept and node.op != "DequantizeLinear" and not widens(graph, node)
    ]
    known = _evaluated(graph, [node for node in graph.nodes if node.name in names]) if nodes else {}
    found = {value: known[value] for node in nodes for value in node.outputs if value in known}
    for node in of_op(graph, "Shape", "Size"):
        kind = graph.tensor(node.inputs[0])
        if kind.static and node.name not in names:
            dims = np.array(kind.dims, np.int64)
            found[node.output] = dims[node.attr("start", 0) : node.attr("end", None)] if node.op == "Shape" else dims.prod()
    found.update(_empty(graph))
    found = {value: array for value, array in found.items() if value not in graph.outputs}
    if not found:
        return graph
    edit = graph.edit()
    for value, array in found.items():
        edit.forward(value, edit.param(value, np.asarray(array)))
    return edit.finish("fold")


def _empty(graph: Graph) -> Mapping[str, np.ndarray]:
    """Computed values of no elements, such as slices of nothing: known whatever the inputs are."""
    kinds = ((value, graph.tensor(value)) for node in graph.nodes for value in node.outputs if value)
    known = ((value, kind) for value, kind in kinds if kind.static and 0 in kind.dims and kind.dtype != "undefined")
    return {value: np.zeros(kind.dims, numpy_dtype(kind.dtype)) for value, kind in known}


def decoding(graph: Graph) -> frozenset[str]:
    """The nodes that decode weights which kernels can read as codes."""
    found = (compressed(graph, node) for node in of_op(graph, "Conv", "Gemm", "MatMul") if not node.domain)
    return frozenset(name for one in found if not isinstance(one, str) for name in one.nodes)


def _evaluated(graph: Graph, nodes: list[Node]) -> Mapping[str, np.ndarray]:
    if not nodes:
        return {}
    wanted = tuple(value for node in nodes for value in node.outputs if value and graph.tensor(value).dtype != "undefined")
    read = {value for node in nodes for value in node.reads}
    params = {name: array for name, array in graph.params.items() if name in read}
    wide = {value: f"{value} as float32" for value in wanted if graph.tensor(value).dtype == "bfloat16"}  # numpy has none
    casts = [Node("Cast", (value,), (name,), name, MappingProxyType({"to": 1})) for value, name in wide.items()]
    outputs = tuple(wide.get(value, value) for value in wanted)
    part = dataclasses.replace(graph, inputs=(), outputs=outputs, nodes=(*nodes, *casts), params=params)
    found = dict(zip(wanted, ort.run(part, {}).values(), strict=True))
    return {value: array.astype(numpy_dtype("bfloat16")) if value in wide else array for value, array in found.items()}
