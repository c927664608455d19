"""Candidates -> object code, in workers that live on: TVM is imported once in each (never tvm.s_tir.tensor_intrin, 30 s)."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as BuildTimeoutError
from dataclasses import dataclass
from typing import Any

from hwopt.backends.tvm.kernels import Schedule
from hwopt.backends.tvm.tune.task import Task
from hwopt.errors import HwoptError, ToolchainError

BUILD_SECONDS = 60.0


@dataclass(frozen=True)
class Built:
    """One candidate's object code and its kernel's parameters (name, dtype, elements); or the reason why there is none."""

    data: bytes = b""
    parameters: tuple[tuple[str, str, int], ...] = ()
    reason: str = ""


def build_candidate(task: Task, schedule: Schedule, symbol: str) -> Built:
    """Runs in a worker."""
    import json
    import math

    from hwopt.backends.tvm import kernels
    from hwopt.backends.tvm.build import description_for, object_code

    try:
        function = kernels.build(task.spec, schedule, task.micro, symbol)
        parameters = tuple((str(one.name), str(one.dtype), math.prod(map(int, one.shape))) for one in function.params)
        description = description_for(function, json.loads(task.tvm))
        return Built(object_code({symbol: function}, description, task.name), parameters)
    except HwoptError as error:
        return Built(reason=str(error))
    except Exception as error:  # a template that cannot do this schedule: the candidate's failure, not ours
        return Built(reason=f"{type(error).__name__}: {error}")


Build = Callable[[Task, Schedule, str], Built]


class Builder:
    """Builds batches on an executor: the caller's, or local processes of our own, which are replaced when they die."""

    def __init__(
        self, workers: int = 1, executor: Executor | None = None, build: Build = build_candidate, timeout: float = BUILD_SECONDS
    ) -> None:
        self.workers, self.build, self.timeout = workers, build, timeout
        self._given, self._own = executor, None if executor else _pool(workers)

    def __enter__(self) -> Builder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._own is not None:
            _end(self._own)

    def start(self, task: Task, schedules: Sequence[Schedule], symbols: Sequence[str]) -> list[Future]:
        return [self._submit(task, one, symbol) for one, symbol in zip(schedules, symbols, strict=True)]

    def finish(self, task: Task, schedules: Sequence[Schedule], symbols: Sequence[str], futures: Sequence[Future]) -> list[Built]:
        """Results in order. What was lost with a worker is built again, by itself."""
        deadline = time.monotonic() + self.timeout
        built = []
        for schedule, symbol, future in zip(schedules, symbols, futures, strict=True):
            found = self._result(future, max(0.1, deadline - time.monotonic()))
            if found is None:
                found = self._result(self._submit(task, schedule, symbol), self.timeout)
            built.append(found or Built(reason="it ends the process that builds it"))
        return built

    def _submit(self, task: Task, schedule: Schedule, symbol: str) -> Future:
        try:
            return (self._given or self._local()).submit(self.build, task, schedule, symbol)
        except BrokenExecutor:
            self._renew()
            return (self._given or self._local()).submit(self.build, task, schedule, symbol)

    def _result(self, future: Future, timeout: float) -> Built | None:
        """None if the worker died."""
        try:
            return future.result(timeout)
        except (BrokenExecutor, CancelledError):
            self._renew()
            return None
        except BuildTimeoutError:
            future.cancel()
            self._renew()
            return Built(reason=f"not built within {self.timeout:g} s")

    def _local(self) -> ProcessPoolExecutor:
        if self._own is None:
            self._own = _pool(self.workers)
        return self._own

    def _renew(self) -> None:
        if self._own is not None:
            _end(self._own)
            self._own = None


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_warm)


def _warm() -> None:
    """Import TVM before the first candidate; leave interrupts to the parent."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from hwopt.backends.tvm import build, kernels  # noqa: F401


def _end(pool: ProcessPoolExecutor) -> None:
    """Stop at once, also what hangs."""
    processes: list[Any] = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        with contextlib.suppress(OSError, ValueError):
            process.kill()


@contextlib.contextmanager
def cluster(address: str) -> Iterator[Executor]:
    """A Dask cluster's workers as an executor; raises ToolchainError where Dask is missing or nobody answers."""
    try:
        from distributed import Client
    except ImportError as error:
        raise ToolchainError("Dask is not installed", place=address, hint="pip install distributed") from error
    try:
        client = Client(address, timeout=10)
    except (OSError, ValueError) as error:
        raise ToolchainError(f"no Dask scheduler answers: {error}", place=address) from error
    with client:
        yield client.get_executor()
