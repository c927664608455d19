"""Counts of convolutions that run by Winograd's algorithm (kernels/winograd.py)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hwopt.backends.tvm.learn.counted import (
    LINE,
    SECOND,
    Counted,
    Numbers,
    floats,
    memory_shape,
    pieces,
    share,
    spread,
    step_names,
    steps_of,
    traffic,
)
from hwopt.target import MicroKernel, Workload

if TYPE_CHECKING:  # the templates import TVM; listing targets must not
    from hwopt.backends.tvm.kernels.schedule import Schedule
    from hwopt.backends.tvm.kernels.winograd_schedule import WinogradSpec


def by_winograd(work: Workload, micro: MicroKernel, threads: int) -> Counted | None:
    """The counts; None for a kernel that runs otherwise."""
    from hwopt.backends.tvm.kernels.winograd_schedule import default_schedule

    spec = _spec_of(work, micro)
    if spec is None:
        return None
    schedule = default_schedule(spec, micro, threads)
    times, cycles = _times(work, spec, schedule, micro)
    facts = _shape(spec, schedule, micro) | memory_shape(work) | steps_of(step_names(work)[1:]).shape()
    return Counted(f"winograd {work.dtype}", spread(times, threads, cycles), floats(facts))


def share_of_direct(work: Workload, micro: MicroKernel | None) -> float:
    """Cycles by this algorithm over those of the direct form, estimated, for one core; 1 where that is what runs."""
    from hwopt.backends.tvm.kernels import suited
    from hwopt.backends.tvm.kernels.winograd_schedule import cycles, default_schedule, direct_cycles

    spec = _spec_of(work, micro)
    if spec is None or micro is None:
        return 1.0
    micro = suited(spec, micro)
    return cycles(spec, default_schedule(spec, micro), micro) / direct_cycles(spec, micro)


def products_of(work: Workload, micro: MicroKernel | None) -> int:
    """Multiply-adds that the kernel does: fewer than the convolution's own by this algorithm."""
    from hwopt.backends.tvm.kernels.winograd_schedule import shape_of

    spec = _spec_of(work, micro)
    if spec is None:
        return work.macs
    form = shape_of(spec)
    return work.macs * form.points // (9 * form.tile**2)


def _spec_of(work: Workload, micro: MicroKernel | None) -> WinogradSpec | None:
    """The kernel's request; None for one that runs otherwise."""
    if micro is None or work.kind != "conv" or work.taps != 9:
        return None
    from hwopt.backends.tvm.kernels import suited
    from hwopt.backends.tvm.kernels.spec import ConvSpec
    from hwopt.backends.tvm.kernels.winograd_schedule import pays, winograd_spec
    from hwopt.backends.tvm.learn.specs import spec_of

    spec = spec_of(work, micro)
    if not isinstance(spec, ConvSpec) or not pays(spec, suited(spec, micro)):
        return None
    return winograd_spec(spec)


def _times(work: Workload, spec: WinogradSpec, schedule: Schedule, micro: MicroKernel) -> tuple[Numbers, float]:
    """Counts of all tasks, and the schedule's own estimate of their cycles."""
    from hwopt.backends.tvm.kernels.winograd_schedule import Parts

    parts = Parts.of(spec, schedule, micro)
    tasks = parts.tasks
    kept = parts.kept_bytes(spec.in_channels, micro.lanes * schedule.vectors)
    stored = tasks * parts.results * (1 + pieces(spec.out_channels, micro.lanes) / parts.vectors)
    return {
        "patches": float(tasks * parts.patches), "weights_turned": float(tasks * parts.weights),
        "multiplied": tasks * parts.multiplied, "results": float(tasks * parts.results),
        **steps_of(step_names(work)[1:]).times(parts.form.tile**2 * stored),
        "kept_far": tasks * kept * share(kept, SECOND) / LINE,
        "padded": work.read_bytes / LINE, **traffic(work), "call": 100.0,
    }, parts.cycles * tasks  # fmt: skip


def _shape(spec: WinogradSpec, schedule: Schedule, micro: MicroKernel) -> Numbers:
    from hwopt.backends.tvm.kernels.winograd_schedule import shape_of

    form = shape_of(spec)
    return {
        "columns": schedule.tile_columns, "vectors": schedule.vectors, "block_rows": schedule.block_rows, "lanes": micro.lanes,
        "log_in": math.log(spec.in_channels), "log_out": math.log(spec.out_channels), "rows_left": spec.out_height % form.tile,
        "columns_left": spec.out_width % form.tile,
        "channels_left": spec.in_channels % form.lanes(micro) / micro.lanes,
        "lanes_left": spec.out_channels % micro.lanes / micro.lanes, "image": math.log(spec.out_height * spec.out_width),
        "images": spec.batch,
    }  # fmt: skip
