"""Why did this layer get that? A plan as readable lines with its numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from hwopt.errors import UsageError, did_you_mean
from hwopt.pipeline import Refusal, parse
from hwopt.plan.plan import Decision, Plan, Recovery
from hwopt.plugins import find_passes

MANY = 60  # refusals: more are counted
KINDS = {
    "was chosen instead": "another was chosen instead",
    "; not chosen": "not worth its error",
    "removes more than": "removes more than another and is not faster",
    "is small beside": "its error is small beside that of other layers",
    "not worth it": "errs hardly less, not worth it",
}


def explain(plan: Plan, layer: str = "") -> str:
    """All decisions and refusals (counted where these are many), or those of one layer.

    Raises UsageError if the plan never looked at that layer.
    """
    if layer:
        known = {site for decision in plan.decisions for site in _sites(decision)} | {one.site for one in plan.refused}
        if layer not in known:
            raise UsageError(f"the plan knows no {layer!r}", hint=did_you_mean(layer, known))
    return "\n".join(_lines(plan, layer)) + "\n"


def recovery_line(recovery: Recovery) -> str:
    """What training made of the changed model."""
    return f"recovered: {recovery.metric} {recovery.score_before:.4f} -> {recovery.score_after:.4f} by {recovery.recipe}"


def _lines(plan: Plan, layer: str) -> Iterator[str]:
    yield f"target {plan.target}, {plan.threads} thread{'s' if plan.threads != 1 else ''}, seed {plan.seed}"
    limits = ", ".join(f"{key} {value:g}" for key, value in vars(plan.budget).items() if value is not None)
    yield f"budget: {limits}"
    if plan.seconds_before:
        scaled = (
            "" if plan.time_scale == 1 else f" (times of the cost model, multiplied by {plan.time_scale:.3g} as measured here)"
        )
        yield f"predicted: {plan.seconds_before * 1e3:.4g} ms -> {plan.seconds_after * 1e3:.4g} ms{scaled}"
    if plan.recovery:
        yield recovery_line(plan.recovery)
    yield from (f"note: {note}" for note in plan.notes)
    if not layer:
        yield from _rounds(plan)
    chosen = [decision for decision in plan.decisions if not layer or layer in _sites(decision)]
    alone = "; what each saves by itself: neighbours share conversions, so that the sum may differ" if len(chosen) > 1 else ""
    yield f"chosen ({len(chosen)}{alone}):"
    for decision in chosen:
        found = decision.measured_seconds
        measured = "" if found is None else f"; measured: {found * 1e6:+.2f} us saved in the whole model"
        yield f"  {' + '.join(decision.by)}: {decision.reason}{measured}"
    refused = [one for one in plan.refused if layer in ("", one.site)]
    yield f"refused ({len(refused)}):"
    if layer or len(refused) <= MANY:
        yield from (f"  {one.by} at {one.site}: {one.reason}" for one in refused)
    else:
        yield from _counted(refused)
        yield "  each of them with its numbers: hwopt explain --layer NAME"


def _counted(refused: Iterable[Refusal]) -> Iterator[str]:
    """One line for each family at each place: how often which kind of reason."""
    kinds: dict[tuple[str, str], Counter[str]] = {}
    for one in refused:
        kinds.setdefault((one.by, one.site), Counter())[_kind(one.reason)] += 1
    for (by, site), counts in kinds.items():
        yield f"  {by} at {site}: " + ", ".join(f"{count} x {kind}" if count > 1 else kind for kind, count in counts.items())


def _kind(reason: str) -> str:
    """A reason without what it is about and without its numbers."""
    what, colon, why = reason.partition(": ")
    text = why if colon and "{" in what else reason
    for mark, kind in KINDS.items():
        if mark in text:
            return kind
    return re.sub(r"\s*\(.*\)", "", text)


def _rounds(plan: Plan) -> Iterator[str]:
    for number, one in enumerate(plan.rounds, 1):
        verdict = "feasible" if one.feasible else "not feasible"
        size, time = f"{one.weight_bytes / 1e6:.3g} MB", f"{one.predicted_seconds * 1e3:.4g} ms"
        yield f"round {number}: allowed error {one.allowed_error:.3g}, {one.decisions} changes, {time}, {size}: {verdict}"
        yield f"  score {one.score:.4f}, drop {one.drop:+.4f}" + (f"; {one.note}" if one.note else "")


def _sites(decision: Decision) -> set[str]:
    return {site for text in decision.by for site in parse(text, find_passes()).site}
