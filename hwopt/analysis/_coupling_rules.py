"""Coupling rules of the operators that pass channels on: elementwise, normalization, pooling, and those that move data.

`RULES[op](slots, node)` gives the axes of each output, uniting and freezing on the way; an operator that is not in the
table is a barrier. A rule that cannot say raises Unclear, which makes the node a barrier, with that reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from hwopt.analysis import _coupling_products as products
from hwopt.analysis._coupling_products import broadcast
from hwopt.analysis._coupling_slots import Axes, Slots, Unclear
from hwopt.ir import Graph, Node

Rule = Callable[[Slots, Node], list[Axes]]

_UNARY = """Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast CastLike Ceil Celu Clip Cos Cosh Dropout Elu Erf Exp Floor
Gelu HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin
Sinh Softplus Softsign Sqrt Tan Tanh ThresholdedRelu"""
_NARY = """Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod
Mul Or PRelu Pow Sub Sum Where Xor"""
_REDUCE = """ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
ReduceSumSquare"""
_POOL = "AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool"


def _one(rule: Callable[[Slots, Node], Axes]) -> Rule:
    return lambda slots, node: [rule(slots, node)]


def unary(slots: Slots, node: Node) -> list[Axes]:
    return [slots.axes(node.inputs[0])] * len(node.outputs)


def nary(slots: Slots, node: Node) -> Axes:
    return broadcast(slots, [slots.axes(value) for value in node.inputs])


def per_channel(slots: Slots, node: Node) -> list[Axes]:
    """BatchNormalization, InstanceNormalization: one number per channel in every other input."""
    axes = slots.axes(node.inputs[0])
    for value in filter(None, node.inputs[1:]):
        slots.unite(slots.axis(node.inputs[0], 1), slots.axis(value, 0))
    return [axes] + [(axes[1],)] * (len(node.outputs) - 1)


def group_norm(slots: Slots, node: Node) -> Axes:
    """A whole group goes or stays, or the statistics of the rest would change."""
    data, *affine = node.inputs
    channels, groups = slots.axis(data, 1), node.attr("num_groups")
    if len(channels) % groups:
        raise Unclear(f"{len(channels)} channels in {groups} groups")
    units = channels.reshape(groups, -1)
    slots.unite(units, units[:, :1])
    for value in affine:
        ids = slots.axis(value, 0)
        if len(ids) != len(channels):
            raise Unclear("one number per group, as before opset 21")
        slots.unite(ids, channels)
    return slots.axes(data)


def across(default: int, trailing: bool = False) -> Rule:
    """Softmax and its kin, LayerNormalization: each result needs all indices of the axis, so none may go."""

    def rule(slots: Slots, node: Node) -> list[Axes]:
        axes = slots.axes(node.inputs[0])
        first = node.attr("axis", default) % len(axes)
        whole = trailing or (node.op in ("Softmax", "LogSoftmax", "Hardmax") and slots.graph.opsets.get("", 13) < 13)
        for ids in axes[first:] if whole else axes[first : first + 1]:
            slots.freeze(ids, f"{node} works across this axis")
        if not trailing:
            return [axes] * len(node.outputs)
        for value in filter(None, node.inputs[1:]):
            broadcast(slots, [axes, slots.axes(value)])
        rest = [slots.like(value, "statistics of a normalization") if value else () for value in node.outputs[1:]]
        return [axes, *rest]

    return rule


def local_response(slots: Slots, node: Node) -> Axes:
    slots.freeze(slots.axes(node.inputs[0])[1], f"{node} works across this axis")
    return slots.axes(node.inputs[0])


def mean_variance(slots: Slots, node: Node) -> Axes:
    axes = slots.axes(node.inputs[0])
    for axis in node.attr("axes", (0, 2, 3)):
        slots.freeze(axes[axis], f"{node} works across this axis")
    return axes


def triangle(slots: Slots, node: Node) -> Axes:
    axes = slots.axes(node.inputs[0])
    for ids in axes[-2:]:
        slots.freeze(ids, f"{node} works across this axis")
    return axes


def reduce(slots: Slots, node: Node) -> Axes:
    """A sum over an axis has no weights that could be masked: the axis is frozen; the others pass."""
    axes = slots.axes(node.inputs[0])
    dropped = node.attr("axes")
    if len(node.inputs) > 1 and node.inputs[1]:
        constant = slots.graph.constant(node.inputs[1])
        if constant is None:
            raise Unclear("axes that are computed")
        dropped = tuple(map(int, constant))
    if not dropped and node.attr("noop_with_empty_axes", 0):
        return axes
    return _without(slots, node, axes, {axis % len(axes) for axis in dropped or range(len(axes))})


def arg(slots: Slots, node: Node) -> Axes:
    axes = slots.axes(node.inputs[0])
    return _without(slots, node, axes, {node.attr("axis", 0) % len(axes)})


def _without(slots: Slots, node: Node, axes: Axes, dropped: set[int]) -> Axes:
    for axis in dropped:
        slots.freeze(axes[axis], f"{node} works across this axis")
    if not node.attr("keepdims", 1):
        return tuple(ids for axis, ids in enumerate(axes) if axis not in dropped)
    return tuple(slots.fresh(1) if axis in dropped else ids for axis, ids in enumerate(axes))


def pool(slots: Slots, node: Node) -> Axes:
    if any(node.outputs[1:]):
        raise Unclear("pooling with indices")
    return (*slots.axes(node.inputs[0])[:2], *slots.like(node.output, "a spatial axis")[2:])


def quantize_linear(slots: Slots, node: Node) -> Axes:
    """x, scale, zero point: one for all, or one per index of an axis; scales per block are unclear."""
    axes = slots.axes(node.inputs[0])
    if node.attr("block_size", 0):
        raise Unclear("scales per block")
    for value in filter(None, node.inputs[1:]):
        scale = slots.axes(value)
        if len(scale) == 1 and scale[0] is not None and len(scale[0]) > 1:
            slots.unite(slots.axis(node.inputs[0], node.attr("axis", 1)), scale[0])
        elif len(scale) > 1:
            raise Unclear("scales per block")
    return axes


def transpose(slots: Slots, node: Node) -> Axes:
    axes = slots.axes(node.inputs[0])
    return tuple(axes[axis] for axis in node.attr("perm", tuple(reversed(range(len(axes))))))


def concat(slots: Slots, node: Node) -> Axes:
    parts = [slots.axes(value) for value in node.inputs]
    axis = node.attr("axis") % len(parts[0])
    joined = [part[axis] for part in parts]
    known = [ids for ids in joined if ids is not None]
    if len(known) < len(joined):
        raise Unclear(f"axis {axis} is not static")
    bare = broadcast(slots, [(*part[:axis], None, *part[axis + 1 :]) for part in parts])
    return (*bare[:axis], np.concatenate(known), *bare[axis + 1 :])


def split(slots: Slots, node: Node) -> list[Axes]:
    axes = slots.axes(node.inputs[0])
    axis = node.attr("axis", 0) % len(axes)
    if len(node.inputs) > 1 and node.inputs[1] and slots.graph.constant(node.inputs[1]) is None:
        raise Unclear("sizes that are computed")
    ids, start, parts = slots.axis(node.inputs[0], axis), 0, []
    for value in node.outputs:
        size = slots.graph.tensor(value).dims[axis] if value else 0
        if not value:
            raise Unclear("a part that nobody names")
        parts.append((*axes[:axis], ids[start : start + size], *axes[axis + 1 :]))
        start += size
    return parts


def slice_(slots: Slots, node: Node) -> Axes:
    """Contiguous pieces are mapped; a stride freezes its axis."""
    axes = list(slots.axes(node.inputs[0]))
    for axis, start, end, step in slice_ranges(slots.graph, node, len(axes)):
        ids = axes[axis]
        if ids is None:
            raise Unclear(f"axis {axis} is not static")
        if step != 1:
            slots.freeze(ids, f"{node} has a stride")
        axes[axis] = ids[slice(start, end if step > 0 or end >= -len(ids) else None, step)]
    return tuple(axes)


def slice_ranges(graph: Graph, node: Node, rank: int) -> list[tuple[int, int, int, int]]:
    """(axis, start, end, step) of a Slice with constant operands (opset 10 and newer)."""
    given = [graph.constant(value) if value else np.empty(0, np.int64) for value in node.inputs[1:]]
    if not given or any(array is None for array in given):
        raise Unclear("a slice whose bounds are computed")
    starts, ends, axes, steps = [[int(v) for v in array] for array in given if array is not None] + [[]] * (4 - len(given))
    axes = [axis % rank for axis in axes] or list(range(len(starts)))
    return list(zip(axes, starts, ends, steps or [1] * len(starts), strict=True))


def pad(slots: Slots, node: Node) -> Axes:
    """Padded channels are elements of their own that no weight makes; only constant padding can lose some."""
    axes = slots.axes(node.inputs[0])
    out: list = list(axes)
    for axis, (before, after) in pad_widths(slots.graph, node, len(axes)).items():
        ids = axes[axis]
        if ids is None or before < 0 or after < 0 or node.attr("mode", "constant") != "constant":
            slots.freeze(ids, f"{node} pads along this axis")
        if ids is None:
            continue
        if before >= 0 and after >= 0 and node.attr("mode", "constant") == "constant":
            out[axis] = np.concatenate([slots.fresh(before), ids, slots.fresh(after)])
        else:
            out[axis] = slots.fresh(len(ids) + before + after, f"{node} pads along this axis")
    return tuple(out)


def pad_widths(graph: Graph, node: Node, rank: int) -> dict[int, tuple[int, int]]:
    """Axis -> (before, after), for the axes that a Pad with constant operands (opset 11 and newer) changes."""
    widths = graph.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    named = graph.constant(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] else np.arange(rank)
    if widths is None or named is None:
        raise Unclear("padding that is computed")
    pairs = {int(axis) % rank: (int(b), int(a)) for axis, b, a in zip(named, *widths.reshape(2, -1), strict=True)}
    return {axis: pair for axis, pair in pairs.items() if pair != (0, 0)}


def resize(slots: Slots, node: Node) -> Axes:
    if len(node.inputs) > 3 and node.inputs[3] and slots.graph.constant(node.inputs[3]) is None:
        raise Unclear("sizes that are computed")
    axes, out = slots.axes(node.inputs[0]), slots.like(node.output, "a resized axis")
    same = [a is not None and b is not None and len(a) == len(b) for a, b in zip(axes, out, strict=True)]
    for keep, ids in zip(same, axes, strict=True):
        slots.freeze(None if keep else ids, f"{node} resizes this axis")
    return tuple(a if keep or a is None else b for keep, a, b in zip(same, axes, out, strict=True))


def expand(slots: Slots, node: Node) -> Axes:
    if slots.graph.constant(node.inputs[1]) is None:
        raise Unclear("a shape that is computed")
    return broadcast(slots, [slots.axes(node.inputs[0]), slots.like(node.output)])


def tile(slots: Slots, node: Node) -> Axes:
    repeats = slots.graph.constant(node.inputs[1])
    if repeats is None:
        raise Unclear("repeats that are computed")
    axes = zip(slots.axes(node.inputs[0]), map(int, repeats), strict=True)
    return tuple(ids if ids is None or count == 1 else np.tile(ids, count) for ids, count in axes)


def depth_to_space(slots: Slots, node: Node) -> Axes:
    channels, block = slots.axis(node.inputs[0], 1), node.attr("blocksize") ** 2
    column = node.attr("mode", "DCR") == "DCR"
    parts = channels.reshape(block, -1) if column else channels.reshape(-1, block).T
    slots.unite(parts, parts[:1])
    return (slots.axes(node.inputs[0])[0], parts[0], *slots.like(node.output, "a spatial axis")[2:])


def space_to_depth(slots: Slots, node: Node) -> Axes:
    spread = np.tile if node.attr("mode", "DCR") == "DCR" else np.repeat
    channels = spread(slots.axis(node.inputs[0], 1), node.attr("blocksize") ** 2)
    return (slots.axes(node.inputs[0])[0], channels, *slots.like(node.output, "a spatial axis")[2:])


def reshape(slots: Slots, node: Node) -> Axes:
    """Equal sizes pass; where axes are split or merged one of them carries the cut and the others are frozen."""
    if node.op == "Squeeze" and len(node.inputs) < 2 and not node.attr("axes"):
        raise Unclear("a squeeze of whatever has size one")
    if node.op == "Reshape" and slots.graph.constant(node.inputs[1]) is None:
        raise Unclear("a shape that is computed")
    axes, out = slots.axes(node.inputs[0]), list(slots.like(node.output))
    lead = 0
    while lead < min(len(axes), len(out)) and axes[lead] is None and out[lead] is None:
        lead += 1
    if any(ids is None for ids in (*axes[lead:], *out[lead:])):
        raise Unclear("a reshape that is not static")
    sizes = [len(ids) if ids is not None else 1 for ids in axes]
    for given, made in factors(sizes, [len(ids) if ids is not None else 1 for ids in out]):
        if len(given) == len(made) == 1:
            out[made[0]] = axes[given[0]]
        elif len(given) == 1:
            _split_axis(slots, node, axes, out, given[0], made)
        elif len(made) == 1:
            _merge_axes(slots, node, axes, out, given, made[0])
        else:
            _regroup(slots, node, axes, out, given, made)
    return tuple(out)


def factors(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes of equal product on both sides, axes of size one left out: [[0], [0, 1]] is a split."""
    if math.prod(before) != math.prod(after) or not math.prod(before):
        raise Unclear("a reshape of unequal sizes")
    old, new = ([axis for axis, size in enumerate(sizes) if size > 1] for sizes in (before, after))
    runs = []
    while old and new:
        given, made = [old.pop(0)], [new.pop(0)]
        while (left := math.prod(before[i] for i in given)) != (right := math.prod(after[i] for i in made)):
            (given if left < right else made).append((old if left < right else new).pop(0))
        runs.append((given, made))
    return runs


def _coordinate(sizes: Sequence[int], axis: int) -> np.ndarray:
    """The coordinate along one factor, for every index of the flat axis."""
    inner = math.prod(sizes[axis + 1 :])
    return np.arange(math.prod(sizes)) // inner % sizes[axis]


def _split_axis(slots: Slots, node: Node, axes: Axes, out: list, given: int, made: list[int]) -> None:
    flat, parts = axes[given], [out[axis] for axis in made]
    if flat is None:
        return
    sizes = [len(ids) for ids in parts]
    options = list(range(len(made)))
    if len(made) == 2 and _shuffles(slots, node):
        options.reverse()
    carrier = options[0] if slots.is_frozen(flat) else slots.choose(node, made[0], options, parts)
    slots.unite(flat, parts[carrier][_coordinate(sizes, carrier)])
    for index, ids in enumerate(parts):
        if index != carrier:
            slots.freeze(ids, f"{node} splits an axis")


def _merge_axes(slots: Slots, node: Node, axes: Axes, out: list, given: list[int], made: int) -> None:
    parts = [ids for ids in (axes[axis] for axis in given) if ids is not None]
    free = [index for index, ids in enumerate(parts) if not slots.is_frozen(ids)]
    carrier = slots.choose(node, made, free, parts) if len(free) > 1 else (free or [0])[0]
    out[made] = parts[carrier][_coordinate([len(ids) for ids in parts], carrier)]
    for index, ids in enumerate(parts):
        if index != carrier:
            slots.freeze(ids, f"{node} merges axes")


def _regroup(slots: Slots, node: Node, axes: Axes, out: list, given: list[int], made: list[int]) -> None:
    """[C, H, W] <-> [G, C / G * H * W], as in exported group normalization: the leading axes are related, the rest is frozen."""
    first, second = axes[given[0]], out[made[0]]
    if first is None or (len(first) % len(second) and len(second) % len(first)):
        raise Unclear("a reshape without a clear factorisation")
    size = max(len(first), len(second))
    slots.unite(np.repeat(first, size // len(first)), np.repeat(second, size // len(second)))
    for ids in (*(axes[axis] for axis in given[1:]), *(out[axis] for axis in made[1:])):
        slots.freeze(ids, f"{node} regroups axes")


def _shuffles(slots: Slots, node: Node) -> bool:
    """The channel shuffle: [g * c] -> [g, c] -> [c, g] -> [c * g] keeps all groups and thins every one of them."""
    graph = slots.graph
    turned = graph.sole_user(node.output)
    merged = graph.sole_user(turned.output) if turned is not None and turned.op == "Transpose" else None
    if merged is None or merged.op not in ("Reshape", "Flatten"):
        return False
    return graph.tensor(merged.output).shape == graph.tensor(node.inputs[0]).shape


RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNARY.split(), unary),
    **dict.fromkeys(_NARY.split(), _one(nary)),
    **dict.fromkeys(_REDUCE.split(), _one(reduce)),
    **dict.fromkeys(_POOL.split(), _one(pool)),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _one(reshape)),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), across(-1)),
    **dict.fromkeys(("ArgMax", "ArgMin"), _one(arg)),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), per_channel),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _one(quantize_linear)),
    "Concat": _one(concat),
    "Conv": _one(products.conv),
    "ConvTranspose": _one(products.conv_transpose),
    "DepthToSpace": _one(depth_to_space),
    "Einsum": _one(products.einsum),
    "Expand": _one(expand),
    "Gather": _one(products.gather),
    "Gemm": _one(products.gemm),
    "GroupNormalization": _one(group_norm),
    "LayerNormalization": across(-1, trailing=True),
    "LRN": _one(local_response),
    "LpNormalization": across(-1),
    "MatMul": _one(products.matmul),
    "MeanVarianceNormalization": _one(mean_variance),
    "Pad": _one(pad),
    "Resize": _one(resize),
    "Slice": _one(slice_),
    "SpaceToDepth": _one(space_to_depth),
    "Split": split,
    "Tile": _one(tile),
    "Transpose": _one(transpose),
    "Trilu": _one(triangle),
}
