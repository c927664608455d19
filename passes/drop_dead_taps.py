"""drop-dead-taps: what a convolution's kernel only ever multiplies with padding is removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hwopt.ir import Graph, Node, of_op
from hwopt.pipeline import Context, Pass, Phase


@dataclass(frozen=True)
class DropDeadTaps(Pass):
    """Conv(x, W) -> Conv(x, W without its outer rows and columns), where those lie in the padding for every output.

    So do those of atrous convolutions whose dilation exceeds the image: at 256 x 256 pixels two of the three of a DeepLab's
    pyramid (16 x 16 positions, dilations 24 and 36) are 1 x 1 in truth. Needs constant weights and known sizes.
    Chen et al., "Rethinking atrous convolution for semantic image segmentation", 2017, section 3.3.
    """

    name: ClassVar[str] = "drop-dead-taps"
    summary: ClassVar[str] = "remove the parts of convolutions' kernels that only ever see padding"
    phase: ClassVar[Phase] = Phase.CLEAN
    exact: ClassVar[bool] = True
    order: ClassVar[int] = 20  # before convolutions change their form

    def run(self, graph: Graph, ctx: Context) -> Graph:
        self.check_site(graph)
        edit = graph.edit()
        for node in of_op(graph, "Conv"):
            weight = graph.constant(node.inputs[1])
            if weight is None or not self.covers(node):
                continue
            cuts = dead_taps(graph, node, weight.shape[2:])
            if not any(before or after for before, after in cuts):
                continue
            kept = [slice(before, size - after) for (before, after), size in zip(cuts, weight.shape[2:], strict=True)]
            live = edit.param(f"{node.inputs[1]}_live", weight[(slice(None), slice(None), *kept)])
            edit.replace(node, inputs=(node.inputs[0], live, *node.inputs[2:]), attrs=_without(node, weight.shape[2:], cuts))
        return edit.finish(str(self))


def dead_taps(graph: Graph, node: Node, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """How many (first, last) of the taps along each axis lie outside of the image for every output; one always stays."""
    data, out = (graph.tensor(value).shape for value in (node.inputs[0], node.output))
    found = []
    for axis, taps in enumerate(sizes):
        size, results = (shape[axis + 2] if shape else None for shape in (data, out))
        if isinstance(size, int) and isinstance(results, int):
            found.append(_dead(node, axis, size, results, taps))
        else:
            found.append((0, 0))
    return found


def _dead(node: Node, axis: int, size: int, results: int, taps: int) -> tuple[int, int]:
    """Of one axis; only as far as the padding reaches, which cannot become negative."""
    spatial = len(node.attr("pads", ())) // 2
    if not spatial:
        return 0, 0
    step, dilation = (node.attr(name, (1,) * spatial)[axis] for name in ("strides", "dilations"))
    before, after = node.attr("pads")[axis], node.attr("pads")[axis + spatial]
    last = (results - 1) * step - before  # where the last output reads its first tap
    low = next((tap for tap in range(taps) if last + tap * dilation >= 0), taps - 1)
    high = next((tap for tap in range(taps) if (taps - 1 - tap) * dilation - before < size), taps - 1)
    low, high = min(low, before // dilation), min(high, after // dilation)
    return (low, high) if low + high < taps else (0, 0)


def _without(node: Node, sizes: tuple[int, ...], cuts: list[tuple[int, int]]) -> Mapping[str, Any]:
    """The attributes of the convolution with fewer taps; a single tap has no dilation."""
    spatial = len(cuts)
    dilations, pads = node.attr("dilations", (1,) * spatial), node.attr("pads")
    left = [size - before - after for size, (before, after) in zip(sizes, cuts, strict=True)]
    ends = [pad - cut * dilation for pad, cut, dilation in zip(
        pads, [*(before for before, _ in cuts), *(after for _, after in cuts)], (*dilations, *dilations), strict=True
    )]  # fmt: skip
    spread = tuple(1 if taps == 1 else dilation for taps, dilation in zip(left, dilations, strict=True))
    return {**node.attrs, "kernel_shape": tuple(left), "dilations": spread, "pads": tuple(ends)}
