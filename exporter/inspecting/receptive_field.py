"""Receptive fields: which pixels of the input an output can depend on.

The arithmetic is that of A. Araujo, W. Norris, J. Sim 2019, "Computing Receptive Fields of Convolutional Neural
Networks", Distill, doi:10.23915/distill.00021, written forwards. Along one axis, position i of a tensor sees the input
from `first + i * jump` to `last + i * jump`; the image itself has first = last = 0 and jump = 1. A window of k cells
with dilation d, stride s and p cells of padding in front makes of it (Distill, eqs. 1 to 4)

    first' = first - p * jump        last' = last + (d * (k - 1) - p) * jump        jump' = s * jump

Branches that meet give the union of what they see (Distill, "Arbitrary computation graphs"). A mean over the whole map,
or a matrix over the flattened map, is a window as large as the map. Its result has no position any more (jump 0), and
where it meets a map again (squeeze and excitation) a position sees the union of both: so an axis keeps one interval for
each jump. Nothing is clipped to the image: cells of the padding count, as in the field that papers quote.

A stack of dilated windows skips cells within its field (P. Wang et al. 2018, "Understanding Convolution for Semantic
Segmentation", section 3.2: gridding). Which ones is told in cells of the map where the stack begins, for a few pixels
around each cell are seen by the layers before it: an axis keeps those that a position is computed from, as bits, from
the first dilated window to the next change of the resolution. Without dilation, windows have no holes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import reduce
from math import ceil, floor
from typing import Protocol

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """How the outputs along one axis read their input, in cells of that input.

    Output i reads from `first + i * stride` to `extent` cells behind it; fractions come from resampling.

    Attributes:
        first: cell that output 0 reads first, negative in the padding.
        extent: last cell minus first cell.
        stride: cells between neighbouring outputs.
        slack: what is added to the number of cells before it is divided by the stride (padding minus window).
        ceil: whether a last window that is not full counts.
        step: cells from one that is read to the next: the dilation.
        reach: output 0 reads the whole cells from one of these to the other, and others as much further on as they are;
            None where that is from `first` to `extent` behind it.
        border: what stands beyond the ends: "zeros", which are of no image; "edge", nothing but what is within; or
            "reflect", the cells from the ends back.
    """

    first: Fraction
    extent: Fraction
    stride: Fraction
    slack: Fraction
    ceil: bool = False
    step: int = 1
    reach: tuple[Fraction, Fraction] | None = None
    border: str = "zeros"

    def cells(self, outputs: tuple[int, int], size: int) -> tuple[int, int]:
        """The first and the last of `size` cells that outputs from one to another read; of zeros also beyond them."""
        low, high = self.reach or (self.first, self.first + self.extent)
        first, last = ceil(low + outputs[0] * self.stride), floor(high + outputs[1] * self.stride)
        if self.border == "edge":
            return min(max(first, 0), size - 1), min(max(last, 0), size - 1)
        if self.border == "reflect":
            ends = [_reflected(end, size) for end in (first, last)]
            ends += [end for end in (0, size - 1) if first <= end <= last]
            return min(ends), max(ends)
        return first, last

    def outputs(self, size: int) -> int:
        """Number of outputs for `size` cells; below one where the window does not fit."""
        steps = (size + self.slack) / self.stride
        count = (ceil(steps) if self.ceil else floor(steps)) + 1
        # With rounding up, a window that would start behind the last cell is dropped.
        if self.ceil and self.first + (count - 1) * self.stride >= size:
            count -= 1
        return count


def _reflected(cell: int, size: int) -> int:
    """The cell that a cell beyond the ends repeats."""
    return cell if 0 <= cell < size else -cell if cell < 0 else 2 * (size - 1) - cell


def padded(padding: tuple[int, int], border: str) -> Window:
    """What joins cells with those of a padding; `padding` is (in front, behind) and may be negative."""
    return replace(sliding(1, padding=padding), border=border)


def sliding(
    kernel: int, stride: int = 1, padding: tuple[int, int] = (0, 0), dilation: int = 1, *, ceil_mode: bool = False
) -> Window:
    """The window of a convolution or a pooling; `padding` is (in front, behind), in cells, and may be negative."""
    extent = dilation * (kernel - 1)
    slack = sum(padding) - extent - 1
    return Window(Fraction(-padding[0]), Fraction(extent), Fraction(stride), Fraction(slack), ceil_mode, dilation)


def transposed(kernel: int, stride: int, padding: tuple[int, int], dilation: int, output_padding: int) -> Window:
    """The window of a transposed convolution: output i reads the cells m with m * stride - padding + tap = i."""
    extent = dilation * (kernel - 1)
    outer = extent - sum(padding) + output_padding
    return Window(
        first=Fraction(2 * padding[0] - extent, 2 * stride) - Fraction(extent // stride, 2),
        extent=Fraction(extent // stride),
        stride=Fraction(1, stride),
        slack=Fraction(outer, stride) - 1,
        reach=(Fraction(padding[0] - extent, stride), Fraction(padding[0], stride)),
        border="edge",
    )


_TINY = Fraction(1, 10**6)
# Of a scale in binary digits, which is meant in decimal ones or as a ratio.
_WHOLE = 10**4
_HALF = Fraction(1, 2)
# From which to which distance before and behind a place a whole cell is the nearest, by ONNX's names.
NEAREST: Mapping[str, tuple[Fraction, Fraction]] = {
    "round_prefer_floor": (-_HALF, _HALF - _TINY),
    "round_prefer_ceil": (_TINY - _HALF, _HALF),
    "floor": (_TINY - 1, Fraction(0)),
    "ceil": (Fraction(0), 1 - _TINY),
}


def resampled(
    before: int, after: int, taps: int, place: str = "half_pixel", nearest: str = "floor", scale: float | None = None
) -> Window:
    """The window of an interpolation from `before` to `after` cells.

    Args:
        before: how many there are.
        after: how many there are then.
        taps: cells that an output reads: 1 for the nearest, 2 for linear, 4 for cubic.
        place: of an output among the cells, as ONNX calls it: "half_pixel", "asymmetric" or "align_corners".
        nearest: of `NEAREST`.
        scale: what `before` was multiplied by, where that was said; the product need not be a whole number.
    """
    stride = Fraction(before, after) if scale is None else (1 / Fraction(scale)).limit_denominator(_WHOLE)
    if place == "align_corners":
        stride = Fraction(before - 1, after - 1) if after > 1 and before > 1 else Fraction(1)
    middle = stride / 2 - _HALF if place == "half_pixel" else Fraction(0)
    # Of several cells one as far away as the next place has no weight.
    low, high = NEAREST[nearest] if taps == 1 else (_TINY - taps // 2, taps // 2 - _TINY)
    slack = (after - 1) * stride - before
    first = middle - Fraction(taps - 1, 2)
    reach = (middle + low, middle + high)
    return Window(first, Fraction(taps - 1), stride, slack, reach=reach, border="edge")


def adaptive(before: int, after: int) -> Window:
    """The window of a pooling to `after` cells: exact where they divide `before`, else the largest window."""
    stride = Fraction(before, after)
    largest = max(ceil((i + 1) * stride) - floor(i * stride) for i in range(after))
    return Window(Fraction(0), Fraction(largest - 1), stride, (after - 1) * stride - before)


def sliced(start: int, stop: int, step: int, size: int) -> Window:
    """The window of `[start:stop:step]`, all in range, of `size` cells: a crop keeps its distance from both ends."""
    return Window(Fraction(start), Fraction(0), Fraction(step), Fraction(stop - size - start - 1))


@dataclass(frozen=True)
class Cells:
    """The cells that position 0 is computed from, of the map where a stack of dilated windows begins.

    Attributes:
        first: the first of them; negative in the padding.
        bits: bit b is cell first + b; the lowest is set.
    """

    first: int = 0
    bits: int = 1

    @property
    def extent(self) -> int:
        """From the first to the last."""
        return self.bits.bit_length()

    @property
    def unseen(self) -> int:
        """How many between them are skipped."""
        return self.extent - self.bits.bit_count()

    def through(self, window: Window) -> "Cells":
        """The cells behind a window with a stride of 1."""
        bits = 0
        for tap in range(0, int(window.extent) + 1, window.step):
            bits |= self.bits << tap
        return Cells(self.first + int(window.first), bits)

    def joined(self, other: "Cells") -> "Cells":
        """Those of either."""
        first = min(self.first, other.first)
        return Cells(first, self.bits << self.first - first | other.bits << other.first - first)


@dataclass(frozen=True)
class Field:
    """What one output sees along one axis, in pixels of the input.

    Attributes:
        size: of the field, at the position where it is largest.
        stride: pixels between the fields of neighbouring outputs; None where outputs have no position.
        centre: middle of the field of output 0, in pixel indices (the centre of the first pixel is 0); where every
            output sees the whole image as well, of the part that moves with the output.
        cells: of the map where the dilated windows begin; None where there were none at this resolution.
    """

    size: Fraction
    stride: Fraction | None
    centre: Fraction
    cells: Cells | None = None


@dataclass(frozen=True)
class Axis:
    """The height or the width of the image, as a tensor has it.

    Attributes:
        dim: dimension of the tensor that runs along it; None once that is lost.
        size: number of positions.
        spans: jump -> (first, last) pixel seen by position 0.
        taken: where a flattened map is read as a map still: how many positions the next matrix takes at once.
        cells: as `Field` has them.
    """

    dim: int | None
    size: int
    spans: Mapping[Fraction, tuple[Fraction, Fraction]]
    taken: int | None = None
    cells: Cells | None = None

    def through(self, window: Window) -> "Axis":
        """The axis behind `window`."""
        spans = {
            jump * window.stride: (first + window.first * jump, last + (window.first + window.extent) * jump)
            for jump, (first, last) in self.spans.items()
        }
        return replace(self, size=window.outputs(self.size), spans=spans, cells=self._cells_behind(window))

    def _cells_behind(self, window: Window) -> Cells | None:
        whole = window.first.denominator == window.extent.denominator == 1
        if window.stride != 1 or not whole:
            return None  # another resolution, at which no stack has begun
        begins = window.step > 1 and window.extent > 0
        if self.cells is None and not begins:
            return None
        return (self.cells or Cells()).through(window)

    def collapsed(self) -> "Axis":
        """The axis of a result that all positions took part in."""
        first = min(first for first, _ in self.spans.values())
        last = max(last + (self.size - 1) * jump for jump, (_, last) in self.spans.items())
        return Axis(None, 1, {Fraction(0): (first, last)})

    def field(self) -> Field:
        """What the positions see."""
        sizes = []
        for position in (0, self.size - 1):  # the size is convex in the position: the largest is at an end
            first, last = self.seen(position)
            sizes.append(last - first + 1)
        jump = max(self.spans)
        first, last = self.spans[jump]
        return Field(max(sizes), jump or None, (first + last) / 2, self.cells)

    def seen(self, position: int) -> tuple[Fraction, Fraction]:
        """The first and the last pixel that a position can depend on; in the padding they are none of the image."""
        first = min(first + position * jump for jump, (first, _) in self.spans.items())
        last = max(last + position * jump for jump, (_, last) in self.spans.items())
        return first, last


def image_axis(dim: int, size: int) -> Axis:
    """The axis of the image itself."""
    return Axis(dim, size, {Fraction(1): (Fraction(0), Fraction(0))})


def joined(axes: Sequence[Axis]) -> Axis | None:
    """The axis of what is computed from all of `axes`, position by position; None where they do not match."""
    size = max(axis.size for axis in axes)
    # A single position that meets many is broadcast: all of them see what it sees.
    axes = [axis.collapsed() if axis.size < size else axis for axis in axes] if size > 1 else axes
    placed = [axis for axis in axes if axis.dim is not None or axis.taken is not None]
    if len({(axis.dim, axis.taken, axis.size) for axis in placed}) > 1:
        return None
    spans: dict[Fraction, tuple[Fraction, Fraction]] = {}
    for axis in axes:
        for jump, (first, last) in axis.spans.items():
            known = spans.get(jump, (first, last))
            spans[jump] = (min(first, known[0]), max(last, known[1]))
    begun = [axis.cells for axis in placed if axis.cells is not None]
    cells = None
    if begun:  # a branch without dilation, such as a shortcut, has read the cell itself
        found = [axis.cells or Cells() for axis in placed]
        cells = reduce(Cells.joined, found)
    return replace(placed[0] if placed else axes[0], spans=spans, cells=cells)


class Rule(Protocol):
    """What an operator does to the axis of one of its inputs."""

    def __call__(self, axis: Axis, before: Shape, after: Shape, *, spread: bool) -> Axis | None:
        """The axis of the output.

        Args:
            axis: of the input.
            before: shape of the input at the size that the network was traced at, with the batch.
            after: likewise of the output.
            spread: whether the end of the classifier is read as convolutions: reductions of the whole map are
                windows of its traced size that slide, and a flattened map remains a map.

        Returns:
            None where it is not known what the positions see.
        """


@dataclass(frozen=True)
class Aligned:
    """Position by position; shapes of different ranks are broadcast.

    Attributes:
        mixed: dimension whose positions are not kept apart (those of a concatenation, a split, a softmax).
    """

    mixed: int | None = None

    def __call__(self, axis: Axis, before: Shape, after: Shape, *, spread: bool) -> Axis | None:
        """As `Rule` says."""
        if axis.dim is None:
            return axis
        if self.mixed is not None and axis.dim == self.mixed % len(before):
            return None
        return replace(axis, dim=axis.dim + len(after) - len(before))


@dataclass(frozen=True)
class Windowed:
    """A window along some dimensions."""

    windows: Mapping[int, Window]

    def __call__(self, axis: Axis, before: Shape, after: Shape, *, spread: bool) -> Axis | None:
        """As `Rule` says."""
        window = None if axis.dim is None else self.windows.get(axis.dim)
        return axis if window is None else axis.through(window)


@dataclass(frozen=True)
class Reduced:
    """A mean, sum or maximum over whole dimensions."""

    dims: frozenset[int]
    keep: bool

    def __call__(self, axis: Axis, before: Shape, after: Shape, *, spread: bool) -> Axis | None:
        """As `Rule` says."""
        if axis.dim is None:
            return axis
        if axis.dim not in self.dims:
            return axis if self.keep else replace(axis, dim=axis.dim - sum(dim < axis.dim for dim in self.dims))
        if not spread:
            return axis.collapsed()
        slid = axis.through(sliding(before[axis.dim]))
        return slid if self.keep else replace(slid, dim=None, taken=1)


@dataclass(frozen=True)
class Adaptive:
    """Pooling to a given number of cells."""

    def __call__(self, axis: Axis, before: Shape, after: Shape, *, spread: bool) -> Axis | None:
        """As `Rule` says."""
        if axis.dim is None:
            return axis
        cells, outputs = before[axis.dim], after[axis.dim]
        if outputs == 1:
            return Reduced(frozenset({axis.dim}), keep=True)(axis, before, after, spread=spread)
        if not spread:
            return axis.through(adaptive(cells, outputs))
        stride = cells // outputs
        return axis.through(sliding(cells - (outputs - 1) * stride, stride))


@dataclass(frozen=True)
class Moved:
    """Dimensions that change places; `places[d]` is where dimension d goes, None where it goes away."""

    places: tuple[int | None, ...]

    def __call__(self, axis: Axis, before: Shape, after: Shape, *, spread: bool) -> Axis | None:
        """As `Rule` says."""
        if axis.dim is None:
            return axis
        place = self.places[axis.dim]
        if place is None:
            return axis.collapsed() if axis.size == 1 else None
        return replace(axis, dim=place)


@dataclass(frozen=True)
class Reshaped:
    """The same elements in another shape: a map that stays one, or that is flattened to [batch, features]."""

    def __call__(self, axis: Axis, before: Shape, after: Shape, *, spread: bool) -> Axis | None:
        """As `Rule` says."""
        if axis.dim is None:
            return axis
        behind = len(before) - axis.dim
        if behind < len(after) and after[-behind:] == before[-behind:]:
            return replace(axis, dim=len(after) - behind)
        if before[0] != after[0] or (len(after) != 2 and before[axis.dim] != 1):
            return None
        return replace(axis, dim=None, taken=before[axis.dim]) if spread else axis.collapsed()


@dataclass(frozen=True)
class Multiplied:
    """A matrix times the last dimension."""

    def __call__(self, axis: Axis, before: Shape, after: Shape, *, spread: bool) -> Axis | None:
        """As `Rule` says."""
        if axis.dim is not None:
            return None if axis.dim == len(before) - 1 else axis
        return axis if axis.taken is None else replace(axis.through(sliding(axis.taken)), taken=1)


@dataclass(frozen=True)
class Unknown:
    """Anything else: what the positions see is not known."""

    def __call__(self, axis: Axis, before: Shape, after: Shape, *, spread: bool) -> Axis | None:
        """As `Rule` says."""
        return None
