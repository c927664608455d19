"""What each region of a graph costs in counted work: the Workloads that cost models price."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from hwopt.analysis.bfloat16 import narrows, widens
from hwopt.analysis.compressed import Compressed, compressed
from hwopt.analysis.orders import orders
from hwopt.analysis.qdq import narrow_weights
from hwopt.analysis.regions import VIEWS, Region, constant_nodes, regions
from hwopt.ir import Graph, Node, TensorType
from hwopt.target import Coded, Workload


def kernels(graph: Graph) -> tuple[tuple[Region, Workload], ...]:
    """Each region that becomes a kernel with its work, in running order; views of memory (Reshape ...) cost nothing."""
    every = regions(graph)
    lying = orders(graph, every)
    found = [(region, workload(graph, region)) for region in every if not is_view(graph, region)]
    footprint = rounded(sum(work.weight_bytes for _, work in found if work.kind != "move"))  # a table's rows are not all read
    return tuple(
        (region, dataclasses.replace(work, footprint=footprint, order=lying.get(region.name, ""))) for region, work in found
    )


def rounded(size: int) -> int:
    """To four values for each power of two: small changes of a model leave it as it is."""
    step = 1 << max(0, size.bit_length() - 3)
    return (size + step // 2) // step * step


def workloads(graph: Graph) -> tuple[Workload, ...]:
    """The work of each kernel, in running order."""
    return tuple(found for _, found in kernels(graph))


def workload(graph: Graph, region: Region) -> Workload:
    """The work of one region. Dimensions that are not static count as 1."""
    weight = coded_weights(graph, region)
    read, weights = _read_bytes(graph, region, weight)
    written = sum(_bytes(graph.tensor(value)) for value in region.outputs)
    m, n, k, groups, taps = _product(graph, region.anchor)
    kind = region.kind if region.kind != "other" else "reduce"
    narrow = narrow_weights(graph, region.anchor) if region.integer and kind in ("conv", "matmul") else 0
    return Workload(
        name=region.name, kind=kind, dtype=_dtype(graph, region), m=m, n=n, k=k, groups=groups, taps=taps,
        elements=_extra_elements(graph, region), read_bytes=read, write_bytes=written, weight_bytes=weights,
        coded=None if weight is None else Coded(weight.bytes, weight.bits, weight.books is not None),
        window=_window(graph, region.anchor), dims=_dims(graph.tensor(region.output)),
        steps=_steps(graph, region), narrow=narrow, relaid=_relaid(graph, region),
    )  # fmt: skip


def _relaid(graph: Graph, region: Region) -> bool:
    """True if a kernel that is no product reads an image as the caller has it, with channels first, and moves them last."""
    images = [graph.tensor(value) for value in region.inputs if value in graph.inputs and value not in graph.params]
    moved = any(len(kind.shape or ()) == 4 and _dims(kind)[1] > 1 and math.prod(_dims(kind)[2:]) > 1 for kind in images)
    return moved and region.kind not in ("conv", "depthwise", "matmul")


def is_view(graph: Graph, region: Region) -> bool:
    """True for a reshape that only gives memory another shape."""
    visible = region.output in graph.outputs or region.inputs[:1] == () or region.inputs[0] in graph.inputs
    return region.anchor.op in VIEWS and not visible and len(region.epilogue) == 0


def _dtype(graph: Graph, region: Region) -> str:
    if region.integer:
        return "int8"
    if region.bfloat16 and region.kind != "depthwise":  # those compute in float32
        return "bfloat16"
    return graph.tensor(region.anchor.inputs[0] if region.anchor.inputs else region.output).dtype


def coded_weights(graph: Graph, region: Region) -> Compressed | None:
    """The weights of a region's anchor as codes, where they are stored as such and its arithmetic takes other numbers."""
    anchor = region.anchor
    if anchor.op not in ("Conv", "Gemm", "MatMul") or anchor.domain:
        return None
    found = compressed(graph, anchor)
    if isinstance(found, str) or (region.integer and found.bits == 8 and found.books is None):
        return None
    return found


def _read_bytes(graph: Graph, region: Region, coded: Compressed | None) -> tuple[int, int]:
    """Bytes of activations and of weights that the region reads; weights as the arithmetic takes them, decoded."""
    folded = constant_nodes(graph)
    if coded is not None:
        return _activation_bytes(graph, region), coded.codes.size * (1 if region.integer else 4) + _others(graph, region)
    decoding = [
        node for node in region.nodes
        if node.name in folded and node.op != "DequantizeLinear" and not widens(graph, node)
    ]  # fmt: skip
    inside = {value for node in decoding for value in (*node.reads, *node.outputs)}
    results = {value for node in decoding for value in node.outputs if _leaves(graph, value, decoding)}
    weights = sum(_bytes(graph.tensor(value)) for value in results)
    weights += sum(_bytes(graph.tensor(value)) for value in region.inputs if value in graph.params and value not in inside)
    if region.anchor.op == "Gather":  # of a table only the rows that are asked for
        weights = min(weights, sum(_bytes(graph.tensor(value)) for value in region.anchor.outputs))
    return _activation_bytes(graph, region), weights


def _activation_bytes(graph: Graph, region: Region) -> int:
    return sum(_bytes(graph.tensor(value)) for value in region.inputs if value not in graph.params)


def _others(graph: Graph, region: Region) -> int:
    """Bytes of the parameters that the region reads besides its coded weights: biases and the like."""
    inside = _behind(graph, region.anchor.inputs[1])
    return sum(_bytes(graph.tensor(value)) for value in region.inputs if value in graph.params and value not in inside)


def _behind(graph: Graph, value: str) -> set[str]:
    """Every value that a constant one is computed from."""
    found, waiting = set(), [value]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(graph.producer[name].reads if name in graph.producer else ())
    return found


def _leaves(graph: Graph, value: str, decoding: list[Node]) -> bool:
    """True if anything but the decoding itself reads the value."""
    names = {node.name for node in decoding}
    return any(user.name not in names for user in graph.users.get(value, ()))


def _product(graph: Graph, node: Node) -> tuple[int, int, int, int, int]:
    """m, n, k, groups, taps of the anchor's multiplications; zeros if it has none."""
    if node.op in ("Conv", "ConvTranspose"):
        return _conv(graph, node)
    if node.op not in ("Gemm", "MatMul"):
        return 0, 0, 0, 1, 1
    left, right = (_dims(graph.tensor(value)) for value in node.inputs[:2])
    if node.op == "Gemm":
        left = left[::-1] if node.attr("transA", 0) else left
        right = right[::-1] if node.attr("transB", 0) else right
    left, right = (1, *left) if len(left) == 1 else left, (*right, 1) if len(right) == 1 else right
    batch = math.prod(right[:-2])
    rows = math.prod(_dims(graph.tensor(node.output))) // max(1, right[-1] * batch)
    return max(rows, 1), right[-1], left[-1], batch, 1


def _conv(graph: Graph, node: Node) -> tuple[int, int, int, int, int]:
    weight, out = _dims(graph.tensor(node.inputs[1])), _dims(graph.tensor(node.output))
    groups, taps = node.attr("group", 1), math.prod(weight[2:])
    if node.op == "Conv":
        return out[0] * math.prod(out[2:]), weight[0] // groups, weight[1] * taps, groups, taps
    data = _dims(graph.tensor(node.inputs[0]))  # every input pixel meets every tap
    return data[0] * math.prod(data[2:]), weight[1] * taps, weight[0] // groups, groups, taps


def _steps(graph: Graph, region: Region) -> tuple[str, ...]:
    """Operators, and what else decides about their code; products do not care about more than names."""
    product = region.kind in ("conv", "depthwise", "matmul")
    details = ((node, "" if product else _detail(graph, node)) for node in (region.anchor, *region.epilogue))
    return tuple(f"{node.op} {detail}" if detail else node.op for node, detail in details)


def _detail(graph: Graph, node: Node) -> str:
    """Axes, permutations, ways to resize, and of which form a second operand is; "" where the operator says it all."""
    rank = len(graph.tensor(node.inputs[0]).shape or ()) if node.inputs else 0
    if node.op == "Transpose":
        return ",".join(map(str, node.attr("perm") or reversed(range(rank))))
    if node.op in ("Resize", "Upsample"):
        return str(node.attr("mode", "nearest"))
    if node.op in BINARY and len(node.inputs) == 2:
        return min((_form(graph, value, node.output) for value in node.inputs), key=FORMS.index)
    if "Softmax" in node.op or "Normalization" in node.op:
        axis = node.attr("axis", -1)
        return "" if axis in (-1, rank - 1) else str(axis)
    axes = _axes(graph, node)
    return ",".join(str(axis % rank if rank else axis) for axis in axes)


BINARY = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Pow", "PRelu", "Mod", "Where", "Equal", "Greater", "Less")
FORMS = ("one", "channel", "last", "some", "full")  # elements of an operand: one, along axis 1, along the last one, fewer, all


def _form(graph: Graph, value: str, result: str) -> str:
    """How an operand is broadcast over the result."""
    mine, whole = _dims(graph.tensor(value)), _dims(graph.tensor(result))
    mine = (*(1,) * (len(whole) - len(mine)), *mine)
    wide = [axis for axis, size in enumerate(mine) if size > 1]
    if mine == whole:
        return "full"
    if not wide:
        return "one"
    return {len(whole) - 1: "last", 1: "channel"}.get(wide[0], "some") if len(wide) == 1 else "some"


def _axes(graph: Graph, node: Node) -> tuple[int, ...]:
    """The axes that an operator names as attribute or as constant."""
    if node.op in ("Concat", "Split", "Gather", "GatherElements"):
        return (node.attr("axis", 0),)
    place = {"Slice": 3}.get(node.op, 1) if node.op.startswith("Reduce") or node.op == "Slice" else None
    if place is None:
        return ()
    stated = node.inputs[place] if len(node.inputs) > place else ""
    found = graph.params[stated].ravel().tolist() if stated in graph.params else node.attr("axes", ())
    return tuple(map(int, found))


def _window(graph: Graph, node: Node) -> tuple[int, ...]:
    """Batch, then (height, width) of the data, the kernel, strides, dilations and the pads on both sides; images only."""
    data = _dims(graph.tensor(node.inputs[0])) if node.inputs else ()
    if node.op not in ("Conv", "MaxPool", "AveragePool") or len(data) not in (3, 4):
        return ()
    weight = _dims(graph.tensor(node.inputs[1]))[2:] if node.op == "Conv" else ()
    rank = len(data) - 2
    pads = node.attr("pads", (0,) * (2 * rank))
    ones = (1,) * rank
    pairs = (data[2:], weight or node.attr("kernel_shape"), node.attr("strides", ones), node.attr("dilations", ones))
    flat = [size for pair in pairs for size in ((1,) * (2 - rank) + tuple(pair))]
    sides = [size for pair in (pads[:rank], pads[rank:]) for size in ((0,) * (2 - rank) + tuple(pair))]
    return (data[0], *flat, *sides)


def _extra_elements(graph: Graph, region: Region) -> int:
    """Scalar results besides the products: one per epilogue step and element, windows of pools, inputs of reductions."""
    rounding = region.epilogue[-1:] if region.epilogue and narrows(graph, region.epilogue[-1]) else ()  # part of the store
    steps = sum(_elements(graph, node.outputs) for node in region.epilogue if node not in rounding)
    if region.kind in ("conv", "depthwise", "matmul"):
        return steps
    anchor = region.anchor
    if region.kind == "pool" and "kernel_shape" in anchor.attrs:
        return steps + _elements(graph, anchor.outputs[:1]) * math.prod(anchor.attr("kernel_shape"))
    if region.kind in ("pool", "reduce", "other"):
        return steps + max(_elements(graph, anchor.inputs[:1]), _elements(graph, anchor.outputs))
    return steps + _elements(graph, anchor.outputs)


def _elements(graph: Graph, values: Iterable[str]) -> int:
    return sum(math.prod(_dims(graph.tensor(value))) for value in values if value)


def _dims(kind: TensorType) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else 1 for dim in kind.shape or ())


def _bytes(kind: TensorType) -> int:
    return TensorType(kind.dtype, _dims(kind)).bytes if kind.dtype not in ("undefined", "string") else 0
