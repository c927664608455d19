"""Choosing a plan: price, solve, apply, measure the score, correct the allowance, solve again; the best feasible plan is kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from hwopt.errors import BudgetError, HwoptError
from hwopt.evaluate import Comparison, compare
from hwopt.pipeline import Pass, Phase, Refusal, merged
from hwopt.plan.attempt import Attempt, Found, Priced, Search, measured, price, tightened, versions
from hwopt.plan.backend import lacking
from hwopt.plan.budget import Amounts, Budget
from hwopt.plan.finer import refined
from hwopt.plan.nearest import nearest, widened
from hwopt.plan.options import Option
from hwopt.plan.plan import Decision, Offer, Plan, Round
from hwopt.plan.polish import polished
from hwopt.plan.solve import Limits, Solution, solve
from hwopt.plan.uniform import UNIFORM, behind, uniform_solutions
from hwopt.plugins import find_passes

__all__ = ["Attempt", "Found", "Priced", "Search", "price", "search", "versions"]
ROUNDS = 5
FIRST_ERROR = 2.0  # allowed error per unit of allowed drop in the first round; the rounds correct it
STEP = 4.0  # how far the allowance moves at most while only one side of the border is known
RELAX = "relax the budget or --max-drop"
NARROW = 1.25  # stop when the largest feasible and the smallest infeasible allowance are this close


def search(task: Search, priced: Priced) -> Found:
    """The fastest plan within the budget. Raises BudgetError, naming the nearest plans, if a limited budget cannot be met.

    A keyboard interrupt during the rounds ends the search with the best plan found so far, whose note says so.
    """
    attempts, note = _attempts(task, priced)
    found = _best(task, priced, attempts)
    return dataclasses.replace(found, plan=dataclasses.replace(found.plan, note=note))


def _attempts(task: Search, priced: Priced) -> tuple[list[Attempt], str]:
    """What was tried, and a note if that was interrupted."""
    attempts: list[Attempt] = []
    note = ""
    try:
        _uniform(task, priced, attempts)
        _rounds(task, priced, attempts)
        _one_dtype(task, priced, attempts)
        _extremes(task, priced, attempts)
        _polish(task, priced, attempts)
        _single_family(task, priced, attempts)
        if task.refine:
            _refine(task, priced, attempts)
    except KeyboardInterrupt:
        if not attempts:
            raise
        note = f"interrupted: the best plan of {len(attempts)} round{'s' if len(attempts) > 1 else ''}"
        task.progress(note, 0, 1)
    return attempts, note


def _uniform(task: Search, priced: Priced, attempts: list[Attempt]) -> None:
    """Every layer in one precision: no search ends slower (or, where time is limited, worse) than the best of these plans that
    keeps the budget.

    Where scores move in coarse steps (one wrong answer of 100 is a point), an early round may fail by bad luck, and all later
    ones look at less and less.
    """
    for one in uniform_solutions(priced):
        attempts.append(measured(task, priced, one, one.error))
        careful = behind(priced, one)
        if careful is not None and not (attempts[-1].round.feasible and task.budget.latency_seconds is None):
            attempts.append(measured(task, priced, careful, careful.error))


def _one_dtype(task: Search, priced: Priced, attempts: list[Attempt]) -> None:
    """Rounds with one dtype at a time where time is limited: sums are right to a percent there, which fills the limit better."""
    forms = priced.forms if task.budget.latency_seconds is not None else ()
    for form in forms if len(forms) > 1 else ():
        _rounds(task, priced.in_form(form), attempts)


def _extremes(task: Search, priced: Priced, attempts: list[Attempt]) -> None:
    """What keeps each limit best of all, and all with the least error, where nothing keeps the budget: sums may be far off
    near the edge of what can be done.
    """
    if any(attempt.round.feasible for attempt in attempts):
        return
    limits = task.first_limits()
    for aimed, bounds in (("error", limits), *((name, Limits()) for name in limits.stated())):
        solution = solve(priced.base, priced.options, priced.pairs, bounds, aim=aimed, tie=task.tie)
        if solution is not None and _known(attempts, solution) is None:
            attempts.append(measured(task, priced, solution, solution.error))


def _polish(task: Search, priced: Priced, attempts: list[Attempt]) -> None:
    """Exchanges on the best plan so far, priced on the graphs that they make. Limits other than the drop are left alone."""
    ranked = ranking(task, attempts, task.amounts(task.graph))
    if not ranked or task.budget.limited:
        return
    best = ranked[0]
    solution = polished(task.graph, task.ctx, priced, best.solution, best.round.allowed_error, task.pricer)
    if _known(attempts, solution) is None:
        attempts.append(measured(task, priced, solution, best.round.allowed_error))


def _single_family(task: Search, priced: Priced, attempts: list[Attempt]) -> None:
    """Quantization alone: the sum of gains may have promised more than it kept, or the errors of other families less.

    Once, with the largest error that was feasible; in rounds of its own where it could be faster than the best joint plan.
    """
    alone = tuple(option for option in priced.options if all(_of_quantization(one) for one in option.passes))
    if task.budget.limited or len(alone) in (0, len(priced.options)):
        return
    menu = dataclasses.replace(priced, options=alone)
    fastest = solve(priced.base, alone, priced.pairs, Limits(), tie=task.tie)
    ranked = ranking(task, attempts, task.amounts(task.graph))
    if fastest is not None and (not ranked or fastest.seconds * task.scale < ranked[0].amounts.seconds):
        _rounds(task, menu, attempts)
        return
    allowed = max((attempt.round.allowed_error for attempt in attempts if attempt.round.feasible), default=0.0)
    solution = solve(priced.base, alone, priced.pairs, Limits(allowed), tie=task.tie)
    if solution is not None and _known(attempts, solution) is None:
        attempts.append(measured(task, priced, solution, allowed))


def _of_quantization(one: Pass) -> bool:
    return Phase.QUANTIZE in (one.phase, one.prepares)


def _refine(task: Search, priced: Priced, attempts: list[Attempt]) -> None:
    """The best plan with more care; if nothing is feasible, that with the least drop of those that keep the other limits."""
    best = next(iter(ranking(task, attempts, task.amounts(task.graph))), None)
    kept = [attempt for attempt in attempts if not task.exceeded(attempt.amounts)]
    best = best or min(kept, key=lambda attempt: attempt.comparison.drop, default=None)
    if best is None:
        return
    solution, refused = refined(task, best.solution, priced.options)
    attempt = measured(task, priced, solution, best.round.allowed_error)
    better = attempt if attempt.comparison.drop <= best.comparison.drop else best
    attempts[attempts.index(best)] = dataclasses.replace(better, refused=refused)


def _known(attempts: Sequence[Attempt], solution: Solution) -> Attempt | None:
    chosen = set(map(id, solution.options))
    return next((a for a in attempts if set(map(id, a.solution.options)) == chosen), None)


def _rounds(task: Search, priced: Priced, attempts: list[Attempt]) -> None:
    """Solve -> apply -> measure, moving the allowed error between the largest feasible and the smallest infeasible one."""
    most = sum(option.error for option in priced.options) + 1e-9
    menu = set(map(id, priced.options))
    uniform = [one for one in attempts if one.solution.by == UNIFORM and menu.issuperset(map(id, one.solution.options))]
    proven = max((one.solution.error for one in ranking(task, uniform, task.amounts(task.graph))), default=0.0)
    allowed = min(max(FIRST_ERROR * task.budget.max_drop, proven, 1e-6), most)
    low, high, shrink, failed = 0.0, math.inf, 1.0, 0
    limits = task.first_limits()
    for number in range(ROUNDS):
        task.progress("solving and measuring", number, ROUNDS)
        bounded = dataclasses.replace(limits, error=allowed)
        solution = solve(priced.base, priced.options, priced.pairs, bounded, tie=task.tie)
        attempt = None
        if solution is None:  # a size, memory, energy or latency limit needs more error than is allowed yet
            low = max(low, allowed)
        else:
            known = _known(attempts, solution)
            attempt = known or measured(task, priced, solution, allowed)
            if known is None:
                attempts.append(attempt)
            limits = tightened(task, limits, attempt)
            wanted = aim(task.budget, attempt.comparison)
            if attempt.comparison.drop <= wanted:
                low = allowed
            else:
                high, failed = allowed, failed + 1
                shrink = max((wanted / attempt.comparison.drop) ** failed, 1 / STEP)
        if attempt and task.exceeded(attempt.amounts):
            continue  # the limit is tightened now; the allowance may well do
        if limits.seconds is not None and attempt and low:
            return  # the least error within the limits, which no larger allowance makes less
        if (low >= most and high == math.inf) or high <= low * NARROW:
            return
        allowed = _next(low, high, most, shrink)


def _next(low: float, high: float, most: float, shrink: float) -> float:
    """Drops grow about as errors do: after one that is twice too large, half the error; bolder steps if that fails again."""
    if high == math.inf:
        return min(low * STEP, most)
    return high * min(shrink, 1 / NARROW) if low == 0.0 else math.sqrt(low * high)


def aim(budget: Budget, comparison: Comparison) -> float:
    """The drop the search aims at: one standard error (at most half) inside the budget, so that it holds on other data too."""
    low, high = comparison.interval or (0.0, 0.0)
    return budget.max_drop - min((high - low) / 2 / 1.96, budget.max_drop / 2)


def _best(task: Search, priced: Priced, attempts: Sequence[Attempt]) -> Found:
    """The fastest feasible attempt; the unchanged model if none is better; BudgetError if limits are set and not met.

    What was only tried to name the nearest budget may keep this one.
    """
    start = task.amounts(task.graph)
    ranked = ranking(task, attempts, start)
    if not ranked and (broken := task.exceeded(start)):
        if not task.thorough:
            raise BudgetError(f"nothing that was tried keeps the budget ({broken} unchanged)", place="plan", hint=RELAX)
        free: list[Attempt] = []  # what the drop alone allows
        _rounds(dataclasses.replace(task, budget=Budget(task.budget.max_drop)), priced, free)
        attempts = widened(task, priced, [*attempts, *free])
        ranked = ranking(task, attempts, start)
        if not ranked:
            raise BudgetError(nearest(task, attempts, broken), place="plan", hint=RELAX)
    best = ranked[0] if ranked else None
    if best is None:
        plan = make_plan(task, priced, None, attempts, start)
        return Found(plan, task.graph, compare(task.scorer.metric, priced.baseline, priced.baseline))
    others = tuple(found_of(task, priced, one, attempts, start) for one in ranked[1:])
    return dataclasses.replace(found_of(task, priced, best, attempts, start), others=others)


def ranking(task: Search, attempts: Sequence[Attempt], start: Amounts) -> list[Attempt]:
    """The feasible attempts, best first: the fastest, or with the best score where time is limited. Only careful ones if there
    are any at all inside of the budget's edge.

    What was searched for is the luckiest of several; plans in one precision are not, and need no margin.
    """
    feasible = [attempt for attempt in attempts if attempt.round.feasible]
    if not task.budget.limited:
        feasible = [attempt for attempt in feasible if attempt.amounts.seconds < start.seconds]
    careful = [attempt for attempt in feasible if _careful(task, attempt)]
    return sorted(careful or feasible, key=lambda attempt: _rank(task, attempt))


def _careful(task: Search, attempt: Attempt) -> bool:
    return attempt.solution.by == UNIFORM or attempt.comparison.drop <= aim(task.budget, attempt.comparison)


def _rank(task: Search, attempt: Attempt) -> tuple[float, ...]:
    """Less is better."""
    drop, seconds = attempt.comparison.drop, attempt.amounts.seconds
    return (seconds,) if task.budget.latency_seconds is None else (drop, seconds)


def _round(task: Search, attempt: Attempt, best: Attempt | None) -> Round:
    """What an attempt came to, and why it lost to `best` where it is the better by its figures."""
    if best is None or not attempt.round.feasible or _careful(task, attempt) or _rank(task, attempt) >= _rank(task, best):
        return attempt.round
    edge = aim(task.budget, attempt.comparison)
    margin = "plans that are searched for keep one standard error inside the budget, to hold on other data"
    note = f"passed over: a drop above {edge:+.4f} is too close to what is allowed ({margin}; one precision for all needs none)"
    return dataclasses.replace(attempt.round, note=note)


def found_of(task: Search, priced: Priced, best: Attempt, attempts: Sequence[Attempt], start: Amounts) -> Found:
    """A plan for one attempt, computed again from the plan's own text: every limit must hold for what it makes."""
    plan = make_plan(task, priced, best, attempts, start)
    stated = merged(one for option in best.solution.options for one in option.passes)
    if plan.passes({**find_passes(), **{type(one).name: type(one) for one in stated}}) != stated:
        raise HwoptError("the plan's text does not say what was measured", place="plan", hint="this is an error in hwopt")
    amounts = task.amounts(best.graph)
    if best.round.feasible and (broken := task.exceeded(amounts)):
        raise HwoptError(f"the plan breaks a limit: {broken}", place="plan", hint="this is an error in hwopt")
    return Found(plan, best.graph, best.comparison, uniform=best.solution.by == UNIFORM)


def make_plan(task: Search, priced: Priced, best: Attempt | None, attempts: Sequence[Attempt], start: Amounts) -> Plan:
    chosen = best.solution.options if best else ()
    taken = {id(option.offered): option for option in chosen}
    after = best.amounts if best else start
    not_chosen = [_not_chosen(option, chosen, task.scale) for option in priced.options if id(option) not in taken]
    decisions = tuple(_decision(option, priced, task.scale) for option in chosen)
    tried = best.refused if best else ()
    return Plan(
        target=task.target.name, threads=task.threads, graph_digest=task.graph.digest, budget=task.budget, seed=task.ctx.seed,
        decisions=decisions, refused=(*priced.refused, *tried, *not_chosen),
        rounds=tuple(_round(task, attempt, best) for attempt in attempts),
        seconds_before=start.seconds, seconds_after=after.seconds, time_scale=task.scale,
        joules_before=start.joules, joules_after=after.joules,
        offers=tuple(_offer(taken.get(id(option), option), id(option) in taken, task.scale) for option in priced.options),
        calibration_digest=task.ctx.calibration.digest if task.ctx.calibration else "", versions=versions(),
        knobs={key: str(value) for key, value in task.knobs.items()},
        lacking=lacking(task.target, (one for option in chosen for one in option.passes)),
    )  # fmt: skip


def _offer(option: Option, chosen: bool, scale: float) -> Offer:
    seconds = option.gain * scale
    return Offer(option.text, option.group, seconds, -option.bytes, -option.joules, option.error, chosen)


def _decision(option: Option, priced: Priced, scale: float) -> Decision:
    before, gain = scale * priced.base.total_seconds, scale * option.gain
    count = len(option.work)
    reason = f"{count} kernel{'s' if count > 1 else ''} {_faster(gain)}, error {option.error:.3g}"
    reason += f"; {option.note}" if option.note else ""
    size = priced.base.bytes
    return Decision(tuple(map(str, option.passes)), before, before - gain, size, size + option.bytes, option.error, reason)


def _faster(gain: float) -> str:
    """Alone; conversions may cost more than that until the neighbours change as well."""
    return f"{gain * 1e6:.2f} us faster" if gain >= 0 else f"{-gain * 1e6:.2f} us slower alone, less with its neighbours"


def _not_chosen(option: Option, chosen: Sequence[Option], scale: float) -> Refusal:
    other = next((o for o in chosen if o.group == option.group), None)
    reason = f"{option.text}: {_faster(option.gain * scale)} for an error of {option.error:.3g}"
    whole = "with its neighbours' conversions and the error allowance of the whole model"
    reason += f"; {other.text} was chosen instead, {whole}" if other else f"; not chosen, {whole}"
    return Refusal(option.passes[0].name, option.group, reason)
