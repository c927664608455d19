"""MetaSchedule's design spaces for kernels that no template covers: traces sampled, mutated and finished here.

Only its rules, mutators and postprocessors are used: building, measuring and remembering are ours, as for templates (its own
builder starts processes anew for every batch). tvm.s_tir.tensor_intrin is never imported: that takes 30 s, and no rule needs it.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

from hwopt.backends.tvm.generic import choosing_bits
from hwopt.backends.tvm.kernels import Schedule
from hwopt.backends.tvm.kernels.loops import LoopsSpec, Traced, source_of, traced_loops
from hwopt.backends.tvm.tune.database import Trial
from hwopt.backends.tvm.tune.space import Proposer, space_of
from hwopt.backends.tvm.tune.task import Task

JOBS = 8  # parallel tasks for each core
LANES = (16, 64)  # of a vector, at most: one register of AVX-512, or four
UNROLLS = (0, 16, 64, 512)  # statements of an unrolled loop, at most
PARENTS = 4  # of the best traces, which the next ones are mutations of
FRESH = 0.25  # share of the traces that is sampled anew
ATTEMPTS = 8  # for each trace that is asked for: many are known already, some break a rule
PARTIAL = "meta_schedule.random_compute_producer"  # marks a block that sums partial results
COSTLY = ("tirx.exp", "tirx.reinterpret", "tirx.sqrt", "tirx.rsqrt")  # exp, and what its polynomial is made with


def proposer_of(task: Task, seed: int) -> Proposer | TraceProposer | None:
    """Who finds candidates for a task; None where there is nothing to choose."""
    space = space_of(task)
    if space is None:
        return None
    if isinstance(task.spec, LoopsSpec):
        return TraceProposer(Proposer(space, seed), Traces(task.spec, task.tvm, task.threads))
    return Proposer(space, seed)


class TraceProposer:
    """Candidates for a kernel without a template: one half our own schedules while there are any, the rest traces."""

    def __init__(self, grid: Proposer, traces: Traces) -> None:
        self.grid, self.traces = grid, traces

    def propose(self, trials: Sequence[Trial], count: int, pending: Sequence[Schedule] = ()) -> list[Schedule]:
        """Up to `count` schedules that have not been tried; fewer where nothing new is found."""
        plain = [one for one in trials if not isinstance(one.schedule, Traced)]
        waiting = [one for one in pending if not isinstance(one, Traced)]
        found = self.grid.propose(plain, count // 2, waiting)
        known = {*pending, *(one.schedule for one in trials)}
        return found + self._sampled(trials, count - len(found), known)

    def _sampled(self, trials: Sequence[Trial], count: int, known: set[Schedule]) -> list[Schedule]:
        generator = random.Random(f"{self.grid.seed} {self.grid.space.task.key} {len(known)}")
        best = sorted((one for one in trials if one.ok and isinstance(one.schedule, Traced)), key=lambda one: one.doubted)
        parents = [one.schedule for one in best[:PARENTS]]
        found: dict[Schedule, None] = {}
        for _ in range(ATTEMPTS * count):
            if len(found) >= count:
                break
            made = self.traces.candidate(generator, parents)
            if made is not None and made not in known:
                found.setdefault(made)
        return list(found)


class Traces:
    """The design spaces of one kernel: inlining what is costly or not, in short or long vectors, serial or parallel."""

    def __init__(self, spec: LoopsSpec, description: str, threads: int) -> None:
        import tvm
        from tvm.s_tir.meta_schedule import postproc

        function = choosing_bits(source_of(spec)).with_attr({"global_symbol": "main", "tirx.noalias": True})
        self.module = tvm.IRModule({"main": function})
        self.target = tvm.target.Target({**json.loads(description), "num-cores": threads})
        self.threads = threads
        kinds = (postproc.DisallowDynamicLoop, postproc.RewriteParallelVectorizeUnroll, postproc.RewriteReductionBlock)
        self.finish = [kind() for kind in kinds]
        self.spaces: dict[str, tuple[Any, int]] = {}  # a trace's instructions, and for how many threads
        self.mutators: dict[int, list[Any]] = {}
        self._contexts: list[Any] = []  # kept alive: rules and mutators hold no reference
        for cores, lanes, costly in itertools.product(sorted({1, threads}), LANES, (COSTLY, ())):
            self._add(cores, list(_rules(cores, lanes, costly)))

    def _add(self, threads: int, rules: list[Any]) -> None:
        from tvm.s_tir import ScheduleError
        from tvm.s_tir.meta_schedule import mutator, space_generator
        from tvm.s_tir.schedule import Trace

        change = [mutator.MutateTileSize(), mutator.MutateComputeLocation(), mutator.MutateUnroll()]
        change += [mutator.MutateParallel(JOBS)] if threads > 1 else []
        generator = space_generator.PostOrderApply(
            sch_rules=rules, postprocs=self.finish, mutator_probs=dict.fromkeys(change, 1.0 / len(change))
        )
        self._contexts.append(_context(self.module, self.target, generator))
        self.mutators[threads] = change
        try:
            found = generator.generate_design_space(self.module)
        except (ScheduleError, ValueError, RuntimeError):  # a rule cannot work on this kernel: there is no space then
            found = []
        for one in found:
            self.spaces.setdefault(_json(Trace(one.trace.insts, {})), (one.trace.insts, threads))

    def candidate(self, generator: random.Random, parents: Sequence[Schedule]) -> Traced | None:
        """A mutation of a parent, or a sample of one of the spaces; None where it broke a rule."""
        from tvm.s_tir import ScheduleError

        if not self.spaces:
            return None
        made = generator.random(), generator.randrange(1, 2**31)
        try:
            if parents and made[0] >= FRESH:
                parent = generator.choice(parents)
                return self._mutated(parent, generator, made[1]) if isinstance(parent, Traced) else None
            return self._fresh(generator, made[1])
        except (ScheduleError, ValueError, RuntimeError):  # a decision that cannot be carried out
            return None

    def _fresh(self, generator: random.Random, seed: int) -> Traced | None:
        from tvm.s_tir.schedule import Trace

        instructions, threads = generator.choice(list(self.spaces.values()))
        return self._finished(Trace(instructions, {}), threads, seed)

    def _mutated(self, parent: Traced, generator: random.Random, seed: int) -> Traced | None:
        from tvm import s_tir
        from tvm.s_tir.meta_schedule import _ffi_api

        threads = self.threads if parent.parallel else 1
        schedule = s_tir.Schedule(self.module)
        s_tir.schedule.Trace.apply_json_to_schedule(json.loads(parent.trace), schedule)
        trace = _ffi_api.MutatorApply(generator.choice(self.mutators[threads]), schedule.trace, seed)
        return self._finished(trace, threads, seed) if trace is not None else None

    def _finished(self, trace: Any, threads: int, seed: int) -> Traced | None:
        """The trace with decisions where it has none, and with the postprocessors' instructions."""
        from tvm import s_tir

        schedule = s_tir.Schedule(self.module, seed=seed)
        trace.apply_to_schedule(schedule, remove_postproc=True)
        schedule.enter_postproc()
        if not all(one.apply(schedule) for one in self.finish):
            return None
        return traced_loops(_json(schedule.trace.simplified(remove_postproc=False)), threads)


def _json(trace: Any) -> str:
    return json.dumps(trace.as_json(), default=lambda one: one.value)


def _rules(threads: int, lanes: int, costly: Sequence[str]) -> Iterator[Any]:
    """MetaSchedule's for CPUs and one of ours. Any reduction may have partial results: LLVM does not reorder sums by itself."""
    from tvm.s_tir.meta_schedule import schedule_rule

    yield schedule_rule.InlineConstantScalars()
    yield schedule_rule.AutoInline(
        into_producer=False, into_consumer=True, inline_const_tensor=True, disallow_if_then_else=False,
        require_injective=True, require_ordered=False, disallow_op=list(costly),
    )  # fmt: skip
    yield schedule_rule.AddRFactor(max_jobs_per_core=2**20, max_innermost_factor=lanes)
    yield schedule_rule.MultiLevelTiling("SSRSRS", max_innermost_factor=lanes)
    yield _tiling_rule(lanes)
    yield schedule_rule.ParallelizeVectorizeUnroll(JOBS if threads > 1 else -1, lanes, list(UNROLLS), True)
    yield schedule_rule.RandomComputeLocation()


def _tiling_rule(lanes: int) -> Any:
    """Besides the block as it is, the same in tiles of its last two axes: MetaSchedule itself tiles products only."""
    from tvm.ir.utils import derived_object
    from tvm.s_tir.meta_schedule.schedule_rule import PyScheduleRule

    @derived_object
    class Tiles(PyScheduleRule):
        def _initialize_with_tune_context(self, context: Any) -> None:
            pass

        def apply(self, sch: Any, block: Any) -> list[Any]:
            tiled = (_tiled(sch.copy(), block, lanes, inner) for inner in (-1, -2))
            return [sch, *(one for one in tiled if one is not None)]

        def clone(self) -> Any:
            return Tiles()

    return Tiles()


def _tiled(sch: Any, block: Any, lanes: int, inner: int) -> Any | None:
    """A few vectors along one of the last two axes (-1 or -2) innermost, reductions outside of them; None: nothing to tile.

    Loops become vectors at the end, by the postprocessor: a block that is computed inside of a vectorized loop would be wrong.
    """
    loops, kinds = sch.get_loops(block), [one.iter_type for one in sch.get(block).iter_vars]
    if len(loops) != len(kinds) or PARTIAL in sch.get(block).annotations:  # tiled already, or its loops are in another order
        return None
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == 0 and int(sch.get(loop).extent) > 1]
    reduced = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == 2]
    if len(spatial) < -inner or len(spatial) + len(reduced) < 2:
        return None
    across = spatial[inner]
    outer, several, lane = sch.split(across, sch.sample_perfect_tile(across, n=3, max_innermost_factor=lanes))
    first = [one for one in loops if one not in reduced and one is not across]
    down = []
    if len(spatial) > 1:
        other = spatial[-3 - inner]
        above, below = sch.split(other, sch.sample_perfect_tile(other, n=2, max_innermost_factor=8))
        first, down = [above if one is other else one for one in first], [below]
    sch.reorder(*first, outer, *reduced, *down, several, lane)
    return sch


def _context(module: Any, target: Any, generator: Any) -> Any:
    """What TuneContext's own constructor makes, without the import of tensor_intrin in it."""
    from tvm.s_tir.meta_schedule import _ffi_api
    from tvm.s_tir.meta_schedule.tune_context import TuneContext

    made = TuneContext.__new__(TuneContext)
    made.__init_handle_by_constructor__(_ffi_api.TuneContext, module, target, generator, None, "main", 1, 1, None)
    _ffi_api.TuneContextInitialize(made)
    return made
