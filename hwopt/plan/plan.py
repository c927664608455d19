"""Plan: every decision and every refusal with its numbers, as data that is written, read and replayed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hwopt.errors import UsageError
from hwopt.ir import Graph
from hwopt.pipeline import Context, Pass, PassManager, Refusal, Trace, merged, parse
from hwopt.plan.budget import Budget

FORMAT = 1


@dataclass(frozen=True)
class Decision:
    """One change at one place: one pass, or several on the same layer that were priced together.

    Costs are those of the whole model by the target's cost model (in measured seconds where the model was measured), the
    change alone.
    """

    by: tuple[str, ...]  # passes as text, with their site
    seconds_before: float
    seconds_after: float
    bytes_before: int
    bytes_after: int
    error: float  # divergence of the outputs that this change alone causes
    reason: str
    measured_seconds: float | None = None  # what the built model gains by it: timed with all changes and without this one


@dataclass(frozen=True)
class Round:
    """One turn of solve -> apply -> measure: what was allowed, and what came out."""

    allowed_error: float
    decisions: int
    predicted_seconds: float
    weight_bytes: int
    score: float
    drop: float
    feasible: bool
    joules: float = 0.0
    solved_seconds: float = 0.0  # what the solver's sums and pairs promised; predicted_seconds prices the graph itself
    gap: float = 0.0  # proven: (cost of the solution - bound) / cost
    note: str = ""  # why it lost, where its figures do not say so


@dataclass(frozen=True)
class Offer:
    """One option that was priced: what it would save alone (negative: costs), and whether it was taken."""

    text: str
    group: str
    seconds: float
    bytes: float
    joules: float
    error: float
    chosen: bool


@dataclass(frozen=True)
class Recovery:
    """The training behind the changes: a recipe that does it again, and the score of the changed model without and with it."""

    recipe: str
    metric: str
    score_before: float
    score_after: float
    data_digest: str = ""  # of what was trained on; empty for a loader


@dataclass(frozen=True)
class Plan:
    """What to do to one graph for one target. `str(pass)` in each decision parses back into the pass."""

    target: str
    threads: int
    graph_digest: str
    budget: Budget
    seed: int
    decisions: tuple[Decision, ...] = ()
    refused: tuple[Refusal, ...] = ()
    rounds: tuple[Round, ...] = ()
    seconds_before: float = 0.0  # of the whole model, predicted
    seconds_after: float = 0.0
    time_scale: float = 1.0  # measured over predicted time of the unchanged model, which all times here were multiplied by
    joules_before: float = 0.0  # 0 where the target states no energy
    joules_after: float = 0.0
    offers: tuple[Offer, ...] = ()
    knobs: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of whole families, as a search set them
    calibration_digest: str = ""  # of the data that chose ranges and scores; others give other weights
    recovery: Recovery | None = None
    note: str = ""  # what a reader must know, such as an interrupted search
    lacking: str = ""  # what of it hwopt generates no code for: other backends may
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """Sorted and indented: equal plans are equal bytes."""
        return json.dumps(self.to_data(), indent=1, sort_keys=True) + "\n"

    def to_data(self) -> dict[str, Any]:
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know, line by line."""
        return tuple(filter(None, (self.note, self.lacking)))

    @property
    def families(self) -> frozenset[str]:
        """Names of the passes that the decisions use."""
        return frozenset(text.partition("{")[0] for decision in self.decisions for text in decision.by)

    def passes(self, known: Mapping[str, type[Pass]]) -> tuple[Pass, ...]:
        """The passes to run, in phase order, those that differ only in their site joined."""
        return merged(parse(text, known) for decision in self.decisions for text in decision.by)


def interrupted(note: str) -> bool:
    """Whether a plan's note says that somebody stopped its search or its training: another run may find better."""
    return "interrupted" in note


def plan_from_json(text: str, place: str = "plan") -> Plan:
    """The inverse of `Plan.to_json`; raises UsageError for what is no plan."""
    try:
        raw: dict[str, Any] = json.loads(text)
        if raw.pop("format") != FORMAT:
            raise UsageError("written by another version of hwopt", place=place, hint="make the plan again")
        raw["budget"] = Budget(**raw["budget"])
        for key, kind in (("decisions", Decision), ("refused", Refusal), ("rounds", Round), ("offers", Offer)):
            raw[key] = tuple(kind(**item) for item in raw.get(key, ()))
        raw["decisions"] = tuple(dataclasses.replace(one, by=tuple(one.by)) for one in raw["decisions"])
        raw["recovery"] = Recovery(**raw["recovery"]) if raw.get("recovery") else None
        return Plan(**raw)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"not a plan ({type(error).__name__}: {error})", place=place) from error


def apply_plan(graph: Graph, plan: Plan, ctx: Context, known: Mapping[str, type[Pass]]) -> Trace:
    """Do exactly what the plan says; raises UsageError if it was made for another graph."""
    if plan.graph_digest != graph.digest:
        raise UsageError("the plan was made for another model", place="plan", hint="weights and shapes must be the same")
    return PassManager(plan.passes(known)).run(graph, ctx)
