"""SCALE-Sim v3's memory replayed fold by fold: our systolic cycles plus the stalls that its prefetcher makes.

The model of hwopt's targets fetches any block again at its size. SCALE-Sim's prefetcher knows one order only: half a scratchpad
at a time, round and round, so that going back costs a whole round; and it adds each wait twice (read_buffer.service_reads). To
compare cycles with DRAM stalls, and not prefetchers, its rules are followed here, on folds instead of on every cycle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hwopt.target import Workload
from targets._systolic import Systolic, folds_of

SETS = 100  # a buffer is looked up in so many sets


@dataclass
class Reader:
    """One scratchpad: a window of half of it slides over `size` elements in their fixed order."""

    size: int
    half: int
    bandwidth: int
    start: int = 0
    ready: float = 0.0  # when the last prefetch was complete

    def __post_init__(self) -> None:
        self.unit = -(-2 * self.half // SETS)
        self.sets = self.size // self.unit + 1
        self.active = min(-(-self.half // self.unit), self.sets)
        self.ahead = min(-(-self.half // self.unit), self.sets - self.active)

    def wait(self, element: int, now: float) -> float:
        """Cycles that the array waits for an element asked for at `now`."""
        late = 0.0
        for _ in range(4 * SETS * self.sets):
            if (element // self.unit - self.start) % self.sets < self.active:
                break
            self.start = (self.start + self.ahead) % self.sets
            self.ready += self.half / self.bandwidth + 1
            over = self.ready - now - late - 1
            late += 2 * over if over > 0 else over
        return max(late, 0.0)

    def next_border(self, element: int) -> int:
        """The first element behind the window that holds `element`."""
        inside = (element // self.unit - self.start) % self.sets
        return (element // self.unit + self.active - inside) * self.unit


@dataclass(frozen=True)
class Visit:
    """What one fold asks of one operand: elements `first` to `last`, from cycle `begin` to cycle `end` of the fold."""

    reader: Reader
    first: int
    last: int
    begin: float
    end: float


def total_cycles(array: Systolic, work: Workload, bandwidth: int) -> float:
    """Cycles of one group with SCALE-Sim's stalls, its scratchpads being filled before the first cycle."""
    folds, length = _folds(array, work, bandwidth)
    now = 0.0
    for fold in folds:
        late = 0.0
        for visit in fold:
            late += _streamed(visit, now + late)
        now += length + late
    return max(now, _drained(array, work, bandwidth, now))


def _streamed(visit: Visit, now: float) -> float:
    """Stalls of one visit: at its first element, wherever it leaves the window, and at its last."""
    late, at = visit.reader.wait(visit.first, now + visit.begin), visit.first
    if visit.last < visit.first:
        return late + visit.reader.wait(visit.last, now + visit.end + late)
    span = max(visit.last - visit.first, 1)
    while (at := visit.reader.next_border(at)) <= visit.last:
        share = (at - visit.first) / span
        late += visit.reader.wait(at, now + late + visit.begin + share * (visit.end - visit.begin))
    return late


def _folds(array: Systolic, work: Workload, bandwidth: int) -> tuple[Iterator[list[Visit]], int]:
    """The visits of every fold in order, and the cycles of a fold."""
    rows, columns, skew = array.rows, array.columns, array.rows + array.columns - 2
    inputs = Reader(work.m * work.k, array.input_bytes // 2, bandwidth)
    weights = Reader(work.k * work.n, array.weight_bytes // 2, bandwidth)
    if array.dataflow == "os":
        down, across, length = folds_of(work.m, rows), folds_of(work.n, columns), work.k + skew
        order = ((i, j) for j in range(across) for i in range(down))
        return (
            [_stream(inputs, i, down, rows, (0, length)), _stream(weights, j, across, columns, (0, length))] for i, j in order
        ), length
    weight_stays = array.dataflow == "ws"
    kept, moved = (weights, inputs) if weight_stays else (inputs, weights)
    steps, stays = (work.m, work.n) if weight_stays else (work.n, work.m)
    down, across = folds_of(work.k, rows), folds_of(stays, columns)
    order = ((i, j) for j in range(across) for i in range(down))
    return (
        [_kept(kept, j * down + i, down * across, rows), _stream(moved, i, down, rows, (rows, steps + 2 * rows))]
        for i, j in order
    ), rows + steps + skew


def _kept(reader: Reader, block: int, blocks: int, rows: int) -> Visit:
    """A block that stays in the array is loaded from its end."""
    return Visit(reader, (block + 1) * reader.size // blocks - 1, block * reader.size // blocks, 0, rows)


def _stream(reader: Reader, block: int, blocks: int, side: int, when: tuple[int, int]) -> Visit:
    """A block that streams in is skewed: its range in the fixed order reaches into its neighbours'."""
    reach = side * side // 2
    first, last = block * reader.size // blocks - reach, (block + 1) * reader.size // blocks - 1 + reach
    return Visit(reader, max(first, 0), min(last, reader.size - 1), *when)


def _drained(array: Systolic, work: Workload, bandwidth: int, now: float) -> float:
    """When results leave no faster than the port allows: all but what the buffer holds, after its first half."""
    written = work.m * work.n * (1 if array.dataflow == "os" else folds_of(work.k, array.rows))
    rest = written - 3 * array.output_bytes // 2
    return now * (array.output_bytes // 2) / written + rest / bandwidth if rest > 0 else now
