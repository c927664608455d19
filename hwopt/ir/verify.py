"""The rules of the IR; a pass that breaks one is stopped where it did."""

from __future__ import annotations

import onnx

from hwopt.errors import VerifyError
from hwopt.ir.graph import Graph, Node
from hwopt.ir.types import TensorType, type_of


def verify(graph: Graph) -> None:
    """Raise VerifyError, naming the node or value, unless the graph is well formed.

    Names are unique, every value has one producer that comes before its readers, inputs and parameters are typed and
    parameters agree with their types, outputs exist, and each node obeys its operator's ONNX schema.
    """
    _unique(graph)
    _defined_before_use(graph)
    _typed(graph)
    context = onnx.checker.C.CheckerContext()
    context.ir_version = 10
    context.opset_imports = dict(graph.opsets)
    for node in graph.nodes:
        _schema(node, context)


def _unique(graph: Graph) -> None:
    seen: set[str] = set()
    for node in graph.nodes:
        if not node.name:
            raise VerifyError(f"a {node.op} node has no name", place=graph.name)
        if node.name in seen:
            raise VerifyError("two nodes have this name", place=f"node {node.name}")
        seen.add(node.name)


def _defined_before_use(graph: Graph) -> None:
    defined = {*graph.inputs, *graph.params}
    for node in graph.nodes:
        for value in node.reads:
            if value not in defined:
                late = "later" if value in graph.producer else "never"
                raise VerifyError(f"reads {value}, which is {late} defined", place=f"node {node.name} ({node.op})")
        for value in filter(None, node.outputs):
            if value in defined:
                raise VerifyError(f"defines {value} a second time", place=f"node {node.name} ({node.op})")
            defined.add(value)
    for value in graph.outputs:
        if value not in defined:
            raise VerifyError("the graph output is never defined", place=f"value {value}")


def _typed(graph: Graph) -> None:
    for value in graph.inputs:
        if value not in graph.types:
            raise VerifyError("the graph input has no type", place=f"value {value}")
    for name, array in graph.params.items():
        if graph.types.get(name) != type_of(array):
            raise VerifyError(f"the parameter is {type_of(array)} but typed {graph.types.get(name)}", place=f"value {name}")
        if array.flags.writeable:
            raise VerifyError("the parameter's array is writeable", place=f"value {name}")
    for value, kind in graph.types.items():
        if isinstance(kind, TensorType) and any(isinstance(d, int) and d < 0 for d in kind.shape or ()):
            raise VerifyError(f"has a negative dimension: {kind}", place=f"value {value}")


def _schema(node: Node, context: onnx.checker.C.CheckerContext) -> None:
    if node.domain not in ("", "ai.onnx") or any(isinstance(attr, onnx.GraphProto) for attr in node.attrs.values()):
        return
    try:
        onnx.checker.check_node(node.proto, context)
    except onnx.checker.ValidationError as error:
        reason = str(error).strip().splitlines()[0]
        raise VerifyError(f"breaks its ONNX schema: {reason}", place=f"node {node.name} ({node.op})") from error
