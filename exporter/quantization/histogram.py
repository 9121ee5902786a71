"""Values counted in histograms of bounded size, and the ranges that keep most of what they say."""

import math
import threading
from dataclasses import dataclass, field

import numpy as np

BINS = 2048
# Migacz quantizes magnitudes to the 128 that an INT8 has.
ENTROPY_LEVELS = 128
# The steps of a symmetric INT8 grid from 0 to either end.
STEPS = 127

# The smallest float32 is 2**-149, and neighbouring ones differ by 2**-24 of their size: no bin needs to be narrower.
_MIN_EXPONENT = -149
_MAX_BIN = 2**24
# Values counted at a time: they and what is made of them stay in a core's cache.
CHUNK = 2**17
# Where a float32 stays one when it is scaled to bins: those of 0 and below need no care for what is smaller than 1.
_SCALED_IN_FLOAT32 = range(-100, 1)
_MOST_CLIPPED = 0.01
# Divergences this close are equal, up to the rounding of their sums.
_TIE = 1e-9


class NotFinite(ValueError):
    """A value that no histogram counts."""


@dataclass(frozen=True)
class Range:
    """The values of an activation that its integers stand for, `low` to `high`; those beyond are clipped.

    Attributes:
        low: smallest value.
        high: largest value.
        method: what chose them, one of `calibrate.METHODS`; "" for a range from elsewhere. It is no part of equality.
    """

    low: float
    high: float
    method: str = field(default="", compare=False)


@dataclass
class Extremes:
    """The smallest and the largest of values."""

    low: float = math.inf
    high: float = -math.inf
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False, kw_only=True)

    def add(self, values: np.ndarray) -> None:
        """Look at float32 values, on any thread; raises NotFinite."""
        if values.size:
            low, high = float(values.min()), float(values.max())
            with self.lock:
                self.take(low, high)

    def take(self, low: float, high: float) -> bool:
        """Take these for values that are there; whether either is a new extreme. Raises NotFinite."""
        if not (math.isfinite(low) and math.isfinite(high)):  # a minimum and a maximum of NaN are NaN
            raise NotFinite
        wider = low < self.low or high > self.high
        self.low, self.high = min(self.low, low), max(self.high, high)
        return wider

    def minmax(self) -> Range:
        """All the values."""
        return Range(self.low, self.high, "minmax")


@dataclass
class Histogram(Extremes):
    """Counts of values in at most 2,048 bins, whose width is a power of two.

    Bin i of width 2**exponent holds the values of [i, i + 1) * 2**exponent. When values fall outside, neighbouring
    bins are merged in pairs until all fit. Because every bin is then exactly two of the former ones, the counts are
    those of a histogram that had known all the values from the start, in whatever order they came.

    Attributes:
        exponent: of the width.
        first: number of the first bin.
        counts: int64 [bins], of all the values.
        low: smallest value.
        high: largest value.
        zeros: how many of the values are exactly 0, as half of those behind a ReLU are.
        floor: values of a smaller magnitude may be missing in `counts`; see `Tail`.
        near: how many are.
    """

    exponent: int = _MIN_EXPONENT
    first: int = 0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    zeros: int = 0
    floor: float = 0.0
    near: int = 0

    def add(self, values: np.ndarray) -> None:
        """Count float32 values, on any thread; raises NotFinite."""
        if values.size == 0:
            return
        flat = values.reshape(-1)
        low, high = float(flat.min()), float(flat.max())
        with self.lock:
            self.cover(low, high)
            for at in range(0, len(flat), CHUNK):
                chunk = flat[at : at + CHUNK]
                self.zeros += int(np.count_nonzero(chunk == 0))
                self.count(chunk)

    def cover(self, low: float, high: float) -> None:
        """Make room for values from `low` to `high`, and take these for values that are there; raises NotFinite."""
        if self.take(low, high):
            self._cover(self.low, self.high)

    def count(self, values: np.ndarray) -> None:
        """Put float32 values [n] into their bins, which are there; zeros among them have been told."""
        # Scaling by a power of two is exact, in float64 for every float32: none becomes 0.
        exact = values if self.exponent in _SCALED_IN_FLOAT32 else values.astype(np.float64)
        bins = np.floor(exact * exact.dtype.type(2.0**-self.exponent)).astype(np.int64)
        bins -= self.first
        self.counts += np.bincount(bins, minlength=len(self.counts))

    def merge(self, other: "Histogram") -> None:
        """Count what `other` has counted as well; the result is that of one histogram for the values of both."""
        if not len(other.counts):
            return
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self._cover(self.low, self.high)
        bins = (other.first + np.arange(len(other.counts))) >> (self.exponent - other.exponent)
        np.add.at(self.counts, bins - self.first, other.counts)
        self.zeros += other.zeros

    def percentile(self, percentile: float) -> Range:
        """The values between the two bins that end with the given share of all values above, and below, them.

        Args:
            percentile: of the values, 50 to 100, that lie below the upper end, and above the lower end.
        """
        below = np.cumsum(self.counts)
        share = below[-1] * (percentile / 100)
        upper = self.first + int(np.searchsorted(below, share)) + 1
        above = np.cumsum(self.counts[::-1])
        lower = self.first + len(self.counts) - 1 - int(np.searchsorted(above, share))
        return self._within(lower * self.width, upper * self.width, "percentile")

    def entropy(self) -> Range:
        """The values up to the magnitude whose clipped distribution loses least when it is quantized.

        S. Migacz 2017, "8-bit Inference with TensorRT" (GPU Technology Conference, S7310): for each number of bins of
        |x| from 128 up, P is their distribution with all that lies beyond added to the last of them, and Q what is
        left of them after being merged into 128 levels, each spread evenly over its bins that are not empty. The
        number with the least Kullback-Leibler divergence of Q from P wins, the largest of equal ones. Two things are
        added: exact zeros, which every grid represents, are left out; and no more than 1 % of the others may be
        clipped, since values far from 0 (all in 3 to 4, say) diverge least when all of them are. A divergence
        of histograms knows no target: 128 levels of magnitude are INT8's, and the range is used for UINT8 as well.
        """
        counts, width = self._magnitudes()
        sizes = np.arange(ENTROPY_LEVELS, len(counts) + 1)
        total = int(counts.sum())
        if not len(sizes) or not total:
            return self._within(self.low, self.high, "entropy")
        divergence = _divergences(counts, sizes)
        divergence[total - np.cumsum(counts)[sizes - 1] > _MOST_CLIPPED * total] = np.inf
        best = int(np.flatnonzero(divergence <= divergence.min() + _TIE)[-1])
        limit = int(sizes[best]) * width
        return self._within(-limit, limit, "entropy")

    def mse(self) -> Range:
        """The values up to the magnitude whose range has the least mean squared error of quantization.

        Every edge of a bin is tried as the largest magnitude, for both ends at once; the lower end of what a ReLU made
        stays 0. Clipping to an optimal range is R. Banner et al. 2019, "Post training 4-bit quantization of
        convolutional networks for rapid-deployment", section 2, here with the counted distribution in the place of a
        fitted one. The error, and the grid that is assumed, are those of `squared_error`.
        """
        edges = np.abs(np.arange(self.first, self.first + len(self.counts) + 1) * self.width)
        limits = np.unique(edges[(edges > 0) & (edges >= self.floor)])
        errors = self._errors(np.maximum(-limits, min(self.low, 0.0)), np.minimum(limits, max(self.high, 0.0)))
        limit = float(limits[errors.argmin()])
        return self._within(-limit, limit, "mse")

    def squared_error(self, span: Range) -> float:
        """The mean squared error that values make when they are clipped to a range and rounded.

        The grid is that of INT8, 127 steps from 0 to the larger end, for whatever target. Its steps are as wide as
        UINT8's in a symmetric range and twice as wide in a one-sided one, where a range that suits it costs UINT8
        little, and the other way round costs more (benchmarks/calibration.py). Rounding costs a twelfth of the squared
        step (W. Bennett 1948, "Spectra of quantized signals"), except for values that are exactly 0. Every bin's
        values are taken to be in its middle.
        """
        low, high = np.array([min(span.low, 0.0)]), np.array([max(span.high, 0.0)])
        return float(self._errors(low, high)[0]) / self.total

    def clipped_error(self, limit: float) -> float:
        """The part of `squared_error` that clipping to a magnitude alone makes."""
        _, below, _, above = self._beyond(np.array([-limit]), np.array([limit]))
        return float(below[0] + above[0]) / self.total

    @property
    def total(self) -> int:
        """Number of the values, 1 where there are none."""
        return max(int(self.counts.sum()) + self.near, 1)

    @property
    def width(self) -> float:
        """Width of a bin."""
        return 2.0**self.exponent

    def _errors(self, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
        """Sums of squared errors of ranges, given as their lower ends, up to 0, and their upper ends, from 0."""
        below, clipped_below, above, clipped_above = self._beyond(lower, upper)
        inside = self.counts.sum() + self.near - self.zeros - below - above
        errors: np.ndarray = clipped_below + clipped_above + inside * (np.maximum(-lower, upper) / STEPS) ** 2 / 12
        return errors

    def _beyond(self, lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """How many values lie below the lower ends, the sums of their squared distances, and both for the upper."""
        middles = (np.arange(self.first, self.first + len(self.counts)) + 0.5) * self.width
        middles = np.clip(middles, self.low, self.high)
        return *_beyond(-middles[::-1], self.counts[::-1], -lower), *_beyond(middles, self.counts, upper)

    def _magnitudes(self) -> tuple[np.ndarray, float]:
        """Counts of |x| other than 0 in at most 2,048 bins from 0 up, and their width."""
        bins = np.arange(self.first, self.first + len(self.counts))
        # The bin [-i - 1, -i) mirrors [i, i + 1).
        bins = np.where(bins < 0, -bins - 1, bins)
        shift = max(0, int(bins.max()).bit_length() - (BINS - 1).bit_length())
        bins = bins >> shift
        counts = np.bincount(bins, weights=self.counts).astype(np.int64)
        counts[0] -= self.zeros
        return counts, self.width * 2.0**shift

    def _within(self, low: float, high: float, method: str) -> Range:
        return Range(max(self.low, low), min(self.high, high), method)

    def _cover(self, low: float, high: float) -> None:
        """Merge bins until `low` to `high` needs at most 2,048, and lay the counts out from the bin of `low`."""
        exponent = self.exponent
        while True:
            first, last = (math.floor(math.ldexp(value, -exponent)) for value in (low, high))
            if last - first < BINS and max(-first, last) <= _MAX_BIN:
                break
            exponent += 1
        counts = np.zeros(last - first + 1, np.int64)
        former = (self.first + np.arange(len(self.counts))) >> (exponent - self.exponent)
        np.add.at(counts, former - first, self.counts)
        self.exponent, self.first, self.counts = exponent, first, counts


def _beyond(middles: np.ndarray, counts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many of the rising `middles` lie above each of `ends`, and the sum of their squared distances from it."""
    largest = float(middles[-1])
    # Distances from the largest value: small numbers where it matters, at the far end.
    distances = middles - largest
    number, first, second = (np.append(np.cumsum((counts * distances**power)[::-1])[::-1], 0.0) for power in range(3))
    at = np.searchsorted(middles, ends, side="right")
    moved = ends - largest
    squares = second[at] - 2 * moved * first[at] + moved**2 * number[at]
    return number[at], np.maximum(squares, 0.0)


def _divergences(counts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergences of Migacz's Q from P, for the first `sizes` bins of `counts`.

    Sums over bins and levels are differences of running sums: one table of sizes x levels in the place of a loop.
    """
    total = counts.sum()
    mass = np.append(0, np.cumsum(counts))
    used = np.append(0, np.cumsum(counts > 0))
    surprise = np.append(0.0, np.cumsum(_x_log_x(counts)))
    outliers = total - mass[sizes]
    last = counts[sizes - 1]
    # Levels as even as they get: level g of n bins begins at bin g * n / 128.
    bounds = -(-np.arange(ENTROPY_LEVELS + 1) * sizes[:, None] // ENTROPY_LEVELS)
    kept = np.diff(mass[bounds], axis=1).astype(np.float64)
    filled = np.diff(used[bounds], axis=1)
    filled[:, -1] += (outliers > 0) & (last == 0)
    reference = kept.copy()
    reference[:, -1] += outliers
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(kept / filled) - np.log(mass[sizes])[:, None]
        cross = np.where(reference > 0, reference * logs, 0.0).sum(axis=1)
    own = surprise[sizes - 1] + _x_log_x(last + outliers) - total * np.log(total)
    divergences = (own - cross) / total
    return np.where(np.isfinite(divergences), divergences, np.inf)


def _x_log_x(counts: np.ndarray) -> np.ndarray:
    values: np.ndarray = counts * np.log(np.maximum(counts, 1))
    return values
