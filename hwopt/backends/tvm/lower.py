"""Graph -> Relax: templates for convolutions and matmuls, integer kernels for quantized data, TVM's operators for the rest.

The Relax function that comes out is a straight list of calls of PrimFuncs; `lowered` runs TVM's fusion over what is not
scheduled yet and gives those kernels our CPU schedule.
"""

from __future__ import annotations

from typing import Any

from hwopt.analysis import bfloat16
from hwopt.analysis.regions import ELEMENTWISE, Region, constant_nodes, regions
from hwopt.backends.tvm import (
    convert,
    integer,
    kernels,
    normalizing,
    padding,
    pooled,
    pooling,
    resizing,
    rowwise,
    scanning,
    sorting,
    table,
    windows,
)
from hwopt.backends.tvm.coded import coded_kernel, expanded_because
from hwopt.backends.tvm.fold import constant_values, folded
from hwopt.backends.tvm.functions import is_deep
from hwopt.backends.tvm.heads import composed
from hwopt.backends.tvm.kernels.winograd_schedule import WinogradSpec
from hwopt.backends.tvm.layout import Values, convert_bfloat16, dims_of, reordered, to_first, to_last
from hwopt.backends.tvm.origins import naming_builder, with_origins
from hwopt.backends.tvm.templates import Choose, Templates
from hwopt.backends.tvm.weighted import Kernel, weighted_kernel
from hwopt.errors import UnsupportedError
from hwopt.ir import Graph, Node
from hwopt.target import Target

REORDERED = ("Concat", "Split", "Slice", "Pad", "Resize", "Upsample", "DepthToSpace", "SpaceToDepth")
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def lower(graph: Graph, target: Target, threads: int, choose: Choose = kernels.default_schedule, compact: bool = False) -> Any:
    """A Relax IRModule whose `main` computes the graph; kernels of templates are in it, the rest are Relax operators."""
    return Lowering(folded(graph), target, threads, choose, compact).module()


class Lowering:
    """One graph on its way to Relax."""

    def __init__(
        self, graph: Graph, target: Target, threads: int, choose: Choose = kernels.default_schedule, compact: bool = False
    ) -> None:
        self.graph = graph
        self.builder = naming_builder()
        self.values = Values(graph, self.builder)
        self.values.arrays.update(constant_values(graph))
        self.converter = convert.Converter(graph, self.builder)
        self.compact = compact  # keep weights as codes even where decoding them costs time
        self.templates = Templates(self.builder, target, threads, choose)
        self.constant = constant_nodes(graph)
        self.pools = pooled.pools(graph)
        self.done: set[str] = set()  # anchors of regions that the kernel of another one computes

    def module(self) -> Any:
        from tvm import relax

        parameters = []
        for index, name in enumerate(self.graph.inputs):
            kind = self.graph.tensor(name)
            parameters.append(relax.Var(f"input_{index}", relax.TensorType(kind.dims, kind.dtype)))
            self.values.put(name, parameters[-1])
        with self.builder.function("main", parameters):
            with self.builder.dataflow():
                for index, region in enumerate(every := regions(self.graph)):
                    self.builder.origin = index
                    if region.anchor.name not in self.done:
                        self.region(region)
                results = [self.values.get(name) for name in self.graph.outputs]
                output = self.builder.emit_output(relax.Tuple(results))
            self.builder.emit_func_output(output)
        module = self.builder.get()
        module.update_func(module.get_global_var("main"), module["main"].with_attr("hwopt.labels", self.templates.labels))
        labels = {variable: self._regions_of(label) for variable, label in self.templates.labels.items()}
        return with_origins(module, tuple(region.name for region in every), labels)

    def _regions_of(self, label: str) -> tuple[str, ...]:
        """The regions that a template's kernel computes: its own, and the pool behind it if that is in it."""
        pool = self.pools.get(label)
        return (label, pool.name) if pool and pool.anchor.name in self.done else (label,)

    def region(self, region: Region) -> None:
        """Emit one region, as one kernel where there is one for it, else node by node."""
        if region.anchor.op in WEIGHTED and region.anchor.domain == "" and region.anchor.name not in self.constant:
            if self._coded(region):
                return
            kernel = weighted_kernel(self.graph, region, self.values, self.templates.suits)
            if kernel and self._pooled(kernel, region):
                return
            result = self.templates.call(kernel, region.name) if kernel else None
            if kernel and result is not None and kernel.order:
                self.values.move(region.output, result, kernel.order)
                return
            if kernel and result is not None:
                self.values.put(region.output, result, kernel.last)
                return
        if rowwise.emit(self, region) or table.emit(self, region) or (region.integer and integer.emit(self, region)):
            return
        if windows.emit(self, region):
            return
        for node in region.nodes:
            if node.name not in self.constant and not bfloat16.widens(self.graph, node):  # readers widen for themselves
                self.node(node)

    def _pooled(self, kernel: Kernel, region: Region) -> bool:
        """Emit the region together with the global pool behind it, where its own micro-kernel can do that.

        Winograd's algorithm, which has no place for the pool, saves more than a kernel of the pool's own takes.
        """
        pool = self.pools.get(region.anchor.name)
        whole = pooled.averaged(self.graph, kernel, pool) if pool else None
        if pool is None or whole is None or kernels.supports(whole.spec, self.templates.micro(kernel.spec)):
            return False
        if isinstance(self.templates.fitted(kernel)[0].spec, WinogradSpec):
            return False
        self.values.put(pool.output, self.templates.call(whole, region.name), whole.last)
        self.done.add(pool.anchor.name)
        return True

    def _coded(self, region: Region) -> bool:
        """Emit the region as a kernel that decodes its weights, where that is faster; False for all others."""
        if expanded_because(self.graph, region, self.templates.target, self.templates.threads, self.compact):
            return False
        kernel = coded_kernel(self.graph, region, self.values)
        result = self.templates.call_coded(kernel, region.name) if kernel else None
        if kernel is None or result is None:
            return False
        self.values.put(region.output, result, kernel.last)
        return True

    def node(self, node: Node) -> None:
        """Emit one node by TVM's converter, in the order of axes that costs least."""
        self.provide(node)
        if bfloat16.narrows(self.graph, node):
            last = self.values.is_last(node.inputs[0])
            self.values.put(
                node.output,
                convert_bfloat16(self.builder, self.values.get(node.inputs[0], last), is_deep(self.graph, node)),
                last,
            )
            return
        made_by_us = any(
            one.emit(self.graph, node, self.values, self.builder) for one in (pooling, padding, normalizing, scanning)
        )
        if made_by_us or any(one.emit(self.graph, node, self.values, self.templates) for one in (resizing, sorting)):
            return
        if node.op == "Transpose" and self.values.is_last(node.inputs[0]):
            self._transpose(node)
            return
        if node.op == "Transpose":
            self._move(node)
            return
        rank = len(self.graph.tensor(node.output).shape or ())
        follows = rank >= 3 and any(
            self.values.has_last(value) and len(self.graph.tensor(value).shape or ()) == rank for value in node.inputs if value
        )
        elementwise = follows and node.op in ELEMENTWISE and node.op not in ("QuantizeLinear", "DequantizeLinear", "CastLike")
        if elementwise:
            self._put(node, convert.node_inputs(self.values, node, True, rank), True)
        elif follows and self._whole_tensor(node):
            inputs = [self.values.once(node.inputs[0], True), *(self.values.get(value) for value in node.inputs[1:])]
            self._put(node, inputs, True)
        elif follows and node.op in REORDERED:
            self._reordered(node)
        else:
            self._put(node, convert.node_inputs(self.values, node), False)

    def _whole_tensor(self, node: Node) -> bool:
        """True for quantization with one scale, which does not care about axes."""
        scale = self.graph.tensor(node.inputs[1]) if node.op in ("QuantizeLinear", "DequantizeLinear") else None
        return scale is not None and scale.static and scale.dims == ()

    def _put(self, node: Node, inputs: list[Any], last: bool) -> None:
        for value, expr in zip(node.outputs, self.converter.convert(node, inputs), strict=False):
            if not value:
                continue
            if not last:
                self._check(node, value, expr)
            self.values.put(value, expr, last)

    def _check(self, node: Node, value: str, expr: Any) -> None:
        kind = self.graph.tensor(value)
        if kind.static and hasattr(expr.ty, "shape") and expr.ty.shape is not None:
            try:
                found = dims_of(expr)
            except TypeError as error:
                raise UnsupportedError("TVM does not find its static shape", place=f"node {node.name} ({node.op})") from error
            if tuple(found) != kind.dims:
                raise UnsupportedError(f"TVM makes {found} of {kind}", place=f"node {node.name} ({node.op})")

    def _reordered(self, node: Node) -> None:
        """An operator that only moves data: transposed in, transposed out; its kernel swallows both transpositions."""
        inputs = [self.values.once(value, False) if value else None for value in node.inputs]
        for value, expr in zip(node.outputs, self.converter.convert(node, inputs), strict=False):
            self._check(node, value, expr)
            self.values.put(value, self.builder.emit(reordered(expr, True)), True)

    def _transpose(self, node: Node) -> None:
        """A transposition of a value that lies channels last: both permutations in one, often none."""
        from tvm import relax

        rank = len(self.graph.tensor(node.output).dims)
        wanted = node.attr("perm", tuple(reversed(range(rank))))
        back = to_first(rank)
        order = [back[axis] for axis in wanted]
        expr = self.values.get(node.inputs[0], True)
        if order == sorted(order):
            self.values.put(node.output, expr)
        elif tuple(order[axis] for axis in to_last(rank)) == tuple(range(rank)):
            self.values.put(node.output, expr, True)
        else:
            self.values.put(node.output, self.builder.emit(relax.op.permute_dims(expr, order)))

    def _move(self, node: Node) -> None:
        """A transposition: emitted where its result is needed, as those who read it may read by strides instead."""
        source = node.inputs[0]
        rank = len(self.graph.tensor(node.output).dims)
        wanted = node.attr("perm", tuple(reversed(range(rank))))
        expr, order = self.values.moved(source) or (self.values.get(source), tuple(range(rank)))
        self.values.move(node.output, expr, composed(order, wanted))

    def provide(self, node: Node) -> None:
        """Compute the dequantizations that other regions read through but this node needs in float."""
        for value in node.inputs:
            source = self.graph.producer.get(value)
            missing = source is not None and value not in self.values.arrays and not self.values.known(value)
            if missing and source is not None and source.op == "DequantizeLinear":
                self.node(source)
