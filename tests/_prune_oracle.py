"""The masked model: what pruning must equal. Whoever sums over removed units multiplies them by zero instead."""

from __future__ import annotations

import numpy as np

from hwopt.analysis.coupling import Coupling, Group, analyse
from hwopt.backends.ort import run
from hwopt.ir import Graph, Node, verify
from passes._prune_cut import cut
from passes.prune_channels import kept_units
from tests.random_graphs import random_feeds

Removed = list[tuple[Group, np.ndarray]]


def masked(graph: Graph, kept: np.ndarray) -> Graph:
    """The graph with a Mul by zeros and ones on the first operand of every product that sums over removed elements."""
    coupling, edit = analyse(graph), graph.edit()
    for node in graph.nodes:
        value = node.inputs[0] if node.inputs else ""
        for axis in summed_axes(node, coupling):
            axes = coupling.values[node.inputs[0]]
            ids = axes[axis]
            if ids is not None and not kept[ids].all():
                shape = [-1 if i == axis else 1 for i in range(len(axes))]
                value = edit.emit("Mul", [value, edit.param("mask", kept[ids].astype(np.float32).reshape(shape))])
        if node.inputs and value != node.inputs[0]:
            edit.replace(node, inputs=(value, *node.inputs[1:]))
    return edit.finish("mask")


def summed_axes(node: Node, coupling: Coupling) -> list[int]:
    """The axes of its first operand that a product sums over."""
    if node.op in ("Conv", "ConvTranspose"):
        return [1]
    if node.op == "Gemm":
        return [0 if node.attr("transA", 0) else 1]
    if node.op == "MatMul":
        return [len(coupling.values[node.inputs[0]]) - 1]
    if node.op == "Einsum":
        terms, result = node.attr("equation").split("->")
        first, second = terms.split(",")
        return [i for i, letter in enumerate(first) if letter in second and letter not in result]
    return []


def random_removal(graph: Graph, seed: int, share: float = 0.5) -> Removed:
    """A random share of the units of every group that may be cut."""
    rng = np.random.default_rng(seed)
    free = [group for group in analyse(graph).groups if not group.frozen]
    stay = [kept_units(group, rng.random(group.size), max(1, int(group.size * share))) for group in free]
    return [(group, np.setdiff1d(np.arange(group.size), units)) for group, units in zip(free, stay, strict=True)]


def pruned_like_masked(graph: Graph, removed: Removed, tolerance: float = 1e-4) -> Graph:
    """The pruned graph, after proof that it is valid and gives the masked model's outputs."""
    kept = analyse(graph).kept(removed)
    pruned = cut(graph, analyse(graph), kept, "prune")
    verify(pruned)
    feeds = random_feeds(graph)
    assert_same(run(masked(graph, kept), feeds), run(pruned, feeds), tolerance)
    return pruned


def assert_same(wanted: dict[str, np.ndarray], found: dict[str, np.ndarray], tolerance: float = 1e-4) -> None:
    """Equal shapes, and values within the tolerance of each output's largest."""
    for name, array in wanted.items():
        assert found[name].shape == array.shape, name
        scale = max(1e-3, float(np.abs(array.astype(np.float64)).max(initial=0)))
        assert np.abs(found[name].astype(np.float64) - array).max(initial=0) <= tolerance * scale, name
