"""Which parts of a picture are hidden, and what the answers to all of them say of each pixel."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Map = NDArray[np.float32]
Size = tuple[int, int]


class Masks(Protocol):
    """Masks of one method, and what became of the score under those that were answered.

    Attributes:
        count: how many there are.
    """

    count: int

    def lowest(self) -> float:
        """What evidence is drawn as none."""
        ...

    def mask(self, index: int) -> Map:
        """[height, width]: 1 where the picture is kept, 0 where it is hidden."""
        ...

    def add(self, index: int, score: float) -> None:
        """Note the score of the picture under a mask."""
        ...

    def evidence(self) -> Map:
        """[height, width] of the masks that were added; NaN where none of them says anything."""
        ...


class Rise:
    """RISE (Petsiuk, Das, Saenko 2018, section 3): random masks, weighed by the score that each of them leaves.

    Each cell of a grid is kept with the same probability. The grid, enlarged bilinearly to one cell more than the
    picture, is shifted by less than a cell. A mask is drawn when it is needed, from the seed and its number: none is
    kept, and a run of fewer has the first of a longer one.

    Args:
        size: (height, width) of the picture.
        count: masks.
        grid: cells along each side.
        keep: the probability p.
        seed: of the masks.
    """

    def __init__(self, size: Size, count: int, grid: int, keep: float, seed: int) -> None:
        self.count, self._size, self._grid, self._keep, self._seed = count, size, grid, keep, seed
        self._cell = [math.ceil(side / grid) for side in size]
        self._rows, self._columns = (_enlarged(grid, (grid + 1) * pixels) for pixels in self._cell)
        self._total, self._added = np.zeros(size), 0

    def mask(self, index: int) -> Map:
        """As `Masks` has it."""
        cells, top, left = self.drawn(index)
        height, width = self._size
        mask = self._rows[top : top + height] @ cells @ self._columns[left : left + width].T
        return mask.astype(np.float32, copy=False)

    def drawn(self, index: int) -> tuple[Map, int, int]:
        """The grid of a mask, 1 where a cell is kept, and how far up and left it is shifted."""
        random = np.random.default_rng([self._seed, index])
        cells = (random.random((self._grid, self._grid)) < self._keep).astype(np.float32)
        top, left = (int(pixels) for pixels in random.integers(0, self._cell))
        return cells, top, left

    def add(self, index: int, score: float) -> None:
        """As `Masks` has it."""
        self._total += score * self.mask(index)
        self._added += 1

    def lowest(self) -> float:
        """As `Masks` has it: that of the mean pixel, since only differences between pixels mean something."""
        return float(self.evidence().mean())

    def evidence(self) -> Map:
        """The mean of the masks, each times its score, divided by p."""
        return (self._total / (self._keep * max(self._added, 1))).astype(np.float32)


class Occlusion:
    """Occlusion (Zeiler and Fergus 2014, section 4.2): how far the score falls behind a square that hides a part.

    A pixel's evidence is the mean fall behind the squares that cover it. The squares come in a random order, so that
    those of a run that is cut short lie everywhere.

    Args:
        size: (height, width) of the picture.
        window: side of the square, in pixels; one beyond the edge is cut off there.
        stride: pixels from one square to the next.
        seed: of the order.
        whole: score of the whole picture.
    """

    def __init__(self, size: Size, window: int, stride: int, seed: int, whole: float) -> None:
        self._size, self._window, self._whole = size, window, whole
        tops, lefts = (_starts(side, window, stride) for side in size)
        self._corners = [(top, left) for top in tops for left in lefts]
        self.count = len(self._corners)
        self._order = np.random.default_rng(seed).permutation(self.count)
        self._fall, self._covered = np.zeros(size), np.zeros(size)

    def mask(self, index: int) -> Map:
        """As `Masks` has it."""
        mask = np.ones(self._size, np.float32)
        mask[self._square(index)] = 0
        return mask

    def add(self, index: int, score: float) -> None:
        """As `Masks` has it."""
        self._fall[self._square(index)] += self._whole - score
        self._covered[self._square(index)] += 1

    def lowest(self) -> float:
        """As `Masks` has it: no fall. Where the score rises, the part spoke against it."""
        return 0.0

    def evidence(self) -> Map:
        """The mean fall; NaN where no square was answered that covers the pixel."""
        known = self._covered > 0
        return np.where(known, self._fall / np.maximum(self._covered, 1), np.nan).astype(np.float32)

    def _square(self, index: int) -> tuple[slice, slice]:
        top, left = self._corners[self._order[index]]
        return slice(top, top + self._window), slice(left, left + self._window)


class ScoreCam:
    """Score-CAM (H. Wang et al. 2020, section 3.2): each channel of a map of features is a mask.

    A channel is enlarged to the picture bilinearly and stretched to 0 to 1. The evidence is the sum of the enlarged
    channels, each weighed by the softmax, over the channels, of the score that it leaves, as far as it is above zero.
    The score of a baseline, which the paper takes off, is the same for all channels and nothing in the softmax. A
    channel that is the same everywhere hides nothing: it is left out.

    Args:
        size: (height, width) of the picture.
        maps: [channels, height, width] of the picture's features, finite.
    """

    def __init__(self, size: Size, maps: NDArray[np.floating]) -> None:
        maps = maps.astype(np.float32)
        self._maps = maps[np.ptp(maps, axis=(1, 2)) > 0]
        self.count = len(self._maps)
        self._size = size
        self._rows, self._columns = (_enlarged(cells, side) for cells, side in zip(maps.shape[1:], size, strict=True))
        self._scores: list[float] = []

    def mask(self, index: int) -> Map:
        """As `Masks` has it."""
        channel = self._large(self._maps[index])
        low, high = channel.min(), channel.max()
        # A peak that is left of where pixels are looked at may be enlarged to none.
        return (channel - low) / (high - low) if high > low else np.ones(self._size, np.float32)

    def add(self, index: int, score: float) -> None:
        """As `Masks` has it."""
        assert index == len(self._scores)
        self._scores.append(score)

    def lowest(self) -> float:
        """As `Masks` has it."""
        return 0.0

    def evidence(self) -> Map:
        """The weighed sum of the channels that were added, as far as it is above zero."""
        if not self._scores:
            return np.full(self._size, np.nan, np.float32)
        shares = np.exp(np.array(self._scores) - max(self._scores))
        total = np.tensordot(shares / shares.sum(), self._maps[: len(shares)], axes=1)
        return self._large(total.astype(np.float32)).clip(0)

    def _large(self, channel: Map) -> Map:
        return (self._rows @ channel @ self._columns.T).astype(np.float32, copy=False)


def squares(size: Size, window: int, stride: int) -> int:
    """How many squares an occlusion has."""
    return math.prod(len(_starts(side, window, stride)) for side in size)


def _starts(side: int, window: int, stride: int) -> range:
    return range(0, max(side - window, 0) + stride, stride)


def _enlarged(cells: int, pixels: int) -> Map:
    """[pixels, cells]: how much of each cell is in each pixel, bilinearly between the centres of cells."""
    centres = np.clip((np.arange(pixels) + 0.5) * cells / pixels - 0.5, 0, cells - 1)
    shares: Map = np.maximum(1 - np.abs(centres[:, None] - np.arange(cells)), 0).astype(np.float32)
    return shares
