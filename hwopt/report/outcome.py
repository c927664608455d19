"""report.json of one job: what was measured, what is predicted where nothing was, and what a reader must know."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hwopt.analysis.liveness import peak_activation_bytes
from hwopt.analysis.size import weight_bytes
from hwopt.backends.ort import Session
from hwopt.build import Built
from hwopt.decide import make_job_scorer, sample_feeds
from hwopt.evaluate import Comparison, compare
from hwopt.ir import Graph
from hwopt.job import Job
from hwopt.measure import Timing, interleaved, onnxruntime_runner
from hwopt.plan.backend import CUDA, FLOATS
from hwopt.plan.explain import recovery_line
from hwopt.plan.search import Found
from hwopt.report.figures import Figures, layer_table, make_report
from hwopt.samples import Samples, shared
from hwopt.target import origin

LESS = 0.9  # of the time on all threads, below which one thread alone is worth a note
UNSTEADY = 0.1  # of the median between the quartiles: others use the processor, too


def measured_report(job: Job, found: Found, baseline: Built, result: Built) -> dict[str, Any]:
    """Score and time the libraries that ship, side by side with ONNX Runtime on the original.

    A library for another machine is scored by ONNX Runtime on its model and timed by the cost model, and the report says so.
    """
    job.progress("measuring", 0, 1)
    here = job.target.runs_here
    compared = _compared(job, baseline, result)
    times = _measured_times(job, baseline, result) if here else _predicted_times(job, baseline, result)
    before, after = _of_library(job, baseline, times["baseline"]), _of_library(job, result, times["result"])
    peers = {"onnxruntime": times["onnxruntime"].median} if here else {}
    notes = [*_notes(job, found, result, compared), *_unsteady(after), *(_alone_faster(job, baseline, result) if here else ())]
    report = _report(job, found, before, after, compared, notes, peers)
    return report | _simulated(job, baseline, result)


def estimated_report(job: Job, found: Found, result: Built) -> dict[str, Any]:
    """What a build knows without a run: scores of the models in ONNX Runtime, times of the cost model."""
    before, after = (_of_graph(graph, job.predicted(graph).seconds) for graph in (job.graph, found.graph))
    made = dataclasses.replace(
        after, library_weight_bytes=result.library.weight_bytes, peak_activation_bytes=result.library.arena_bytes
    )
    return _report(job, found, before, made, found.comparison, _notes(job, found, result, found.comparison))


def plan_report(job: Job, found: Found) -> dict[str, Any]:
    """The same for a plan that was not compiled: the costs it promises, the score of the graph."""
    before, after = _of_graph(job.graph, found.plan.seconds_before), _of_graph(found.graph, found.plan.seconds_after)
    return _report(job, found, before, after, found.comparison, found.plan.notes)


def _report(
    job: Job, found: Found, before: Figures, after: Figures, compared: Comparison | None, notes: Sequence[str],
    peers: Mapping[str, float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    if compared is not None:
        before = dataclasses.replace(before, score=compared.baseline)
        after = dataclasses.replace(after, score=compared.score)
    report = make_report(
        name=job.graph.name, target=job.target, threads=job.threads, baseline=before, result=after, comparison=compared,
        layers=layer_table(job.graph, found.graph, found.plan, job.target, job.threads), peers=peers or {}, notes=notes,
    )  # fmt: skip
    recovery = found.plan.recovery
    took = {"seconds": found.training_seconds} if job.measure else {}  # else the same inputs give the same bytes
    return report | {"recovery": dataclasses.asdict(recovery) | took if recovery else None}


def _compared(job: Job, baseline: Built, result: Built) -> Comparison | None:
    """The scores of both libraries; of their models in ONNX Runtime where the libraries do not run here."""
    scorer = make_job_scorer(job, 1)  # the libraries bring their own threads
    if scorer is None:
        return None
    runs = [built.artifact.run if job.target.runs_here else Session(built.graph).run for built in (baseline, result)]
    before = scorer(runs[0])
    return compare(scorer.metric, before, before if result is baseline else scorer(runs[1]))


def _of_library(job: Job, built: Built, timing: Timing) -> Figures:
    source = "measured" if job.target.runs_here else "predicted"
    return Figures(
        score=None, latency_seconds=timing.median, latency_spread_seconds=timing.spread, latency_source=source,
        weight_bytes=weight_bytes(built.graph), library_weight_bytes=built.library.weight_bytes,
        peak_activation_bytes=built.library.arena_bytes,
    )  # fmt: skip


def _of_graph(graph: Graph, seconds: float) -> Figures:
    size, peak = weight_bytes(graph), peak_activation_bytes(graph)
    return Figures(
        score=None, latency_seconds=max(seconds, 1e-12), latency_spread_seconds=0.0, latency_source="predicted",
        weight_bytes=size, library_weight_bytes=size, peak_activation_bytes=peak,
    )  # fmt: skip


def _measured_times(job: Job, baseline: Built, result: Built) -> dict[str, Timing]:
    """Ours in turns, then the peer: its idle threads go on spinning on the cores that ours would use."""
    feeds = sample_feeds(job, baseline)
    runners = {"baseline": baseline.artifact.runner(feeds)}
    if result is not baseline:
        runners["result"] = result.artifact.runner(feeds)
    times = interleaved(runners)
    peer = interleaved({"onnxruntime": onnxruntime_runner(job.graph, feeds, job.threads)})
    return {"result": times["baseline"], **times, **peer}


def _unsteady(figures: Figures) -> Iterator[str]:
    """A note where the runs of one library differ, so that others would find another speed."""
    share = figures.latency_spread_seconds / figures.latency_seconds
    if share > UNSTEADY:
        yield f"the time of a run varied by {share:.0%} (quartiles): measure again while nothing else runs, with hwopt bench"


def _alone_faster(job: Job, baseline: Built, result: Built) -> list[str]:
    """A note where the library takes longer on its threads than on one: kernels of microseconds, processors that share a core."""
    if job.threads < 2 or result.kind != "c":
        return []
    feeds = sample_feeds(job, baseline)
    counts = (1, job.threads)
    times = interleaved({str(count): result.artifact.runner(feeds, count) for count in counts})
    one, all_of_them = (times[str(count)].median for count in counts)
    if one > LESS * all_of_them:
        return []
    better = f"compile it with --threads 1, or call {result.library.name}_set_threads(1)"
    return [f"one thread is faster here: {one * 1e3:.3g} ms against {all_of_them * 1e3:.3g} ms on {job.threads}; {better}"]


def _predicted_times(job: Job, baseline: Built, result: Built) -> dict[str, Timing]:
    seconds = {"baseline": job.predicted(baseline.graph).seconds, "result": job.predicted(result.graph).seconds}
    return {name: Timing(value, value, value, 0) for name, value in seconds.items()}


def _simulated(job: Job, baseline: Built, result: Built) -> dict[str, Any]:
    """What the model of the target's array counts in one run of each library; nothing for targets without one."""
    if job.target.array is None:
        return {}
    feeds = sample_feeds(job, baseline)
    counted = {"baseline": baseline.artifact.simulation(feeds), "result": result.artifact.simulation(feeds)}
    for one in filter(None, counted.values()):
        cycles = one["array_cycles"] + one["stall_cycles"] + one["other_cycles"]
        one["seconds"] = cycles / job.target.array.hertz
    return {"simulated": counted}


def _seen(job: Job, found: Found) -> Iterator[str]:
    """Samples that the model was made with as well as judged by: what they say is no promise for others."""
    used = {"calibrated": job.ctx.calibration, "trained": job.training.data if found.plan.recovery else None}
    for what, data in used.items():
        count = shared(job.evaluation, data) if job.evaluation and isinstance(data, Samples) else 0
        if count:
            yield f"{count} of {len(job.evaluation or ())} samples that judge were also {what} with: the score is too kind"


def _notes(job: Job, found: Found, result: Built, compared: Comparison | None) -> list[str]:
    notes = [f"runs in TVM's virtual machine: {result.reason}"] if result.kind == "vm" else []
    if job.target.tvm["kind"] == CUDA:
        notes.append("the kernels for the GPU were compiled and inspected, not run")
        notes += [f"{FLOATS}: changes to integers were not considered"] if found.plan.rounds else []
    if not job.measure:
        notes.append("nothing was measured: scored in ONNX Runtime, timed by the cost model")
    elif job.target.array is not None:
        notes.append("runs on this machine with a model of the array in C: scored in ONNX Runtime, timed by the cost model")
    elif not job.target.runs_here:
        notes.append("compiled for another machine: scored in ONNX Runtime, timed by the cost model, the library was not run")
    notes += [result.tuning] if result.tuning else []
    notes += found.plan.notes
    notes += [recovery_line(found.plan.recovery)] if found.plan.recovery else []
    if job.training.recipe is not None and found.plan.recovery is None and found.plan.decisions:
        notes.append(f"no training is in it: {job.training.recipe.name} made nothing better that keeps the limits")
    notes += [] if origin(job.target.cost) == "analytical" else [f"prices: {origin(job.target.cost)}"]
    if not found.plan.decisions:
        why = found.plan.refused[0].reason if found.plan.refused else "no pass had anything to do"
        notes.append(f"nothing was changed beyond clean-up: {why}")
    if compared is not None and compared.baseline == 0:
        notes.append("the unchanged model scores 0 on the evaluation data: are the labels right?")
    if compared is not None and compared.drop > job.budget.max_drop:
        notes.append(f"the drop is above the {job.budget.max_drop:.2%} that were allowed")
    notes += _seen(job, found) if found.plan.decisions else ()
    return notes + ([result.coded_note] if result.coded_note else [])
