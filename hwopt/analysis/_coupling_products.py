"""Coupling rules of the operators that multiply and add: convolutions, matrix products, embedding tables.

A product ends one class and starts another: the axis it sums over belongs to whoever made it, the axis it makes is new.
"""

from __future__ import annotations

from hwopt.analysis._coupling_slots import Axes, Ids, Slots, Unclear, Use
from hwopt.ir import Node


def conv(slots: Slots, node: Node) -> Axes:
    """x[N, C, ...], w[O, C / groups, ...], b[O] -> [N, O, ...]"""
    data, weight = node.inputs[:2]
    channels, made, read = slots.axis(data, 1), slots.axis(weight, 0), slots.axis(weight, 1)
    groups = node.attr("group", 1)
    _check_groups(groups, channels, made)
    if groups == 1:
        slots.unite(channels, read)
        _note(slots, Use(node.name, weight, 0, made, writes=True), Use(node.name, weight, 1, read, data=data, data_axis=1))
    elif whole_groups(groups, len(channels), len(made)):
        _tie_groups(slots, groups, channels, made)
        slots.freeze(read, f"{node}: its groups are cut as a whole")
        aligned = data if len(made) == len(channels) else ""
        _note(slots, Use(node.name, weight, 0, made, data=aligned, data_axis=1))
    else:
        slots.unite(channels.reshape(groups, -1), read)
        _tie_across(slots, groups, made)
        _note(slots, Use(node.name, weight, 0, made, writes=True), Use(node.name, weight, 1, read, data=data, data_axis=1))
    return _finish_conv(slots, node, made)


def conv_transpose(slots: Slots, node: Node) -> Axes:
    """x[N, C, ...], w[C, O / groups, ...], b[O] -> [N, O, ...]"""
    data, weight = node.inputs[:2]
    channels, read, per_group = slots.axis(data, 1), slots.axis(weight, 0), slots.axis(weight, 1)
    groups = node.attr("group", 1)
    made = per_group if groups == 1 else slots.fresh(groups * len(per_group))
    _check_groups(groups, channels, made)
    slots.unite(channels, read)
    if groups == 1 or not whole_groups(groups, len(channels), len(made)):
        _tie_across(slots, groups, channels)
        slots.unite(made.reshape(groups, -1), per_group)
        _note(slots, Use(node.name, weight, 1, per_group, writes=True), Use(node.name, weight, 0, read, data=data, data_axis=1))
    else:
        _tie_groups(slots, groups, channels, made)
        slots.freeze(per_group, f"{node}: its groups are cut as a whole")
        _note(slots, Use(node.name, weight, 0, read, data=data, data_axis=1))
    return _finish_conv(slots, node, made)


MANY_GROUPS = 16  # ResNeXt has 32 of 4 channels; ShuffleNet's few wide groups keep their number and lose width


def whole_groups(groups: int, channels: int, made: int) -> bool:
    """Grouped convolutions lose whole groups where these are many (depthwise, ResNeXt), else width in every group alike.

    Thin groups stay in the second class until input and output have one channel each, so that cutting one side does not
    tie it to the other.
    """
    return channels == made == groups or groups >= MANY_GROUPS


def _check_groups(groups: int, channels: Ids, made: Ids) -> None:
    if len(channels) % groups or len(made) % groups:
        raise Unclear(f"{len(channels)} channels in {groups} groups")


def _tie_groups(slots: Slots, groups: int, channels: Ids, made: Ids) -> None:
    first = channels.reshape(groups, -1)[:, :1]
    slots.unite(channels.reshape(groups, -1), first)
    slots.unite(made.reshape(groups, -1), first)


def _tie_across(slots: Slots, groups: int, ids: Ids) -> None:
    """Every group loses the same positions, so that all groups stay equally wide."""
    slots.unite(ids.reshape(groups, -1), ids.reshape(groups, -1)[:1])


def _finish_conv(slots: Slots, node: Node, made: Ids) -> Axes:
    if len(node.inputs) > 2 and node.inputs[2]:
        slots.unite(slots.axis(node.inputs[2], 0), made)
    return (slots.axes(node.inputs[0])[0], made, *slots.like(node.output, "a spatial axis")[2:])


def _note(slots: Slots, *uses: Use) -> None:
    slots.uses.extend(use for use in uses if slots.is_constant(use.weight))


def gemm(slots: Slots, node: Node) -> Axes:
    """a[M, K] @ b[K, N] + c -> [M, N], a and b transposed as the attributes say"""
    left, right = node.inputs[:2]
    rows, depth_left = (1, 0) if node.attr("transA", 0) else (0, 1)
    depth_right, columns = (1, 0) if node.attr("transB", 0) else (0, 1)
    slots.unite(slots.axis(left, depth_left), slots.axis(right, depth_right))
    out = (slots.axes(left)[rows], slots.axes(right)[columns])
    _note_product(slots, node, (left, rows, depth_left), (right, columns, depth_right))
    if len(node.inputs) > 2 and node.inputs[2]:
        return broadcast(slots, [out, slots.axes(node.inputs[2])])
    return out


def matmul(slots: Slots, node: Node) -> Axes:
    """a[..., M, K] @ b[..., K, N] -> [..., M, N]; weights on either side"""
    left, right = node.inputs
    a, b = slots.axes(left), slots.axes(right)
    if len(a) < 2 or len(b) < 2:
        raise Unclear("a product with a vector")
    slots.unite(slots.axis(left, -1), slots.axis(right, -2))
    _note_product(slots, node, (left, len(a) - 2, len(a) - 1), (right, len(b) - 1, len(b) - 2))
    return (*broadcast(slots, [a[:-2], b[:-2]]), a[-2], b[-1])


def _note_product(slots: Slots, node: Node, left: tuple[str, int, int], right: tuple[str, int, int]) -> None:
    """Each side is (value, free axis, summed axis); the constant one is the weight."""
    for (weight, made, read), (data, _, summed) in ((left, right), (right, left)):
        if slots.is_constant(weight) and not slots.is_constant(data):
            slots.uses.append(Use(node.name, weight, made, slots.axis(weight, made), writes=True))
            slots.uses.append(Use(node.name, weight, read, slots.axis(weight, read), data=data, data_axis=summed))


def einsum(slots: Slots, node: Node) -> Axes:
    """`bthd,hdo->bto`: equal letters are one axis; letters that the output lacks are summed over."""
    terms, arrow, result = node.attr("equation").replace(" ", "").partition("->")
    letters = terms.split(",")
    if not arrow or "." in terms or any(len(set(term)) < len(term) for term in letters):
        raise Unclear(f"equation {node.attr('equation')!r}")
    found: dict[str, Ids] = {}
    for value, term in zip(node.inputs, letters, strict=True):
        for axis, letter in enumerate(term):
            ids = slots.axis(value, axis)
            if letter in found and len(ids) != len(found[letter]):
                raise Unclear(f"letter {letter} has two sizes")
            slots.unite(found.setdefault(letter, ids), ids)
    _note_einsum(slots, node, letters, result)
    return tuple(found[letter] for letter in result)


def _note_einsum(slots: Slots, node: Node, letters: list[str], result: str) -> None:
    if len(letters) != 2:
        return
    for mine, other in ((0, 1), (1, 0)):
        weight, data = node.inputs[mine], node.inputs[other]
        if not slots.is_constant(weight) or slots.is_constant(data):
            continue
        for axis, letter in enumerate(letters[mine]):
            ids = slots.axis(weight, axis)
            if letter not in letters[other] and letter in result:
                slots.uses.append(Use(node.name, weight, axis, ids, writes=True))
            elif letter in letters[other] and letter not in result:
                slots.uses.append(Use(node.name, weight, axis, ids, data=data, data_axis=letters[other].index(letter)))


def gather(slots: Slots, node: Node) -> Axes:
    """data[A, B], indices[...] along axis 0 -> [..., B]: a table of embeddings, a codebook, or a choice of channels"""
    data, indices = node.inputs
    axes = slots.axes(data)
    axis = node.attr("axis", 0) % len(axes)
    picked = slots.graph.constant(indices)
    if picked is not None and picked.ndim == 1 and axes[axis] is not None and not slots.is_constant(data):
        return (*axes[:axis], slots.axis(data, axis)[picked], *axes[axis + 1 :])
    slots.freeze(axes[axis], f"{node} looks indices up along this axis")
    if slots.is_constant(data) and not slots.is_constant(indices):
        rest = ((i, ids) for i, ids in enumerate(axes) if i != axis and ids is not None)
        slots.uses.extend(Use(node.name, data, i, ids, writes=True) for i, ids in rest)
    return (*axes[:axis], *slots.axes(indices), *axes[axis + 1 :])


def broadcast(slots: Slots, operands: list[Axes]) -> Axes:
    """The axes of an elementwise result: operands aligned at the right, axes of size one stretched."""
    rank = max(map(len, operands))
    return tuple(_meet(slots, [axes[i - rank] for axes in operands if len(axes) >= -(i - rank)]) for i in range(rank))


def _meet(slots: Slots, meeting: list[Ids | None]) -> Ids | None:
    known = [ids for ids in meeting if ids is not None]
    size = max((len(ids) for ids in known), default=1)
    wide = [ids for ids in known if len(ids) == size]
    if len(known) < len(meeting):
        for ids in wide if size > 1 else []:
            slots.freeze(ids, "meets a dimension that is not static")
        return None if size == 1 else wide[0]
    if any(len(ids) not in (1, size) for ids in known):
        raise Unclear("operands that do not broadcast")
    kept = next((ids for ids in wide if slots.is_frozen(ids)), wide[0])
    if size > 1:
        for ids in wide:
            slots.unite(kept, ids)
    return kept
