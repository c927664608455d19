"""The share of a core's measured peak that a model's large 3 x 3 convolutions reach where they run: between its other kernels.

Operations are those of the direct form: kernels by Winograd's algorithm, which takes fewer, may show more than the peak.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.layout import Row
from hwopt.ir import Graph
from hwopt.target import Target, Workload

CHANNELS = 128  # of such a layer, at least: then neither its data nor its weights leave units unused
SECONDS = 0.5
KINDS = {"f32": "float32", "int8": "int8", "bf16": "bfloat16"}
METRIC, WORST = "conv_peak_share", "conv_peak_share_worst"


def is_large(work: Workload) -> bool:
    return work.kind == "conv" and work.groups == 1 and work.taps == 9 and min(work.n, work.k // 9) >= CHANNELS


def rows_of(label: str, graph: Graph, target: Target, peak: float | None) -> list[Row]:
    """One thread's geometric mean and least over those layers; none where a model has no such layer, or the peak is not known."""
    from hwopt.analysis.workload import workloads

    if not peak or not any(map(is_large, workloads(graph))):
        return []
    shares = [2 * work.macs / seconds / peak for work, seconds in _timed(graph, target) if is_large(work)]
    mean = math.exp(sum(map(math.log, shares)) / len(shares))
    return [Row(label, METRIC, "1", mean, {}, None), Row(label, WORST, "1", min(shares), {}, None)]


def _timed(graph: Graph, target: Target) -> list[tuple[Workload, float]]:
    from hwopt.analysis.workload import workloads
    from hwopt.backends.tvm.build import compile_program
    from hwopt.backends.tvm.learn.measure import Compiled, command, owners_of, timed
    from hwopt.backends.tvm.tune.runner import Runner
    from hwopt.build import identifier

    program = compile_program(graph, target, 1, identifier(graph.name))  # the names that it was built with: kernels are there
    with Runner(1) as runner, tempfile.TemporaryDirectory() as folder:
        waiting = Compiled(workloads(graph), owners_of(program.calls), tuple(program.objects), command(program, Path(folder)))
        return [(one.work, one.seconds) for one in timed(waiting, runner, SECONDS).samples if one.seconds > 0]


def summary(rows: Sequence[Row], units: Mapping[str, str]) -> dict[str, float]:
    """`amx_peak_share` and the like, by what multiplies in a precision (`units`), over the models that have such layers."""
    made: dict[str, float] = {}
    for dtype, unit in units.items():
        means = [row.ours for row in rows if row.metric == METRIC and f" {dtype} " in row.case]
        least = [row.ours for row in rows if row.metric == WORST and f" {dtype} " in row.case]
        if means:
            made[f"{unit}_peak_share"] = math.exp(sum(map(math.log, means)) / len(means))
            made[f"{unit}_peak_share_worst"] = min(least)
    return made


def units(dtype: str) -> str:
    """What multiplies in this precision on this machine: amx, vnni, ... or the dtype where it has no name."""
    from hwopt.plugins import find_target

    names = " ".join((micro.intrinsic, *micro.features) if (micro := find_target("host").microkernels.get(KINDS[dtype])) else ())
    known = {"amx": "amx", "tdp": "amx", "vpdpbusd": "vnni", "dpbf16": "bf16", "fma": "fma", "mmla": "mmla", "dot": "dot"}
    return next((unit for word, unit in known.items() if word in names), dtype)
