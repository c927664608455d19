"""A graph for the virtual machine in two halves: what needs no runtime comes first, by kernels of ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from types import MappingProxyType
from typing import Any

from hwopt.backends.tvm.build import fused
from hwopt.backends.tvm.layout import OPAQUE, reshaped
from hwopt.backends.tvm.lower import lower
from hwopt.backends.tvm.support import needs_runtime
from hwopt.ir import Graph, Node
from hwopt.target import Target


@dataclasses.dataclass(frozen=True)
class Halves:
    """`ahead` is None where nothing can be computed before the runtime is needed."""

    ahead: Graph | None
    behind: Graph


def halves(graph: Graph) -> Halves:
    """Behind is what needs TVM's runtime, and everything that reads what it computes."""
    late = {node.name for node, _ in needs_runtime(graph)}
    made: set[str] = set()
    for node in graph.nodes:
        if node.name in late or made.intersection(node.reads):
            late.add(node.name)
            made.update(node.outputs)
    early = [node for node in graph.nodes if node.name not in late]
    computed = {value for node in early for value in node.outputs if value}
    rest = [node for node in graph.nodes if node.name in late]
    read = {value for node in rest for value in node.reads}
    between = [value for node in early for value in node.outputs if value in read or value in graph.outputs]
    used = tuple(name for name in graph.inputs if any(name in node.reads for node in early))
    if not between or not used:
        return Halves(None, graph)
    given = [value for value in (*between, *graph.inputs) if value in read]
    outputs = tuple(value for value in graph.outputs if value not in computed)
    return Halves(_part(graph, early, used, between), _part(graph, rest, given, outputs))


def _part(graph: Graph, nodes: list[Node], inputs: Iterable[str], outputs: Iterable[str]) -> Graph:
    known = {*inputs, *outputs, *(value for node in nodes for value in (*node.reads, *node.outputs))}
    return dataclasses.replace(
        graph, nodes=tuple(nodes), inputs=tuple(inputs), outputs=tuple(outputs),
        params=MappingProxyType({name: array for name, array in graph.params.items() if name in known}),
        types=MappingProxyType({name: kind for name, kind in graph.types.items() if name in known}),
    )  # fmt: skip


def joined(graph: Graph, parts: Halves, behind: Any, target: Target, threads: int) -> Any:
    """The IRModule whose `main` runs both halves; `behind` is the second one's, as TVM imported it."""
    from tvm import relax

    if parts.ahead is None:
        return behind
    before = fused(lower(parts.ahead, target, threads), target, threads)
    builder = relax.BlockBuilder()
    second = builder.add_func(behind["main"].without_attr("global_symbol"), "behind")
    inputs = {name: _variable(graph, parts, behind, name, index) for index, name in enumerate(graph.inputs)}
    with builder.function("main", list(inputs.values())):
        with builder.dataflow():
            results = _Ahead(builder, before).run([inputs[name] for name in parts.ahead.inputs])
            found = {**inputs, **dict(zip(parts.ahead.outputs, results, strict=True))}
            late = builder.emit(relax.Call(second, [found[name] for name in parts.behind.inputs]))
            many = isinstance(late.ty, relax.TupleType)
            for index, name in enumerate(parts.behind.outputs):
                found[name] = builder.emit(relax.TupleGetItem(late, index)) if many else late
            output = builder.emit_output(relax.Tuple([found[name] for name in graph.outputs]))
        builder.emit_func_output(output)
    return relax.transform.InlinePrivateFunctions()(builder.get())  # a call would keep sizes that TVM only guesses at first


def _variable(graph: Graph, parts: Halves, behind: Any, name: str, index: int) -> Any:
    """An input; sizes that are open are those of the second half."""
    from tvm import relax

    kind = graph.tensor(name)
    known = relax.TensorType(list(kind.dims), kind.dtype) if kind.static else None
    return relax.Var(f"input_{index}", known or behind["main"].params[parts.behind.inputs.index(name)].ty)


class _Ahead:
    """The bindings of a module's main once more, in another function: the machine wants tensors in the shapes of the kernels."""

    def __init__(self, builder: Any, module: Any) -> None:
        from tvm import tirx

        self.builder, self.main = builder, module["main"]
        kernels = ((one, function) for one, function in module.functions.items() if isinstance(function, tirx.PrimFunc))
        self.kernels = {str(one.name_hint): function for one, function in kernels}
        self.variables = {name: builder.add_func(one.with_attr(OPAQUE), name) for name, one in self.kernels.items()}
        self.values: dict[Any, Any] = {}

    def run(self, inputs: list[Any]) -> list[Any]:
        self.values = dict(zip(self.main.params, inputs, strict=True))
        for block in self.main.body.blocks:
            for binding in block.bindings:
                self.values[binding.var] = self._value(binding.value)
        return list(self._value(self.main.body.body))

    def _value(self, value: Any) -> Any:
        """The expression in terms of the new function; a tuple as a list."""
        import tvm
        from tvm import relax

        if isinstance(value, tvm.ir.Var):
            return self.values[value]
        if isinstance(value, relax.Tuple):
            return [self._value(item) for item in value.fields]
        if isinstance(value, relax.TupleGetItem):
            return self._value(value.tuple_value)[value.index]
        if not isinstance(value, relax.Call):
            return value
        if value.op.name != "relax.call_tir":
            return self.builder.emit(relax.Call(value.op, [self._value(one) for one in value.args], value.attrs))
        return self._kernel(value)

    def _kernel(self, call: Any) -> Any:
        from tvm import relax

        name, given = str(call.args[0].name_hint), [self._value(one) for one in call.args[1].fields]
        kinds = list(call.ty.fields) if isinstance(call.ty, relax.TupleType) else [call.ty]
        shapes = [[int(dim) for dim in one.shape] for one in self.kernels[name].params]
        inputs = [reshaped(self.builder, one, shape) for one, shape in zip(given, shapes, strict=False)]
        results = [relax.TensorType(shape, one.dtype) for one, shape in zip(kinds, shapes[len(given) :], strict=True)]
        made = self.builder.emit(
            relax.call_tir(self.variables[name], relax.Tuple(inputs), results[0] if len(results) == 1 else results)
        )
        several = [self.builder.emit(relax.TupleGetItem(made, at)) for at in range(len(results))] if len(results) > 1 else [made]
        found = [reshaped(self.builder, one, [int(dim) for dim in kind.shape]) for one, kind in zip(several, kinds, strict=True)]
        return found if len(found) > 1 else found[0]
