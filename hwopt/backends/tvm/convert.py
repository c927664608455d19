"""One ONNX node -> Relax operators, by TVM's own converters."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from types import MappingProxyType
from typing import Any

import numpy as np

from hwopt.backends.tvm import functions
from hwopt.backends.tvm.indices import bounded
from hwopt.backends.tvm.layout import Expr, Values, constant
from hwopt.errors import UnsupportedError
from hwopt.ir import Graph, Node

UNREDUCED = {"ReduceL1": "abs", "ReduceL2": "abs", "ReduceSumSquare": "square", "ReduceLogSum": "log"}


class Converter:
    """Emits Relax for nodes into a BlockBuilder."""

    def __init__(self, graph: Graph, builder: Any) -> None:
        self.graph = graph
        from tvm.relax.frontend.onnx import onnx_frontend

        self.builder = builder
        self.opset = graph.opsets.get("", 21)
        self._frontend = onnx_frontend
        self._importer = onnx_frontend.ONNXGraphImporter({}, {})
        self._importer.bb = builder

    def convert(self, node: Node, inputs: list[Expr | None]) -> list[Expr]:
        """The node's outputs; raises UnsupportedError that names the node."""
        from tvm import relax

        if inputs and inputs[0] is not None and str(inputs[0].ty.dtype) == "float32":
            function = functions.function_of(node)
            if function is not None:
                return [functions.mapped(self.builder, inputs[0], function, node.op.lower(), functions.is_deep(self.graph, node))]
            if node.op in functions.EXTREMES:
                keys = functions.mapped(self.builder, inputs[0], functions.ordered, "ordered")
                found = self._converted(node, [keys, *inputs[1:]])[0]
                exact = node.op.startswith("Arg")
                return [found if exact else functions.mapped(self.builder, found, functions.disordered, "disordered")]
        if node.op in UNREDUCED and _reduces_nothing(self.graph, node):
            return [self.builder.emit(getattr(relax.op, UNREDUCED[node.op])(inputs[0]))]
        if node.op == "Mod" and not node.attr("fmod", 0) and inputs[0] is not None and "float" in str(inputs[0].ty.dtype):
            whole = dataclasses.replace(node, attrs=MappingProxyType({**node.attrs, "fmod": 1}))
            return [self.builder.emit(functions.floor_mod(self._converted(whole, inputs)[0], inputs[1]))]
        return self._converted(node, bounded(self.builder, self.graph, node, inputs))

    def _converted(self, node: Node, inputs: list[Expr | None]) -> list[Expr]:
        from tvm import relax

        attrs = self._importer._parse_attr(node.proto.attribute)
        attrs["tvm_custom"] = {"name": node.name, "num_outputs": len(node.outputs)}
        arguments = self._frontend.onnx_input(inputs)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the converters print warnings
                found = self._importer._convert_operator(node.op, arguments, attrs, self.opset)
        except Exception as error:  # converters raise whatever their helpers do
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UnsupportedError(f"TVM cannot convert it: {reason}", place=f"node {node.name} ({node.op})") from error
        if isinstance(found, relax.Tuple):
            return [self.emit(field) for field in found.fields]
        if isinstance(getattr(found, "ty", None), relax.TupleType):
            whole = self.builder.emit(found)
            return [self.builder.emit(relax.TupleGetItem(whole, index)) for index in range(len(found.ty.fields))]
        return [self.emit(found)]

    def emit(self, expr: Any) -> Expr:
        """The expression as a tensor: shapes and plain numbers become constants."""
        from tvm import relax

        if isinstance(expr, relax.ShapeExpr):
            return constant(np.array([int(dim) for dim in expr.values], np.int64))
        if isinstance(expr, np.ndarray):
            return constant(expr)
        return self.builder.emit(expr)


def _reduces_nothing(graph: Graph, node: Node) -> bool:
    """True for a reduction over no axes at all: what it does to each element is left (as ONNX Runtime has it)."""
    given = graph.constant(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] else np.zeros(0)
    empty = given is not None and given.size == 0 and node.attr("axes") is None
    return bool(node.attr("noop_with_empty_axes", 0)) and empty


def node_inputs(values: Values, node: Node, last: bool = False, rank: int = 0) -> list[Expr | None]:
    """The expressions of a node's inputs; with `last` all of them channels last, filled up to `rank` axes in front."""
    found: list[Expr | None] = []
    for value in node.inputs:
        if not value:
            found.append(None)
        elif last:
            found.append(aligned(values, value, rank))
        else:
            found.append(values.get(value))
    return found


def aligned(values: Values, value: str, rank: int) -> Expr:
    """A broadcast operand with `rank` axes, channels last."""
    array = values.constant(value)
    if array is not None:
        if array.ndim == 0:
            return constant(array)
        full = array.reshape((1,) * (rank - array.ndim) + array.shape)
        return constant(full.transpose((0, *range(2, rank), 1)))
    from hwopt.backends.tvm.layout import dims_of, reordered, reshaped

    if len(values.graph.tensor(value).shape or ()) == rank:
        return values.once(value, True)
    expr = values.get(value)
    dims = dims_of(expr)
    return values.builder.emit(reordered(reshaped(values.builder, expr, [1] * (rank - len(dims)) + dims), True))
