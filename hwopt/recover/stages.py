"""Passes in parts: the widths and the sparsity that a schedule reaches by and by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from hwopt.analysis.constant import constant
from hwopt.analysis.coupling import coupling
from hwopt.ir import Graph
from hwopt.pipeline import Context, Pass, PassManager, Phase, merged, run_pass

Remaining = Callable[[float, float, float], float]  # (what is there first, what is there last, progress) -> what is left


def cubic(first: float, last: float, progress: float) -> float:
    """Much at first, little at the end (Zhu and Gupta 2017, equation 1)."""
    return last + (first - last) * (1 - progress) ** 3


def geometric(first: float, last: float, progress: float) -> float:
    """The same share of what is left in each step (Frankle and Carbin 2019)."""
    return float(first * (last / first) ** progress)


@dataclass(frozen=True)
class Width:
    """A group of channels that a pass makes narrower: units before and behind it."""

    by: Pass
    group: str
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class Stages:
    """`widths` and `sparse` can be reached in steps, `rest` is done once behind them. `whole` is all of it at once."""

    start: Graph
    whole: Graph
    widths: tuple[Width, ...]
    sparse: tuple[Pass, ...]
    rest: tuple[Pass, ...]
    ctx: Context

    def at(self, graph: Graph, progress: float, left: Remaining) -> Graph:
        """The graph with as much taken away as is due."""
        due = {one: max(round(left(one.first, one.last, progress)), one.last) for one in self.widths}
        sizes = _sizes(graph)
        cuts = (_narrower(one, keep) for one, keep in due.items() if keep < sizes.get(one.group, 0))
        graph = PassManager(merged(cuts)).run(graph, self.ctx).graph
        for by in self.sparse:
            ratio = 1 - left(1.0, 1 - _ratio(by), progress)
            graph = _with_zeros(graph, dataclasses.replace(by, ratio=ratio), self.ctx)  # type: ignore[call-arg]
        return graph

    @property
    def unfitted(self) -> Stages:
        """The same with cuts that leave the numbers of all other weights alone."""
        widths = (dataclasses.replace(one, by=_unfitted(one.by)) for one in self.widths)
        return dataclasses.replace(self, widths=tuple(widths))

    def finish(self, graph: Graph) -> Graph:
        """With the passes that cannot be done in parts."""
        return PassManager(self.rest).run(graph, self.ctx).graph


def stages_of(graph: Graph, passes: tuple[Pass, ...], ctx: Context) -> Stages:
    """What of the passes can be done in parts.

    A pruning pass has the options `keep` and `ratio` and makes groups of channels narrower; one that drops single weights has
    `pattern=unstructured` and `ratio`, and stores what is left: its zeros can be trained around before it does.
    """
    whole, widths, sparse, rest = graph, [], [], []
    for one in merged(passes):
        before, whole = whole, run_pass(one, whole, ctx)
        if one.phase == Phase.PRUNE and _has(one, "keep", "ratio"):
            widths += list(_narrowed(one, before, whole))
            continue
        if getattr(one, "pattern", "") == "unstructured" and _has(one, "ratio"):
            sparse.append(one)
        rest.append(one)
    return Stages(graph, whole, tuple(widths), tuple(sparse), tuple(rest), ctx)


def _has(one: Pass, *names: str) -> bool:
    return {field.name for field in dataclasses.fields(one)}.issuperset(names)


def _ratio(by: Pass) -> float:
    return float(getattr(by, "ratio"))  # noqa: B009  (an option of the pass, not of every pass)


def _sizes(graph: Graph) -> dict[str, int]:
    return {group.name: group.size for group in coupling(graph)}


def _narrowed(by: Pass, before: Graph, after: Graph) -> Iterator[Width]:
    sizes = _sizes(after)
    for name, size in _sizes(before).items():
        if sizes.get(name, size) < size:
            yield Width(by, name, size, sizes[name])


def _narrower(one: Width, keep: int) -> Pass:
    return dataclasses.replace(one.by, site=(one.group,), keep=keep, ratio=0.0)  # type: ignore[call-arg]


def _unfitted(by: Pass) -> Pass:
    return dataclasses.replace(by, refit=False) if _has(by, "refit") else by  # type: ignore[call-arg]


def _with_zeros(graph: Graph, by: Pass, ctx: Context) -> Graph:
    """The dense graph with the zeros that a pass would store."""
    after, edit = run_pass(by, graph, ctx), graph.edit()
    for node in graph.nodes:
        weight = node.inputs[1] if len(node.inputs) > 1 else ""
        if weight in graph.params and weight not in after.params and node.name in after.node:
            dense = constant(after, after.node[node.name].inputs[1])
            if dense is not None and dense.shape == graph.params[weight].shape:
                edit.set_param(weight, np.where(dense != 0, graph.params[weight], 0).astype(graph.params[weight].dtype))
                edit.replace(node)
    return edit.finish(str(by))
