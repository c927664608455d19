"""Suite `transfer`: a plan for each target, priced on every target. Do the targets really differ?

HAQ (Wang et al., CVPR 2019) showed such a table for mixed precision. The rows of one target are plans with the same allowed
error; a borrowed plan is what another target would have chosen. All times are predicted by the targets' cost models.
"""

from __future__ import annotations

from typing import Any

from benchmarks.layout import Row, lower_is_better, result
from benchmarks.zoo import ZOO
from hwopt.demo import demo_data
from hwopt.evaluate import make_scorer
from hwopt.job import Job, prepare, quiet
from hwopt.pipeline import PassManager, merged
from hwopt.plan.attempt import Search, price
from hwopt.plan.errors import Known
from hwopt.plan.options import Pricer
from hwopt.plan.polish import polished
from hwopt.plan.solve import Limits, Solution, solve
from hwopt.plugins import find_targets

TARGETS = ("host", "cortex-a72", "neoverse-v1", "nvidia-t4", "nvidia-a100", "systolic-16x16", "systolic-128x128", "ethos-u55")
ALLOWED = 0.004  # error of the outputs (mean KL) of every plan: about a point of accuracy on the demo model
SAMPLES = 32
TIE = 0.01  # plans this close are as good: solvers and sums of prices have gaps


def run(models: str | None = None) -> dict[str, Any]:
    """`models`: one of the zoo's, the demo if not given."""
    name = models or "demo"
    known_targets = find_targets()
    chosen = [target for target in TARGETS if target in known_targets]
    jobs = {target: _job(name, target) for target in chosen}
    errors: dict[str, Known] = {}  # by the dtype of quantized activations: the same changes have the same errors
    plans = {target: _solved(job, errors.setdefault(job.target.activation, {})) for target, job in jobs.items()}
    graphs = {target: _applied(jobs[target], plan) for target, plan in plans.items()}
    seconds = {
        here: {by: Pricer(jobs[here].target, jobs[here].threads).graph(graph).seconds for by, graph in graphs.items()}
        for here in chosen
    }
    rows: list[Row] = []
    for here, found in seconds.items():
        unchanged = Pricer(jobs[here].target, jobs[here].threads).graph(jobs[here].graph).seconds
        borrowed = {f"plan for {by}": value for by, value in found.items() if by != here}
        rows.append(lower_is_better(f"{name} on {here}", "predicted latency", "s", found[here], borrowed))
        rows.append(lower_is_better(f"{name} on {here}", "predicted latency", "s", found[here], {"unchanged": unchanged}))
    losses = {here: max(found.values()) / found[here] - 1 for here, found in seconds.items()}
    wins, ties = (
        [all(found[here] <= value * (1 + room) for value in found.values()) for here, found in seconds.items()]
        for room in (1e-9, TIE)
    )
    summary = {
        "targets": len(chosen), "diagonal_wins": sum(wins) / len(wins), "diagonal_wins_or_ties": sum(ties) / len(ties),
        "worst_borrowed_loss": max(losses.values()),
        "least_worst_loss": min(losses.values()), "allowed_error": ALLOWED,
        **{f"loss_on_{here}": loss for here, loss in losses.items()},
    }  # fmt: skip
    notes = [f"not a target here: {', '.join(missing)}"] if (missing := sorted(set(TARGETS) - set(chosen))) else []
    return result("transfer", rows, summary, notes)


def _job(name: str, target: str) -> Job:
    case = ZOO[name](1)
    data = demo_data()[0] if name == "demo" else case.calibrate
    calibrate = {key: array[:SAMPLES] for key, array in data.items()}
    return prepare(
        case.model, target=target, shapes=case.shapes, binds=None, calibrate=calibrate, evaluate=calibrate, budget=None,
        passes=None, threads=1, seed=0, progress=quiet,
    )  # fmt: skip


def _solved(job: Job, errors: Known) -> Solution:
    from hwopt.backends.ort import Session

    evaluation = job.evaluation
    if evaluation is None:
        raise ValueError("the job has no data")
    scorer = make_scorer(job.graph, evaluation, Session(job.graph).run)
    task = Search(
        graph=job.graph, ctx=job.ctx, target=job.target, passes=job.families, scorer=scorer, budget=job.budget,
        threads=job.threads, workers=2, progress=quiet, known=errors,
    )  # fmt: skip
    priced = price(task)
    found = solve(priced.base, priced.options, priced.pairs, Limits(ALLOWED))
    if found is None:
        raise ValueError(f"nothing to choose on {job.target.name}")
    return polished(job.graph, job.ctx, priced, found, ALLOWED, task.pricer)


def _applied(job: Job, plan: Solution) -> Any:
    passes = merged(one for option in plan.options for one in option.passes)
    return PassManager(passes).run(job.graph, job.ctx).graph
