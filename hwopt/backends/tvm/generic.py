"""A CPU schedule for kernels that TVM's operators were lowered to; stock TVM has none.

elementwise   inlined into one loop nest; outer loops fused and parallel, the innermost left whole for LLVM's vectors
reduction over outer axes (pools, means over images)   vectors of neighbouring results, the reduction around them
reduction over the innermost axis (softmax, layer norm)   16 partial results in one vector, then their sum
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from hwopt.errors import ToolchainError

LANES = 16
PARALLEL_WORK = 16384  # scalar results below which starting threads costs more than it saves
PARALLEL_COPIES = 65536  # the same where results are copies: a cycle moves a whole vector


@dataclass(frozen=True)
class Knobs:
    """What tuning may choose: `lanes` of a vector, and how many `vectors` one step computes."""

    lanes: int = LANES
    vectors: int = 1


CHEAP = ("tirx.reinterpret",)
WIDE = ("int64", "uint64")


def scheduled(function: Any, threads: int, knobs: Knobs | None = None) -> Any:
    """The PrimFunc with loops ordered, vectorized and parallel; itself where it has no schedulable blocks."""
    import tvm
    from tvm import s_tir, tirx

    function = _narrow(choosing_bits(function))
    module = tvm.IRModule({"main": function})
    try:
        schedule = s_tir.Schedule(module)
        blocks = _blocks(schedule)
    except (s_tir.ScheduleError, ValueError, RuntimeError):  # kernels written as plain loops have none
        return function
    _inline(schedule, blocks)
    for block in _blocks(schedule):
        _block(schedule, block, threads, knobs or Knobs())
    wraps = any(_walk(schedule.get(block).body, tirx.FloorMod) for block in _blocks(schedule))
    return schedule.mod["main"].with_attr({"tirx.is_scheduled": True, "hwopt.scalar": wraps})


def _narrow(function: Any) -> Any:
    """The PrimFunc with 32-bit indices, where nothing else has 64: TVM cuts loops of 64 bits such that no vectors are left."""
    import tvm
    from tvm import tirx
    from tvm.ir.expr import TensorLoad

    kinds = [one.ty for one in (*function.params, *(load.source for load in _walk(function.body, TensorLoad)))]
    wide = [*kinds, *(cast.ty for cast in _walk(function.body, tirx.Cast))]
    if any(str(kind.dtype) in WIDE for kind in wide) or any(math.prod(map(int, kind.shape)) >= 1 << 31 for kind in kinds):
        return function
    return tirx.transform.ForceNarrowIndexToInt32()(tvm.IRModule({"main": function}))["main"]


def choosing_bits(function: Any) -> Any:
    """The PrimFunc that chooses between the bits of bfloat16 values: TVM would widen the values for that, wrongly in vectors."""
    import tvm_ffi
    from tvm import ir, tirx

    def choosing(call: Any) -> Any:
        if getattr(call.op, "name", "") != "prim.if_then_else" or str(call.ty.dtype) != "bfloat16":
            return call
        condition, one, other = call.args
        bits = (tirx.reinterpret("uint16", value) for value in (one, other))
        return tirx.reinterpret("bfloat16", tirx.if_then_else(condition, *bits))

    return function.with_body(tvm_ffi.structural_map(function.body, (ir.Call, choosing)))


def traced(function: Any, trace: str) -> Any:
    """The PrimFunc after the instructions of a MetaSchedule trace, which is JSON; raises ToolchainError if they do not fit it."""
    import tvm
    from tvm import s_tir, tirx

    try:
        schedule = s_tir.Schedule(tvm.IRModule({"main": choosing_bits(function)}))
        s_tir.schedule.Trace.apply_json_to_schedule(json.loads(trace), schedule)
    except Exception as error:  # TVM raises kinds of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ToolchainError(f"its trace does not fit the kernel: {reason}", hint="tune with a new --tuning-db") from error
    found = schedule.mod["main"]
    return found.with_attr({"tirx.is_scheduled": True, "hwopt.scalar": bool(_walk(found.body, tirx.FloorMod))})


def _blocks(schedule: Any) -> list[Any]:
    root = schedule.get_sblock("root", func_name="main")
    return list(schedule.get_child_blocks(root))


def _inline(schedule: Any, blocks: list[Any]) -> None:
    """Inline every elementwise producer, and move elementwise consumers into their reductions' results."""
    from tvm import s_tir

    for block in blocks:
        statement = schedule.get(block)
        if any(variable.iter_type != 0 for variable in statement.iter_vars) or _is_expensive(schedule, block):
            continue
        try:
            schedule.compute_inline(block)
        except s_tir.ScheduleError:
            continue


def _is_expensive(schedule: Any, block: Any) -> bool:
    """True if a consumer would repeat exp and the like for each of several reads."""
    from tvm import ir

    found = [call for call in _walk(schedule.get(block).body, ir.Call) if getattr(call.op, "name", "") not in CHEAP]
    consumers = schedule.get_consumers(block)
    reduced = any(variable.iter_type == 2 for consumer in consumers for variable in schedule.get(consumer).iter_vars)
    return bool(found) and (len(consumers) > 1 or reduced)


def _block(schedule: Any, block: Any, threads: int, knobs: Knobs) -> None:
    from tvm import s_tir

    try:
        kinds = [variable.iter_type for variable in schedule.get(block).iter_vars]
        loops = schedule.get_loops(block)
        if len(kinds) != len(loops) or not loops:
            return
        if 2 in kinds:
            _reduction(schedule, block, threads, knobs)
        else:
            whole = not _reads_indices(schedule, block)
            _spatial(schedule, loops, threads if _is_long(schedule, block) else 1, knobs, whole)
    except s_tir.ScheduleError:
        return  # an unscheduled block is slow, not wrong


def _is_long(schedule: Any, block: Any) -> bool:
    """False for copies of so few elements that one core has moved them before others have started."""
    from tvm.ir.expr import TensorLoad

    work = math.prod(int(schedule.get(loop).extent) for loop in schedule.get_loops(block))
    return work >= PARALLEL_COPIES or not isinstance(getattr(schedule.get(block).body, "value", None), TensorLoad)


def _reads_indices(schedule: Any, block: Any) -> bool:
    """True if 64-bit numbers are read, such as indices: TVM fails to cut loops over those."""
    from tvm.ir.expr import TensorLoad

    return any(str(load.source.ty.dtype) in WIDE for load in _walk(schedule.get(block).body, TensorLoad))


def _spatial(schedule: Any, loops: list[Any], threads: int, knobs: Knobs, whole: bool) -> None:
    """All loops but the innermost become one, parallel where there is work for several threads; `whole` vectors by themselves."""
    extents = [int(schedule.get(loop).extent) for loop in loops]
    inner = extents[-1]
    step = knobs.lanes * knobs.vectors
    if inner > step:
        outer, lane = schedule.split(loops[-1], [None, step])
        if knobs.vectors > 1:
            several, lane = schedule.split(lane, [knobs.vectors, knobs.lanes])
            schedule.unroll(several)
        schedule.vectorize(lane)
        if inner % step and whole:  # the last vector becomes code of its own, so that the others need no condition
            schedule.annotate(outer, "pragma_loop_partition_hint", True)
        loops = [*loops[:-1], outer]
        _outer(schedule, loops[:-1] or loops, math.prod(extents), threads)
    else:
        if inner == knobs.lanes:
            schedule.vectorize(loops[-1])
        _outer(schedule, loops[:-1], math.prod(extents), threads)


def _outer(schedule: Any, loops: list[Any], work: int, threads: int) -> None:
    if not loops or threads < 2 or work < PARALLEL_WORK:
        return
    fused = schedule.fuse(*loops) if len(loops) > 1 else loops[0]
    schedule.parallel(fused)


def _reduction(schedule: Any, block: Any, threads: int, knobs: Knobs) -> None:
    statement = schedule.get(block)
    loops = schedule.get_loops(block)
    spatial = [loop for loop, variable in zip(loops, statement.iter_vars, strict=True) if variable.iter_type == 0]
    reduced = [loop for loop, variable in zip(loops, statement.iter_vars, strict=True) if variable.iter_type == 2]
    work = math.prod(int(schedule.get(loop).extent) for loop in loops)
    if _reduces_innermost(statement):
        _rows(schedule, block, spatial, reduced, work, threads, knobs.lanes)
        return
    if spatial:
        extent = int(schedule.get(spatial[-1]).extent)
        default = knobs == Knobs()
        widths = [width for width in (1, 2, 4, 8, 16, 32, 64) if extent % width == 0 and (default or width <= knobs.lanes)]
        lanes = max(widths)
        vectors = knobs.vectors if extent % (lanes * knobs.vectors) == 0 else 1
        outer, several, lane = schedule.split(spatial[-1], [None, vectors, lanes])
        schedule.reorder(*spatial[:-1], outer, *reduced, several, lane)
        if vectors > 1:
            schedule.unroll(several)
        if lanes > 1:
            schedule.vectorize(lane)
        kept = [*spatial[:-1], outer]
        fused = schedule.fuse(*kept) if len(kept) > 1 else kept[0]
        schedule.decompose_reduction(block, reduced[0])
        if threads > 1 and work >= PARALLEL_WORK:
            schedule.parallel(fused)


def _reduces_innermost(statement: Any) -> bool:
    """True if some operand's last index is the reduction's."""
    from tvm import ir

    reduced = {variable.var.name for variable in statement.iter_vars if variable.iter_type == 2}
    last = [read.region[-1].min for read in statement.reads if read.region]
    return any(variable.name in reduced for index in last for variable in _walk(index, ir.Var))


def _walk(root: Any, kind: type) -> list[Any]:
    """Every object of a class inside a TIR expression or statement."""
    import tvm_ffi

    found: list[Any] = []
    tvm_ffi.structural_walk(root, [(kind, found.append)])
    return found


def _rows(schedule: Any, block: Any, spatial: list[Any], reduced: list[Any], work: int, threads: int, lanes: int) -> None:
    """Partial results in lanes: floating-point sums are not reordered by LLVM, so it cannot do this by itself."""
    from tvm import s_tir

    fused = schedule.fuse(*spatial) if len(spatial) > 1 else (spatial[0] if spatial else None)
    extent = int(schedule.get(reduced[-1]).extent)
    if extent % lanes == 0 and extent > lanes:
        _, lane = schedule.split(reduced[-1], [None, lanes])
        try:
            partial = schedule.rfactor(lane, 0 if fused is None else 1)
        except s_tir.ScheduleError:
            partial = None
        if partial is not None and fused is not None:
            schedule.reverse_compute_at(block, schedule.get_loops(partial)[0])
            inner = schedule.get_loops(partial)
            schedule.reorder(*inner[2:], inner[1])
            schedule.vectorize(inner[1])
            schedule.decompose_reduction(partial, inner[2])
            fused = schedule.get_loops(block)[0]
    if fused is not None and threads > 1 and work >= PARALLEL_WORK:
        schedule.parallel(fused)
