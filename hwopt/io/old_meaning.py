"""What ONNX's version converter leaves out: operators that kept their name and changed their meaning."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from hwopt.errors import UnsupportedError

HARDMAX = 13  # from this opset on along one axis; before over all axes from `axis` on, as one
RESIZE = 11  # from this opset on with coordinates and roundings to choose
SHRINKS = 10  # from this opset on; before, Upsample only grew


def spell_out(model: onnx.ModelProto, version: int) -> None:
    """Before the conversion, in place: `Hardmax(x)` of old becomes `Reshape(Hardmax(Flatten(x)), Shape(x))`."""
    if version < HARDMAX:
        for graph in _graphs(model.graph):
            _replace(graph, "Hardmax", _flattened)


def keep_meaning(model: onnx.ModelProto, version: int, known: Mapping[str, np.ndarray]) -> None:
    """After the conversion, in place: `Upsample` and `Resize` of old count coordinates from the first pixel's corner.

    Nearest ones take the pixel before, in ONNX Runtime behind it on axes that shrink: two nodes if there are both kinds.
    Raises UnsupportedError where that depends on scales that are computed.
    """
    if version >= RESIZE:
        return
    scales = {name: array for name, array in known.items() if array.size}
    for graph in _graphs(model.graph):
        scales.update({one.name: numpy_helper.to_array(one) for one in graph.initializer})
        given = (node for node in graph.node if node.op_type == "Constant" and node.attribute[0].name == "value")
        scales.update({node.output[0]: numpy_helper.to_array(node.attribute[0].t) for node in given})
    for graph in _graphs(model.graph):
        _replace(graph, "Resize", functools.partial(_asymmetric, known=scales, shrinks=version >= SHRINKS))


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _graphs(inner)


def _replace(graph: onnx.GraphProto, op: str, rewritten: Callable[[onnx.NodeProto], list[onnx.NodeProto]]) -> None:
    if any(node.op_type == op and not node.domain for node in graph.node):
        before = onnx.GraphProto.FromString(graph.SerializeToString()).node
        del graph.node[:]
        graph.node.extend(
            new for node in before for new in (rewritten(node) if node.op_type == op and not node.domain else [node])
        )


def _flattened(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    axis = next((one.i for one in node.attribute if one.name == "axis"), 1)
    value, (result,) = node.input[0], node.output
    flat, chosen, shape = (f"{result}_{part}" for part in ("flat", "chosen", "shape"))
    return [
        helper.make_node("Flatten", [value], [flat], axis=axis),
        helper.make_node("Hardmax", [flat], [chosen], name=node.name, axis=1),
        helper.make_node("Shape", [value], [shape]),
        helper.make_node("Reshape", [chosen, shape], [result]),
    ]


def _asymmetric(node: onnx.NodeProto, known: Mapping[str, np.ndarray], shrinks: bool) -> list[onnx.NodeProto]:
    mode = next((one.s for one in node.attribute if one.name == "mode"), b"nearest")
    mode = b"linear" if mode == b"bilinear" else mode
    attrs: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": "asymmetric"}
    value, roi, scales = node.input[:3]
    (result,) = node.output
    if mode != b"nearest" or not shrinks:
        return [helper.make_node("Resize", [value, roi, scales], [result], name=node.name, nearest_mode="floor", **attrs)]
    if scales not in known:
        raise UnsupportedError(
            f"Resize {result} of an opset below {RESIZE} has computed scales", hint=f"export it with opset {RESIZE} or newer"
        )
    ratios = known[scales]
    down, up = np.minimum(ratios, 1), np.maximum(ratios, 1)
    found = [(part, rounding) for part, rounding in ((down, "ceil"), (up, "floor")) if np.any(part != 1)] or [(up, "floor")]
    nodes = []
    for index, (part, rounding) in enumerate(found):
        target = result if index == len(found) - 1 else f"{result}_{rounding}"
        name = f"{result}_scales_{rounding}"
        nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(part.astype(np.float32))))
        nodes.append(helper.make_node("Resize", [value, roi, name], [target], nearest_mode=rounding, **attrs))
        value = target
    return nodes
