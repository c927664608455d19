"""Write the bfloat16 form: Cast pairs that round what layers read, weights stored as bfloat16, residuals on the way as well."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import MappingProxyType

import numpy as np

from hwopt.analysis.bfloat16 import bfloat16_operands, narrows, widened
from hwopt.analysis.regions import Region, regions
from hwopt.ir import Edit, Graph, Node, numpy_dtype, onnx_dtype, part
from passes._quantize_layers import QUANTIZED, lookup_of, unfit

OPS = ("Conv", "Gemm", "MatMul")
# what ONNX Runtime moves as bfloat16, which has its kernels for little else
_MOVES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Transpose", "Slice", "Gather", "Concat")
BFLOAT16, FLOAT32 = onnx_dtype("bfloat16"), onnx_dtype("float32")


def layer_problem(graph: Graph, node: Node) -> str:
    """Why a layer must stay float32, or ""; QUANTIZED if it computes in bfloat16 or 8 bits already."""
    if node.op not in OPS:
        return f"{node.op} has no bfloat16 kernel"
    if bfloat16_operands(graph, node) is not None:
        return QUANTIZED
    if reason := unfit(graph, node):
        return reason.replace("integer kernel", "bfloat16 kernel")
    right = node.inputs[1]
    if graph.tensor(right).dtype != "float32":
        return f"its weights are {graph.tensor(right).dtype}, not float32"
    if node.op == "MatMul" and len(graph.tensor(right).shape or ()) < 2:
        return "it multiplies with a vector"
    if node.op != "MatMul" and graph.constant(right) is None and not lookup_of(graph, right):
        return "weights are computed"
    beta, bias = node.attr("beta", 1.0), node.inputs[2] if len(node.inputs) > 2 else ""
    if node.op == "Gemm" and beta != 1.0 and bias and graph.constant(bias) is None:
        return "its bias is computed"
    return ""


class Rounding:
    """One graph on its way to bfloat16: first which values are rounded, then the nodes that do it."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.edit = graph, graph.edit()
        self.ends = {region.output: region for region in regions(graph)}
        self.rounded: dict[str, None] = {}
        self.narrow: dict[str, str] = {}
        self.wide: dict[str, str] = {}
        self.inputs: dict[str, list[str]] = {}
        self.scaled: set[str] = set()

    def layers(self, nodes: Sequence[Node]) -> Edit:
        """The edit that computes these layers in bfloat16."""
        for node in nodes:
            self._demand(node.inputs[0])
            if not self._weigh(node):
                self._demand(node.inputs[1])
        wanted = {node.name for node in nodes}
        for value in self.rounded:
            for user in self.graph.users.get(value, ()):
                self._reroute(user, value, user.name in wanted)
        for name, inputs in self.inputs.items():
            node = self.graph.node[name]
            attrs = {key: attr for key, attr in node.attrs.items() if key not in ("alpha", "beta")}
            changes = {"attrs": MappingProxyType(attrs)} if name in self.scaled else {}
            self.edit.replace(node, inputs=tuple(inputs), **changes)
        return self.edit

    def _demand(self, value: str) -> None:
        """Have the value rounded, and with it whatever else of full size its kernel reads, or what it is a copy of."""
        waiting = [value]
        while waiting:
            value = waiting.pop()
            skipped = value in self.rounded or value in self.graph.params or bool(widened(self.graph, value))
            if skipped or self.graph.tensor(value).dtype != "float32":
                continue
            self.rounded[value] = None
            node, region = self.graph.producer.get(value), self.ends.get(value)
            if node is not None and self._moves(node):
                waiting.extend(node.inputs if node.op == "Concat" else node.inputs[:1])
            elif region is not None:
                waiting.extend(self._read_beside(region))

    def _moves(self, node: Node) -> bool:
        """True if the node gives the same result on rounded numbers, as bfloat16."""
        data = node.inputs if node.op == "Concat" else node.inputs[:1]
        floats = all(value not in self.graph.params and self.graph.tensor(value).dtype == "float32" for value in data)
        return (
            node.op in _MOVES and node.domain == "" and floats and not any(value in self.graph.outputs for value in node.outputs)
        )

    def _read_beside(self, region: Region) -> Iterator[str]:
        """The full-size values that a kernel reads besides what its layer multiplies: residuals, what a pool looks at."""
        graph, anchor = self.graph, region.anchor
        if region.kind == "pool":
            yield anchor.inputs[0]
        readers = (anchor, *region.epilogue) if region.kind == "elementwise" else region.epilogue
        shape = graph.tensor(region.output).shape
        for node in readers:
            yield from (value for value in node.inputs if value in region.inputs and graph.tensor(value).shape == shape)

    def _reroute(self, user: Node, value: str, layer: bool) -> None:
        """Have a node read the rounded value; what is stored in float32 anyway stays so for all but the layers."""
        kept = value in self.graph.inputs or value in self.graph.outputs
        if (kept and not layer) or narrows(self.graph, user) or user.op == "QuantizeLinear":
            return
        inputs = self.inputs.setdefault(user.name, list(user.inputs))
        for index, read in enumerate(user.inputs):
            if read == value and not (kept and index > 1):
                inputs[index] = self._widened(value)

    def _widened(self, value: str) -> str:
        if value not in self.wide:
            self.wide[value] = self._cast(self._narrowed(value), FLOAT32, f"{value}_widened")
        return self.wide[value]

    def _narrowed(self, value: str) -> str:
        """The bfloat16 form of a value: what the graph has already, a copy of other bfloat16 values, or rounded."""
        if value in self.narrow:
            return self.narrow[value]
        node = self.graph.producer.get(value)
        known = widened(self.graph, value) or next((u.output for u in self.graph.users[value] if narrows(self.graph, u)), "")
        if not known and node is not None and self._moves(node):
            count = len(node.inputs) if node.op == "Concat" else 1
            inputs = [*map(self._narrowed, node.inputs[:count]), *node.inputs[count:]]
            outputs = [self.edit.fresh(f"{value}_bfloat16")]
            known = self.edit.emit(node.op, inputs, attrs=node.attrs, name=part(node, "bf16"), outputs=outputs, like=node)
        self.narrow[value] = known or self._cast(value, BFLOAT16, f"{value}_bfloat16")
        return self.narrow[value]

    def _cast(self, value: str, to: int, name: str) -> str:
        output = self.edit.fresh(name)
        return self.edit.emit("Cast", [value], attrs={"to": to}, name=f"{name}_cast", outputs=[output])

    def _weigh(self, node: Node) -> bool:
        """Round constant weights, or what they are looked up in; alpha and beta of a Gemm go into weights and bias."""
        source = node.inputs[1]
        lookup = lookup_of(self.graph, source)
        array = self.graph.constant(lookup[0].inputs[0] if lookup else source)
        if array is None:
            return bool(widened(self.graph, source))
        inputs = self.inputs.setdefault(node.name, list(node.inputs))
        alpha, beta = (float(node.attr(key, 1.0)) if node.op == "Gemm" else 1.0 for key in ("alpha", "beta"))
        if alpha != 1.0 or beta != 1.0:
            self.scaled.add(node.name)
        bias = self.graph.constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if bias is not None and beta != 1.0:
            inputs[2] = self.edit.param(f"{node.inputs[2]}_scaled", bias * np.float32(beta))
        key = f"{source} x {alpha}"
        if key not in self.wide:
            rounded = (array * np.float32(alpha)).astype(numpy_dtype("bfloat16"))
            value = self.edit.param(f"{lookup[0].inputs[0] if lookup else source}_bfloat16", rounded)
            for step in lookup:  # the same decoding, of the rounded codebook
                value = self.edit.emit(step.op, [value, *step.inputs[1:]], attrs=step.attrs, name=part(step, "bf16"), like=step)
            self.wide[key] = self._cast(value, FLOAT32, f"{source}_widened")
        inputs[1] = self.wide[key]
        return True
