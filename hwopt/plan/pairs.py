"""What two changes cost together: widths on both sides of a layer, and conversions between neighbours.

    conv[64 -> 64] with half of its inputs and half of its outputs:  t(32, 32), not t(32, 64) + t(64, 32) - t(64, 64)

A width that changes is composed with whatever else happens to the kernel, and the composed kernel is priced. Neighbours that
compute in another dtype are priced by making both of them so: the Q and DQ that remain, and only they, are in that graph.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from hwopt.analysis.regions import regions
from hwopt.analysis.workload import kernels
from hwopt.ir import Graph
from hwopt.pipeline import Context, merged
from hwopt.plan.options import Base, Option, Pair, Pricer
from hwopt.target import Cost, Workload

NEIGHBOURS = 300  # more than this many are not priced one by one: what all of them save together is shared out evenly
WHOLE = 10.0  # times as much as of each graph without one layer the graph with all of them counts: plans end up near it
MATTERS = 1e-4  # of the unchanged model's time: less is no error of a sum
SCALED = ("m", "n", "k", "groups", "elements", "read_bytes", "write_bytes", "weight_bytes")


def pairs_of(graph: Graph, ctx: Context, base: Base, options: Sequence[Option], pricer: Pricer) -> tuple[Pair, ...]:
    """All pairs of options whose prices do not simply add up."""
    pairs = (*width_pairs(base, options, pricer), *form_pairs(graph, ctx, base, options, pricer))
    return (*pairs, *widths_in_forms(graph, ctx, base, options, pairs, pricer))


def width_pairs(base: Base, options: Sequence[Option], pricer: Pricer) -> Iterator[Pair]:
    """Two-dimensional prices: a width (of inputs or outputs) together with another width, a rank, a codebook or a dtype."""
    for one, other in itertools.combinations(options, 2):
        if one.group == other.group or not (one.prunes or other.prunes):
            continue
        width, rest = (one, other) if one.prunes else (other, one)
        shared = [name for name in width.work if name in rest.work and base.work.get(name)]
        alive = {} if rest.prunes else _excess_alive(base, width, rest)
        if not shared and not alive:
            continue
        costs = [_excess(base.work[name], width.work[name], rest.work[name], pricer) for name in shared]
        size = sum(_excess_bytes(base, width, rest, name) for name in shared)
        pair = Pair(one, other, sum(c.seconds for c in costs), sum(c.joules for c in costs), size, alive=alive)
        if any(True for _ in pair.amounts()):
            yield pair


def _excess(before: Sequence[Workload], width: Sequence[Workload], rest: Sequence[Workload], pricer: Pricer) -> Cost:
    """The price of both changes to one kernel, less that of each, plus that of none."""
    both = pricer.cost(compose(before[0], rest, width[0]) if width else ())
    none, first, second = (pricer.cost(work) for work in (before, width, rest))
    seconds = both.seconds + none.seconds - first.seconds - second.seconds
    return Cost(seconds, both.joules + none.joules - first.joules - second.joules)


def compose(before: Workload, parts: Sequence[Workload], width: Workload) -> tuple[Workload, ...]:
    """The kernels that `parts` become when `before` becomes `width`: inputs shrink in the first, outputs in the last."""
    ratio = {f: getattr(width, f) / getattr(before, f) if getattr(before, f) else 1.0 for f in SCALED}
    if len(parts) == 1:
        return (_scaled(parts[0], ratio),)
    ends = dict.fromkeys(("k", "read_bytes"), 0) | dict.fromkeys(("n", "write_bytes", "elements"), len(parts) - 1)
    found = []
    for place, part in enumerate(parts):
        own = {name: value for name, value in ratio.items() if ends.get(name, place) == place}
        own["weight_bytes"] = own.get("n", 1.0) * own.get("k", 1.0)
        found.append(_scaled(part, own))
    return tuple(found)


def _scaled(work: Workload, ratio: Mapping[str, float]) -> Workload:
    return dataclasses.replace(work, **{name: round(getattr(work, name) * factor) for name, factor in ratio.items()})


def _excess_bytes(base: Base, width: Option, rest: Option, name: str) -> float:
    """Of stored weights: two widths multiply; of what a layer's own change saves only the share that is still there counts."""
    before = sum(work.weight_bytes for work in base.work[name])
    if not before or not width.work[name]:
        return 0.0
    share = sum(work.weight_bytes for work in width.work[name]) / before
    if rest.prunes:
        other = sum(work.weight_bytes for work in rest.work[name]) / before
        return before * (share - 1) * (other - 1)
    return rest.bytes * (share - 1) if rest.group == name else 0.0


def _excess_alive(base: Base, width: Option, rest: Option) -> dict[str, float]:
    """Of activations: fewer channels, each of fewer bytes. Two widths add up: they are of different values."""
    both = ((place, base.alive[place]) for place in width.alive if place in rest.alive)
    return {place: width.alive[place] * rest.alive[place] / size for place, size in both if size}


def form_pairs(graph: Graph, ctx: Context, base: Base, options: Sequence[Option], pricer: Pricer) -> list[Pair]:
    """What neighbours save if both of them change their dtype: conversions that nobody needs any more."""
    forms: dict[str, dict[str, list[Option]]] = {}
    for option in options:
        if option.form and not option.prunes:
            forms.setdefault(option.group, {}).setdefault(option.form, []).append(option)
    for menu in forms.values():
        for members in menu.values():
            members.sort(key=lambda option: len(option.passes))  # the first one stands for its form
    links = [
        (forms[a][f], forms[b][g])
        for a, b in neighbours(graph) if a in forms and b in forms
        for f, g in itertools.product(forms[a], forms[b])
    ]  # fmt: skip
    cheap = ctx.roughly(graph)
    few = len(links) <= NEIGHBOURS
    none = np.zeros(2 + len(base.alive))
    savings = [_savings(graph, cheap, base, (one[0], other[0]), pricer) if few else none for one, other in links]
    savings = _completed(graph, cheap, base, forms, links, savings, pricer)
    return [
        Pair(one, other, float(saving[0]), float(saving[1]), alive=alive)
        for (first, second), saving in zip(links, savings, strict=True) if saving.any()
        for alive in [{place: round(d) for place, d in zip(base.alive, saving[2:].tolist(), strict=True) if round(d)}]
        for one, other in itertools.product(first, second)
    ]  # fmt: skip


def widths_in_forms(
    graph: Graph, ctx: Context, base: Base, options: Sequence[Option], pairs: Sequence[Pair], pricer: Pricer
) -> Iterator[Pair]:
    """What widths save where all layers compute in another dtype, beyond what pairs know.

    Kernels without weights (a pool, say) follow their neighbours' dtype, which no pair of a width and one layer sees. The
    harshest width of each group is priced on the graph; the difference is shared out to the layers that it touches, in
    proportion to gains.
    """
    widths: dict[str, list[Option]] = {}
    for option in options:
        if option.prunes and option.gain > 0:
            widths.setdefault(option.group, []).append(option)
    few = ctx.roughly(graph)
    for form in dict.fromkeys(option.form for option in options if option.form):
        members = [option for option in options if option.form == form and not option.prunes]
        plain = list({option.group: option for option in sorted(members, key=lambda o: -len(o.passes))}.values())
        all_alone = _beyond(graph, few, base, plain, pairs, pricer)
        for menu in widths.values():
            harshest = max(menu, key=lambda option: option.gain)
            near = [option for option in members if option.group in harshest.work]
            beyond = _beyond(graph, few, base, [*plain, harshest], pairs, pricer) - all_alone
            if not near or abs(beyond) < MATTERS * base.total_seconds:
                continue
            share = beyond / harshest.gain / len({option.group for option in near})
            yield from (Pair(one, other, share * one.gain) for one, other in itertools.product(menu, near))


def _beyond(graph: Graph, ctx: Context, base: Base, options: Sequence[Option], pairs: Sequence[Pair], pricer: Pricer) -> float:
    """Seconds of the graph with these options less what sums and pairs say."""
    inside = set(map(id, options))
    together = sum(pair.seconds for pair in pairs if id(pair.one) in inside and id(pair.other) in inside)
    return _saving(graph, ctx, base, options, pricer).seconds - together


Link = tuple[list[Option], list[Option]]


def _completed(
    graph: Graph, ctx: Context, base: Base, forms: Mapping[str, Mapping[str, Sequence[Option]]], links: Sequence[Link],
    savings: Sequence[np.ndarray], pricer: Pricer,
) -> list[np.ndarray]:  # fmt: skip
    """The savings, corrected so that they are right where plans end up: all layers in one dtype, and all but one.

    Conversions of a value with several readers disappear only with the last of them, which no pair can see by itself. The
    corrections are the smallest ones (least squares) that explain what those graphs cost.
    """
    found = list(savings)
    for form in dict.fromkeys(form for menu in forms.values() for form in menu):
        firsts = {group: menu[form][0] for group, menu in forms.items() if form in menu}
        inside = [i for i, (one, other) in enumerate(links) if one[0].form == form == other[0].form]
        if not inside:
            continue
        ends = [{links[i][0][0].group, links[i][1][0].group} for i in inside]
        left_out = ["", *(firsts if len(inside) <= NEIGHBOURS else ())]
        wholes = [_savings(graph, ctx, base, [o for g, o in firsts.items() if g != group], pricer) for group in left_out]
        sums = np.array([[float(group not in pair) for pair in ends] for group in left_out])
        sums[0], wholes[0] = WHOLE * sums[0], WHOLE * wholes[0]
        for place, change in zip(inside, _corrections(sums, wholes, [found[i] for i in inside]), strict=True):
            found[place] = found[place] + change
    return found


def _corrections(sums: np.ndarray, wholes: Sequence[np.ndarray], savings: Sequence[np.ndarray]) -> np.ndarray:
    """The least changes of `savings` [links, resources] with which sums @ savings = wholes."""
    return np.linalg.lstsq(sums, np.array(wholes) - sums @ np.array(savings), rcond=1e-9)[0]


def _savings(graph: Graph, ctx: Context, base: Base, options: Sequence[Option], pricer: Pricer) -> np.ndarray:
    """[seconds, joules, bytes alive at each kernel] of the graph with all of these options, less what they cost one by one."""
    cost = _saving(graph, ctx, base, options, pricer)
    alive = pricer.alive(graph, merged(one for option in options for one in option.passes), ctx)
    extra = [alive[place] - size - sum(option.alive.get(place, 0) for option in options) for place, size in base.alive.items()]
    return np.array([cost.seconds, cost.joules, *extra])


def _saving(graph: Graph, ctx: Context, base: Base, options: Sequence[Option], pricer: Pricer) -> Cost:
    """The graph with all of these options, less what they cost one by one."""
    both = pricer.changed(graph, merged(one for option in options for one in option.passes), ctx)
    seconds = both.seconds - base.total_seconds + sum(option.gain for option in options)
    return Cost(seconds, both.joules - base.joules - sum(option.joules for option in options))


def neighbours(graph: Graph) -> list[tuple[str, str]]:
    """Kernels with weights that hand values to each other, seen through those without."""
    weighted = {region.output: work.name for region, work in kernels(graph) if work.macs}
    origin: dict[str, frozenset[str]] = {}
    links: dict[tuple[str, str], None] = {}
    for region in regions(graph):
        name = weighted.get(region.output)
        sources = frozenset(source for value in region.inputs for source in origin.get(value, frozenset()))
        if name:
            links.update(((source, name), None) for source in sorted(sources) if source != name)
        for node in region.nodes:
            origin.update(dict.fromkeys(node.outputs, frozenset({name}) if name else sources))
    return list(links)
