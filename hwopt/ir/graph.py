"""Node, Graph and Edit: an immutable graph with ONNX semantics, and the one way to change it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import networkx
import numpy as np
import onnx

from hwopt.ir.types import OpaqueType, TensorType, ValueType, type_of

# int, float, str, bytes, tuples of these, numpy arrays, or an onnx proto (subgraphs, types) that is never changed.
Attr = Any
EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Node:
    """One operator. A value is its name; "" stands for an optional input or output that is left out."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    name: str
    attrs: Mapping[str, Attr] = field(default_factory=lambda: EMPTY)
    domain: str = ""
    history: tuple[str, ...] = ()

    @property
    def output(self) -> str:
        """The first output, for the many operators that have one."""
        return self.outputs[0]

    @cached_property
    def proto(self) -> onnx.NodeProto:
        """The same node in ONNX's format (shared: do not change it)."""
        proto = onnx.helper.make_node(self.op, self.inputs, self.outputs, name=self.name, domain=self.domain)
        for key in sorted(self.attrs):
            proto.attribute.append(_attribute(key, self.attrs[key], self))
        return proto

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """Every value the node needs: its inputs, and what its subgraphs capture from outside."""
        captured = (name for attr in self.attrs.values() if isinstance(attr, onnx.GraphProto) for name in _free(attr))
        return tuple(dict.fromkeys(name for name in (*self.inputs, *captured) if name))

    def attr(self, key: str, default: Attr = None) -> Attr:
        return self.attrs.get(key, default)

    def __str__(self) -> str:
        return f"{self.op} {self.name}"


def _attribute(key: str, value: Attr, node: Node) -> onnx.AttributeProto:
    if isinstance(value, onnx.AttributeProto):  # a kind of attribute that hwopt has no reading of: carried whole
        return value
    if isinstance(value, np.ndarray):
        return onnx.helper.make_attribute(key, onnx.numpy_helper.from_array(value))
    if value == ():
        return onnx.helper.make_attribute(key, [], attr_type=_list_type(node, key))
    return onnx.helper.make_attribute(key, list(value) if isinstance(value, tuple) else value)


def _list_type(node: Node, key: str) -> int:
    """An empty list does not say what it is a list of; the operator's schema does."""
    declared = onnx.defs.get_schema(node.op, node.domain).attributes.get(key) if onnx.defs.has(node.op, node.domain) else None
    kinds = onnx.AttributeProto
    named = {str(onnx.defs.OpSchema.AttrType.FLOATS): kinds.FLOATS, str(onnx.defs.OpSchema.AttrType.STRINGS): kinds.STRINGS}
    return int(named.get(str(declared.type) if declared else "", kinds.INTS))


def _free(graph: onnx.GraphProto) -> Iterator[str]:
    """Names that a subgraph reads from the graph around it."""
    known = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        yield from (name for name in node.input if name and name not in known)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from (name for name in _free(inner) if name not in known)
        known.update(node.output)
    yield from (value.name for value in graph.output if value.name not in known)


@dataclass(frozen=True, eq=False)
class Graph:
    """A model: nodes in topological order, the types of all values, the parameters (read-only arrays) by name."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    types: Mapping[str, ValueType]
    params: Mapping[str, np.ndarray]
    opsets: Mapping[str, int]
    metadata: Mapping[str, str] = field(default_factory=lambda: EMPTY)

    @cached_property
    def producer(self) -> Mapping[str, Node]:
        """Value -> the node that computes it (absent for inputs and parameters)."""
        return {value: node for node in self.nodes for value in node.outputs if value}

    @cached_property
    def users(self) -> Mapping[str, tuple[Node, ...]]:
        """Value -> the nodes that read it, in graph order; a value nobody reads maps to ()."""
        readers: dict[str, list[Node]] = {value: [] for value in (*self.inputs, *self.params, *self.producer)}
        for node in self.nodes:
            for value in node.reads:
                readers.setdefault(value, []).append(node)
        return {value: tuple(nodes) for value, nodes in readers.items()}

    @cached_property
    def node(self) -> Mapping[str, Node]:
        """Node name -> node."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def dag(self) -> networkx.DiGraph:
        """The nodes' names and who feeds whom, for questions that networkx answers."""
        dag = networkx.DiGraph()
        dag.add_nodes_from(node.name for node in self.nodes)
        pairs = ((self.producer[value].name, node.name) for node in self.nodes for value in node.reads if value in self.producer)
        dag.add_edges_from(pairs)
        return dag

    @cached_property
    def digest(self) -> str:
        """sha256 over structure and weights, in hex; node history and metadata do not count."""
        whole = hashlib.sha256(repr((self.inputs, self.outputs, sorted(self.opsets.items()))).encode())
        for value in (*self.inputs, *self.outputs):
            whole.update(f"{value}:{self.types.get(value)};".encode())
        for node in self.nodes:
            whole.update(node.proto.SerializeToString(deterministic=True))
        for name in sorted(self.params):
            whole.update(f"{name}={param_digest(self.params[name])};".encode())
        return whole.hexdigest()

    def tensor(self, value: str) -> TensorType:
        """The tensor type of a value; `?[...]` where it is unknown or no tensor."""
        found = self.types.get(value)
        return found if isinstance(found, TensorType) else TensorType("undefined", None)

    def constant(self, value: str) -> np.ndarray | None:
        """The parameter of this name, or None if the value is computed or fed."""
        return self.params.get(value)

    def sole_user(self, value: str) -> Node | None:
        """The one node that reads a value, or None if there are several, none, or it is an output."""
        users = self.users.get(value, ())
        return users[0] if len(users) == 1 and value not in self.outputs else None

    def edit(self) -> Edit:
        return Edit(self)


def param_digest(array: np.ndarray) -> str:
    """sha256 over type, shape and bytes of a parameter."""
    data = "\0".join(map(str, array.ravel())).encode() if array.dtype == object else np.ascontiguousarray(array).tobytes()
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + data).hexdigest()


class Edit:
    """The only mutable thing: collects changes to a Graph inside one pass; `finish` returns the new Graph.

    Emit new nodes, forward old values to new ones; what nobody needs any more disappears by itself.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._nodes: dict[str, Node] = {node.name: node for node in graph.nodes}
        self._fresh: list[str] = []  # names of emitted or replaced nodes, to be stamped
        self._params = dict(graph.params)
        self._types: dict[str, ValueType] = dict(graph.types)
        self._forwarded: dict[str, str] = {}
        self._outputs = graph.outputs
        self._inputs = graph.inputs
        self._taken = {*graph.types, *graph.params, *graph.producer, *graph.inputs, *self._nodes}
        self._counts: dict[str, int] = {}  # hint -> the number of the last name made of it
        self._changed = False

    def fresh(self, hint: str) -> str:
        """A name that neither a value nor a node has yet."""
        name, count = hint, self._counts.get(hint, 0)
        while name in self._taken:
            count += 1
            name = f"{hint}_{count}"
        self._counts[hint] = count  # lower ones stay taken: the next search starts here
        self._taken.add(name)
        return name

    def param(self, hint: str, array: np.ndarray) -> str:
        """Add a parameter; returns its name."""
        name = self.fresh(hint)
        self._params[name], self._types[name] = frozen(array), type_of(array)
        return name

    def set_param(self, name: str, array: np.ndarray) -> None:
        """Give an existing parameter another value, for all who read it."""
        self._params[name], self._types[name] = frozen(array), type_of(array)
        self._changed = True

    def emit(
        self,
        op: str,
        inputs: Iterable[str],
        *,
        attrs: Mapping[str, Attr] = EMPTY,
        name: str = "",
        outputs: int | Iterable[str] = 1,
        domain: str = "",
        like: Node | None = None,
    ) -> str:
        """Add a node and return its first output. `like` hands down the history of the node it stands for."""
        name = self.fresh(name or (like.name if like else op))
        names = [self.fresh(f"{name}_out") for _ in range(outputs)] if isinstance(outputs, int) else list(outputs)
        node = Node(op, tuple(inputs), tuple(names), name, MappingProxyType(dict(attrs)), domain, like.history if like else ())
        self._nodes[name] = node
        self._fresh.append(name)
        self._changed = True
        return names[0]

    def replace(self, node: Node, **changes: Any) -> Node:
        """Change fields of a node in place (`op`, `inputs`, `attrs`, `outputs`, `domain`); it keeps its name."""
        new = dataclasses.replace(self._nodes[node.name], **changes)
        self._nodes[node.name] = new
        self._fresh.append(node.name)
        self._changed = True
        return new

    def forward(self, old: Node | str, new: str) -> None:
        """Everybody who reads `old` (a value, or a node's only output) reads `new` instead."""
        value = old.output if isinstance(old, Node) else old
        if value != new:
            self._forwarded[value] = new
            self._changed = True

    def bind(self, name: str, array: np.ndarray) -> None:
        """Turn a graph input into a parameter."""
        self._inputs = tuple(value for value in self._inputs if value != name)
        self.set_param(name, array)

    def sweep(self) -> None:
        """Let `finish` drop what nobody needs even if there is no other change."""
        needed = {node.name for node in in_order(self.graph.nodes, self.graph.outputs)}
        read = {*self.graph.outputs, *(value for node in self.graph.nodes for value in node.reads)}
        dead = len(needed) < len(self.graph.nodes) or any(name not in read for name in self.graph.params)
        self._changed = self._changed or dead

    def finish(self, by: str) -> Graph:
        """The edited Graph, dead parts dropped, sorted, stamped with `by`, types inferred; the same one if unchanged."""
        if not self._changed:
            return self.graph
        self._keep_output_names()
        nodes = [self._resolved(node) for node in self._nodes.values()]
        stamped = set(self._fresh)
        nodes = [dataclasses.replace(n, history=(*n.history, by)) if n.name in stamped else n for n in nodes]
        ordered = in_order(nodes, self._outputs)
        read = {*self._outputs, *self._inputs, *(value for node in ordered for value in (*node.reads, *node.outputs))}
        params = {name: array for name, array in self._params.items() if name in read}
        types = {value: kind for value, kind in self._types.items() if value in read}
        graph = dataclasses.replace(
            self.graph,
            inputs=self._inputs,
            nodes=tuple(ordered),
            params=MappingProxyType(params),
            types=MappingProxyType(types),
        )
        from hwopt.ir.infer import infer_types  # infer builds Graphs: the cycle is broken here

        return infer_types(graph)

    def _target(self, value: str) -> str:
        seen = {value}
        while value in self._forwarded:
            value = self._forwarded[value]
            if value in seen:
                raise ValueError(f"value {value} is forwarded to itself")
            seen.add(value)
        return value

    def _resolved(self, node: Node) -> Node:
        if not any(value in self._forwarded for value in node.reads):
            return node
        renamed = {value: self._target(value) for value in node.reads if value in self._forwarded}
        attrs = {
            key: with_renamed(attr, renamed) if isinstance(attr, onnx.GraphProto) else attr for key, attr in node.attrs.items()
        }
        inputs = tuple(renamed.get(value, value) for value in node.inputs)
        return dataclasses.replace(node, inputs=inputs, attrs=MappingProxyType(attrs))

    def _keep_output_names(self) -> None:
        """A forwarded graph output keeps its name: its new producer takes it over, or an Identity carries it."""
        produced = {value: node for node in self._nodes.values() for value in node.outputs if value}
        for output in self._outputs:
            if output not in self._forwarded:
                continue
            source = self._target(output)
            del self._forwarded[output]
            owner = produced.get(source)
            old = produced.get(output)
            if old is not None and old.outputs == (output,) and old is not owner:
                self._nodes.pop(old.name, None)
            elif old is not None:
                freed = tuple(self.fresh(f"{output}_old") if value == output else value for value in old.outputs)
                self._nodes[old.name] = dataclasses.replace(self._nodes[old.name], outputs=freed)
            if owner is None or source in self._outputs:
                self.emit("Identity", [source], outputs=[output], name=f"{output}_identity")
                continue
            taken = tuple(output if value == source else value for value in self._nodes[owner.name].outputs)
            self._nodes[owner.name] = dataclasses.replace(self._nodes[owner.name], outputs=taken)
            produced[output] = self._nodes[owner.name]
            self._forwarded[source] = output


def frozen(array: np.ndarray) -> np.ndarray:
    """A read-only array with the same contents."""
    if not array.flags.writeable:
        return array
    array = array.copy()
    array.flags.writeable = False
    return array


def with_renamed(graph: onnx.GraphProto, renamed: Mapping[str, str]) -> onnx.GraphProto:
    """A subgraph that reads other values from the graph around it."""
    copy = onnx.GraphProto()
    copy.CopyFrom(graph)
    local = {value.name for value in copy.input} | {value for node in copy.node for value in node.output}
    for node in copy.node:
        node.input[:] = [renamed.get(value, value) if value not in local else value for value in node.input]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                attribute.g.CopyFrom(with_renamed(attribute.g, renamed))
    for value in copy.output:
        if value.name not in local:
            value.name = renamed.get(value.name, value.name)
    return copy


def in_order(nodes: Iterable[Node], outputs: Iterable[str]) -> list[Node]:
    """The nodes that the outputs need, in topological order that keeps the given order where it can."""
    nodes = list(nodes)
    producer = {value: node for node in nodes for value in node.outputs if value}
    needed, queue = set(), [value for value in outputs if value in producer]
    while queue:
        node = producer[queue.pop()]
        if node.name not in needed:
            needed.add(node.name)
            queue.extend(value for value in node.reads if value in producer)
    ordered: list[Node] = []
    done: set[str] = set()
    for root in nodes:
        if root.name in needed:
            _visit(root, producer, done, ordered)
    return ordered


def _visit(root: Node, producer: Mapping[str, Node], done: set[str], ordered: list[Node]) -> None:
    stack, open_nodes = [root], set()
    while stack:
        node = stack[-1]
        waiting = [producer[v] for v in node.reads if v in producer and producer[v].name not in done]
        if node.name in done or not waiting:
            stack.pop()
            open_nodes.discard(node.name)
            if node.name not in done:
                done.add(node.name)
                ordered.append(node)
            continue
        if node.name in open_nodes:
            raise ValueError(f"the graph has a cycle through {node}")
        open_nodes.add(node.name)
        stack.extend(reversed(waiting))


__all__ = ["Attr", "Edit", "Graph", "Node", "OpaqueType", "TensorType", "frozen", "in_order", "param_digest", "with_renamed"]
