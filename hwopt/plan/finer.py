"""The last step of a search: what a plan does coarsely is done with more care, where the outputs then err less.

Weights of 4 bits, rounded by what that does to outputs instead of to the nearest, cost neither time nor bytes, but seconds a
layer to make: too long for every candidate, not for the plan that is chosen. And what prepares a change at no price is no
faster, so nothing that looks for the fastest plan would choose it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from hwopt.backends.ort import Session
from hwopt.ir import Graph
from hwopt.pipeline import Context, Pass, PassManager, Refusal, merged
from hwopt.plan.attempt import SENSITIVITY_SAMPLES, Search, rest_of
from hwopt.plan.errors import Known, divergence_of, outputs_of
from hwopt.plan.options import Option
from hwopt.plan.solve import Solution
from hwopt.samples import Samples

WORTH = 0.95  # of the error at most


@dataclasses.dataclass(frozen=True, eq=False)
class _Judge:
    """The error of whole plans on samples that they are not fitted to, where there are enough; `known` by their text."""

    graph: Graph
    ctx: Context
    samples: Samples
    known: Known

    def error(self, options: Sequence[Option]) -> float:
        passes = merged(one for option in options for one in option.passes)
        text = f"whole plan: {', '.join(map(str, passes))}"
        if text not in self.known:
            changed = PassManager(passes).run(self.graph, self.ctx).graph
            reference = outputs_of(Session(self.graph), self.graph, self.samples)
            self.known[text] = divergence_of(changed, self.samples, reference)
        return self.known[text]


def refined(task: Search, solution: Solution, menu: Sequence[Option] = ()) -> tuple[Solution, tuple[Refusal, ...]]:
    """The solution with options of the menu that prepare its changes for nothing, and with finer passes, where these lower the
    error of the outputs; and what gained nothing."""
    stated = merged(one for option in solution.options for one in option.passes)
    samples, free = task.ctx.calibration, list(_behind(solution.options, menu))
    if samples is None or not (free or any(list(one.finer()) for one in stated)):
        return solution, ()
    fitted = dataclasses.replace(task.ctx, calibration=rest_of(samples) or samples, refused=[])
    judge = _Judge(task.graph, fitted, samples.head(SENSITIVITY_SAMPLES), task.known)
    options, refused, error = solution.options, [], judge.error(solution.options)
    for name, better in free:
        tried = tuple(better.get(id(option), option) for option in options)
        found = judge.error(tried)
        if found <= WORTH * error:
            options, error = tried, found
        else:
            reason = f"in front of all that it prepares: the outputs' error {error:.3g} -> {found:.3g}, not worth it"
            refused.append(Refusal(name, task.graph.name, reason))
    stated = merged(one for option in options for one in option.passes)
    for place, coarse in enumerate(stated):
        for fine in coarse.finer():
            task.progress("rounding with more care", place, len(stated))
            tried = tuple(_with(option, coarse, fine) for option in options)
            found = judge.error(tried)
            said = f"the outputs' error {error:.3g} -> {found:.3g}"
            if found <= WORTH * error:
                options, error = tuple(_noted(one, old, said) for one, old in zip(tried, options, strict=True)), found
            else:
                refused.append(Refusal(fine.name, task.graph.name, f"{dataclasses.replace(fine, site=())}: {said}, not worth it"))
    return (solution if options is solution.options else dataclasses.replace(solution, options=options)), tuple(refused)


def _behind(options: Sequence[Option], menu: Sequence[Option]) -> Iterator[tuple[str, dict[int, Option]]]:
    """Families that prepare some of the options for nothing: what these become."""
    groups = {option.group: option for option in options}
    families: dict[str, dict[int, Option]] = {}
    for other in menu:
        option = groups.get(other.group)
        costs = option is None or other.gain < option.gain or other.bytes > option.bytes or other.joules > option.joules
        if option is not None and not costs and other.passes[0].prepares is not None and other.passes[1:] == option.passes:
            families.setdefault(other.passes[0].name, {})[id(option)] = other
    yield from families.items()


def _with(option: Option, coarse: Pass, fine: Pass) -> Option:
    """The option with the passes that were merged into the coarse one turned as the fine one is."""
    names = [one.name for one in dataclasses.fields(fine)]
    turned = {name: getattr(fine, name) for name in names if getattr(fine, name) != getattr(coarse, name)}
    passes = tuple(dataclasses.replace(one, **turned) if _inside(one, coarse) else one for one in option.passes)
    return option if passes == option.passes else dataclasses.replace(option, passes=passes, coarse=option.offered)


def _inside(one: Pass, whole: Pass) -> bool:
    """True if a pass is one of those that were merged into another."""
    blank = {"site": (), **dict.fromkeys(whole.each, ())}
    return type(one) is type(whole) and dataclasses.replace(one, **blank) == dataclasses.replace(whole, **blank)


def _noted(option: Option, before: Option, said: str) -> Option:
    return option if option is before else dataclasses.replace(option, note=f"with more care for the whole plan: {said}")
