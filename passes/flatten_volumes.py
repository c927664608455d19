"""flatten-volumes: a convolution over a volume becomes one over pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hwopt.ir import Edit, Graph, Node, of_op
from hwopt.pipeline import Context, Pass, Phase


@dataclass(frozen=True)
class FlattenVolumes(Pass):
    """Conv(x [n, c, d, h, w], W [o, c, k, ...]) -> a Conv over n * d pictures of k * c channels: k neighbours in depth.

    Exact: the same products are summed. Kernels for pictures are fast and know 8 bits; the data are copied k times before them.
    Needs one group, constant weights and known sizes.
    """

    name: ClassVar[str] = "flatten-volumes"
    summary: ClassVar[str] = "convolutions over volumes become convolutions over pictures with more channels"
    phase: ClassVar[Phase] = Phase.CLEAN
    exact: ClassVar[bool] = True
    order: ClassVar[int] = 40  # when batch norms have been folded

    def run(self, graph: Graph, ctx: Context) -> Graph:
        self.check_site(graph)
        edit = graph.edit()
        for node in of_op(graph, "Conv"):
            weight = graph.constant(node.inputs[1])
            if not self.covers(node) or weight is None or weight.ndim != 5:
                continue
            known = graph.tensor(node.inputs[0]).static and graph.tensor(node.output).static
            if not known or node.attr("group", 1) != 1 or node.attr("auto_pad", "NOTSET") != "NOTSET":
                ctx.refuse(self, node, "has groups, or sizes that are not known")
                continue
            _flatten(graph, edit, node, weight)
        return edit.finish(str(self))


def _flatten(graph: Graph, edit: Edit, node: Node, weight: np.ndarray) -> None:
    out, channels = graph.tensor(node.output).dims, graph.tensor(node.inputs[0]).dims[1]
    strides, dilations, pads = node.attr("strides", (1,) * 3), node.attr("dilations", (1,) * 3), node.attr("pads", (0,) * 6)
    taps = weight.shape[2]

    def emit(op: str, *inputs: str, **attrs: Any) -> str:
        return edit.emit(op, inputs, attrs=attrs, name=f"{node.name}_{op.lower()}", like=node)

    def numbers(*values: int) -> str:
        return edit.param(f"{node.name}_numbers", np.array(values, np.int64))

    value = node.inputs[0]
    if pads[0] or pads[3]:
        value = emit("Pad", value, numbers(pads[0], pads[3]), "", numbers(2))
    span = (out[2] - 1) * strides[0] + 1
    places = [tap * dilations[0] for tap in range(taps)]
    slices = [emit("Slice", value, numbers(at), numbers(at + span), numbers(2), numbers(strides[0])) for at in places]
    beside = emit("Concat", *slices, axis=1) if taps > 1 else slices[0]
    turned = emit("Transpose", beside, perm=(0, 2, 1, 3, 4))
    rows = graph.tensor(node.inputs[0]).dims[3:]
    pictures = emit("Reshape", turned, numbers(out[0] * out[2], taps * channels, *rows))
    flat = edit.param(f"{node.inputs[1]}_flat", weight.transpose(0, 2, 1, 3, 4).reshape(weight.shape[0], -1, *weight.shape[3:]))
    attrs = {"kernel_shape": weight.shape[3:], "strides": strides[1:], "dilations": dilations[1:]}
    found = edit.fresh(f"{node.output}_pictures")
    edit.replace(
        node, inputs=(pictures, flat, *node.inputs[2:]), outputs=(found,),
        attrs={**attrs, "pads": (*pads[1:3], *pads[4:6]), "group": 1},
    )  # fmt: skip
    volume = emit("Reshape", found, numbers(out[0], out[2], out[1], *out[3:]))
    edit.forward(node.output, emit("Transpose", volume, perm=(0, 2, 1, 3, 4)))
