"""sparsify: single weights become zero, and only the others are stored."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from hwopt.errors import PassError
from hwopt.ir import Graph, Node, of_op
from hwopt.pipeline import Context, Pass, Phase, Refusal
from hwopt.target import Target
from passes._packing import BIT_OPERATORS
from passes._sparse import CRITERIA, kept_of, ratio_of, scores_of, store, stored_bytes

OPS = ("Conv", "Gemm", "MatMul")
PATTERN = re.compile(r"(\d+):(\d+)")
FORMS = (("unstructured", 0.5), ("unstructured", 0.75), ("2:4", 0.0))  # worth considering


@dataclass(frozen=True)
class Sparsify(Pass):
    """y = conv(x, W) -> y = conv(x, W') with zeros for the weights that matter least, stored as a mask and the others' values.

    pattern=unstructured: `ratio` of each layer's weights go, wherever they lie. pattern=2:4 (or any n:m): of every four input
    channels in a row the two best stay, at each output channel and tap. criterion=magnitude: |w|; activation: |w| times the
    input channel's mean square root (Sun et al. 2023, "Wanda"); obd: 1/2 w^2 times the mean square of dL/dw over samples (LeCun
    et al. 1990; needs torch). Kernels multiply the zeros too: the library holds the weights unpacked, model.onnx is smaller.
    """

    name: ClassVar[str] = "sparsify"
    summary: ClassVar[str] = "drop single weights, 2:4 or anywhere, and store the others with a bit mask"
    saves: ClassVar[frozenset[str]] = frozenset({"bytes"})  # no target has kernels that skip the zeros
    phase: ClassVar[Phase] = Phase.SHARE
    order: ClassVar[int] = 60
    knobs: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({"criterion": ("activation", "magnitude", "obd")})
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({"criterion": CRITERIA})

    pattern: str = "unstructured"  # or n:m
    ratio: float = 0.5  # of the weights that go, for pattern=unstructured
    criterion: str = "magnitude"

    def run(self, graph: Graph, ctx: Context) -> Graph:
        self.check()
        self.check_site(graph)
        chosen: dict[str, Node] = {}  # weight -> its reader
        for node in graph.nodes if self.site else of_op(graph, *OPS):
            if not self.covers(node) or (node.op not in OPS and node.name not in self.site):
                continue
            reason = self._reason(graph, node)
            if reason:
                ctx.refuse(self, node, reason)
            else:
                chosen[node.inputs[1]] = node
        if not chosen:
            return graph
        scores, edit = scores_of(graph, chosen, self.criterion, ctx, str(self)), graph.edit()
        for weight, node in chosen.items():
            store(edit, graph, node, kept_of(node, scores[weight], self.ratio, self._group()))
        return edit.finish(str(self))

    @classmethod
    def candidates(cls, graph: Graph, target: Target) -> Iterator[Pass | Refusal]:  # noqa: ARG003
        for node in of_op(graph, *OPS):
            found = [cls((node.name,), pattern, ratio or 0.5, "activation") for pattern, ratio in FORMS]
            reasons = [one._reason(graph, node) for one in found]
            if all(reasons):
                yield Refusal(cls.name, node.name, reasons[0])
            yield from (one for one, reason in zip(found, reasons, strict=True) if not reason)

    def _group(self) -> tuple[int, int] | None:
        found = PATTERN.fullmatch(self.pattern)
        return (int(found[1]), int(found[2])) if found else None

    def check(self) -> None:
        super().check()
        group = self._group()
        if self.pattern != "unstructured" and (group is None or not 0 < group[0] < group[1]):
            raise PassError(f"no pattern {self.pattern!r}", place=str(self), hint="write pattern=2:4 or pattern=unstructured")
        if not 0 < self.ratio < 1:
            raise PassError(f"ratio={self.ratio} is not between 0 and 1", place=str(self))

    def _reason(self, graph: Graph, node: Node) -> str:
        """Why this node's weights stay as they are; empty if some go."""
        if node.op not in OPS or node.domain:
            return f"is a {node.op}; sparsify takes {', '.join(OPS)}"
        weight = graph.constant(node.inputs[1])
        if weight is None or weight.dtype != np.float32 or weight.ndim < 2:
            return "its weights are no float32 constants"
        others = [user.name for user in graph.users[node.inputs[1]] if user.name != node.name]
        if others or node.inputs[1] in graph.outputs:
            return f"weight is shared with {', '.join(others) or 'the outputs'}"
        if graph.opsets.get("", 0) < BIT_OPERATORS:
            return f"masks of bits need opset {BIT_OPERATORS}"
        group = self._group()
        inputs = weight.shape[1] if node.op == "Conv" or node.attr("transB", 0) else weight.shape[-2]
        if group and inputs % group[1]:
            return f"{inputs} input channels are no multiple of {group[1]}"
        after = stored_bytes(weight.size, 1 - ratio_of(self.ratio, group))
        return f"mask and values need {after} bytes, the weights {weight.nbytes}" if after >= weight.nbytes else ""
