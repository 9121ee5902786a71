"""How far an exported model's outputs are from PyTorch's.

Agreement on the first class forgives ties: a sample agrees when the class that the exported model ranks first scores,
in the reference, within TIE x (largest |logit| of the reference) of the reference's best. Float32 sums taken in another
order move logits by about a millionth of that, so rounding decides a tie; an honest disagreement is no tie.

Detections come in no fixed order, and of two that overlap either may be suppressed: they are matched before they are
compared, as in T.-Y. Lin et al. 2014, "Microsoft COCO", by label and by intersection over union (IoU).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from convoynet.exporter.archs import Task
from convoynet.exporter.evidence.accuracy import Interval, wilson
from convoynet.exporter.evidence.limits import Kind
from convoynet.exporter.evidence.spread import Spread, SpreadTally, kind_of

if TYPE_CHECKING:
    from convoynet.exporter.running.runtime import Array, Outputs

TIE = 1e-5
PYTORCH, GIVEN = "PyTorch", "the given file"
_GIVEN_FILE = "the given ONNX file"
MATCHING_IOU = 0.5
_SLIVER = 0.1  # pixels
_BEST = 5
_POINTS = 5_000
_TINY = float(np.finfo(np.float64).tiny)
_KEPT, _SIDED = ("regression", "embedding"), ("labels", "one value")


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
        min_cosine: smallest cosine over the samples between the two vectors of logits; None for one logit.
        top1_agreement: share of samples, or of their pixels, with the same first class (ties: see the module).
        top5_agreement: mean share of the reference's five best classes that are among the exported model's.
        matched: share of detections, of both sides together, that have a partner on the other side.
        same_side: of one value, or of several labels: share that is on the same side of zero (of 0.5 for scores of 0
            to 1); ties as for the first class.
        spread: the error against how the outputs vary over the images; None for detections.
        others: the same of the further outputs, by name.
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
    same_side: float | None = None
    spread: Spread | None = None
    others: dict[str, Parity] = field(default_factory=dict)

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Parity:
        """What `asdict` made of one."""
        spread = told.get("spread")
        others = {name: cls.from_json(other) for name, other in (told.get("others") or {}).items()}
        return cls(**{**told, "spread": spread and Spread(**spread), "others": others})

    @property
    def who(self) -> str:
        """Who made the reference, in short: PyTorch, or the ONNX file that was given in its place."""
        return who(self.reference)

    @property
    def agreement(self) -> float:
        """What most people look at first: the share that is named so in `agreement_name`."""
        if self.spread is not None and not self.decides:
            return max(0.0, 1.0 - (self.spread.error or 0.0) ** 2)
        shares = (self.matched, self.same_side, self.top1_agreement)
        return next(share for share in shares if share is not None)

    @property
    def agreement_interval(self) -> Interval | None:
        """Where `agreement` lies on more such images in 95 of 100 cases; None where it is no share of images."""
        if self.task != "classification" or not self.decides or self.same_side is not None:
            return None
        return wilson(round(self.agreement * self.samples), self.samples)

    @property
    def decides(self) -> bool:
        """Whether something is decided by the outputs, so that it can be decided otherwise."""
        return self.spread is None or self.spread.kind not in _KEPT

    @property
    def agreement_name(self) -> str:
        """Name `agreement` for a person."""
        if not self.decides:
            return "variance kept"
        if self.same_side is not None:
            return "same side of the threshold"
        return {
            "classification": "top-1 agreement",
            "segmentation": "pixels of the same class",
            "detection": "matched detections",
        }[self.task]


def who(reference: str) -> str:
    """The reference in short."""
    return GIVEN if reference.startswith(_GIVEN_FILE) else PYTORCH


class Comparison(NamedTuple):
    """A parity, and some pairs of values for a plot: float [n] each, logits or scores, the reference's rising."""

    parity: Parity
    reference: Array
    exported: Array


@dataclass(frozen=True)
class Sides:
    """Who made the outputs, at which batch sizes the exported model ran, and what is known of the outputs.

    `kind` is what the first means, where it is told; `others` names those behind it; `untrained` chooses the limits.
    """

    reference: str
    runtime: str
    batch_sizes: tuple[int, ...] = ()
    kind: Kind | None = None
    others: tuple[str, ...] = ()
    untrained: bool = False


def compare(task: Task, reference: Outputs, exported: Outputs, order: npt.NDArray[np.intp], sides: Sides) -> Comparison:
    """Compare exported outputs with the reference's rows that `order` picks.

    Args:
        task: what the outputs are.
        reference: one row for each image.
        exported: one row for each member of `order`.
        order: indices into the reference's rows.
        sides: who made them, what they mean, and how the further ones are called.
    """
    if task == "detection":
        return _compare_detections(reference, exported, order, sides)
    first = _compare_logits(task, reference[0], exported[0], order, sides)
    others = {
        name: _compare_logits(_task_of(rows), rows, found, order, replace(sides, kind=_kind_of_other(rows))).parity
        for name, rows, found in zip(sides.others, reference[1:], exported[1:], strict=True)
    }
    return first._replace(parity=replace(first.parity, others=others))


def _task_of(rows: Array) -> Task:
    """How a further output is looked at: a map place by place."""
    return "segmentation" if rows.ndim == 4 and rows[0, 0].size > 1 else "classification"


def _kind_of_other(rows: Array) -> Kind | None:
    """Many numbers beside the logits are an embedding."""
    return "embedding" if rows[0].size > 1 else None


def _compare_logits(
    task: Task, reference: Array, exported: Array, order: npt.NDArray[np.intp], sides: Sides
) -> Comparison:
    """Logits [n, classes], or [n, classes, h, w], of which every pixel is a vote."""
    scale = float(np.abs(reference[np.unique(order)]).max())
    kind = kind_of(task, sides.kind, reference)
    boundary = _boundary(reference) if kind in _SIDED else 0.0
    errors, cosines, first, among, sided = (np.empty(len(order)) for _ in range(5))
    tally = SpreadTally(reference)
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
        sided[row] = _same_side(expected - boundary, found - boundary, TIE * scale)
        tally.add(expected, found)
        signal += float((expected**2).sum())
        noise += float((difference**2).sum())
    # Errors count wherever they are; for the shares an image that came twice counts once.
    once = np.unique(order, return_index=True)[1]
    decides = kind not in _SIDED + _KEPT
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
        # One number has no direction.
        min_cosine=float(np.minimum(1.0, cosines.min())) if reference[0].size > 1 else None,
        top1_agreement=float(first[once].mean()) if decides else None,
        top5_agreement=float(among[once].mean()) if decides else None,
        same_side=float(sided[once].mean()) if kind in _SIDED else None,
        spread=replace(tally.result(kind, len(once)), untrained=sides.untrained),
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


def _boundary(reference: Array) -> float:
    """Between yes and no: zero for logits, 0.5 for scores of 0 to 1."""
    return 0.5 if bool((reference >= 0).all() and (reference <= 1).all()) else 0.0


def _same_side(expected: Array, found: Array, tie: float) -> float:
    """Share of values on the same side of zero; either side is right for a tie, and neither for no number."""
    return float((((expected > 0) == (found > 0)) | (np.abs(expected) <= tie) & np.isfinite(found)).mean())


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
    # Boxes that an image's border cuts to less than a pixel share no area: they are one where their corners are.
    slivers = (areas[0] < 1)[:, None] & (areas[1] < 1)[None]
    near = np.abs(left[:, None] - right[None]).max(axis=2, initial=0) <= _SLIVER
    return np.where(slivers & near, 1.0, result)


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
