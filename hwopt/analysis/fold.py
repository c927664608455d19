"""Constant folding: which values do not depend on the inputs, what they are, and which of them are worth storing."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime

from hwopt.ir import Graph, Node, TensorType, ValueType, frozen, infer_types, numpy_dtype, of_op, type_of

LIMIT_BYTES = 1 << 20  # a constant above this is stored only if it is no larger than the parameters it comes from
CEILING_BYTES = 1 << 28  # nothing larger is ever computed
BATCH_BYTES = 1 << 28  # parameters of one ONNX Runtime session; a protobuf holds 2 GB

# The same inputs do not give the same outputs, or the output is no tensor of a size that inference knows beforehand.
_NEVER = {
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout",
    "If", "Loop", "Scan", "SequenceMap", "DequantizeLinear", "StringSplit", "ImageDecoder",
}  # fmt: skip
# Size known only from the values, but bounded by the input's.
_BOUNDED = {"NonZero", "Unique", "Compress", "NonMaxSuppression"}
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_NARROW = {"uint8", "int8", "uint4", "int4", "uint2", "int2"}
_FEW = 256  # elements: shapes, axes and scales


def fold_constants(graph: Graph, limit_bytes: int = LIMIT_BYTES, by: str = "fold-constants") -> Graph:
    """Replace everything that does not depend on the inputs by parameters; the same graph if there is nothing.

    `Shape(x) -> Gather -> Concat -> Reshape(y, .)` becomes `Reshape(y, [1, 64])` as soon as x has a static type.
    Values come from ONNX Runtime. Kept as they are: random operators, control flow, whatever stores weights in
    fewer bits (DequantizeLinear, narrow integers, codebooks), and constants above `limit_bytes` that are larger than
    the parameters they come from (`ConstantOfShape`, `Expand`) and no weight; what they read is folded all the same.
    """
    while True:
        after = _fold_once(graph, limit_bytes, by)
        if after is graph:
            return graph
        graph = after


def _fold_once(graph: Graph, limit_bytes: int, by: str) -> Graph:
    facts = _evaluate(graph)
    edit = graph.edit()
    for value in _stored(facts, limit_bytes):
        edit.forward(value, edit.param(f"{value}_const", facts.known[value]))
    return edit.finish(by)


def _stored(facts: _Facts, limit_bytes: int) -> list[str]:
    """The computed constants that nodes (or the caller) read, each as late in its chain as its size allows."""
    graph, known = facts.graph, facts.known
    constant = {value for value in known if value in graph.producer}
    done = {node.name for node in graph.nodes if node.outputs and all(v in known for v in node.outputs if v)}
    queue = deque(value for value in graph.outputs if value in constant and not _carries_parameter(graph, value))
    queue += [value for node in graph.nodes if node.name not in done for value in node.reads if value in constant]
    weights = {value for node in of_op(graph, *_WEIGHTED) for value in node.inputs[1:]}
    stored: dict[str, None] = {}
    seen: set[str] = set()
    while queue:
        value = queue.popleft()
        if value in seen:
            continue
        seen.add(value)
        if value in weights or _bytes(known[value]) <= max(limit_bytes, facts.origin[value]):
            stored[value] = None
        else:
            queue.extend(read for read in graph.producer[value].reads if read in constant)
    return list(stored)


def _carries_parameter(graph: Graph, output: str) -> bool:
    """A constant output in its final form: a parameter, renamed by an Identity."""
    node = graph.producer[output]
    return node.op == "Identity" and node.inputs[0] in graph.params


@dataclass(frozen=True, eq=False)
class _Facts:
    """What is known of a graph's values by now; grows while constants are computed. `origin`: the bytes of the parameters
    that a constant comes from."""

    graph: Graph
    types: dict[str, ValueType]
    known: dict[str, np.ndarray]
    origin: dict[str, int]

    def static(self, value: str) -> bool:
        return _is_static(self.types.get(value))

    def ready(self, node: Node) -> bool:
        """Everything it needs is known. Shape and Size need the type of their input only."""
        if node.op in ("Shape", "Size"):
            return self.static(node.inputs[0])
        return all(value in self.known for value in node.reads)


def _evaluate(graph: Graph) -> _Facts:
    """All constants, parameters included. Only what reads something new is looked at again: linear in the graph's size."""
    params = dict(graph.params)
    facts = _Facts(graph, dict(graph.types), params, {name: _bytes(array) for name, array in params.items()})
    place = {node.name: index for index, node in enumerate(graph.nodes)}
    tried: set[str] = set()
    wave: Iterable[Node] = graph.nodes
    while True:
        ready = [node for node in wave if node.name not in tried and facts.ready(node) and _foldable(facts, node)]
        tried.update(node.name for node in ready)
        fresh = _learn(facts, ready)
        if not fresh:
            return facts
        fresh += _spread(facts, fresh, place)
        readers = {place[node.name] for value in fresh for node in graph.users[value]}
        wave = [graph.nodes[index] for index in sorted(readers)]


def _learn(facts: _Facts, wave: Sequence[Node]) -> list[str]:
    """Compute these nodes; returns the values that are known now."""
    computed = dict(_shapes(facts, wave))
    computed.update(_computed(facts.graph, [node for node in wave if node.output not in computed], facts.known))
    fresh = [(node, value) for node in wave for value in node.outputs if value in computed]
    for node, value in fresh:
        total = sum(facts.origin.get(read, 0) for read in node.reads)
        facts.known[value] = frozen(computed[value])
        facts.types[value] = type_of(facts.known[value])
        facts.origin[value] = _bytes(facts.known[value]) if node.op == "Constant" else total
    return [value for _, value in fresh]


def _spread(facts: _Facts, fresh: Sequence[str], place: Mapping[str, int]) -> list[str]:
    """Types that follow from new constants (a Reshape to [2, -1]), and from those types in turn, node by node in graph order;
    inferring the whole graph for every link of a long chain would take quadratic time."""
    graph, found = facts.graph, []
    waiting = [place[node.name] for value in fresh for node in graph.users[value]]
    heapq.heapify(waiting)
    last = -1
    while waiting:
        index = heapq.heappop(waiting)
        node = graph.nodes[index]
        if index == last or all(facts.static(value) for value in node.outputs if value):
            continue
        last = index
        kinds = _isolated(graph, [node], facts.known, facts.types).types
        better = [v for v in node.outputs if v and not facts.static(v) and _is_static(kinds.get(v))]
        facts.types.update({value: kinds[value] for value in better})
        found += better
        for value in better:
            for reader in graph.users[value]:
                heapq.heappush(waiting, place[reader.name])
    return found


def _foldable(facts: _Facts, node: Node) -> bool:
    if node.domain or node.op in _NEVER or not node.outputs or _stores_fewer_bits(facts.graph, node):
        return False
    return all(_fetchable(facts.types.get(value)) for value in node.outputs if value)


def _is_static(kind: ValueType | None) -> bool:
    return isinstance(kind, TensorType) and kind.static


def _fetchable(kind: ValueType | None) -> bool:
    """ONNX Runtime hands out tensors of numpy's own element types only."""
    return isinstance(kind, TensorType) and numpy_dtype(kind.dtype).isbuiltin == 1


def _stores_fewer_bits(graph: Graph, node: Node) -> bool:
    """A weight kept in narrow integers, or as indices into a codebook: unpacking it would undo the compression."""
    if node.op in ("Cast", "BitShift"):  # whole bytes, or several indices to the byte
        array = graph.constant(node.inputs[0])
        return array is not None and array.size > _FEW and type_of(array).dtype in _NARROW
    if node.op == "Gather":
        data, indices = (graph.constant(value) for value in node.inputs[:2])
        return data is not None and indices is not None and data.ndim == 1 and indices.size > max(data.size, _FEW)
    return False


def _shapes(facts: _Facts, wave: Iterable[Node]) -> Iterator[tuple[str, np.ndarray]]:
    """Shape and Size need the type of their input, not its value."""
    for node in wave:
        kind = facts.types.get(node.inputs[0]) if node.op in ("Shape", "Size") else None
        if not isinstance(kind, TensorType):
            continue
        if node.op == "Size":
            yield node.output, np.array(math.prod(kind.dims), np.int64)
        else:
            yield node.output, np.array(kind.dims[node.attr("start", 0) : node.attr("end")], np.int64).reshape(-1)


def _computed(graph: Graph, nodes: Sequence[Node], known: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of nodes whose inputs are all known; nodes that are too large, or that fail, are left out."""
    small = [node for node in nodes if _bytes_read(node, known) <= BATCH_BYTES // 16]
    chosen = _affordable(graph, small, known)
    values = _run(graph, chosen, known)
    if values is None:  # one of them fails: find out which
        values = {}
        for node in chosen:
            values.update(_run(graph, [node], known) or {})
    for node in nodes:
        if node not in small and _bytes_read(node, known) <= 4 * BATCH_BYTES:
            values.update(_run(graph, _affordable(graph, [node], known), known) or {})
    return values


def _affordable(graph: Graph, nodes: Sequence[Node], known: Mapping[str, np.ndarray]) -> list[Node]:
    """Those whose outputs have a size that inference can tell from the input values, and a bearable one."""
    nodes = [node for node in nodes if node.op != "Slice" or known[node.inputs[0]].size]  # inference aborts on empty ones
    if not nodes:
        return []
    types = _isolated(graph, nodes, known, graph.types).types

    def fits(node: Node) -> bool:
        if node.op in _BOUNDED:
            return True
        kinds = [types.get(value) for value in node.outputs if value]
        return all(isinstance(k, TensorType) and k.static and _size(k) <= CEILING_BYTES for k in kinds)

    return [node for node in nodes if fits(node)]


def _isolated(graph: Graph, nodes: Sequence[Node], known: Mapping[str, np.ndarray], types: Mapping[str, ValueType]) -> Graph:
    """A graph of these nodes alone with the types of its values; what they read stands as parameters where it is known."""
    read = dict.fromkeys(value for node in nodes for value in node.reads)
    params = {value: known[value] for value in read if value in known}
    inputs = tuple(value for value in read if value not in known)
    stated = {value: types[value] for value in read if value in types}
    outputs = tuple(value for node in nodes for value in node.outputs if value)
    bare = Graph("constants", inputs, outputs, tuple(nodes), stated, params, graph.opsets)
    try:
        return infer_types(bare)
    except onnx.shape_inference.InferenceError:
        return bare


def _run(graph: Graph, nodes: Sequence[Node], known: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """Outputs by name, computed by ONNX Runtime; None if it cannot run these nodes."""
    if not nodes:
        return {}
    outputs = [value for node in nodes for value in node.outputs if value]
    read = dict.fromkeys(value for node in nodes for value in node.reads)
    weights = [onnx.numpy_helper.from_array(np.asarray(known[value]), value) for value in read]
    infos = [onnx.ValueInfoProto(name=value) for value in outputs]
    body = onnx.helper.make_graph([node.proto for node in nodes], "constants", [], infos, weights)
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in sorted(graph.opsets.items())]
    model = onnx.helper.make_model(body, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = 1, 1, 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return dict(zip(outputs, map(np.asarray, session.run(outputs, {})), strict=True))
    except Exception:  # ONNX Runtime raises a kind of its own for every status code; the node is kept as it is
        return None


def _bytes(array: np.ndarray) -> int:
    return array.size * 8 if array.dtype == object else type_of(array).bytes


def _size(kind: TensorType) -> int:
    return kind.elements * 8 if kind.dtype == "string" else kind.bytes


def _bytes_read(node: Node, known: Mapping[str, np.ndarray]) -> int:
    return sum(_bytes(known[value]) for value in node.reads)
