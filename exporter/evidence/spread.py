"""How much of what outputs say survives: the error of an exported model against the spread of PyTorch's outputs.

An output says something by how it varies from image to image. A cosine or a share of the largest value does not see
that: beside a large offset the same answer for every image is close to all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from convoynet.exporter.evidence.limits import FEWEST_IMAGES, INT8, Kind

if TYPE_CHECKING:
    from convoynet.exporter.archs import Task
    from convoynet.exporter.running.runtime import Array

# A spread below this share of an output's size is float32's rounding: the output is a constant.
_ROUNDING = 2e-6
# Up to here every output is looked at; of more, those that vary at least by _USUAL of the usual spread: a class that
# hardly ever moves decides nothing.
_FEW_OUTPUTS, _USUAL = 32, 0.25
# A sound output keeps more of its spread than this, and a constant moves less than this share of its size.
_DEAD, _STILL = 0.25, 0.01
_UNIT = 1e-3
_NAMED = 5


@dataclass(frozen=True)
class OutputError:
    """One output, by its place in the row or its channel: RMS error as a share of its spread, and what is wrong."""

    output: int
    error: float
    what: str


@dataclass(frozen=True)
class Spread:
    """The error of an exported model against how PyTorch's outputs vary over the images.

    Attributes:
        kind: what the outputs mean.
        images: number of distinct images.
        outputs: elements of a row, or channels of a map.
        varying: how many of them vary in PyTorch.
        error: RMS error of all outputs together as a share of their spread (standard deviation); None where none
            varies.
        worst: the output with the largest error as a share of its own spread, among those that are judged alone.
        faults: outputs that are dead, shifted or no longer constant; the first five.
        faulty: how many there are.
        quiet: dead outputs that vary too little beside the others to be judged.
        untrained: whether the limits are those for random weights.
    """

    kind: Kind
    images: int
    outputs: int
    varying: int
    error: float | None
    worst: OutputError | None = None
    faults: tuple[OutputError, ...] = ()
    faulty: int = 0
    quiet: tuple[int, ...] = ()
    untrained: bool = False

    @property
    def decibels(self) -> float | None:
        """The signal-to-noise ratio of the centred outputs; None where none varies or there is no error."""
        return float(-20 * np.log10(self.error)) if self.error else None

    @property
    def line(self) -> str:
        """The figure for people."""
        if self.error is None:
            return f"no output varies over {self.images} images" if self.images > 1 else "one image shows no spread"
        return f"error {self.error:.3g} of the outputs' spread over {self.images} images"

    def named(self) -> str:
        """The outputs that are at fault, for a line; empty where there are none."""
        if 2 * self.faulty > self.outputs:
            several = f"{self.faulty} of {self.outputs} outputs are at fault: the first" if self.outputs > 1 else "it"
            return f"{several} {self.faults[0].what}"
        told = "; ".join(f"output {fault.output} {fault.what}" for fault in self.faults)
        return told + (f"; and {self.faulty - len(self.faults)} more" if self.faulty > len(self.faults) else "")


def kind_of(task: Task, told: Kind | None, rows: Array) -> Kind:
    """What outputs [n, ...] mean: as told, or where nothing is told as they look."""
    if task != "classification":
        return task
    values = rows.reshape(len(rows), -1)
    if values.shape[1] == 1:
        return told if told in ("labels", "regression") else "one value"
    if told is not None:
        return told
    if len(rows) > 1 and bool((np.abs(np.linalg.norm(values, axis=1) - 1) < _UNIT).all()):
        return "embedding"
    within = bool((values >= 0).all() and (values <= 1).all() and values.any())
    sums = values.sum(axis=1)
    return "labels" if within and not bool((np.abs(sums - 1) < _UNIT).all()) else "values"


class SpreadTally:
    """Adds up, row by row, what it takes to know the spread and the error of each output.

    Args:
        reference: PyTorch's outputs, [n, outputs] or [n, channels, h, w].
    """

    def __init__(self, reference: Array) -> None:
        others = (0, *range(2, reference.ndim))
        # Near the mean the squares do not cancel.
        self._centre = reference.mean(axis=others, dtype=np.float64)
        self._size = np.abs(reference).max(axis=others).astype(np.float64)
        self._images = len(reference)
        self._count = 0
        self._sums = np.zeros((5, len(self._centre)))

    def add(self, expected: Array, found: Array) -> None:
        """Take float64 [m, outputs] of both sides."""
        value, error = expected - self._centre, found - expected
        self._count += len(value)
        products = (value, value * value, error, error * error, value * error)
        self._sums += [product.sum(axis=0) for product in products]

    def result(self, kind: Kind, images: int) -> Spread:
        """What came of it, for this kind of outputs and number of distinct images."""
        value, squares, error, noise, product = self._sums / max(self._count, 1)
        variance = np.maximum(squares - value**2, 0)
        found = np.maximum(variance + 2 * (product - value * error) + noise - error**2, 0)
        varies = np.sqrt(variance) > np.maximum(_ROUNDING * self._size, np.finfo(np.float64).tiny)
        if images < 2 and kind != "segmentation":
            varies = np.zeros_like(varies)
        if not varies.any():
            # Of one image it cannot be said that an output is a constant.
            moved = (
                _moved_constants(noise, np.full_like(self._size, self._size.max()), varies, 0.0) if images > 1 else []
            )
            return Spread(kind, images, len(variance), 0, None, faults=tuple(moved[:_NAMED]), faulty=len(moved))
        total = float(np.sqrt(noise[varies].sum() / variance[varies].sum()))
        known = Spread(kind, images, len(variance), int(varies.sum()), total)
        if images < FEWEST_IMAGES or kind == "embedding":
            return known
        with np.errstate(invalid="ignore", divide="ignore"):
            each = np.where(varies, np.sqrt(noise / variance), 0)
            kept = np.where(varies, np.sqrt(found / variance), 1)
            shift = np.where(varies, error / np.sqrt(variance), 0)
        usual = float(np.sqrt(variance[varies].mean()))
        alone = varies & (_strict(kind, len(variance)) | (np.sqrt(variance) >= _USUAL * usual))
        worst = int(np.argmax(np.where(alone, each, -1)))
        limit = INT8[kind].each
        faults = [
            OutputError(int(index), _finite(each[index]), _words(kept[index], shift[index], each[index]))
            for index in np.flatnonzero(alone & _at_fault(kept, shift, each, limit))
        ]
        faults += _moved_constants(noise, self._size, varies, usual)
        quiet = np.flatnonzero(varies & ~alone & (kept < _DEAD))
        return replace(
            known,
            worst=OutputError(worst, _finite(each[worst]), ""),
            faults=tuple(faults[:_NAMED]),
            faulty=len(faults),
            quiet=tuple(int(index) for index in quiet[:_NAMED]),
        )


def _strict(kind: Kind, outputs: int) -> bool:
    """Whether every output counts, however little it varies beside the others."""
    return kind in ("regression", "labels") or (
        kind not in ("classification", "segmentation") and outputs <= _FEW_OUTPUTS
    )


def _at_fault(kept: Array, shift: Array, each: Array, limit: float | None) -> Array:
    dead: Array = kept < _DEAD
    if limit is None:  # the noise of one class among many decides little, being dead or elsewhere does
        return dead | ~(np.abs(shift) <= 1)
    return dead | ~(each <= limit)


def _moved_constants(noise: Array, size: Array, varies: Array, usual: float) -> list[OutputError]:
    """Outputs that PyTorch gives the same for every image, and the exported model something else."""
    moved = ~varies & ~(np.sqrt(noise) <= np.maximum(_STILL * size, usual / 4))
    return [
        OutputError(int(index), 0.0, f"is a constant in the original and off by {np.sqrt(noise[index]):.2g}")
        for index in np.flatnonzero(moved)
    ]


def _words(kept: float, shift: float, error: float) -> str:
    if not np.isfinite(error):
        return "is not a number"
    if kept < _DEAD:
        return f"says nearly the same for every image ({kept:.2f} of its spread is left)"
    if abs(shift) > 0.7 * error:
        return f"is shifted by {shift:+.2f} of its spread"
    if kept > 1.5:
        return f"varies {kept:.1f} times as much as it should"
    return f"has an error of {error:.2f} of its spread"


def _finite(value: float) -> float:
    """A number that JSON has."""
    return float(np.nan_to_num(value, nan=1e30, posinf=1e30))
