"""Timing models side by side: interleaved, warmed up, median and spread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from hwopt.backends.ort import Session
from hwopt.ir import Graph

ROUNDS = 40  # timed turns of each runner, one after the other
SECONDS_PER_TURN = 0.01
SETTLE_SECONDS = 0.002  # longer than idle worker threads of the runtimes spin
MEDIAN_ERROR, QUARTILES = 1.2533, 1.349  # of normal noise: a median's error over a mean's, quartiles apart over the deviation


@dataclass(frozen=True)
class Timing:
    """Seconds per run over all turns."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    runs: int

    @property
    def spread(self) -> float:
        """Interquartile range in seconds."""
        return self.high - self.low


def interleaved(
    runners: Mapping[str, Callable[[], object]], rounds: int = ROUNDS, settle: float | None = SETTLE_SECONDS
) -> dict[str, Timing]:
    """Time several ways to do the same thing in turns, so that whatever disturbs the machine disturbs all of them.

    With `settle`, every turn begins after that many seconds of rest (other runtimes' threads may still spin) and one untimed run
    (the caches hold the data of others).
    """
    repeats = {name: _repeats(run) for name, run in runners.items()}
    return {name: _timing(values, repeats[name]) for name, values in _turns(runners, repeats, rounds, settle).items()}


def side_by_side(
    runners: Mapping[str, Callable[[], object]], rounds: int = ROUNDS, settle: float | None = SETTLE_SECONDS
) -> dict[str, np.ndarray]:
    """The same as seconds per run of each turn, [rounds]: those at one place were taken one after the other."""
    repeats = {name: _repeats(run) for name, run in runners.items()}
    return {name: np.array(values) for name, values in _turns(runners, repeats, rounds, settle).items()}


def difference(slower: np.ndarray, faster: np.ndarray) -> tuple[float, float]:
    """Median of slower - faster, turn by turn, and its standard error: of normal noise as the quartiles show it, no outliers."""
    low, median, high = np.percentile(slower - faster, (25, 50, 75))
    return float(median), float(MEDIAN_ERROR * (high - low) / QUARTILES / math.sqrt(len(slower)))


def _turns(
    runners: Mapping[str, Callable[[], object]], repeats: Mapping[str, int], rounds: int, settle: float | None
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            if settle is not None:
                time.sleep(settle)
                run()
            seconds[name].append(_turn(run, repeats[name]))
    return seconds


def _repeats(run: Callable[[], object]) -> int:
    """Warm up, and find how many runs fill one turn."""
    run()
    once = min(_turn(run, 1) for _ in range(3))
    return max(1, int(SECONDS_PER_TURN / max(once, 1e-9)))


def _turn(run: Callable[[], object], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - started) / repeats


def _timing(values: list[float], repeats: int) -> Timing:
    low, median, high = np.percentile(values, (25, 50, 75))
    return Timing(float(median), float(low), float(high), len(values) * repeats)


def onnxruntime_runner(graph: Graph, feeds: Mapping[str, np.ndarray], threads: int) -> Callable[[], object]:
    """ONNX Runtime with all its optimizations on the same graph and the same inputs."""
    session = Session(graph, threads=threads, optimize=True)
    return lambda: session.run(feeds)
