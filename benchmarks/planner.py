"""Suite `planner`: is one joint decision better than each family alone, is every change worth it, and how fast is the solver?

Latencies are measured on the libraries that ship, side by side; scores too, on the half of the samples by which no plan was
chosen. Nothing is trained.

At equal latency: for each of several latencies the plan with the best score whose library is measured to keep it, of all families
together and of each alone, searched as `compile --budget latency` does: again with corrected seconds while the library is more
than WITHIN too slow. A family without such a plan loses by definition, which a note says; gains in score are over the others. The
latencies are the joint plan's and steps above it, that of int8 alone and less, and the one halfway between int8 and float.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy import PICTURES, read_pictures
from benchmarks.layout import Row, higher_is_better, lower_is_better, result
from benchmarks.zoo import ZOO, Missing
from hwopt.build import Built, build
from hwopt.compiler import one_blas_thread
from hwopt.decide import TURNS, as_measured, fastest, make_job_scorer, make_task
from hwopt.demo import demo_data
from hwopt.errors import BudgetError, UsageError, did_you_mean
from hwopt.evaluate import Comparison, compare
from hwopt.ir import Graph
from hwopt.job import Job, prepare, quiet
from hwopt.measure import interleaved
from hwopt.plan.attempt import Found, Priced, Search, price
from hwopt.plan.budget import Budget
from hwopt.plan.corrected import search_timed
from hwopt.plan.options import Pricer
from hwopt.plan.problem import Problem
from hwopt.plan.search import search
from hwopt.plan.solve import Limits, solve, solve_problem
from hwopt.plugins import find_target
from hwopt.prove import proved
from hwopt.target import Workload

SIZES = (25, 50, 100, 200, 400, 1000)  # groups
CANDIDATES = 16
WIDTH, SEED = 256, 0
LATENCIES = (1.0, 1.25, 1.5, 2.0)  # times the joint plan's: where families are compared
BELOW = (0.9, 0.8)  # times that of int8 alone, which itself has nothing there
WITHIN = 1.05
HOPELESS = 1.2  # sums of gains are right to a few percent
ROOM = 0.001  # of a latency that was itself predicted
MAX_DROP = 0.01


def run(threads: int | None = None, models: str | None = None, data: Path | None = None, quick: bool = False) -> dict[str, Any]:
    """`models`: demo, efficientnet_lite0 (or `none`: the solver only), joined by commas."""
    rows: list[Row] = []
    summary: dict[str, float] = {}
    notes: list[str] = []
    solver(rows, summary, SIZES[:4] if quick else SIZES)
    for name in [] if models == "none" else (models or "demo").split(","):
        if name not in DATA:
            raise UsageError(f"unknown model {name!r}", place="--models", hint=did_you_mean(name, DATA))
        try:
            families(rows, summary, notes, name, threads, data or PICTURES, quick)
        except Missing as error:
            notes.append(f"{name} is left out: {error}")
    return result("planner", rows, summary, notes)


# --- the solver ---


def solver(rows: list[Row], summary: dict[str, float], sizes: tuple[int, ...]) -> None:
    """A chain of 1x1 convolutions whose widths are chosen: every kernel's price depends on both of its widths."""
    for groups in sizes:
        problem, limit = chain(groups)
        started = time.perf_counter()
        choice, (bound, by) = solve_problem(problem, {"seconds": 1.0}, {"error": limit})
        seconds = time.perf_counter() - started
        again, _ = solve_problem(problem, {"seconds": 1.0}, {"error": limit})
        if choice is None or not problem.keeps(choice, {"error": limit}):
            raise ValueError(f"no feasible choice for {groups} groups")
        cost = problem.amount("seconds", choice)
        gap = (cost - bound) / abs(cost)
        rows.append(lower_is_better(f"{groups} groups x {CANDIDATES} ({by})", "time to a proven gap", "s", seconds, {}))
        rows.append(lower_is_better(f"{groups} groups x {CANDIDATES} ({by})", "proven gap", "1", gap, {}))
        summary |= {f"solver_seconds_{groups}": seconds, f"solver_gap_{groups}": gap}
        if groups == 200:
            summary |= {"solver_seconds": seconds, "solver_gap": gap, "solver_repeats": float(choice == again)}


def chain(groups: int) -> tuple[Problem, float]:
    """`groups` layers of WIDTH channels; candidate c keeps 1 - c / (CANDIDATES + 1) of them. Prices are the host's model's."""
    pricer, random = Pricer(find_target("host"), 1), np.random.default_rng(SEED)
    widths = [WIDTH * (CANDIDATES + 1 - c) // (CANDIDATES + 1) for c in range(CANDIDATES + 1)]
    tables = {}
    for pixels in (49, 196, 784):
        work = [
            [Workload("", "conv", "float32", pixels, n, k, 1, 1, 0, 4 * pixels * k, 4 * pixels * n, 4 * n * k) for n in widths]
            for k in widths
        ]
        tables[pixels] = np.array([[pricer.cost([one]).seconds for one in row] for row in work])
    pixels_of = random.choice(list(tables), groups)
    single = [np.zeros(CANDIDATES + 1) for _ in range(groups)]
    pairs = {}
    for g in range(1, groups):
        table = tables[pixels_of[g]]
        pairs[g - 1, g] = (table - table[:1] - table[:, :1] + table[0, 0]) * 1e3
        single[g - 1] = single[g - 1] + (table[:, 0] - table[0, 0]) * 1e3
        single[g] = single[g] + (table[0] - table[0, 0]) * 1e3
    cut = 1 - np.array(widths) / WIDTH
    error = [random.lognormal(0, 1) * cut ** random.uniform(1, 3) for _ in range(groups)]
    whole = Problem((CANDIDATES + 1,) * groups, {"seconds": single, "error": error}, {"seconds": pairs})
    return whole, 0.15 * sum(float(one.max()) for one in error)


# --- the families ---


def _demo(_: Path) -> tuple[Any, dict, dict, dict]:
    case = ZOO["demo"](1)
    calibrate, evaluate = demo_data()
    return case.model, dict(case.shapes), dict(calibrate), dict(evaluate)


def _efficientnet(folder: Path) -> tuple[Any, dict, dict, dict]:
    """Pictures of every fourth class calibrate, those of the other classes are judged."""
    files = sorted(folder.glob("*.jpg"))
    if not files:
        raise Missing("there are no pictures", place=str(folder), hint="give --data FOLDER with NNNN.jpg by class")
    labels, found = np.array([int(path.stem) for path in files]), read_pictures(files)
    judged = labels % 4 != 0
    case = ZOO["efficientnet_lite0"](1)
    return case.model, dict(case.shapes), {"inputs": found[~judged]}, {"inputs": found[judged], "labels": labels[judged]}


DATA = {"demo": _demo, "efficientnet_lite0": _efficientnet}


@dataclasses.dataclass(frozen=True, eq=False)
class Lab:
    """One model under study, with what its libraries said."""

    job: Job
    judge: Job  # scores on samples by which no plan was chosen
    task: Search
    priced: Priced
    folder: Path
    baseline: np.ndarray
    whole: Built  # the unchanged model, whose measured seconds are the unit: machines grow slower and faster
    feeds: Mapping[str, np.ndarray]
    known: dict[str, Built] = dataclasses.field(default_factory=dict)  # by the graph's digest

    def built(self, graph: Graph) -> Built:
        """Each graph is compiled once."""
        if graph.digest not in self.known:
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            self.known[graph.digest] = build(graph, self.job.target, self.job.threads, folder)
        return self.known[graph.digest]

    def seconds(self, **libraries: Built) -> dict[str, float]:
        """Measured side by side with the unchanged model, in seconds as long as those that it took at first."""
        runners = {name: one.artifact.runner(self.feeds) for name, one in {**libraries, "": self.whole}.items()}
        times = {name: timing.median for name, timing in interleaved(runners).items()}
        unit = self.priced.base.total_seconds * self.task.scale / times.pop("")
        return {name: seconds * unit for name, seconds in times.items()}

    def score(self, built: Built) -> Comparison:
        """On the library itself, and samples that the search has not seen."""
        scorer = make_job_scorer(self.judge, 1)
        if scorer is None:
            raise ValueError("no evaluation data")
        return compare(scorer.metric, self.baseline, scorer(built.artifact.run))


@one_blas_thread
def families(
    rows: list[Row], summary: dict[str, float], notes: list[str], name: str, threads: int | None, folder: Path, quick: bool
) -> None:
    """Rows: speed of the joint plan, scores at equal latency, and what each change of the plan saves."""
    model, shapes, calibrate, evaluate = DATA[name](folder)
    chosen, judged = ({key: array[first::2] for key, array in evaluate.items()} for first in (0, 1))
    job, judge = (
        prepare(
            model, target="host", shapes=shapes, binds=None, calibrate=calibrate, evaluate=half, budget=Budget(MAX_DROP),
            passes=None, threads=threads or 1, seed=0, progress=quiet,
        )
        for half in (chosen, judged)
    )  # fmt: skip
    task = make_task(job)
    scorer = make_job_scorer(judge, 1)
    if task is None or scorer is None:
        raise ValueError("the model has no data")
    with tempfile.TemporaryDirectory(prefix="hwopt-planner-") as scratch:
        whole = build(job.graph, job.target, job.threads, Path(scratch) / "float")
        task = as_measured(job, task, whole)
        feeds = {key: array[:1] for key, array in evaluate.items() if key != "labels"}
        joint, priced = search_timed(task, price(task))
        lab = Lab(job, judge, task, priced, Path(scratch), scorer(whole.artifact.run), whole, feeds)
        joint, library = fastest(job, joint, lambda one: lab.built(one.graph))
        _, plain = fastest(job, search(task, _int8(priced)), lambda one: lab.built(one.graph))
        times = lab.seconds(joint=library, int8=plain, float=whole)
        drop = lab.score(library)
        rows.append(
            lower_is_better(
                f"{name} joint plan", "latency", "s", times["joint"], {"own int8": times["int8"], "own float": times["float"]}
            )
        )
        rows.append(lower_is_better(f"{name} joint plan", "drop", "1", drop.drop, {"own int8": lab.score(plain).drop}))
        mark = "" if name == "demo" else f"{name}_"
        summary |= {
            f"{mark}speed_vs_own_int8": times["int8"] / times["joint"], f"{mark}joint_drop": drop.drop,
            f"{mark}joint_predicted_over_measured": joint.plan.seconds_after / times["joint"],
        }  # fmt: skip
        points = {f"{factor:g} x the joint plan": times["joint"] * factor for factor in LATENCIES[: 1 if quick else None]}
        points |= {f"{factor:g} x int8": times["int8"] * factor for factor in (1.0, *BELOW)}
        points["halfway from int8 to float"] = (times["int8"] + times["float"]) / 2
        known = {"1 x the joint plan": {"joint": library}, "1 x int8": {"int8": plain}}
        at_equal_latency(rows, summary, notes, lab, name, mark, points, known)
        if not quick:
            left_out(rows, summary, lab, name, mark, joint, library)


def _int8(priced: Priced) -> Priced:
    """What int8 alone can do."""
    alone = priced.only("quantize")
    return dataclasses.replace(alone, options=tuple(option for option in alone.options if option.form == "int8"))


def at_equal_latency(
    rows: list[Row], summary: dict[str, float], notes: list[str], lab: Lab, name: str, mark: str, points: Mapping[str, float],
    known: Mapping[str, Mapping[str, Built]],
) -> None:  # fmt: skip
    """Scores at several latencies (measured seconds by name). `known`: libraries that define such a latency."""
    names = list(dict.fromkeys(one.name for option in lab.priced.options for one in option.passes))
    menus = {"joint": lab.priced, **{family: lab.priced.only(family) for family in names}}
    gains, won = [], []
    for point, allowed in points.items():
        given = known.get(point, {})
        wanted = {family: menu for family, menu in menus.items() if family not in given}
        libraries = {family: built for family, menu in wanted.items() if (built := _gentlest(lab, menu, allowed)) is not None}
        libraries |= given
        if "joint" not in libraries:
            notes.append(f"{name} within {allowed * 1e6:.4g} us ({point}): no joint plan is measured that fast")
            won += [False] if libraries else []
            continue
        times = lab.seconds(**libraries)
        scores = {family: lab.score(one).score for family, one in libraries.items()}
        ours = scores.pop("joint")
        latency = max((times[family] for family in given), default=allowed)  # what defines one is as fast as itself
        reached = {family: score for family, score in scores.items() if times[family] <= latency * WITHIN}
        case = f"{name} within {allowed * 1e6:.4g} us ({point})"
        rows.append(higher_is_better(case, lab.task.scorer.metric, "1", ours, {f"{f} alone": s for f, s in reached.items()}))
        alone = {f"{family} alone": times[family] for family in scores}
        rows.append(lower_is_better(case, "latency", "s", times["joint"], alone))
        if missed := sorted({*menus, *scores} - {*reached, "joint"}):
            notes.append(f"{case}: no plan of {', '.join(missed)} alone is measured that fast: that loses by definition")
        won.append(times["joint"] <= latency * WITHIN and all(ours > score for score in reached.values()))
        if reached:
            gains.append(ours - max(reached.values()))
            summary[f"{mark}joint_vs_best_single_at_{point.replace(' ', '_')}"] = gains[-1]
        summary[f"{mark}joint_score_at_{point.replace(' ', '_')}"] = ours
    if won:
        summary[f"{mark}joint_wins_at_equal_latency"] = sum(won) / len(won)
    if gains:
        summary[f"{mark}joint_vs_best_single"] = gains[0]
        summary[f"{mark}joint_vs_best_single_least"] = min(gains)


def _gentlest(lab: Lab, menu: Priced, seconds: float) -> Built | None:
    """The library of the plan with the best score within a measured latency, as `--budget latency` finds it, or None."""
    task = dataclasses.replace(lab.task, budget=Budget(1.0, latency_seconds=seconds * (1 + ROOM)), thorough=False)
    least = solve(menu.base, menu.options, menu.pairs, Limits())
    for _ in range(TURNS):
        if least is None or least.seconds * task.scale > HOPELESS * seconds:  # saves the search
            return None
        try:
            found = search(task, menu)
        except BudgetError:
            return None
        built = lab.built(found.graph)
        took = lab.seconds(it=built)["it"]
        if took <= seconds * WITHIN:
            return built
        task = dataclasses.replace(task, scale=task.scale * took / found.plan.seconds_after)
    return None


def left_out(rows: list[Row], summary: dict[str, float], lab: Lab, name: str, mark: str, joint: Found, library: Built) -> None:
    """Every change left out once, as compile --check all does it; then again, on the plan that is left."""
    job = dataclasses.replace(lab.job, check="all")
    state = proved(job, joint, library, lambda one: lab.built(one.graph), lab.feeds, lambda _: True)
    effects = [one.measured_seconds for one in state.found.plan.decisions if one.measured_seconds is not None]
    taken = len(joint.plan.decisions) - len(state.found.plan.decisions)
    rows.append(higher_is_better(f"{name} changes left out once", "least saving of a change that stays", "s", min(effects), {}))
    rows.append(lower_is_better(f"{name} changes left out once", "changes taken out", "1", taken, {}))
    summary |= {
        f"{mark}changes": len(state.found.plan.decisions), f"{mark}changes_taken_out": taken,
        f"{mark}least_saving_us": min(effects) * 1e6, f"{mark}negative_changes": sum(effect < 0 for effect in effects),
    }  # fmt: skip
