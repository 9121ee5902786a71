"""How far an exported model's outputs are from PyTorch's.

Agreement on the first class forgives ties: a sample agrees when the class that the exported model ranks first scores,
in the reference, within TIE x (largest |logit| of the reference) of the reference's best. Float32 sums taken in another
order move logits by about a millionth of that, so rounding decides a tie; an honest disagreement is no tie.

Detections come in no fixed order, and of two that overlap either may be suppressed: they are matched before they are
compared, as in T.-Y. Lin et al. 2014, "Microsoft COCO", by label and by intersection over union (IoU).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from convoynet.exporter.archs import Task

if TYPE_CHECKING:
    from convoynet.exporter.running.runtime import Array, Outputs

TIE = 1e-5
MATCHING_IOU = 0.5
_BEST = 5
_POINTS = 5_000
_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class Parity:
    """The exported model's outputs against the reference's, on the same images.

    Attributes:
        task: what was compared.
        samples: number of distinct images.
        max_abs_error: largest |exported - reference| over all logits; for detections, over the coordinates of matched
            boxes, in pixels.
        max_rel_error: the same as a share of the largest |reference|: of the largest logit, or coordinate.
        reference: what the outputs were compared with.
        runtime: what ran the exported model.
        batch_sizes: the batch sizes at which it ran.
        sqnr_db: the reference's logits against the error, as a ratio of squares, in decibels; None where there is no
            error at all, and for detections.
        min_cosine: smallest cosine over the samples between the two vectors of logits.
        top1_agreement: share of samples, or of their pixels, with the same first class (ties: see the module).
        top5_agreement: mean share of the reference's five best classes that are among the exported model's.
        matched: share of detections, of both sides together, that have a partner on the other side.
    """

    task: Task
    samples: int
    max_abs_error: float
    max_rel_error: float
    reference: str
    runtime: str
    batch_sizes: tuple[int, ...] = ()
    sqnr_db: float | None = None
    min_cosine: float | None = None
    top1_agreement: float | None = None
    top5_agreement: float | None = None
    matched: float | None = None

    @property
    def agreement(self) -> float:
        """What most people look at first: top1_agreement, or for detections `matched`."""
        share = self.matched if self.task == "detection" else self.top1_agreement
        assert share is not None
        return share

    @property
    def agreement_name(self) -> str:
        """Name `agreement` for a person."""
        return {
            "classification": "top-1 agreement",
            "segmentation": "pixels of the same class",
            "detection": "matched detections",
        }[self.task]


class Comparison(NamedTuple):
    """A parity, and some pairs of values for a plot: float [n] each, logits or scores, the reference's rising."""

    parity: Parity
    reference: Array
    exported: Array


@dataclass(frozen=True)
class Sides:
    """Who made the outputs, and at which batch sizes the exported model ran."""

    reference: str
    runtime: str
    batch_sizes: tuple[int, ...] = ()


def compare(task: Task, reference: Outputs, exported: Outputs, order: npt.NDArray[np.intp], sides: Sides) -> Comparison:
    """Compare exported outputs with the reference's rows that `order` picks.

    Args:
        task: what the outputs are.
        reference: one row for each image.
        exported: one row for each member of `order`.
        order: indices into the reference's rows.
        sides: goes into the result as it is.
    """
    if task == "detection":
        return _compare_detections(reference, exported, order, sides)
    return _compare_logits(task, reference[0], exported[0], order, sides)


def _compare_logits(
    task: Task, reference: Array, exported: Array, order: npt.NDArray[np.intp], sides: Sides
) -> Comparison:
    """Logits [n, classes], or [n, classes, h, w], of which every pixel is a vote."""
    scale = float(np.abs(reference[np.unique(order)]).max())
    errors, cosines, first, among = (np.empty(len(order)) for _ in range(4))
    signal = noise = 0.0
    for row, index in enumerate(order):  # one at a time: the maps of a batch would not fit in float64
        expected, found = (
            np.moveaxis(side, 0, -1).reshape(-1, side.shape[0]).astype(np.float64)
            for side in (reference[index], exported[row])
        )
        difference = found - expected
        errors[row] = np.abs(difference).max()
        cosines[row] = _cosine(expected, found)
        first[row], among[row] = _agreement(expected, found, TIE * scale)
        signal += float((expected**2).sum())
        noise += float((difference**2).sum())
    # Errors count wherever they are; for the shares an image that came twice counts once.
    once = np.unique(order, return_index=True)[1]
    parity = Parity(
        task=task,
        samples=len(once),
        max_abs_error=float(errors.max()),
        max_rel_error=float(errors.max()) / max(scale, _TINY),
        reference=sides.reference,
        runtime=sides.runtime,
        batch_sizes=sides.batch_sizes,
        sqnr_db=float(10 * np.log10(max(signal, _TINY) / noise)) if noise else None,
        # Rounding can put the cosine of equal vectors a hair above one; NumPy's minimum keeps a NaN.
        min_cosine=float(np.minimum(1.0, cosines.min())),
        top1_agreement=float(first[once].mean()),
        top5_agreement=float(among[once].mean()),
    )
    stride = -(-reference.size // 2**20)
    return Comparison(parity, *_points(reference.ravel()[::stride], exported[: len(reference)].ravel()[::stride]))


def _cosine(expected: Array, found: Array) -> float:
    # A row of zeros has no direction; the tiny term keeps it from being a division by zero.
    return float((expected * found).sum() / (np.linalg.norm(expected) * np.linalg.norm(found) + _TINY))


def _agreement(expected: Array, found: Array, tie: float) -> tuple[float, float]:
    """Shares for the rows [pixels, classes]: the first class, and the five best."""
    best = np.take_along_axis(expected, found.argmax(axis=1)[:, None], axis=1)[:, 0]
    first = best >= expected.max(axis=1) - tie
    k = min(_BEST, expected.shape[1])
    least = np.sort(expected, axis=1)[:, -k] - tie
    chosen = np.argsort(-found, axis=1, kind="stable")[:, :k]
    among = np.take_along_axis(expected, chosen, axis=1) >= least[:, None]
    return float(first.mean()), float(among.mean())


def _points(reference: Array, exported: Array) -> tuple[Array, Array]:
    """Evenly spread points of the sorted values, so that the extremes are among them."""
    chosen = np.argsort(reference, kind="stable")
    if len(chosen) > _POINTS:
        chosen = chosen[np.linspace(0, len(chosen) - 1, _POINTS).astype(np.intp)]
    return reference[chosen], exported[chosen]


class Detections(NamedTuple):
    """The detections of one image without padding: boxes float [n, 4], scores float [n], labels int [n]."""

    boxes: Array
    scores: Array
    labels: Array


def detections(outputs: Outputs, row: int) -> Detections:
    """Cut the padding off one image of a detector's boxes, scores, labels and count."""
    boxes, scores, labels, counts = outputs
    count = int(counts[row].item())
    return Detections(boxes[row, :count], scores[row, :count], labels[row, :count])


def match(wanted: Detections, offered: Detections, iou: float = MATCHING_IOU) -> list[tuple[int, int]]:
    """Pairs of indices: each wanted detection, by falling score, takes the free one of its label that fits best."""
    overlap = _iou(wanted.boxes.astype(np.float64), offered.boxes.astype(np.float64))
    overlap[wanted.labels[:, None] != offered.labels[None]] = 0
    pairs = []
    for index in np.argsort(-wanted.scores, kind="stable"):
        if overlap.shape[1] and (best := int(overlap[index].argmax())) >= 0 and overlap[index, best] >= iou:
            pairs.append((int(index), best))
            overlap[:, best] = 0
    return pairs


def _iou(left: Array, right: Array) -> Array:
    """Intersection over union of every pair of boxes: [n, 4] and [m, 4] to [n, m]."""
    low = np.maximum(left[:, None, :2], right[None, :, :2])
    high = np.minimum(left[:, None, 2:], right[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (left, right)]
    result: Array = shared / np.maximum(areas[0][:, None] + areas[1][None] - shared, _TINY)
    return result


def _compare_detections(reference: Outputs, exported: Outputs, order: npt.NDArray[np.intp], sides: Sides) -> Comparison:
    extent = max(float(np.abs(reference[0]).max()), _TINY)
    pixels = [0.0]
    points: list[tuple[Array, Array]] = []
    partners = total = 0
    for row, index in enumerate(order):
        wanted, offered = detections(reference, int(index)), detections(exported, row)
        pairs = match(wanted, offered)
        partners += 2 * len(pairs)
        total += len(wanted.scores) + len(offered.scores)
        if not pairs:
            continue
        left, right = (list(side) for side in zip(*pairs, strict=True))
        pixels.append(float(np.abs(wanted.boxes[left] - offered.boxes[right]).max()))
        points.append((wanted.scores[left], offered.scores[right]))
    error = float(np.max(pixels))
    parity = Parity(
        task="detection",
        samples=len(np.unique(order)),
        max_abs_error=error,
        max_rel_error=error / extent,
        reference=sides.reference,
        runtime=sides.runtime,
        batch_sizes=sides.batch_sizes,
        matched=partners / total if total else 0.0,
    )
    empty = (np.zeros(0, np.float32),) * 2
    columns = [np.concatenate(side) for side in zip(*points, strict=True)] if points else empty
    return Comparison(parity, *_points(columns[0], columns[1]))
