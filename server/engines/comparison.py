"""Whether two answers to the same batch are the same, as far as the precision of a network allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from convoynet.server.engines.onnx_file import OnnxFile
from convoynet.server.types import Tensor

Answer = Mapping[str, Tensor]
Flags = NDArray[np.bool_]
Sizes = NDArray[np.float64]

_LOOSE_ERROR = 0.1
"""How far a row may be off then, relative to all of it."""
_UNSTABLE = 0.01
"""What moves by more than this part of the largest number, when its input hardly does, was decided by chance."""


@dataclass(frozen=True)
class Tolerance:
    """How far two answers may be apart.

    Attributes:
        relative: To the number itself.
        scale: To the largest number of its row.
        loose: Whether rounding decides: a network of integers, or one that is told to compute in fewer bits.
        choices: The part of an output of whole numbers that may be others: where the best two classes of a pixel are
            alike, the last bit of a sum decides.
        order: The part of an output of any numbers that may be others, where they are sorted.
    """

    relative: float = 1e-3
    scale: float = 3e-5
    loose: bool = False
    choices: float = 0.0
    order: float = 0.0


def tolerance_of(read: OnnxFile, precision: str) -> Tolerance:
    """How far engines may be apart on a network, by what it computes with.

    Args:
        read: What its file says.
        precision: What its float layers are to be computed in.
    """
    if not read.operators:  # nothing is known of it
        return LOOSE
    sums, sorts = not read.operators.isdisjoint(_SUMS), not read.operators.isdisjoint(_SORTS)
    tolerance = Tolerance(choices=0.002 if sums else 0.0, order=0.05 if sums and sorts else 0.0)
    if read.is_quantized or precision != "f32":
        return replace(tolerance, loose=True, choices=0.1)
    return replace(tolerance, relative=1e-2, scale=1e-2) if read.is_half else tolerance


_SUMS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN"})
"""What adds up many products, in an order that every engine chooses for itself."""
_SORTS = frozenset({"TopK", "NonMaxSuppression"})
LOOSE = Tolerance(loose=True, choices=0.1)


@dataclass(frozen=True)
class Expected:
    """What the reference answered.

    Attributes:
        answer: To a probe.
        moved: How far each number moved when the input did not, or hardly did. Whole numbers that changed are `inf`.
        overflows: Whether infinities among the numbers follow from nothing but their size.
    """

    answer: Answer
    moved: Mapping[str, Sizes]
    overflows: bool = False

    def row(self, index: int) -> Expected:
        """One row of it."""
        part = slice(index, index + 1)
        moved = {name: of[part] for name, of in self.moved.items()}
        return replace(self, answer={name: of[part] for name, of in self.answer.items()}, moved=moved)

    def stable(self, name: str) -> Flags:
        """Where an output can be compared."""
        values = self.answer[name]
        return np.asarray(self.moved[name] <= (_UNSTABLE * _scale(values) if values.dtype.kind == "f" else 0))


def expected(answer: Answer, others: Sequence[Answer], *, overflows: bool = False) -> Expected:
    """What is expected, from an answer and those to the same or nearly the same input."""
    moved: dict[str, Sizes] = {}
    for name, values in answer.items():
        moved[name] = np.zeros(values.shape)
        for other in others:
            moved[name] = np.maximum(moved[name], _apart(values, other[name]))
    return Expected(answer, moved, overflows)


def difference(want: Expected, have: Answer, tolerance: Tolerance, *, batched: bool) -> str:
    """Where an answer differs from what was expected, in words; "" where it does not."""
    for name, values in want.answer.items():
        mine = have[name]
        if mine.shape != values.shape:
            return f"output '{name}' has the shape {list(mine.shape)}, and not {list(values.shape)}"
        stable, allowed = want.stable(name), tolerance.order
        if values.dtype.kind != "f":
            wrong, allowed = (mine != values) & stable, max(tolerance.choices, tolerance.order)
        else:
            wrong = ~_same_kind(values, mine, want.overflows) & stable
            finite = stable & np.isfinite(values) & np.isfinite(mine)
            wrong |= _wrong(values, mine, want.moved[name], finite, tolerance, batched)
        if values.size and wrong.mean() > allowed:
            return _first(name, mine, values, wrong)
    return ""


def _wrong(a: Tensor, b: Tensor, moved: Sizes, judged: Flags, tolerance: Tolerance, batched: bool) -> Flags:
    """Where finite numbers are too far apart."""
    with np.errstate(all="ignore"):
        wide = np.where(judged, a, 0).astype(np.float64)
        apart = np.abs(wide - np.where(judged, b, 0))
        axes = tuple(range(1 if batched else 0, a.ndim))
        if tolerance.loose:
            size = np.sqrt(np.square(wide).sum(axis=axes, keepdims=True))
            off = np.sqrt(np.square(apart).sum(axis=axes, keepdims=True))
            return np.broadcast_to(off > _LOOSE_ERROR * size + 1e-6, a.shape) & judged & (apart > 0)
        largest = np.abs(wide).max(axis=axes, keepdims=True, initial=0)
        allowed = tolerance.relative * np.abs(wide) + tolerance.scale * largest + 10 * moved
        return np.asarray((apart > allowed) & judged)


def _same_kind(a: Tensor, b: Tensor, overflows: bool) -> Flags:
    """Where both are finite, both NaN, or the same infinity."""
    finite = np.isfinite(a)
    if overflows:
        return np.asarray(~finite | np.isfinite(b))
    return np.where(finite, np.isfinite(b), (np.isnan(a) & np.isnan(b)) | (a == b))


def _apart(a: Tensor, b: Tensor) -> Sizes:
    if a.shape != b.shape:
        return np.full(a.shape, np.inf)
    if a.dtype.kind != "f":
        return np.where(a == b, 0, np.inf)
    with np.errstate(all="ignore"):
        apart = np.abs(a.astype(np.float64) - b.astype(np.float64))
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    return np.where(same, 0, np.where(np.isfinite(a) & np.isfinite(b), apart, np.inf))


def _scale(values: Tensor) -> float:
    finite = values[np.isfinite(values)]
    return float(np.abs(finite).max(initial=0))


def _first(name: str, mine: Tensor, wanted: Tensor, wrong: Flags) -> str:
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    return f"output '{name}' is {mine[at]} at {list(at)}, and not {wanted[at]}"
