"""A tuning session: which kernel next, which candidates, until the trials or the time are spent or nothing is left to try."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field

from hwopt.backends.tvm.kernels import Schedule
from hwopt.backends.tvm.kernels.loops import LoopsSpec
from hwopt.backends.tvm.kernels.packed import PackedSpec
from hwopt.backends.tvm.kernels.spec import MatmulSpec, PoolSpec, Quantize
from hwopt.backends.tvm.tune.builder import Build, Builder, Built, build_candidate
from hwopt.backends.tvm.tune.child import HOT
from hwopt.backends.tvm.tune.database import CONFIRM, ROUNDS, Database, Trial
from hwopt.backends.tvm.tune.runner import HANG_SECONDS, Kernels, Outcome, Runner, ratio
from hwopt.backends.tvm.tune.space import Proposer
from hwopt.backends.tvm.tune.task import Task, operations
from hwopt.backends.tvm.tune.traces import TraceProposer, proposer_of
from hwopt.errors import ToolchainError, UsageError
from hwopt.target import Target

BATCH = 16  # candidates that are built, linked and measured together
ALPHA, WINDOW = 0.5, 3  # of the scheduler's gain: weight of the recent slope, and over how many batches it is taken
UNSTEADY = "unsteady"  # ran, but while the clock moved: not recorded, and proposed again
FINALISTS, PASSES = 3, 3  # of the last comparison: how many take part, and how often others may take their place


@dataclass
class Progress:
    """One kernel on its way: seconds of the default and of the best schedule, after each batch."""

    task: Task
    calls: int
    proposer: Proposer | TraceProposer | None
    limit: float = 0.0  # seconds that the hardware needs at least, by the measured peak of its micro-kernel
    default: float = 0.0
    trials: int = 0
    best: list[float] = field(default_factory=list)  # ratio to the default after each batch
    exhausted: bool = False
    reason: str = ""  # why it cannot be tuned
    confirmed: int = 0  # trials at the time of the last confirmation

    @property
    def ratio(self) -> float:
        return self.best[-1] if self.best else 1.0

    @property
    def seconds(self) -> float:
        return self.default * self.ratio

    def withdrawn(self, database: Database) -> None:
        """Its best schedule was found to be none in the whole model: the next one counts, or the default."""
        self.best.append(_best(database, self.task))
        self.reason = "" if self.ratio < 1 else "no schedule was faster in the whole model"

    def gain(self, waiting: int = 0) -> float:
        """What one more batch may save, in seconds of the model's run, when `waiting` others are not measured yet.

        g = alpha * drop over the window / window + (1 - alpha) * (best - limit) / n: the task scheduler of Ansor (Zheng et al.,
        OSDI 2020), which has no limit and therefore best / n.
        """
        if self.exhausted or self.proposer is None:
            return 0.0
        window = self.best[-WINDOW - 1 :]
        slope = (window[0] - window[-1]) / max(1, len(window) - 1) if window else 0.0
        room = max(0.01 * self.seconds, self.seconds - self.limit) / (1 + len(self.best) + waiting)
        return self.calls * (ALPHA * slope * self.default + (1 - ALPHA) * room)


@dataclass(frozen=True)
class Effort:
    """When to stop: after so many candidates, or seconds; None: no such bound."""

    trials: int | None = None
    seconds: float | None = None


@dataclass
class State:
    """What a caller sees after every batch."""

    tasks: list[Progress]
    effort: Effort
    trials: int = 0
    started: float = field(default_factory=time.monotonic)
    failures: dict[str, int] = field(default_factory=dict)  # by status

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @property
    def before(self) -> float:
        """Seconds of all calls with default schedules."""
        return sum(one.calls * one.default for one in self.tasks)

    @property
    def after(self) -> float:
        return sum(one.calls * one.seconds for one in self.tasks)

    @property
    def limit(self) -> float:
        return sum(one.calls * one.limit for one in self.tasks)

    @property
    def share(self) -> float:
        """The share of the time that is spent."""
        shares = [0.0]
        if self.effort.trials:
            shares.append(self.trials / self.effort.trials)
        if self.effort.seconds:
            shares.append(self.elapsed / self.effort.seconds)
        return min(1.0, max(shares))

    @property
    def gained(self) -> bool:
        """Whether some schedule beats a default one."""
        return any(one.ratio < 1 for one in self.tasks)

    @property
    def done(self) -> bool:
        return self.share >= 1 or all(one.exhausted or one.proposer is None for one in self.tasks)


Watch = Callable[[State], None]


def tune(
    tasks: Mapping[Task, int],
    target: Target,
    database: Database,
    effort: Effort,
    *,
    watch: Watch = lambda _: None,
    seed: int = 0,
    executor: Executor | None = None,
    build: Build = build_candidate,
    hang: float = HANG_SECONDS,
    batch: int = BATCH,
    runner: Runner | None = None,
) -> State:
    """Search schedules for tasks (with the number of calls of each) and add what is measured to the database, batch by batch.

    Interrupting it (KeyboardInterrupt) loses the batch at work only; running it again goes on from the database.
    `runner`, which is closed at the end, measures somewhere else; all cores here build then.
    """
    if effort.trials is None and effort.seconds is None:
        raise UsageError("tuning without an end", hint="state a number of trials or a time")
    state = State([_progress(task, calls, database, seed) for task, calls in tasks.items()], effort)
    threads = max((task.threads for task in tasks), default=1)
    workers, cores, ahead = machine(0 if runner else threads)
    if not state.tasks or state.done:
        return state
    with Builder(workers, executor, build) as builder, runner or Runner(threads, cores, hang, seed) as measuring:
        session = Session(state, database, builder, measuring, batch)
        session.find_limits(target)
        session.measure_defaults()
        session.run(ahead or executor is not None, watch)
        session.confirm(watch)
    return state


def machine(threads: int) -> tuple[int, tuple[int, ...], bool]:
    """Workers that build, cores that measure, and whether both can go on at the same time."""
    if not hasattr(os, "sched_getaffinity"):
        return 1, (), False
    if threads == 0:  # measured elsewhere
        return len(os.sched_getaffinity(0)), (), True
    cores = sorted(os.sched_getaffinity(0))
    spare = len(cores) - threads
    if spare < 2:  # one core builds too slowly to keep up: better build on all, then measure
        return len(cores), tuple(cores[-threads:]), False
    return spare, tuple(cores[-threads:]), True


def _progress(task: Task, calls: int, database: Database, seed: int) -> Progress:
    """What the database knows of a task is where it starts."""
    found = Progress(task, calls, proposer_of(task, seed))
    known = [trial for trial in database.trials(task) if trial.ok]
    if known:
        found.trials = len(known)
        found.best = [_best(database, task)]
        found.confirmed = found.trials
    return found


@dataclass
class Batch:
    """Candidates on their way through building and measuring."""

    progress: Progress
    schedules: list[Schedule]
    futures: list[Future]


class Session:
    """The loop over batches."""

    def __init__(self, state: State, database: Database, builder: Builder, runner: Runner, size: int) -> None:
        self.state, self.database, self.builder, self.runner, self.size = state, database, builder, runner, size
        self._references: dict[Task, Built] = {}
        self._pending: dict[Task, list[Schedule]] = {}

    def find_limits(self, target: Target) -> None:
        """Measure the peak of every micro-kernel that the tasks use: nominal clock rates are often far from the real one."""
        peaks: dict[Task, float] = {}
        for progress in self.state.tasks:
            probe = progress.task.probe
            if probe not in peaks:
                peaks[probe] = self._peak(probe)
            progress.limit = progress.task.limit(target, peaks[probe])

    def _peak(self, probe: Task) -> float:
        """Operations a second of one core."""
        built = build_candidate(probe, probe.default, "probe")
        if built.reason:
            raise ToolchainError(built.reason, place=probe.name)
        hot = tuple((HOT, *row[1:]) for row in signature(probe, built.parameters))
        found = self.runner.measure(Kernels({"probe": built.data}, hot), CONFIRM)
        return operations(probe.spec) / min(found["probe"].times)

    def measure_defaults(self) -> None:
        """The times that candidates must beat, of all tasks, so that the first candidates go where most can be gained."""
        waiting = [
            (one, self.builder.start(one.task, [one.task.default], [_symbol(one.task.default)])) for one in self.state.tasks
        ]
        for progress, futures in waiting:
            task, symbol = progress.task, _symbol(progress.task.default)
            built = self.builder.finish(task, [task.default], [symbol], futures)[0]
            try:
                if built.reason:
                    raise ToolchainError(f"the default schedule cannot be built: {built.reason}")
                found = self.runner.measure(Kernels({symbol: built.data}, signature(task, built.parameters)), ROUNDS)
            except ToolchainError as error:
                progress.exhausted, progress.reason = True, str(error)
                continue
            self._references[task] = built
            progress.default = min(found[symbol].times)

    def run(self, ahead: bool, watch: Watch) -> None:
        """Measure one batch while the next one is built, if the machine has the cores for both."""
        following: Batch | None = None
        while following is not None or not self.state.done:
            current = following or self._next()
            if current is None:
                return
            following = self._next() if ahead and not self.state.done and self._room() > 0 else None
            self._measure(current, ROUNDS)
            watch(self.state)

    def confirm(self, watch: Watch) -> None:
        """Compare each kernel's best candidates once more with many rounds: the luckiest is not always the fastest."""
        for progress in self.state.tasks:
            for _ in range(PASSES if progress.trials > progress.confirmed else 0):
                finalists = self._finalists(progress.task)
                if not finalists:
                    break
                self._measure(self._start(progress, finalists), CONFIRM)
                watch(self.state)
            progress.confirmed = progress.trials

    def _finalists(self, task: Task) -> list[Schedule]:
        """Those that promise to beat the best confirmed one."""
        trials = [one for one in self.database.trials(task) if one.ok and one.rounds >= ROUNDS]
        bound = min((one.doubted for one in trials if one.rounds >= CONFIRM), default=1.0)
        better = [one for one in trials if one.rounds < CONFIRM and one.doubted < min(1.0, bound)]
        return [one.schedule for one in sorted(better, key=lambda one: one.doubted)[:FINALISTS]]

    def _next(self) -> Batch | None:
        """The batch with the largest expected gain."""
        for progress in sorted(self.state.tasks, key=lambda one: -one.gain(self._waiting(one))):
            if progress.exhausted or progress.proposer is None:
                continue
            pending = self._pending.get(progress.task, [])
            schedules = progress.proposer.propose(self.database.trials(progress.task), self._room(), pending)
            if schedules:
                return self._start(progress, schedules)
            progress.exhausted = not pending
        return None

    def _waiting(self, progress: Progress) -> int:
        """Batches of a task that are being built."""
        return -(-len(self._pending.get(progress.task, [])) // self.size)

    def _room(self) -> int:
        """Candidates that the next batch may have."""
        bound = self.state.effort.trials
        waiting = sum(map(len, self._pending.values()))
        return self.size if bound is None else max(0, min(self.size, bound - self.state.trials - waiting))

    def _start(self, progress: Progress, schedules: list[Schedule]) -> Batch:
        task = progress.task
        self._pending.setdefault(task, []).extend(schedules)
        return Batch(progress, schedules, self.builder.start(task, schedules, [_symbol(one) for one in schedules]))

    def _measure(self, batch: Batch, rounds: int) -> None:
        """Wait for the builds, measure them, record what came out."""
        progress, task = batch.progress, batch.progress.task
        symbols = [_symbol(one) for one in batch.schedules]
        built = dict(zip(batch.schedules, self.builder.finish(task, batch.schedules, symbols, batch.futures), strict=True))
        pending = self._pending[task]
        self._pending[task] = [one for one in pending if one not in built]
        self.state.trials += len(built) if rounds == ROUNDS else 0
        try:
            trials = self._trials(task, built, rounds)
        except ToolchainError as error:
            progress.exhausted, progress.reason = True, str(error)
            return
        self.database.add(task, [one for one in trials if one.status != UNSTEADY])  # a time of another clock is none
        self._account(progress, trials, rounds == ROUNDS)

    def _trials(self, task: Task, built: Mapping[Schedule, Built], rounds: int) -> list[Trial]:
        """A trial for every candidate; raises ToolchainError if the default schedule cannot be measured."""
        reference = self._references[task]
        first = _symbol(task.default)
        objects = {first: reference.data, **{_symbol(one): found.data for one, found in built.items() if not found.reason}}
        found = self.runner.measure(Kernels(objects, signature(task, reference.parameters)), rounds) if len(objects) > 1 else {}
        trials = []
        for schedule, one in built.items():
            if one.reason:
                trials.append(Trial(schedule, "failed", reason=one.reason))
            else:
                trials.append(_trial(schedule, found[_symbol(schedule)], found[first]))
        return trials

    def _account(self, progress: Progress, trials: Sequence[Trial], search: bool) -> None:
        for trial in trials:
            if not trial.ok:
                self.state.failures[trial.status] = self.state.failures.get(trial.status, 0) + 1
        best = _best(self.database, progress.task)
        if search:
            progress.trials += len(trials)
            progress.best.append(best)
        elif progress.best:
            progress.best[-1] = best


def _symbol(schedule: Schedule) -> str:
    return "s_" + hashlib.sha256(repr(schedule).encode()).hexdigest()[:16]


def _trial(schedule: Schedule, found: Outcome, reference: Outcome) -> Trial:
    if found.status != "ok" or not found.times or not reference.times:
        return Trial(schedule, found.status, reason=found.reason)
    return Trial(schedule, "ok", min(found.times), min(reference.times), ratio(found.times, reference.times), len(found.times))


def _best(database: Database, task: Task) -> float:
    found = database.winner(task)
    return found.doubted if found else 1.0


def signature(task: Task, parameters: Sequence[tuple[str, str, int]]) -> tuple[tuple[str, str, int, float, float], ...]:
    """The kernel's parameters with ranges of random values that keep results in range, so that wrong ones show.

    Codes are weights, too: the measuring process keeps them cold.
    """
    return tuple(
        ("weights" if name == "codes" else name, dtype, size, *_range(task, name, dtype)) for name, dtype, size in parameters
    )


def _range(task: Task, name: str, dtype: str) -> tuple[float, float]:
    if dtype in ("uint8", "int8"):
        return (0.0, 256.0) if dtype == "uint8" else (-128.0, 128.0)
    if dtype == "int32":
        return -1000.0, 1000.0
    if name != "scale":
        return (0.5, 1.5) if name == "factor" else (-1.0, 1.0)
    step = next((one.scale for one in task.spec.epilogue if isinstance(one, Quantize)), 1.0)
    spread = step * 40 / (math.sqrt(_depth(task)) * 147 * 74)  # of products of random bytes: 147 x 74, the roots of mean squares
    return 0.5 * spread, 1.5 * spread


def _depth(task: Task) -> int:
    """Products in one accumulator."""
    spec = task.spec
    if isinstance(spec, MatmulSpec | PackedSpec | LoopsSpec):
        return 1 if isinstance(spec, LoopsSpec) else spec.k
    taps = spec.kernel[0] * spec.kernel[1]
    return taps if isinstance(spec, PoolSpec) else taps * spec.in_channels // spec.groups
