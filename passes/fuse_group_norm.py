"""fuse-group-norm: one node for a GroupNormalization that an exporter wrote as an instance norm of reshaped groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hwopt.ir import Edit, Graph, Node, of_op
from hwopt.pipeline import Context, Pass, Phase
from passes._affine import affine_of


@dataclass(frozen=True)
class FuseGroupNorm(Pass):
    """Reshape(InstanceNormalization(Reshape(x to groups), s, b)) [* scale [+ bias]] -> GroupNormalization(x, scale, bias).

    The groups are of channels that lie together, scale and bias constants per channel; other readers of what is between end it.
    torch's exporters write it so. One group per channel becomes an InstanceNormalization. Needs float32 and opset 21.
    Wu and He 2018.
    """

    name: ClassVar[str] = "fuse-group-norm"
    summary: ClassVar[str] = "one GroupNormalization node for the instance norm of reshaped groups"
    phase: ClassVar[Phase] = Phase.CLEAN
    exact: ClassVar[bool] = True
    order: ClassVar[int] = 20

    def run(self, graph: Graph, ctx: Context) -> Graph:
        if graph.opsets.get("", 0) < 21:
            return graph
        self.check_site(graph)
        edit = graph.edit()
        for node in of_op(graph, "InstanceNormalization"):
            if self.covers(node) and (back := _grouped(graph, node)) is not None:
                _fuse(graph, edit, node, back)
        return edit.finish(str(self))


def _grouped(graph: Graph, norm: Node) -> Node | None:
    """The Reshape that brings the normalised groups back to channels, or None where there are no groups."""
    flat, back = graph.producer.get(norm.inputs[0]), graph.sole_user(norm.output)
    reshapes = all(node is not None and node.op == "Reshape" for node in (flat, back))
    if flat is None or back is None or not reshapes or any(graph.constant(value) is None for value in norm.inputs[1:]):
        return None
    before, groups, after = (graph.tensor(value) for value in (flat.inputs[0], flat.output, back.output))
    if before != after or not (before.static and groups.static) or before.dtype != "float32" or len(before.dims) < 3:
        return None
    return back if groups.dims[0] == before.dims[0] and before.dims[1] % groups.dims[1] == 0 else None


def _fuse(graph: Graph, edit: Edit, norm: Node, back: Node) -> None:
    channels, groups = graph.tensor(back.output).dims[1], graph.tensor(norm.output).dims[1]
    scale, bias = (np.repeat(graph.params[value].astype(np.float64), channels // groups) for value in norm.inputs[1:])
    last, source = back, graph.producer[norm.inputs[0]].inputs[0]
    while (user := graph.sole_user(last.output)) is not None and user.op in ("Mul", "Add"):
        affine = affine_of(graph, user)
        if affine is None or affine.axis not in (None, 1):
            break
        scale, bias, last = scale * affine.scale, bias * affine.scale + affine.shift, user
    numbers = [edit.param(f"{norm.name}_{name}", one.astype(np.float32)) for name, one in (("scale", scale), ("bias", bias))]
    attrs = {"epsilon": norm.attr("epsilon", 1e-5), **({"num_groups": groups} if groups != channels else {})}
    op = "GroupNormalization" if groups != channels else "InstanceNormalization"
    edit.forward(last, edit.emit(op, [source, *numbers], attrs=attrs, like=norm))
