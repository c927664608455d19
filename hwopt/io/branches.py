"""An If whose condition is a constant is its taken branch."""

from __future__ import annotations

from types import MappingProxyType

import onnx

from hwopt.errors import ModelError
from hwopt.io.proto import dense, nodes_of
from hwopt.ir import Edit, Graph, Node, of_op
from hwopt.ir.graph import with_renamed


def inline_branches(graph: Graph) -> Graph:
    """`If(true, then, else) -> then`, for every If whose condition is a parameter; the same graph if there is none.

    Values of the branch get names that the graph does not have yet; its initializers become parameters.
    """
    edit = graph.edit()
    for node in of_op(graph, "If"):
        condition = graph.constant(node.inputs[0])
        if condition is not None:
            _inline(edit, node, _taken(node, "then_branch" if condition.all() else "else_branch"))
    return edit.finish("inline-branches")


def _taken(node: Node, branch: str) -> onnx.GraphProto:
    body = node.attr(branch)
    if body is None or len(body.output) < len(node.outputs):
        raise ModelError(
            f"{branch} does not give its outputs", place=f"node {node.name} (If)", hint="the model breaks ONNX's rules"
        )
    return body


def _inline(edit: Edit, branch_of: Node, branch: onnx.GraphProto) -> None:
    renamed: dict[str, str] = {}
    for tensor in branch.initializer:
        renamed[tensor.name] = edit.param(f"{branch_of.name}_{tensor.name}", onnx.numpy_helper.to_array(tensor))
    for sparse in branch.sparse_initializer:
        renamed[sparse.values.name] = edit.param(f"{branch_of.name}_{sparse.values.name}", dense(sparse))
    inner = nodes_of(branch)
    renamed.update({value: edit.fresh(f"{branch_of.name}_{value}") for node in inner for value in node.outputs if value})
    for node in inner:
        attrs = {key: with_renamed(a, renamed) if isinstance(a, onnx.GraphProto) else a for key, a in node.attrs.items()}
        edit.emit(
            node.op,
            (renamed.get(value, value) for value in node.inputs),
            attrs=MappingProxyType(attrs),
            name=f"{branch_of.name}_{node.name}",
            outputs=[renamed.get(value, value) for value in node.outputs],
            domain=node.domain,
            like=branch_of,
        )
    for outer, result in zip(branch_of.outputs, branch.output, strict=False):
        if outer:
            edit.forward(outer, renamed.get(result.name, result.name))
