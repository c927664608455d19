"""One opset for everything behind the importer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import MappingProxyType

import onnx
import onnx.version_converter

from hwopt.errors import UnsupportedError
from hwopt.io.check import all_nodes
from hwopt.io.old_meaning import keep_meaning, spell_out
from hwopt.io.proto import nodes_of
from hwopt.ir import Graph, Node, TensorType, frozen, infer_types, of_op, onnx_dtype
from hwopt.ir.infer import skeleton

# The newest opset that the oldest ONNX Runtime we accept (1.20) runs, and the first with 4-bit and blocked
# QuantizeLinear. TVM's importer picks each operator's newest implementation at or below it: all but one kind
# (opset 23, attention) are at most 21. Later opsets widened element types and clarified texts, little else.
PINNED = 21


def to_pinned(graph: Graph) -> Graph:
    """The graph at the pinned opset; types must be static for older models.

    Newer: relabelled where every operator means the same there, else kept at its own opset (`Attention`, float8 casts).
    Older: converted by ONNX's version converter, on a skeleton without weights. Raises UnsupportedError if that fails.
    """
    version = graph.opsets.get("")
    if version == PINNED:
        return graph
    if version is None or all(_means_the_same(graph, node, version) for node in graph.nodes):
        return dataclasses.replace(graph, opsets=MappingProxyType({**graph.opsets, "": PINNED}))
    return graph if version > PINNED else _converted(graph, version)


def _converted(graph: Graph, version: int) -> Graph:
    hint = f"export it with opset {PINNED}"
    if version < 9 and any(of_op(graph, "Scan")):
        raise UnsupportedError(f"Scan of opset {version} has a batch dimension that later ones lack", place=graph.name, hint=hint)
    bare = skeleton(graph)
    spell_out(bare, version)
    bare = onnx.shape_inference.infer_shapes(bare)
    try:
        model = onnx.version_converter.convert_version(bare, PINNED)
    except Exception as error:  # the converter, written in C++, raises kinds of its own
        reason = str(error).strip().splitlines()[-1]
        message = f"ONNX cannot convert opset {version} to {PINNED}: {reason}"
        raise UnsupportedError(message, place=graph.name, hint=hint) from error
    keep_meaning(model, version, graph.params)
    params = dict(graph.params)
    for tensor in model.graph.initializer:
        if tensor.name not in params:
            params[tensor.name] = frozen(onnx.numpy_helper.to_array(tensor))
    types = {name: kind for name, kind in graph.types.items() if name not in params}
    opsets = {**graph.opsets, "": PINNED}
    converted = dataclasses.replace(
        graph,
        nodes=nodes_of(model.graph),
        params=MappingProxyType(params),
        types=MappingProxyType(types),
        opsets=MappingProxyType(opsets),
    )
    return infer_types(converted)


def _means_the_same(graph: Graph, node: Node, version: int) -> bool:
    """True if the operator has the same meaning at the pinned opset as at the model's."""
    if node.domain:
        return True
    inner = (one for attr in node.attrs.values() if isinstance(attr, onnx.GraphProto) for one in all_nodes(attr))
    if any(_since(one.op_type, version) != _since(one.op_type, PINNED) for one in inner if one.domain in ("", "ai.onnx")):
        return False
    since = _since(node.op, PINNED)
    if since == _since(node.op, version):
        return True
    return version > PINNED and since is not None and _fits(graph, node) and not _redefined(graph, node)


def _since(op: str, version: int) -> int | None:
    try:
        return int(onnx.defs.get_schema(op, version, "").since_version)
    except onnx.defs.SchemaError:
        return None


def _fits(graph: Graph, node: Node) -> bool:
    """Attributes and element types are all among those of the pinned opset."""
    schema = onnx.defs.get_schema(node.op, PINNED, "")
    if schema.deprecated or any(key not in schema.attributes for key in node.attrs):
        return False
    if not (schema.min_input <= len(node.inputs) <= schema.max_input and len(node.outputs) <= schema.max_output):
        return False
    allowed = {constraint.type_param_str: set(constraint.allowed_type_strs) for constraint in schema.type_constraints}
    bound: dict[str, str] = {}
    for value, parameter in _parameters(node, schema):
        kind = _type_text(graph, value)
        variable = parameter.type_str
        if kind not in allowed.get(variable, {variable}):
            return False
        if parameter.is_homogeneous and bound.setdefault(variable, kind) != kind:
            return False
    return True


def _parameters(node: Node, schema: onnx.defs.OpSchema) -> Iterator[tuple[str, onnx.defs.OpSchema.FormalParameter]]:
    """Values with the formal parameter each stands for; the last one of a variadic list stands for the rest."""
    for values, formal in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        yield from ((value, formal[min(index, len(formal) - 1)]) for index, value in enumerate(values) if value)


def _type_text(graph: Graph, value: str) -> str:
    kind = graph.types.get(value)
    if not isinstance(kind, TensorType) or kind.dtype == "undefined":
        return "unknown"
    name = onnx.TensorProto.DataType.Name(onnx_dtype(kind.dtype)).lower()
    return f"tensor({name})"


def _redefined(graph: Graph, node: Node) -> bool:
    """Where the text changed, not only the types: float8 casts (23), and Mod of floats without fmod (28)."""
    kinds = [graph.tensor(value).dtype for value in (*node.inputs, *node.outputs) if value]
    if node.op in ("Cast", "CastLike", "QuantizeLinear"):
        return any(kind.startswith("float8") for kind in kinds)
    return node.op == "Mod" and not node.attr("fmod", 0) and any("float" in kind or kind == "double" for kind in kinds)
