"""fuse-layer-norm: one node for a LayerNormalization that an exporter wrote as nine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwopt.ir import Edit, Graph, Node, of_op, scalar
from hwopt.ir.pattern import Match, closed, find, op
from hwopt.pipeline import Context, Pass, Phase

MEAN = op("ReduceMean", "x")
CENTRED = (op("Sub", "x", MEAN), op("Add", "x", op("Neg", MEAN)))
VARIANCE = op("ReduceMean", (op("Pow", CENTRED, 2.0), op("Mul", CENTRED, CENTRED)))
STABLE = op("Add", VARIANCE, "epsilon")
DEVIATION = (op("Sqrt", STABLE), op("Pow", STABLE, 0.5))
INVERSE = (op("Reciprocal", DEVIATION), op("Div", 1.0, DEVIATION), op("Pow", STABLE, -0.5))
NORMAL = (op("Div", CENTRED, DEVIATION), op("Mul", CENTRED, INVERSE))
RATIO = op("Mul", INVERSE, "scale")
SCALED = (op("Mul", NORMAL, "scale"), op("Mul", CENTRED, RATIO))
# tf.nn.batch_normalization on a row: x * (scale / deviation) + (bias - mean * (scale / deviation))
FOLDED = op("Add", op("Mul", "x", RATIO), op("Sub", "bias", op("Mul", MEAN, RATIO)))
LAYER_NORM = (op("Add", SCALED, "bias"), FOLDED, *SCALED, *NORMAL)


@dataclass(frozen=True)
class FuseLayerNorm(Pass):
    """(x - mean(x)) / sqrt(mean((x - mean(x))^2) + epsilon) [* scale [+ bias]] -> LayerNormalization(x, scale, bias).

    The means run over the last axes and keep them; scale and bias are constants over those axes, all others are left
    behind the new node. The square may be a Pow or a product, the division a Reciprocal, the end TensorFlow's
    x * ratio + (bias - mean * ratio). Needs float32 and opset 17. Ba, Kiros and Hinton 2016.
    """

    name: ClassVar[str] = "fuse-layer-norm"
    summary: ClassVar[str] = "one LayerNormalization node for its exploded forms"
    phase: ClassVar[Phase] = Phase.CLEAN
    exact: ClassVar[bool] = True
    order: ClassVar[int] = 20

    def run(self, graph: Graph, ctx: Context) -> Graph:
        if graph.opsets.get("", 0) < 17:
            return graph
        self.check_site(graph)
        edit = graph.edit()
        inner: set[str] = set()  # nodes that have become part of a LayerNormalization
        for node in reversed(list(of_op(graph, "Add", "Mul", "Div"))):
            if node.name in inner or not self.covers(node):
                continue
            match = next((m for m in (find(graph, form, node.output) for form in LAYER_NORM) if m and _affine(graph, m)), None)
            if match is None:
                continue
            reason = _unfit(graph, match, node)
            if reason:
                ctx.refuse(self, node, reason)
            else:
                _fuse(edit, graph, match, node)
                inner.update(part.name for part in match.nodes)
        return edit.finish(str(self))


def _affine(graph: Graph, match: Match) -> bool:
    """True if scale and bias, where there are any, are constants of the normalised axes' shape or broadcast to it."""
    shape = _normalised(graph, match)
    for name in ("scale", "bias"):
        array = graph.constant(match[name]) if name in match.values else np.zeros(1)
        if array is None or shape is None or not _broadcasts(array.shape, shape):
            return False
    return True


def _broadcasts(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Leading ones aside, the shape stretches to the wanted one."""
    lead = len(shape) - len(wanted)
    own = shape[lead:] if lead > 0 and set(shape[:lead]) == {1} else shape
    return len(own) <= len(wanted) and all(a in (1, b) for a, b in zip(own[::-1], wanted[::-1], strict=False))


def _normalised(graph: Graph, match: Match) -> tuple[int, ...] | None:
    """The sizes of the last axes, if every mean runs over exactly these and keeps them."""
    shape = graph.tensor(match["x"]).shape
    if not shape:
        return None
    found = {tuple(sorted(axis % len(shape) for axis in _axes(graph, mean))) for mean in match.of_op("ReduceMean")}
    axes = found.pop() if len(found) == 1 else ()
    sizes = tuple(size for size in shape[len(shape) - len(axes) :] if isinstance(size, int)) if axes else ()
    return sizes if len(sizes) == len(axes) > 0 and axes == tuple(range(axes[0], len(shape))) else None


def _axes(graph: Graph, mean: Node) -> tuple[int, ...]:
    """The axes of a ReduceMean that keeps its dimensions: an attribute until opset 17, an input from 18 on; () if unclear."""
    if mean.attr("keepdims", 1) != 1:
        return ()
    if len(mean.inputs) < 2:
        return tuple(mean.attr("axes", ()))
    array = graph.constant(mean.inputs[1])
    return () if array is None else tuple(int(axis) for axis in array.ravel())


def _unfit(graph: Graph, match: Match, node: Node) -> str:
    """Why a matched LayerNormalization cannot be one node, or ""."""
    if graph.types.get(match["x"]) != graph.types.get(node.output):
        return "broadcasting changes the shape"
    if graph.tensor(match["x"]).dtype != "float32":
        return f"computes in {graph.tensor(match['x']).dtype}"
    if scalar(graph, match["epsilon"]) is None:
        return "epsilon is no constant"
    return "" if closed(graph, match) else "an intermediate value is read elsewhere"


def _fuse(edit: Edit, graph: Graph, match: Match, node: Node) -> None:
    shape = _normalised(graph, match) or ()
    inputs = [match["x"]]
    for name, default in (("scale", 1.0), ("bias", 0.0)):
        value = match.values.get(name, "")
        array = graph.constant(value) if value else np.full(shape, default, np.float32)
        if array is None or (name == "bias" and not value):
            continue
        if array.shape != shape:
            lead = max(array.ndim - len(shape), 0)
            value = edit.param(f"{node.name}_{name}", np.broadcast_to(array.reshape(array.shape[lead:]), shape))
        inputs.append(value or edit.param(f"{node.name}_{name}", array))
    epsilon = scalar(graph, match["epsilon"])
    edit.replace(node, op="LayerNormalization", inputs=tuple(inputs), attrs={"axis": -len(shape), "epsilon": epsilon})
