"""Between onnx.ModelProto and Graph, without changing anything: each is the inverse of the other."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import numpy as np
import onnx

from hwopt.ir import Attr, Graph, Node, ValueType, frozen, infer_types, type_of
from hwopt.ir.infer import from_proto, value_info

_PLAIN = {"FLOAT", "INT", "STRING", "FLOATS", "INTS", "STRINGS"}


def from_model(model: onnx.ModelProto, folder: str = "") -> Graph:
    """The Graph of a model; nodes without a name get one, all values get types. `folder` holds external weights."""
    return infer_types(stated_graph(model, folder))


def stated_graph(model: onnx.ModelProto, folder: str = "") -> Graph:
    """The same with only those types that the model states."""
    body = model.graph
    params = {tensor.name: frozen(onnx.numpy_helper.to_array(tensor, folder)) for tensor in body.initializer}
    params.update({tensor.values.name: frozen(dense(tensor)) for tensor in body.sparse_initializer})
    inputs = tuple(value.name for value in body.input if value.name not in params)
    types: dict[str, ValueType] = {name: type_of(array) for name, array in params.items()}
    for value in (*body.value_info, *body.output, *body.input):
        kind = from_proto(value.type)
        if kind is not None and value.name not in params:
            types[value.name] = kind
    return Graph(
        name=body.name or "graph",
        inputs=inputs,
        outputs=tuple(value.name for value in body.output),
        nodes=nodes_of(body),
        types=MappingProxyType(types),
        params=MappingProxyType(params),
        opsets=MappingProxyType({_domain(opset.domain): opset.version for opset in model.opset_import}),
        metadata=MappingProxyType({entry.key: entry.value for entry in model.metadata_props}),
    )


def to_model(graph: Graph, weights: Sequence[onnx.TensorProto] | None = None) -> onnx.ModelProto:
    """The ModelProto of a Graph; `weights` stand for its parameters (io.files writes them to a second file above 2 GB)."""
    inputs = [value_info(name, graph.types[name]) for name in graph.inputs]
    outputs = [value_info(name, graph.types.get(name)) for name in graph.outputs]
    if weights is None:
        weights = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in graph.params.items()]
    body = onnx.helper.make_graph([node.proto for node in graph.nodes], graph.name, inputs, outputs, weights)
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in sorted(graph.opsets.items())]
    model = onnx.helper.make_model(body, opset_imports=opsets, producer_name="hwopt")
    # Before IR version 4 every parameter is also an input that the caller may overwrite.
    model.ir_version = max(4, onnx.helper.find_min_ir_version_for(opsets, ignore_unknown=True))
    onnx.helper.set_model_props(model, dict(graph.metadata))
    return model


def dense(tensor: onnx.SparseTensorProto) -> np.ndarray:
    """A sparse tensor written out; its indices are linear, or one row of coordinates for each value."""
    values, indices = onnx.numpy_helper.to_array(tensor.values), onnx.numpy_helper.to_array(tensor.indices)
    array = np.zeros(tuple(tensor.dims), values.dtype)
    array[np.unravel_index(indices, array.shape) if indices.ndim == 1 else tuple(indices.T)] = values
    return array


def nodes_of(body: onnx.GraphProto) -> tuple[Node, ...]:
    """Nodes of a graph or subgraph in their order; those without a name get one."""
    taken = {node.name for node in body.node}
    seen: set[str] = set()
    nodes = []
    for index, proto in enumerate(body.node):
        name = proto.name if proto.name and proto.name not in seen else ""
        while not name or name in seen:
            name = f"{proto.op_type}_{index}" if f"{proto.op_type}_{index}" not in taken else f"{name or proto.op_type}_"
            taken.add(name)
        seen.add(name)
        attrs = MappingProxyType({attribute.name: _attr(attribute) for attribute in proto.attribute})
        nodes.append(Node(proto.op_type, tuple(proto.input), tuple(proto.output), name, attrs, _domain(proto.domain)))
    return tuple(nodes)


def _attr(proto: onnx.AttributeProto) -> Attr:
    kind = onnx.AttributeProto.AttributeType.Name(proto.type)
    if kind == "TENSOR":
        return frozen(onnx.numpy_helper.to_array(proto.t))
    if kind == "GRAPH":
        return proto.g
    if kind not in _PLAIN:
        return proto
    value = onnx.helper.get_attribute_value(proto)
    return tuple(map(_text, value)) if kind in ("FLOATS", "INTS", "STRINGS") else _text(value)


def _text(value: Attr) -> Attr:
    """Strings are bytes in ONNX; nearly all are UTF-8."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _domain(name: str) -> str:
    """The default domain has two spellings."""
    return "" if name == "ai.onnx" else name
