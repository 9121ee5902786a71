"""What the default method needs of an activation's values, for a fraction of the work of counting all of them.

The error of a clipped range is made of the values beyond it, each by how far, and of the others by their number alone.
No range that is worth choosing clips more than a few percent, so that only the values far from 0 need bins.
"""

from dataclasses import dataclass, field

import numpy as np

from convoynet.exporter.quantization.histogram import CHUNK, Histogram, Range

# About this share of the values that are not 0 gets no bin ...
_NEAR = 0.99
# ... and none that is nearer to 0 than this share of the largest: much of an activation may sit at its bound.
_MOST_NEAR = 0.9
# Every so many values are also counted wherever they are. A prime: maps are 7, 14, 28, 56 wide.
_STRIDE = 61


@dataclass
class Tail:
    """Values counted so far as `Histogram.mse` needs them; it finds the same range in them as in all.

    Attributes:
        far: those of a magnitude from its `floor` up, which the first values decide, and the extremes of all.
        sampled: some of all, for where the best range turns out to lie below the floor.
    """

    far: Histogram = field(default_factory=Histogram)
    sampled: Histogram = field(default_factory=Histogram)

    def add(self, values: np.ndarray) -> None:
        """Count float32 values; raises NotFinite."""
        if values.size == 0:
            return
        flat, far = values.reshape(-1), self.far
        low, high = float(flat.min()), float(flat.max())
        far.cover(low, high)
        some = flat[::_STRIDE]
        self.sampled.add(some)
        if not far.floor:
            far.floor = _floor(some, max(-low, high))
        signed = low < 0
        for at in range(0, len(flat), CHUNK):
            chunk = flat[at : at + CHUNK]
            far.zeros += int(np.count_nonzero(chunk == 0))
            counted = chunk[(np.abs(chunk) if signed else chunk) >= far.floor]
            far.near += len(chunk) - len(counted)
            if len(counted):
                far.count(counted)

    def mse(self) -> Range:
        """See `Histogram.mse`."""
        span = self.far.mse()
        # What a range that ends below the floor clips costs more than what one that ends there clips.
        if self.far.squared_error(span) <= self.far.clipped_error(self.far.floor):
            return span
        low, high = self.sampled.mse().low, self.sampled.mse().high
        return Range(max(low, self.far.low), min(high, self.far.high), span.method)


def _floor(values: np.ndarray, largest: float) -> float:
    """The magnitude from which values are counted; 0 where there are none but zeros."""
    magnitudes = np.abs(values[values != 0])
    return min(float(np.quantile(magnitudes, _NEAR)), _MOST_NEAR * largest) if len(magnitudes) else 0.0
