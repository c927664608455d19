"""Value ranges from calibration: streaming histograms, calibrators that read a range off them, and the 8-bit grid of a range.

A histogram has a fixed number of bins on a grid that is anchored at zero and whose bin width is a power of two; when a value
falls outside, the width doubles and neighbours merge. One pass, constant memory, and the result does not depend on the order
or the batching of the data. Exact zeros are counted apart: every 8-bit grid represents them exactly, so that no calibrator
may trade them (after a Relu they are half of all values).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field

import numpy as np

from hwopt.analysis.memo import remembered
from hwopt.backends.ort import Session, observing
from hwopt.errors import DataError
from hwopt.ir import Graph
from hwopt.samples import Samples

BINS = 4096
_FINEST = -165  # 2^-149 is the smallest float32; 4096 bins below it

Range = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Extremes:
    """The least and the largest value, and zero between them."""

    low: float = 0.0
    high: float = 0.0

    def add(self, array: np.ndarray, name: str = "") -> Extremes:
        """With these values seen too. Raises DataError, naming the value, for NaN and infinity."""
        values = np.asarray(array)
        return self.merge(Extremes(*_finite_range(values, name))) if values.size else self

    def merge(self, other: Extremes) -> Extremes:
        """Of both sets of values."""
        return Extremes(min(self.low, other.low), max(self.high, other.high))


def _finite_range(values: np.ndarray, name: str) -> Range:
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DataError("holds NaN or infinity during calibration", place=f"value {name}" if name else "calibration")
    return low, high


@dataclass(frozen=True, eq=False)
class Histogram:
    """`counts[i]` values lie in [(start + i) * width, (start + i + 1) * width), width = 2^exponent; `zeros` come apart."""

    exponent: int = _FINEST
    start: int = 0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    zeros: int = 0
    low: float = 0.0
    high: float = 0.0

    @property
    def width(self) -> float:
        return math.ldexp(1.0, self.exponent)

    @property
    def edges(self) -> np.ndarray:
        """The BINS + 1 bin borders."""
        return (self.start + np.arange(BINS + 1)) * self.width

    def add(self, array: np.ndarray, name: str = "") -> Histogram:
        """With these values counted too. Raises DataError, naming the value, for NaN and infinity."""
        values = np.asarray(array).ravel()
        if not values.size:
            return self
        grown = self._spanning(*_finite_range(values, name))
        counts = grown.counts + np.bincount(_bins(values, grown.exponent) - grown.start, minlength=BINS)
        zeros = values.size - int(np.count_nonzero(values))
        counts[-grown.start] -= zeros
        return Histogram(grown.exponent, grown.start, counts, grown.zeros + zeros, grown.low, grown.high)

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of both sets of values."""
        left, right = self._spanning(other.low, other.high), other._spanning(self.low, self.high)
        return Histogram(left.exponent, left.start, left.counts + right.counts, left.zeros + right.zeros, left.low, left.high)

    def _spanning(self, low: float, high: float) -> Histogram:
        """The same counts on the grid that also holds `low` and `high` (and always zero)."""
        low, high = min(self.low, low), max(self.high, high)
        exponent = _exponent(low, high)
        start = math.floor(math.ldexp(low, -exponent))
        filled = np.flatnonzero(self.counts)
        counts = np.zeros(BINS, np.int64)
        np.add.at(counts, ((self.start + filled) >> min(exponent - self.exponent, 62)) - start, self.counts[filled])
        return Histogram(exponent, start, counts, self.zeros, low, high)


def _exponent(low: float, high: float) -> int:
    """The smallest exponent at which BINS bins of width 2^exponent on zero's grid hold [low, high]; grows with the range."""
    exponent = max(_FINEST, math.frexp(high - low)[1] - BINS.bit_length())
    while math.floor(math.ldexp(high, -exponent)) - math.floor(math.ldexp(low, -exponent)) >= BINS:
        exponent += 1
    return exponent


def _bins(values: np.ndarray, exponent: int) -> np.ndarray:
    """floor(value / 2^exponent), exact: scaling by a power of two does not round."""
    exact_in_single = values.dtype == np.float32 and abs(exponent) < 100
    scaled = values * np.float32(2.0**-exponent) if exact_in_single else np.ldexp(values.astype(np.float64), -exponent)
    return np.floor(scaled).astype(np.intp)


@dataclass(frozen=True, eq=False)
class ChannelMean:
    """The mean of every channel along one axis, streamed."""

    axis: int
    sums: np.ndarray | float = 0.0
    count: int = 0

    @property
    def mean(self) -> np.ndarray:
        """[channels]"""
        return np.atleast_1d(np.asarray(self.sums / max(self.count, 1)))

    def add(self, array: np.ndarray, name: str = "") -> ChannelMean:
        """With these values counted too. Raises DataError, naming the value, for NaN and infinity."""
        axis = self.axis % array.ndim
        if axis == array.ndim - 1:
            rows = array.reshape(-1, array.shape[-1])
            sums = np.ones(len(rows), rows.dtype) @ rows
        else:  # the last axis first: it is contiguous, and numpy sums it pairwise
            inner = array.sum(axis=tuple(range(axis + 1, array.ndim)))
            sums = inner.sum(axis=tuple(range(axis)), dtype=np.float64)
        if not np.isfinite(sums).all():
            raise DataError("holds NaN or infinity during calibration", place=f"value {name}" if name else "calibration")
        return ChannelMean(self.axis, self.sums + sums, self.count + array.size // max(array.shape[axis], 1))


# --- watching a model run ---

RANGE = "range"
# a value, and what is wanted of it: the means of the channels along an axis, its histogram (None), or RANGE, its extremes alone
Probe = tuple[str, int | str | None]
Found = Histogram | ChannelMean | Extremes


@dataclass(frozen=True, eq=False)
class Observations:
    """What probes saw."""

    found: Mapping[Probe, Found]

    def extremes(self, value: str) -> Extremes:
        found = self.found[value, RANGE]
        return found if isinstance(found, Extremes) else Extremes()

    def histogram(self, value: str) -> Histogram:
        found = self.found[value, None]
        return found if isinstance(found, Histogram) else Histogram()

    def mean(self, value: str, axis: int) -> np.ndarray:
        found = self.found[value, axis]
        return found.mean if isinstance(found, ChannelMean) else np.zeros(1)


def observe(batches: Iterable[Mapping[str, np.ndarray]], probes: Iterable[Probe]) -> Observations:
    """Run the probes over all batches (arrays by value name), in constant memory."""
    found: dict[Probe, Found] = {probe: _nothing(probe) for probe in probes}
    for batch in batches:
        found = {probe: one.add(batch[probe[0]], probe[0]) for probe, one in found.items()}
    return Observations(found)


def _nothing(probe: Probe) -> Found:
    _, wanted = probe
    if isinstance(wanted, int):
        return ChannelMean(wanted)
    return Histogram() if wanted is None else Extremes()


def observed(graph: Graph, samples: Samples, probes: Iterable[Probe], others: Iterable[Probe] = ()) -> Observations:
    """Probe inputs and intermediate values over all samples, in one sweep of ONNX Runtime, batch by batch.

    Remembered for the graph and the samples: asked a second time, it runs the probes in `others` in the same sweep. Raises
    DataError for values that are not finite.
    """
    known = _known(graph, samples)
    wanted = tuple(dict.fromkeys(probes))
    missing = [probe for probe in wanted if probe not in known]
    if missing and known:
        missing = [probe for probe in dict.fromkeys((*missing, *others)) if probe not in known]
    if missing:
        order = {value: index for index, value in enumerate((*graph.inputs, *graph.producer))}
        missing.sort(key=lambda probe: order.get(probe[0], -1))  # an error then names the first value that is not finite
        known.update(observe(_batches(graph, samples, missing), missing).found)
    return Observations({probe: known[probe] for probe in wanted})


@remembered
def _known(_graph: Graph, _samples: Samples) -> MutableMapping[Probe, Found]:
    return {}


def _batches(graph: Graph, samples: Samples, probes: Iterable[Probe]) -> Iterator[Mapping[str, np.ndarray]]:
    watched = observing(graph, (value for value, _ in probes))
    session = Session(watched) if watched.outputs else None
    for feeds in samples.feeds(graph):
        yield {**feeds, **(session.run(feeds) if session else {})}


# --- calibrators: histogram -> range ---


def min_max(histogram: Histogram | Extremes) -> Range:
    """Everything that was seen."""
    return histogram.low, histogram.high


def percentile(histogram: Histogram, percent: float = 99.99) -> Range:
    """All but (100 - percent) / 2 % of the values on either side, zeros included (as ONNX Runtime's PercentileCalibrater)."""
    cut = (100.0 - percent) / 200.0
    counts = histogram.counts.astype(np.float64)
    counts[-histogram.start] += histogram.zeros
    cumulative = np.concatenate([[0.0], np.cumsum(counts)])
    if not cumulative[-1]:
        return 0.0, 0.0
    low, high = np.interp([cut, 1.0 - cut], *_filled(cumulative / cumulative[-1], histogram.edges))
    return min(max(float(low), histogram.low), 0.0), max(min(float(high), histogram.high), 0.0)


def _filled(shares: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The borders of bins that are not empty: between others the quantile function jumps."""
    rises = np.diff(shares) > 0
    keep = np.append(rises, False) | np.append(False, rises)
    return shares[keep], edges[keep]


def mean_square(histogram: Histogram, levels: int = 255) -> Range:
    """The range with the least expected squared error: step^2 / 12 inside, the distance to the border outside.

    Searches the bin borders, first one side and then the other until neither moves (Banner et al., "Post-training 4-bit
    quantization of convolution networks", 2019, without assuming a distribution).
    """
    counts, edges = histogram.counts.astype(np.float64), histogram.edges
    centers = edges[:-1] + histogram.width / 2
    upper, lower = edges[-histogram.start :], edges[: -histogram.start + 1]
    above, count_above = _clipped(counts, centers, upper, histogram.width)
    below, count_below = _clipped(counts[::-1], -centers[::-1], -lower[::-1], histogram.width)
    below, count_below = below[::-1], count_below[::-1]
    total, high, low = counts.sum(), len(upper) - 1 if histogram.high > 0 else 0, 0 if histogram.low < 0 else len(lower) - 1
    for _ in range(8):
        before = high, low
        inside = (total - count_above - count_below[low]) * ((upper - lower[low]) / levels) ** 2 / 12
        high = int(np.argmin(above + inside)) if histogram.high > 0 else high
        inside = (total - count_above[high] - count_below) * ((upper[high] - lower) / levels) ** 2 / 12
        low = int(np.argmin(below + inside)) if histogram.low < 0 else low
        if (high, low) == before:
            break
    return (
        max(float(lower[low]), histogram.low) if histogram.low < 0 else 0.0,
        min(float(upper[high]), histogram.high) if histogram.high > 0 else 0.0,
    )


def _clipped(counts: np.ndarray, centers: np.ndarray, borders: np.ndarray, width: float) -> tuple[np.ndarray, np.ndarray]:
    """For each border: the summed squared distance of all values above it, and how many these are."""
    number, first, second = (np.cumsum((counts * centers**power)[::-1])[::-1] for power in (0, 1, 2))
    offset = len(counts) - len(borders) + 1
    number, first, second = (np.append(sums, 0.0)[offset:] for sums in (number, first, second))
    return np.maximum(second - 2 * borders * first + borders**2 * number, 0) + number * width**2 / 12, number


def entropy(histogram: Histogram, levels: int = 255) -> Range:
    """The clipping threshold with the least KL divergence between the clipped and the quantized distribution of |x|.

    S. Migacz, "8-bit inference with TensorRT" (GTC 2017): for every i the reference is the first i bins with all outliers in
    the last one, the candidate is the same bins without outliers merged into the grid's levels and spread again evenly over
    the bins that are not empty. A one-sided value has all levels on its side, a two-sided one half of them.
    """
    one_sided = histogram.low == 0 or histogram.high == 0
    levels = (levels + 1) // (1 if one_sided else 2)
    counts = _folded(histogram)
    if len(counts) <= levels:
        return histogram.low, histogram.high
    sizes = np.arange(levels, len(counts) + 1)
    divergences = _divergences(counts, sizes, levels)
    threshold = float(sizes[int(np.argmin(divergences))]) * histogram.width
    return max(histogram.low, -threshold), min(histogram.high, threshold)


def _folded(histogram: Histogram) -> np.ndarray:
    """Counts of |x| in bins from zero up to the largest value."""
    positive, negative = histogram.counts[-histogram.start :], histogram.counts[: -histogram.start][::-1]
    folded = np.zeros(max(len(positive), len(negative)))
    folded[: len(positive)] += positive
    folded[: len(negative)] += negative
    filled = np.flatnonzero(folded)
    return folded[: filled[-1] + 1] if len(filled) else folded[:0]


def _divergences(counts: np.ndarray, sizes: np.ndarray, levels: int) -> np.ndarray:
    """KL(reference || candidate) for each number of kept bins, from prefix sums; infinity where the candidate misses a bin."""
    total = counts.sum()
    mass, filled, self_information = (np.concatenate([[0.0], np.cumsum(part)]) for part in (counts, counts > 0, _xlogx(counts)))
    result = np.full(len(sizes), np.inf)
    for position, size in enumerate(sizes):
        outliers, last = total - mass[size], counts[size - 1]
        borders = np.arange(levels + 1) * size // levels
        merged = np.diff(mass[borders])
        spread = np.diff(filled[borders])
        spread[-1] += float(last == 0 and outliers > 0)
        reference = merged.copy()
        reference[-1] += outliers
        used = reference > 0
        if (merged[used] == 0).any():
            continue
        logarithm = self_information[size] - _xlogx(last) + _xlogx(last + outliers)
        crossed = (reference[used] * np.log(merged[used] / spread[used])).sum()
        result[position] = (logarithm - crossed) / total + math.log(mass[size] / total)
    return result


def _xlogx(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values * np.log(np.maximum(values, 1e-300)), 0.0)


CALIBRATORS: Mapping[str, Callable[..., Range]] = {
    "minmax": min_max, "percentile": percentile, "mse": mean_square, "entropy": entropy,
}  # fmt: skip


# --- the grid of a range ---


@dataclass(frozen=True)
class Grid:
    """real = (integer - zero_point) * scale, integers of `dtype` (uint8 or int8)."""

    scale: float
    zero_point: int
    dtype: str

    @property
    def bounds(self) -> tuple[int, int]:
        info = np.iinfo(self.dtype)
        return int(info.min), int(info.max)

    def quantize(self, array: np.ndarray) -> np.ndarray:
        """saturate(round_half_even(x / scale) + zero_point), in float32 as ONNX's QuantizeLinear."""
        steps = np.rint(np.asarray(array, np.float32) / np.float32(self.scale))
        return np.clip(steps + self.zero_point, *self.bounds).astype(self.dtype)

    def dequantize(self, integers: np.ndarray) -> np.ndarray:
        return ((integers.astype(np.int32) - self.zero_point) * np.float32(self.scale)).astype(np.float32)


def grid_of(low: float, high: float, dtype: str, *, symmetric: bool = False) -> Grid:
    """The 8-bit grid of a range, widened to hold zero exactly; a range of nothing but zero gets the scale 1."""
    low, high = min(low, 0.0), max(high, 0.0)
    info = np.iinfo(dtype)
    middle = (int(info.min) + int(info.max) + 1) // 2
    if high == low:
        return Grid(1.0, middle if symmetric else int(info.min), dtype)
    tiny = float(np.finfo(np.float32).tiny)
    if symmetric:
        return Grid(float(np.float32(max(max(-low, high) / 127, tiny))), middle, dtype)
    scale = float(np.float32(max((high - low) / 255, tiny)))
    return Grid(scale, int(np.clip(round(-low / scale), 0, 255)) + int(info.min), dtype)
