"""flatten-conv: a convolution over an image one pixel wide becomes one over a line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from hwopt.ir import Graph, Node, of_op
from hwopt.pipeline import Context, Pass, Phase


@dataclass(frozen=True)
class FlattenConv(Pass):
    """Squeeze(Conv(x)) -> Conv(Squeeze(x)), where the squeezed axis of the image has one pixel and the kernel too.

    Exporters from TensorFlow and JAX write one-dimensional convolutions like that. What follows the Squeeze (a bias, an
    activation) then follows the convolution, so that it folds into its weights and its kernel. Weights must be constant.
    """

    name: ClassVar[str] = "flatten-conv"
    summary: ClassVar[str] = "convolutions over images one pixel wide become one-dimensional"
    phase: ClassVar[Phase] = Phase.CLEAN
    exact: ClassVar[bool] = True
    order: ClassVar[int] = 25  # before fold-batch-norm, which then folds what follows

    def run(self, graph: Graph, ctx: Context) -> Graph:
        self.check_site(graph)
        edit = graph.edit()
        for node in of_op(graph, "Conv"):
            squeeze = graph.sole_user(node.output)
            if not self.covers(node) or squeeze is None or squeeze.op != "Squeeze":
                continue
            axis = squeezed_axis(graph, node, squeeze)
            weight = graph.constant(node.inputs[1])
            if axis is None or weight is None:
                continue
            data = edit.emit("Squeeze", (node.inputs[0], *squeeze.inputs[1:]), attrs=squeeze.attrs, like=squeeze)
            line = edit.param(f"{node.inputs[1]}_line", weight.squeeze(axis))
            outputs = (edit.fresh(f"{node.output}_line"),)
            edit.replace(node, inputs=(data, line, *node.inputs[2:]), attrs=without_axis(node, axis - 2), outputs=outputs)
            edit.forward(squeeze, outputs[0])
        return edit.finish(str(self))


def squeezed_axis(graph: Graph, node: Node, squeeze: Node) -> int | None:
    """2 or 3: the axis of the image that the Squeeze removes and that the convolution leaves alone."""
    shapes = [graph.tensor(value).shape for value in (node.inputs[0], node.output, node.inputs[1])]
    axes = squeeze.attr("axes")
    if axes is None and len(squeeze.inputs) > 1:
        array = graph.constant(squeeze.inputs[1])
        axes = None if array is None else tuple(array.reshape(-1).tolist())
    if any(shape is None or len(shape) != 4 for shape in shapes) or axes is None or len(axes) != 1 or axes[0] % 4 < 2:
        return None
    axis = axes[0] % 4
    pads = node.attr("pads", (0, 0, 0, 0))
    alone = all(shape is not None and shape[axis] == 1 for shape in shapes) and pads[axis - 2] == pads[axis] == 0
    return axis if alone else None


def without_axis(node: Node, axis: int) -> Mapping[str, Any]:
    """The attributes of the convolution over the other axis of the image."""
    found = dict(node.attrs)
    for key in ("kernel_shape", "strides", "dilations", "pads"):
        if key in found:
            found[key] = tuple(value for index, value in enumerate(found[key]) if index % 2 != axis)
    return found
