"""What each option does to the outputs: one currency for all families."""

from __future__ import annotations

import dataclasses
from collections.abc import MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from hwopt.analysis.sensitivity import sensitivity
from hwopt.backends.ort import Session
from hwopt.evaluate import divergence
from hwopt.ir import Graph
from hwopt.pipeline import Context, Pass, run_pass
from hwopt.plan.fisher import by_gradients, estimated
from hwopt.plan.options import Option, Progress
from hwopt.samples import Samples

Known = MutableMapping[str, float]  # by the pass's text: searches over knobs ask for most of them again


def measure_errors(
    graph: Graph,
    ctx: Context,
    options: Sequence[Option],
    samples: Samples,
    workers: int,
    progress: Progress,
    known: Known,
    how: str = "measured",
) -> list[Option]:
    """The options with the divergence of the outputs that each pass causes alone; those of a combination add up.

    `how` is measured (one run of the whole model each), fisher (gradients, see hwopt.plan.fisher), or auto: gradients where
    measuring would take long and torch is there.
    """
    single = [one for one in dict.fromkeys(one for option in options for one in option.passes) if str(one) not in known]
    if single and by_gradients(how, graph, single, samples):
        known.update(_estimates(graph, ctx, single, samples, progress))
    elif single:
        known.update(_divergences(graph, ctx, single, samples, workers, progress))
    return [dataclasses.replace(option, error=sum(known[str(one)] for one in option.passes)) for option in options]


def errors_behind(
    graph: Graph, changed: Graph, ctx: Context, options: Sequence[Option], samples: Samples, workers: int, progress: Progress,
    *, gradients: bool,
) -> list[float]:  # fmt: skip
    """Of options of one pass each that have their errors in `graph`, in one that computes the same with other weights.

    Gradients tell how the error changes: its level, which is fitted to measured errors, is the option's own.
    """
    single = list(dict.fromkeys(option.passes[0] for option in options))
    if not gradients:
        found = _divergences(changed, ctx, single, samples, workers, progress)
        return [found[str(option.passes[0])] for option in options]
    progress("measuring sensitivity by gradients", 0, 1)
    before, after = (sensitivity(one, single, samples, partial(_run, one, ctx), seed=ctx.seed) for one in (graph, changed))
    ratios = {one: after.error(one) / max(before.error(one), 1e-30) for one in single}
    return [option.error * ratios[option.passes[0]] for option in options]


def _run(graph: Graph, ctx: Context, one: Pass) -> Graph:
    return run_pass(one, graph, ctx)


def _estimates(graph: Graph, ctx: Context, single: Sequence[Pass], samples: Samples, progress: Progress) -> dict[str, float]:
    progress("measuring sensitivity by gradients", 0, 1)
    reference = outputs_of(Session(graph), graph, samples)
    found = estimated(graph, ctx, single, samples, lambda changed: divergence_of(changed, samples, reference))
    if found.calibration:
        rank = found.calibration.rank_correlation
        progress(f"rank correlation with {len(found.calibration.measured)} whole configurations: {rank:.2f}", 1, 1)
    return {str(one): found.error(one) for one in single}


def _divergences(
    graph: Graph, ctx: Context, single: Sequence[Pass], samples: Samples, workers: int, progress: Progress
) -> dict[str, float]:
    reference = outputs_of(Session(graph), graph, samples)
    errors: dict[str, float] = {}
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(_error, one, graph, ctx, samples, reference) for one in single]
        try:
            for done, (one, future) in enumerate(zip(single, futures, strict=True)):
                progress("measuring sensitivity", done, len(single))
                errors[str(one)] = future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return errors


def outputs_of(session: Session, graph: Graph, samples: Samples) -> list[np.ndarray]:
    """Every floating-point output over all samples."""
    runs = [session.run(feeds) for feeds in samples.feeds(graph)]
    found = [np.concatenate([np.atleast_1d(run[name]) for run in runs]) for name in graph.outputs]
    return [output for output in found if np.issubdtype(output.dtype, np.floating)]


def _error(one: Pass, graph: Graph, ctx: Context, samples: Samples, reference: list[np.ndarray]) -> float:
    changed = run_pass(one, graph, ctx)
    return 0.0 if changed is graph else divergence_of(changed, samples, reference)


def divergence_of(changed: Graph, samples: Samples, reference: list[np.ndarray]) -> float:
    found = outputs_of(Session(changed), changed, samples)
    return sum(divergence(before, after) for before, after in zip(reference, found, strict=True))
