"""Which nodes become one kernel: what the backend emits and what the cost models price.

    DequantizeLinear -> Conv -> Add(bias) -> Relu -> QuantizeLinear      one region, anchored at the Conv

A region is its anchor, the nodes behind it that read nothing but it and earlier values (each intermediate has one reader),
and in front of it the dequantizations and constant nodes that the kernel reads through. Regions have one result, so their
graph is acyclic; each runs at the place of its last node.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hwopt.analysis.bfloat16 import bfloat16_operands, narrows, widens
from hwopt.analysis.gates import self_gated
from hwopt.analysis.memo import remembered
from hwopt.analysis.qdq import Quantization, dequantized, quantization, quantized_weight
from hwopt.ir import Graph, Node


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "GlobalLpPool")
MOVES = _names(
    "Reshape Flatten Squeeze Unsqueeze Identity Transpose Concat Split Slice Pad Gather GatherElements GatherND Expand Tile"
    " Resize Upsample DepthToSpace SpaceToDepth ScatterElements ScatterND Shape Size ConstantOfShape Range EyeLike"
    " ReverseSequence Trilu OneHot Compress"
)
VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
REDUCTIONS = _names(
    "Softmax LogSoftmax Hardmax LayerNormalization GroupNormalization InstanceNormalization RMSNormalization LRN"
    " MeanVarianceNormalization LpNormalization ArgMax ArgMin CumSum Einsum TopK ReduceMean ReduceSum ReduceMax ReduceMin"
    " ReduceProd ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceSumSquare"
)
ROWS = ("Softmax", "LayerNormalization")  # one kernel with a sum in front and a quantization behind
ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "Gelu")
ELEMENTWISE = _names(
    "Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Celu"
    " Clip Cos Cosh DequantizeLinear Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish IsInf IsNaN"
    " LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow QuantizeLinear Reciprocal Relu Round Selu"
    " Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Tan Tanh ThresholdedRelu Where Xor Swish"
)
INTEGER_MOVES = (*VIEWS, "Transpose", "Concat", "Slice", "Pad", "DepthToSpace", "SpaceToDepth", "Resize")
INTEGER_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean")


Grown = tuple[Node, tuple[Node, ...], bool]  # anchor, epilogue, computes on integers


@dataclass(frozen=True, eq=False)
class Region:
    """One kernel. `kind`: conv, depthwise, matmul, pool, elementwise, reduce, move or other.

    `nodes` are in graph order, `epilogue` those behind the anchor; `inputs` are the values read (parameters included) and
    `outputs` the values that the rest of the graph can see. `integer` says that it computes on the quantized values, `bfloat16`
    that it multiplies bfloat16 values.
    """

    kind: str
    anchor: Node
    nodes: tuple[Node, ...]
    epilogue: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    integer: bool = False
    bfloat16: bool = False

    @property
    def output(self) -> str:
        return self.outputs[0]

    @property
    def name(self) -> str:
        return self.anchor.name


@remembered
def regions(graph: Graph) -> tuple[Region, ...]:
    """The graph's nodes in disjoint regions, in an order in which they can run."""
    constant = constant_nodes(graph)
    order = {node.name: index for index, node in enumerate(graph.nodes)}
    owner: dict[str, int] = {}
    grown: list[Grown] = []
    for node in graph.nodes:
        if node.name in owner or node.name in constant or node.op == "DequantizeLinear" or widens(graph, node):
            continue
        epilogue = tuple(_epilogue(graph, node, owner))
        owner.update((member.name, len(grown)) for member in (node, *epilogue))
        grown.append((node, epilogue, computes_on_integers(graph, node, epilogue)))
    members = [[anchor, *epilogue] for anchor, epilogue, _ in grown]
    _adopt(graph, grown, members, owner, constant)
    found = [_region(graph, *grown[i], members[i], order) for i in range(len(grown))]
    return tuple(sorted(found, key=lambda region: max(order[region.anchor.name], *(order[n.name] for n in region.nodes))))


@remembered
def constant_nodes(graph: Graph) -> frozenset[str]:
    """Names of the nodes that depend on parameters only: they are computed at compile time."""
    values = set(graph.params)
    names = set()
    for node in graph.nodes:
        if not node.op.startswith("Random") and node.op not in ("Bernoulli", "Multinomial") and values.issuperset(node.reads):
            values.update(node.outputs)
            names.add(node.name)
    return frozenset(names)


def _adopt(graph: Graph, grown: list[Grown], members: list[list[Node]], owner: dict[str, int], constant: frozenset[str]) -> None:
    """Give dequantizations and constant nodes to the first region that reads through them, or one of their own."""
    for node in reversed(graph.nodes):
        if node.name in owner:
            continue
        readers = [owner[user.name] for user in graph.users.get(node.output, ()) if user.name in owner]
        visible = any(value in graph.outputs for value in node.outputs)
        folded = node.name in constant or all(_reads_through(graph, grown[index], node) for index in readers)
        if readers and folded and not visible:
            owner[node.name] = min(readers)
            members[min(readers)].append(node)
            continue
        owner[node.name] = len(grown)
        grown.append((node, (), False))
        members.append([node])


def _reads_through(graph: Graph, grown: Grown, node: Node) -> bool:
    """True if the region takes the quantized value itself instead of this dequantization's result."""
    if widens(graph, node):
        return True
    if node.op != "DequantizeLinear" or dequantized(graph, node.output) is None:
        return False
    anchor, epilogue, integer = grown
    if integer and node.output in anchor.inputs:
        return True
    if kind_of(graph, anchor) == "elementwise":
        return True
    return any(member.op == "Add" and node.output in member.inputs for member in epilogue)


def _region(graph: Graph, anchor: Node, epilogue: tuple, integer: bool, members: list[Node], order: dict[str, int]) -> Region:
    nodes = tuple(sorted(members, key=lambda node: order[node.name]))
    made = {value for node in nodes for value in node.outputs}
    inside = {node.name for node in nodes}
    reads = []
    for value in (value for node in nodes for value in node.reads if value not in made):
        through = graph.producer.get(value)
        use_integer = through is not None and _reads_through(graph, (anchor, epilogue, integer), through)
        reads.append(through.inputs[0] if through is not None and use_integer else value)
    last = epilogue[-1] if epilogue else anchor
    seen = [v for v in last.outputs if v]
    body = (anchor, *epilogue)
    seen += [
        value for node in nodes if node is not last for value in node.outputs
        if value in graph.outputs or (node in body and any(u.name not in inside for u in graph.users.get(value, ())))
    ]  # fmt: skip
    narrow = bfloat16_operands(graph, anchor) is not None
    return Region(kind_of(graph, anchor), anchor, nodes, epilogue, tuple(dict.fromkeys(reads)), tuple(seen), integer, narrow)


def kind_of(graph: Graph, node: Node) -> str:
    """The family of kernels that a node anchors; barriers and foreign operators are `other`."""
    if node.domain not in ("", "ai.onnx"):
        return "other"
    if node.op in ("Conv", "ConvTranspose"):
        weight = graph.tensor(node.inputs[1]).shape
        deep = node.op == "Conv" and node.attr("group", 1) > 1 and weight is not None and weight[1] == 1
        return "depthwise" if deep else "conv"
    if node.op in ("Gemm", "MatMul"):
        return "matmul"
    if node.op == "ReduceMean" and reduces_image(graph, node):
        return "pool"
    families = (("pool", POOLS), ("elementwise", ELEMENTWISE), ("reduce", REDUCTIONS), ("move", MOVES))
    return next((kind for kind, ops in families if node.op in ops), "other")


def reduces_image(graph: Graph, node: Node) -> bool:
    """True if a reduction is over all axes but batch and channels: a global pool."""
    rank = len(graph.tensor(node.inputs[0]).shape or ())
    axes = node.attr("axes")
    if axes is None and len(node.inputs) > 1:
        array = graph.constant(node.inputs[1])
        axes = None if array is None else array.tolist()
    return rank > 2 and axes is not None and sorted(axis % rank for axis in axes) == list(range(2, rank))


def _epilogue(graph: Graph, anchor: Node, owner: dict[str, int]) -> Iterator[Node]:
    """The nodes behind the anchor that its kernel can do on the way out."""
    kind = kind_of(graph, anchor)
    if by_rows(graph, anchor):
        yield from _behind_rows(graph, anchor, owner)
    if kind in ("reduce", "other") or len(anchor.outputs) != 1 or anchor.op == "QuantizeLinear":
        return
    value = anchor.output
    while True:
        step = _next(graph, value, kind, anchor, owner)
        yield from step
        if not step or step[-1].op == "QuantizeLinear":
            return
        value = step[-1].output
        if step[-1].op in ROWS:
            yield from _behind_rows(graph, step[-1], owner)
            return


def by_rows(graph: Graph, node: Node) -> bool:
    """True for a softmax over the last axis and a layer norm with constant parameters."""
    kind = graph.tensor(node.output)
    one = node.domain == "" and kind.dtype == "float32" and kind.static and len([v for v in node.outputs if v]) == 1
    if node.op not in ROWS or not one or not kind.dims or 0 in kind.dims:
        return False
    if node.op == "LayerNormalization":
        return all(graph.constant(value) is not None for value in node.inputs[1:] if value)
    return graph.opsets.get("", 0) >= 13 and node.attr("axis", -1) % len(kind.dims) == len(kind.dims) - 1


def _behind_rows(graph: Graph, node: Node, owner: dict[str, int]) -> tuple[Node, ...]:
    """What a row operator's kernel does with its result: nothing for NaN, fewer bits."""
    guard = nan_guard(graph, node)
    return (*guard, *_quantized(graph, guard[-1].output if guard else node.output, owner))


def nan_guard(graph: Graph, softmax: Node) -> tuple[Node, ...]:
    """IsNaN and Where of `Where(IsNaN(p), 0, p)`: torch writes so that a softmax of nothing but masked scores is 0; else ()."""
    users = {user.op: user for user in graph.users.get(softmax.output, ())}
    test, choice = users.get("IsNaN"), users.get("Where")
    if softmax.op != "Softmax" or len(users) != 2 or test is None or choice is None or softmax.output in graph.outputs:
        return ()
    zero = graph.constant(choice.inputs[1])
    guards = graph.sole_user(test.output) is choice and choice.inputs[0] == test.output and choice.inputs[2] == softmax.output
    kept = graph.tensor(choice.output) == graph.tensor(softmax.output)
    return (test, choice) if guards and kept and zero is not None and not np.any(zero) else ()


def _sums_rows(graph: Graph, add: Node, value: str, user: Node) -> bool:
    """True if `user` is a row operator over the sum `value`, such that its kernel can add: a mask or a residual."""
    if add.op != "Add" or value != add.output or not by_rows(graph, user) or user.inputs[0] != value:
        return False
    full = graph.tensor(value).dims
    shapes = sorted((graph.tensor(name).shape or () for name in add.inputs), key=lambda shape: shape != full)
    over_last = user.attr("axis", -1) % len(full) == len(full) - 1
    return over_last and shapes[0] == full and shapes[1][-1:] == full[-1:] and add.inputs[0] != add.inputs[1]


def _quantized(graph: Graph, value: str, owner: dict[str, int]) -> tuple[Node, ...]:
    """The quantization to 8 bits, or rounding to bfloat16, that is all that reads the value; () if it is read otherwise."""
    user = None if value in graph.outputs else graph.sole_user(value)
    if user is not None and user.name not in owner and narrows(graph, user):
        return (user,)
    if user is None or user.op != "QuantizeLinear" or user.name in owner or user.inputs[0] != value:
        return ()
    found = quantization(graph, user)
    return (user,) if found is not None and found.whole and found.dtype in ("uint8", "int8") else ()


def _next(graph: Graph, value: str, kind: str, anchor: Node, owner: dict[str, int]) -> tuple[Node, ...]:
    if value in graph.outputs:
        return ()
    gated = self_gated(graph, value)
    if gated and kind in ("conv", "depthwise", "matmul", "elementwise"):
        return gated
    user = graph.sole_user(value)
    if user is None or user.name in owner or graph.tensor(user.output).shape != graph.tensor(value).shape:
        return ()
    if user.op == "QuantizeLinear":
        return _quantized(graph, value, owner)
    if narrows(graph, user):
        return (user,)
    if not graph.tensor(value).dtype.startswith("float") or graph.tensor(user.output).dtype != graph.tensor(value).dtype:
        return ()
    if kind in ("conv", "depthwise", "matmul"):
        return (user,) if _is_step(graph, user, value, anchor) else ()
    if kind == "pool":
        return (user,) if user.op in ("Relu", "Clip") and user.inputs[0] == value else ()
    if kind == "elementwise" and _sums_rows(graph, anchor, value, user):
        return (user,)
    return (user,) if kind == "elementwise" and user.op in ELEMENTWISE else ()


def _is_step(graph: Graph, user: Node, value: str, anchor: Node) -> bool:
    """True if a kernel template has a step for what the node does to the value."""
    if user.op in ACTIVATIONS:
        constants = all(graph.constant(v) is not None for v in user.inputs[1:] if v)
        return user.inputs[0] == value and constants
    if user.op not in ("Add", "Sub", "Mul", "Div") or len(user.inputs) != 2:
        return False
    other = user.inputs[1] if user.inputs[0] == value else user.inputs[0]
    if other == value or (user.op in ("Sub", "Div") and (user.inputs[0] != value or graph.constant(other) is None)):
        return False
    full, shape = graph.tensor(value).shape or (), graph.tensor(other).shape
    if shape is None or len(shape) > len(full):
        return False
    padded = (1,) * (len(full) - len(shape)) + tuple(shape)
    convolves = anchor.op in ("Conv", "ConvTranspose")
    channel = 1 if convolves else len(full) - 1
    per_channel = all(dim in (1, full[axis] if axis == channel else 1) for axis, dim in enumerate(padded))
    if graph.constant(other) is not None and per_channel:
        return True
    if padded == tuple(full):
        return user.op in ("Add", "Mul") and graph.constant(other) is None
    image = convolves and padded == (*full[:2], *(1 for _ in full[2:]))
    return user.op == "Mul" and image


def computes_on_integers(graph: Graph, anchor: Node, epilogue: tuple[Node, ...]) -> bool:
    """True if the region's inputs are quantized such that its kernel needs no float copy of them."""
    if anchor.op in WEIGHTED and anchor.domain == "":
        return integer_operands(graph, anchor) is not None
    if not epilogue or epilogue[-1].op != "QuantizeLinear":
        return False
    middle = epilogue[:-1]
    if anchor.op == "Concat":
        return not middle and all(dequantized(graph, value) for value in anchor.inputs)
    first = dequantized(graph, anchor.inputs[0]) if anchor.inputs else None
    if first is None:
        return False
    if anchor.op in INTEGER_MOVES and anchor.op != "Pad":
        return not middle
    clamped = all(node.op in ("Relu", "Clip") for node in middle)
    if anchor.op in ("Add", "Sub", "Mul"):
        same = all(graph.tensor(value).shape is not None for value in anchor.inputs)
        return clamped and same and dequantized(graph, anchor.inputs[1]) is not None
    return clamped and (anchor.op in ("Relu", "Clip") or (anchor.op in INTEGER_POOLS and kind_of(graph, anchor) == "pool"))


@dataclass(frozen=True, eq=False)
class IntegerOperands:
    """A conv's or matmul's quantized operands: the data and, if constant, int8 weights with scales [channels] or []."""

    data: str
    data_quantization: Quantization
    weight: np.ndarray | None
    weight_scale: np.ndarray
    right: str = ""  # a computed right side, with its quantization
    right_quantization: Quantization | None = None


def integer_operands(graph: Graph, node: Node) -> IntegerOperands | None:
    """The quantized operands of a layer whose kernel can multiply integers; None where it must stay float."""
    data = dequantized(graph, node.inputs[0])
    if data is None or (node.op == "Gemm" and (node.attr("transA", 0) or node.attr("alpha", 1.0) != 1.0)):
        return None
    rank = len(graph.tensor(node.inputs[1]).shape or ())
    channels = 0 if node.op == "Conv" or node.attr("transB", 0) else 1 if node.op == "ConvTranspose" else rank - 1
    weight = quantized_weight(graph, node.inputs[1], channels) if rank else None
    if weight is not None:
        return IntegerOperands(*data, *weight)
    right = dequantized(graph, node.inputs[1])
    symmetric = right is not None and right[1].dtype == "int8" and int(right[1].zero_point) == 0 and int(data[1].zero_point) == 0
    if node.op != "MatMul" or right is None or not symmetric:
        return None  # a zero point of computed values would need their sums at run time
    return IntegerOperands(*data, None, right[1].scale, *right)
