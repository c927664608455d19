"""Passes that make others err less, in front of these: `smooth{site=q+k+v} + quantize{site=q}`.

They are exact, so alone they gain nothing and are no options. Each of their candidates stands in front of the changes that it
prepares (`Pass.prepares`), at the price of both; that the error gets smaller is measured. A family is applied to the whole
model once, and the changes are judged behind it one by one: what it does for other layers is exact there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

from hwopt.ir import Graph
from hwopt.pipeline import Context, Pass, PassManager, Refusal, merged, run_pass
from hwopt.plan.options import Option
from hwopt.target import Target

MATTERS = 0.1  # of the mean error that the same change makes at all layers: where it errs less, there is little to gain
WORTH = 0.95  # of the error at most
Price = Callable[[tuple[Pass, ...]], Option | Refusal]
Chains = list[tuple[Option, Option]]  # an option, and the same behind what prepares it
Judge = Callable[[Graph, Chains], Sequence[float]]  # their errors in the graph that all has prepared


def prepared(
    graph: Graph, ctx: Context, target: Target, kinds: Iterable[type[Pass]], options: Sequence[Option], price: Price, judge: Judge
) -> tuple[list[Option], list[Refusal]]:  # fmt: skip
    """The options behind what prepares them, where they then err less, and why not elsewhere. `ctx` is that of errors."""
    found: list[Option] = []
    refused: list[Refusal] = []
    for kind in (kind for kind in kinds if kind.prepares is not None):
        offered = _offered(kind, graph, target, list(_worth(kind, graph, options, refused)), refused)
        whole, chains = _applied(graph, ctx, list(_priced(offered, price, refused)), refused)
        for (option, chain), error in zip(chains, judge(whole, chains) if chains else (), strict=True):
            said = f"error {option.error:.3g} -> {error:.3g}"
            if error <= WORTH * option.error:
                found.append(dataclasses.replace(chain, error=error, note=f"{kind.name} in front of it: {said}"))
            else:
                refused.append(Refusal(kind.name, option.group, f"{chain.text}: {said}, not worth it"))
    return found, refused


def _worth(kind: type[Pass], graph: Graph, options: Sequence[Option], refused: list[Refusal]) -> Iterator[Option]:
    """Single changes of the phase that err enough to matter."""
    alike: dict[Pass, list[Option]] = {}
    for option in options:
        one = option.passes[0]
        if len(option.passes) == 1 and one.phase == kind.prepares and one.prepared and option.error > 0:
            alike.setdefault(dataclasses.replace(one, site=()), []).append(option)
    if not alike:
        refused.append(Refusal(kind.name, graph.name, "there is nothing that it prepares"))
    for members in alike.values():
        mean = sum(option.error for option in members) / len(members)
        for option in members:
            if option.error >= MATTERS * mean:
                yield option
            else:
                reason = f"{option.text}: its error of {option.error:.3g} is small beside that of other layers"
                refused.append(Refusal(kind.name, option.group, reason))


def _offered(
    kind: type[Pass], graph: Graph, target: Target, options: Sequence[Option], refused: list[Refusal]
) -> list[tuple[Option, Pass]]:
    """Each option with the candidates that prepare its layer."""
    candidates: list[Pass] = []
    for one in kind.candidates(graph, target) if options else ():
        (refused if isinstance(one, Refusal) else candidates).append(one)  # type: ignore[arg-type]
    return [(option, one) for option in options for one in candidates if set(option.passes[0].site) <= set(one.site)]


def _priced(offered: Sequence[tuple[Option, Pass]], price: Price, refused: list[Refusal]) -> Iterator[tuple[Option, Option]]:
    for option, one in offered:
        chain = price((one, *option.passes))
        if isinstance(chain, Refusal):
            refused.append(chain)
        else:
            yield option, chain


def _applied(graph: Graph, ctx: Context, chains: Chains, refused: list[Refusal]) -> tuple[Graph, Chains]:
    """The model with all that changes it, and the chains with that; the data may say that there is nothing to prepare."""
    reasons: dict[Pass, str] = {}
    for one in dict.fromkeys(chain.passes[0] for _, chain in chains):
        own = dataclasses.replace(ctx, refused=[])
        if run_pass(one, graph, own) is graph:
            reasons[one] = own.refused[-1].reason if own.refused else "changes nothing"
    for chain in (chain for _, chain in chains if chain.passes[0] in reasons):
        refused.append(Refusal(chain.passes[0].name, chain.group, f"{chain.text}: {reasons[chain.passes[0]]}"))
    kept = [(option, chain) for option, chain in chains if chain.passes[0] not in reasons]
    own = dataclasses.replace(ctx, refused=[])
    return PassManager(merged(chain.passes[0] for _, chain in kept)).run(graph, own).graph, kept
