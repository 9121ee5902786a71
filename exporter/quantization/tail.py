"""What the default method needs of an activation's values, for a fraction of the work of counting all of them.

The error of a clipped range is made of the values beyond it, each by how far, and of the others by their number alone.
No range that is worth choosing clips more than a few percent, so that only the values far from 0 need bins.
"""

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


@dataclass
class Tail:
    """Values counted so far as `Histogram.mse` needs them; it finds the same range in them as in all.

    Attributes:
        far: those of a magnitude from its `floor` up, which the first values decide, and the extremes of all.
        some: a few of all, for where the best range turns out to lie below the floor.
    """

    far: Histogram = field(default_factory=Histogram)
    some: list[np.ndarray] = field(default_factory=list)

    def add(self, values: np.ndarray) -> None:
        """Count float32 values; raises NotFinite."""
        if values.size == 0:
            return
        flat, far = values.reshape(-1), self.far
        if not far.floor:
            far.floor = _floor(flat[:: len(flat) // _LOOKED_AT | 1]) if len(flat) >= _LOOKED_AT else _LEAST
        self.some.append(flat[:: max(1, len(flat) // _KEPT)].copy())
        # Until there is a floor, every value but 0 is counted.
        floor = far.floor or _LEAST
        far.near += len(flat)
        for at in range(0, len(flat), CHUNK):
            chunk = flat[at : at + CHUNK]
            low, high = float(chunk.min()), float(chunk.max())
            far.cover(low, high)
            if low <= 0 <= high:
                far.zeros += int(np.count_nonzero(chunk == 0))
            counted = chunk[(np.abs(chunk) if low < 0 else chunk) >= floor]
            if len(counted):
                far.count(counted)
                far.near -= len(counted)

    def mse(self) -> Range:
        """See `Histogram.mse`."""
        span = self.far.mse()
        # What a range that ends below the floor clips costs more than what one that ends there clips.
        if self.far.squared_error(span) <= self.far.clipped_error(self.far.floor):
            return span
        everywhere = Histogram()
        everywhere.cover(self.far.low, self.far.high)
        everywhere.add(np.concatenate(self.some))
        return everywhere.mse()


def _floor(values: np.ndarray) -> float:
    """The magnitude from which values are counted; 0 where there are none but zeros."""
    magnitudes = np.abs(values[values != 0])
    if not np.isfinite(magnitudes).all() or not len(magnitudes):
        return 0.0
    return min(float(np.quantile(magnitudes, _NEAR)), _MOST_NEAR * float(magnitudes.max()))
