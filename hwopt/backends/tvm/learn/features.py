"""What a predictor sees of a kernel: counts, weighed into a first guess of its time, and facts that make it faster or slower."""

from __future__ import annotations

import functools

from hwopt.backends.tvm.learn.counted import Counted, Micros
from hwopt.backends.tvm.learn.counted_depthwise import depthwise
from hwopt.backends.tvm.learn.counted_loops import loops
from hwopt.backends.tvm.learn.counted_pools import pool
from hwopt.backends.tvm.learn.counted_products import product
from hwopt.target import MicroKernel, Workload

KINDS = ("conv", "depthwise", "matmul", "pool", "elementwise", "reduce", "move")
PRODUCTS = ("conv", "depthwise", "matmul")


def counted(work: Workload, micros: Micros, threads: int) -> Counted:
    """The family and the counts of one kernel."""
    return _counted(work, tuple(sorted(micros.items())), threads, work.footprint)


@functools.lru_cache(maxsize=8192)
def _counted(work: Workload, micros: tuple[tuple[str, MicroKernel], ...], threads: int, _footprint: int) -> Counted:
    """The footprint stands by itself, as workloads that differ in it alone are equal."""
    pooled = pool(work, dict(micros).get("float32"), threads)
    if pooled is not None:
        return pooled
    micro = dict(micros).get("float32" if work.kind == "depthwise" and work.dtype == "bfloat16" else work.dtype)
    if micro is None or work.kind not in PRODUCTS:
        return loops(work, threads)
    return depthwise(work, micro, threads) if work.kind == "depthwise" else product(work, micro, threads)
