"""What the default method needs of an activation's values, for a fraction of the work of counting all of them.

The error of a clipped range is made of the values beyond it, each by how far, and of the others by their number alone.
No range that is worth choosing clips more than a few percent, so that only the values far from 0 need bins.
"""

import threading
from dataclasses import dataclass, field

import numpy as np

from convoynet.exporter.quantization.histogram import CHUNK, Histogram, Range

# About this share of the values that are not 0 gets no bin ...
_NEAR = 0.997
# ... and none that is nearer to 0 than this share of the largest: much of an activation may sit at its bound.
_MOST_NEAR = 0.9
# So many of the first values say where that is; where there are fewer, all are soon counted.
_LOOKED_AT = 2**14
# So many of each portion are kept wherever they are.
_KEPT = 64
_LEAST = float(np.finfo(np.float32).smallest_subnormal)
# Values that NumPy looks at in one call. Threads take turns in Python: only long calls let the others have theirs.
_PIECE = 2**20
_EIGHT = 8


class _Masks(threading.local):
    """Room for what is true of the values of a piece, once for each thread: new memory costs more than the answer."""

    def __init__(self) -> None:
        self.one, self.other = np.empty(_PIECE, np.bool_), np.empty(_PIECE, np.bool_)


_MASKS = _Masks()


@dataclass
class Tail:
    """Values counted so far as `Histogram.mse` needs them; it finds the same range in them as in all.

    Attributes:
        far: those of a magnitude from its `floor` up, which the first values decide, and the extremes of all.
        some: a few of all, for where the best range turns out to lie below the floor.
    """

    far: Histogram = field(default_factory=Histogram)
    some: list[np.ndarray] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, values: np.ndarray) -> None:
        """Count float32 values, on any thread; raises NotFinite."""
        if values.size == 0:
            return
        flat, far = values.reshape(-1).astype(np.float32, copy=False), self.far
        with self.lock:
            if not far.floor:
                far.floor = _floor(flat[:: len(flat) // _LOOKED_AT | 1]) if len(flat) >= _LOOKED_AT else _LEAST
            self.some.append(flat[_places(len(flat))])
            # Until there is a floor, every value but 0 is counted.
            floor = np.float32(far.floor or _LEAST)
        for at in range(0, len(flat), _PIECE):
            self._count(flat[at : at + _PIECE], floor)

    def mse(self) -> Range:
        """See `Histogram.mse`."""
        span = self.far.mse()
        # What a range that ends below the floor clips costs more than what one that ends there clips.
        if self.far.squared_error(span) <= self.far.clipped_error(self.far.floor):
            return span
        return self._everywhere().mse()

    def _everywhere(self) -> Histogram:
        """All values: those from the floor up as they were counted, the others as a few of them stand for them."""
        made, near = Histogram(), Histogram()
        made.merge(self.far)
        few = np.concatenate(self.some)
        few = few[np.abs(few) < self.far.floor]
        if len(few):
            near.cover(self.far.low, self.far.high)
            near.add(few)
            near.counts *= round(self.far.near / len(few))
            near.zeros = 0  # of which all are known
            made.merge(near)
        return made

    def _count(self, values: np.ndarray, floor: np.float32) -> None:
        """Count values, and look at all of them no more often than it takes.

        Several threads look at once, and take turns only with what they found: what others add meanwhile makes the
        range wider, and what a narrower one says of these values stays true.
        """
        far = self.far
        with self.lock:
            low, high = far.low, far.high
        # Beyond an extreme that is as far from 0 as the floor, or is 0, there is nothing but what is found below.
        least = low if low == 0 or low <= -floor else float(values.min())
        most = high if high >= floor else float(values.max())
        with self.lock:
            far.cover(least, most)
        low, high = min(low, least), max(high, most)
        positive = low >= 0
        found = _where(values, _beyond(values, floor, low, high))
        if len(found):
            least, most = float(found.min()), float(found.max())
            low, high = min(low, least), max(high, most)
        zeros = 0
        if low <= 0 <= high:
            zeros = _zeros_of_positive(values, found) if positive else _zeros(values)
        counted = found[np.abs(found) >= floor] if positive else found
        with self.lock:
            far.cover(least, most)
            far.zeros += zeros
            far.near += len(values) - len(counted)
            for at in range(0, len(counted), CHUNK):
                far.count(counted[at : at + CHUNK])


def _beyond(values: np.ndarray, floor: np.float32, low: float, high: float) -> np.ndarray:
    """Where values have a magnitude from `floor` up; where what is below `low` or above `high`, or NaN, may be.

    A `low` or `high` nearer to 0 than the floor, but for a `low` of 0, is known to bound them, and none to be NaN.
    """
    beyond, above = _MASKS.one[: len(values)], _MASKS.other[: len(values)]
    if low >= 0:
        # The bits of float32 rise with the positive values, and are larger still for the others.
        np.greater_equal(values.view(np.uint32), floor.view(np.uint32), out=beyond)
    elif low > -floor:
        np.greater_equal(values, floor, out=beyond)
    elif high < floor:
        np.less_equal(values, -floor, out=beyond)
    else:
        np.less(values, floor, out=beyond)
        np.logical_and(beyond, np.greater(values, -floor, out=above), out=beyond)
        np.logical_not(beyond, out=beyond)
    return beyond


def _where(values: np.ndarray, beyond: np.ndarray) -> np.ndarray:
    """The values where `beyond` is true, in their order; where that is few, in less time than `values[beyond]`.

    Eight truths at a time are a number, which is 0 nearly everywhere.
    """
    whole = len(values) // _EIGHT * _EIGHT
    truths = beyond[:whole].view(np.uint64)
    eights = np.flatnonzero(np.not_equal(truths, 0, out=_MASKS.other[: len(truths)]))
    some = values[:whole].reshape(-1, _EIGHT).take(eights, axis=0).reshape(-1)[truths.take(eights).view(np.bool_)]
    return np.concatenate([some, values[whole:][beyond[whole:]]])


def _zeros_of_positive(values: np.ndarray, found: np.ndarray) -> int:
    """How many of the values are 0, of which -0.0 is among those found."""
    return int(len(values) - np.count_nonzero(values.view(np.uint32)) + np.count_nonzero(found == 0))


def _zeros(values: np.ndarray) -> int:
    return int(np.count_nonzero(np.equal(values, np.float32(0), out=_MASKS.one[: len(values)])))


def _places(count: int) -> np.ndarray:
    """Where a few of so many values stand: anywhere, as every n-th may be the same pixel of each image."""
    return np.arange(count) if count <= _KEPT else np.random.default_rng(count).integers(0, count, _KEPT)


def _floor(values: np.ndarray) -> float:
    """The magnitude from which values are counted; 0 where there are none but zeros."""
    magnitudes = np.abs(values[values != 0])
    if not np.isfinite(magnitudes).all() or not len(magnitudes):
        return 0.0
    return min(float(np.quantile(magnitudes, _NEAR)), _MOST_NEAR * float(magnitudes.max()))
