"""Types of all values by ONNX's own shape inference, on a skeleton without the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import onnx

from hwopt.ir.graph import Graph
from hwopt.ir.sizes import corrected
from hwopt.ir.types import Dim, OpaqueType, TensorType, ValueType, dtype_name, onnx_dtype, type_of

# Shapes, axes, pads and scales travel as values, since inference reads them; real weights only as types.
SMALL_ELEMENTS = 256
LIKE_THEIR_INPUT = ("GroupNormalization", "MeanVarianceNormalization")  # ONNX 1.23 has no inference for them


def infer_types(graph: Graph) -> Graph:
    """The graph with the type of every value that ONNX can infer; stated types of others are kept.

    Where ONNX Runtime makes another size, inference starts again from that. Raises onnx.shape_inference.InferenceError
    where operators contradict their inputs.
    """
    right: dict[str, TensorType] = {}
    while True:
        typed = _inferred(graph, right)
        found = corrected(typed)
        if not found:
            return typed
        right.update(found)


def _inferred(graph: Graph, right: Mapping[str, TensorType]) -> Graph:
    """What ONNX infers if the values of `right` are of these types: they stand as inputs, without their nodes."""
    bare = skeleton(graph)
    if right:
        kept = [node for node in bare.graph.node if not right.keys() & set(node.output)]
        del bare.graph.node[:]
        bare.graph.node.extend(kept)
        bare.graph.input.extend(value_info(name, kind) for name, kind in right.items())
    for node in bare.graph.node:
        if node.op_type in LIKE_THEIR_INPUT and not node.domain:
            node.op_type, node.input[:] = "Identity", node.input[:1]
            del node.attribute[:]
    inferred = onnx.shape_inference.infer_shapes(bare, strict_mode=False, data_prop=True)
    types: dict[str, ValueType] = dict(graph.types)
    types.update({name: type_of(array) for name, array in graph.params.items()})
    for info in (*inferred.graph.value_info, *inferred.graph.output):
        found = from_proto(info.type)
        if found is not None:
            types[info.name] = found if info.name in graph.producer else types.get(info.name, found)
    types.update(right)
    return dataclasses.replace(graph, types=MappingProxyType(types))


def skeleton(graph: Graph) -> onnx.ModelProto:
    """The model without large weights: they stand as inputs. Cheap to build, and all that inference needs."""
    inputs = [value_info(name, graph.types.get(name)) for name in graph.inputs]
    initializers = []
    for name, array in graph.params.items():
        if array.size <= SMALL_ELEMENTS and array.dtype != np.dtype(object):
            initializers.append(onnx.numpy_helper.from_array(np.asarray(array), name))
        else:
            inputs.append(value_info(name, type_of(array)))
    outputs = [onnx.ValueInfoProto(name=name) for name in graph.outputs]
    untyped = [node for node in graph.nodes if node.domain not in ("", "ai.onnx")]
    stated = [value_info(v, graph.types[v]) for node in untyped for v in node.outputs if v in graph.types]
    nodes = [node.proto for node in graph.nodes]
    body = onnx.helper.make_graph(nodes, graph.name or "graph", inputs, outputs, initializers, value_info=stated)
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in sorted(graph.opsets.items())]
    return onnx.helper.make_model(body, opset_imports=opsets, ir_version=10)


def value_info(name: str, kind: ValueType | None) -> onnx.ValueInfoProto:
    if kind is None:
        return onnx.ValueInfoProto(name=name)
    if isinstance(kind, OpaqueType):
        return onnx.ValueInfoProto(name=name, type=onnx.TypeProto.FromString(kind.proto))
    return onnx.helper.make_tensor_value_info(name, onnx_dtype(kind.dtype), kind.shape)


def from_proto(proto: onnx.TypeProto) -> ValueType | None:
    """An ONNX type; None if it says nothing."""
    if not proto.HasField("tensor_type"):
        return OpaqueType(proto.SerializeToString(deterministic=True)) if proto.WhichOneof("value") else None
    tensor = proto.tensor_type
    if not tensor.elem_type:
        return None
    if not tensor.HasField("shape"):
        return TensorType(dtype_name(tensor.elem_type), None)
    return TensorType(dtype_name(tensor.elem_type), tuple(map(_dim, tensor.shape.dim)))


def _dim(proto: onnx.TensorShapeProto.Dimension) -> Dim:
    if proto.HasField("dim_value"):
        return proto.dim_value if proto.dim_value >= 0 else None  # some exporters write -1 for an open size
    return proto.dim_param or None
