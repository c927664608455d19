"""Structured pruning: remove whole channels, heads or groups, in every weight that they run through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from hwopt.analysis.coupling import Group, analyse, coupling
from hwopt.errors import PassError, UsageError, closest, did_you_mean
from hwopt.ir import Graph
from hwopt.pipeline import Context, Pass, Phase, Refusal, at_site
from hwopt.target import Target
from passes._prune_criteria import CRITERIA
from passes._prune_cut import cut
from passes._prune_repair import repair

SEARCHED = (
    "obs",
    "activation",
    "taylor",
    "fisher",
    "l2",
    "fpgm",
)  # the gradient criteria need torch: without it such trials fail
REMOVED = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)  # shares of a group, on the granule of the target


@dataclass(frozen=True)
class PruneChannels(Pass):
    """conv1[64] -> relu -> conv2[.., 64] becomes conv1[48] -> relu -> conv2[.., 48].

    `site` names coupling groups (see hwopt.analysis.coupling), each by the first node that writes it; none means all groups.
    `keep` units stay in each of them (one number for all, or one for each), or `ratio` of the units goes. The least important
    ones by `criterion` are removed: magnitude (l1), l2, activation, fpgm, random, obs, or by gradients taylor, fisher, obd
    (these need torch; labels if there are). The result equals the model in which all who read these units multiply them by
    zero; with calibration data those who read them are then fitted to what they computed before (see passes._prune_repair),
    unless refit=false.
    """

    name: ClassVar[str] = "prune-channels"
    summary: ClassVar[str] = "remove the least important channels, heads or groups, in all layers that share them"
    phase: ClassVar[Phase] = Phase.PRUNE
    knobs: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({"criterion": SEARCHED})
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({"criterion": tuple(CRITERIA)})
    each: ClassVar[tuple[str, ...]] = ("keep",)

    keep: tuple[int, ...] = ()
    ratio: float = 0.0
    criterion: str = "l2"
    refit: bool = True

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise UsageError(
                f"unknown criterion {self.criterion!r}", place=str(self), hint=did_you_mean(self.criterion, CRITERIA)
            )
        keep = (self.keep,) if isinstance(self.keep, int) else tuple(self.keep)
        object.__setattr__(self, "keep", keep[:1] if len(set(keep)) < 2 else keep)
        if min(self.keep, default=1) < 1 or not 0 <= self.ratio < 1:
            raise UsageError("keep must be at least 1 and ratio in [0, 1)", place=str(self))
        if self.keep and self.ratio:
            raise UsageError("state keep or ratio, not both", place=str(self))
        if len(self.keep) > 1 and len(self.keep) != len(self.site):
            raise UsageError(f"{len(self.keep)} widths for {len(self.site)} groups", place=str(self), hint="state one for each")

    def run(self, graph: Graph, ctx: Context) -> Graph:
        self.check()
        self.check_site(graph)
        found = analyse(graph)
        chosen = list(self._chosen(graph, found.groups, ctx))
        if not chosen:
            return graph
        removed = []
        for group, scores in zip(chosen, CRITERIA[self.criterion](graph, chosen, ctx), strict=True):
            stay = kept_units(group, scores, self._wanted(group, ctx))
            if len(stay) == group.size:
                ctx.refuse(self, group.name, "some value would lose its last channel")
            removed.append((group, np.setdiff1d(np.arange(group.size), stay)))
        samples = ctx.calibration if self.refit else None
        return cut(graph, found, found.kept(removed), str(self), None if samples is None else lambda work: repair(work, samples))

    def _chosen(self, graph: Graph, groups: tuple[Group, ...], ctx: Context) -> Iterator[Group]:
        """The groups that the site names and that may be cut; every other one is refused."""
        known = {group.name: group for group in groups}
        for name in self.site or known:
            if name in known and not known[name].frozen and self._wanted(known[name], ctx) < known[name].size:
                yield known[name]
            elif name in known:
                ctx.refuse(self, name, known[name].frozen or f"it has no more than {known[name].size} units")
            else:
                ctx.refuse(self, name, "no group of channels is called after this node")

    def check(self) -> None:
        super().check()
        if not self.keep and not self.ratio:
            raise UsageError("how much?", place=str(self), hint="write keep=48 or ratio=0.5")

    def check_site(self, graph: Graph) -> None:
        """Groups are called after nodes; those of inputs after the value."""
        for name in (one for one in self.site if one not in graph.node):
            known = {group.name for group in coupling(graph)}
            if name not in known:
                hint = closest(name, known, "groups are called after the first node that writes them")
                raise PassError(f"no group {name} in {graph.name}", place=str(self), hint=hint)

    def _wanted(self, group: Group, ctx: Context) -> int:
        """Units to keep; a ratio is rounded up to the granule of the target, if there is one."""
        if self.keep:
            return at_site(self.keep, self.site.index(group.name) if group.name in self.site else 0) or 0
        wanted = max(1, round(group.size * (1 - self.ratio)))
        widths = [] if ctx.target is None else granular(group, ctx.target)
        return min((width for width in widths if width >= wanted), default=wanted if not widths else group.size)

    @classmethod
    def candidates(cls, graph: Graph, target: Target) -> Iterator[Pass | Refusal]:
        """For each group the widths on the target's granule that lie nearest to these shares; a planner has calibration data."""
        for group in coupling(graph):
            widths = granular(group, target)
            if group.frozen or not widths:
                reason = group.frozen or f"none of its {group.size} units can go without leaving the target's granule"
                yield Refusal(cls.name, group.name, reason)
                continue
            wanted = [group.size * (1 - removed) for removed in REMOVED]
            nearest = {min(widths, key=lambda width: abs(width - one)) for one in wanted}
            yield from (cls(site=(group.name,), keep=(width,), criterion="obs") for width in sorted(nearest, reverse=True))


def granular(group: Group, target: Target) -> list[int]:
    """Units that may stay so that the channels fill the target's granule; the int8 one where the group is wide enough."""
    coarse, fine = target.granule_of("int8"), target.granule_of("float32")
    for granule in sorted({coarse, fine}, reverse=True):
        widths = [units for units in range(1, group.size) if units * group.granularity % granule == 0]
        if widths:
            return widths
    return []


def kept_units(group: Group, scores: np.ndarray, keep: int) -> np.ndarray:
    """The `keep` most important units, sorted; more only where a value would lose its last channel."""
    order = np.argsort(-scores, kind="stable")
    rank = np.argsort(order)
    stay: set[int] = set()
    for block in group.blocks:
        if not stay.intersection(block.tolist()):
            stay.add(int(block[rank[block].argmin()]))
    rest = (int(unit) for unit in order if int(unit) not in stay)
    stay.update(unit for unit, _ in zip(rest, range(keep - len(stay)), strict=False))
    return np.array(sorted(stay))
