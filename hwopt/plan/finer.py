"""The last step of a search: what a plan does coarsely is done with more care, where the outputs then err less.

Weights of 4 bits, rounded by what that does to outputs instead of to the nearest, cost neither time nor bytes, but seconds a
layer to make: too long for every candidate, not for the plan that is chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

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


def refined(task: Search, solution: Solution) -> tuple[Solution, tuple[Refusal, ...]]:
    """The solution with finer passes where these lower the error of the outputs, and what gained nothing."""
    stated = merged(one for option in solution.options for one in option.passes)
    samples = task.ctx.calibration
    if samples is None or not any(list(one.finer()) for one in stated):
        return solution, ()
    fitted = dataclasses.replace(task.ctx, calibration=rest_of(samples) or samples, refused=[])
    judge = _Judge(task.graph, fitted, samples.head(SENSITIVITY_SAMPLES), task.known)
    options, refused, error = solution.options, [], judge.error(solution.options)
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
