"""What two models answer for the same labelled images: which answers flipped, which classes paid, how sure both are.

That the average hides who paid is what S. Hooker and others found (2019, "What do compressed deep neural networks
forget?", arXiv:1911.05248). A class paid where McNemar's exact test (Q. McNemar 1947, Psychometrika 12) finds that it
lost more right answers than chance explains, among as many classes as there are (S. Holm 1979, Scand. J. Stat. 6). How
far confidence can be trusted is the expected calibration error in 15 bins (C. Guo and others 2017, "On calibration of
modern neural networks", ICML).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convoynet.exporter.evidence.accuracy import Interval, paired_interval, wilson

BINS = 15
_LEVEL = 0.05
Logits = NDArray[np.float32]
Classes = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Said:
    """The answers of one model: the class that comes first for each image, and the probability that it gives it."""

    best: Classes
    confidence: Floats


@dataclass(frozen=True)
class ByClass:
    """One class: its images, and what became of their answers.

    Attributes:
        before, after: the shares of right answers, with their 95 % intervals.
        p: that so uneven a change, or a more uneven one, comes of chance; corrected for the number of classes.
    """

    index: int
    images: int
    before: float
    after: float
    before_interval: Interval
    after_interval: Interval
    lost: int
    gained: int
    p: float

    @property
    def drop(self) -> float:
        """The share of its images that was lost."""
        return (self.lost - self.gained) / self.images

    @property
    def drop_interval(self) -> Interval:
        """The 95 % interval of the share that was lost."""
        return paired_interval(self.lost, self.gained, self.images)

    @property
    def paid(self) -> bool:
        """Whether it lost more than chance explains."""
        return self.drop > 0 and self.p < _LEVEL


@dataclass(frozen=True)
class Flips:
    """The images, by their places, whose answer became another: right to wrong, wrong to right, wrong to else wrong."""

    lost: Classes
    gained: Classes
    other: Classes

    @property
    def count(self) -> int:
        """All of them."""
        return len(self.lost) + len(self.gained) + len(self.other)


def probabilities(logits: Logits, temperature: float = 1.0) -> Floats:
    """Softmax of the logits over a temperature."""
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    np.exp(scaled, out=scaled)
    scaled /= scaled.sum(axis=1, keepdims=True)
    return scaled


def said(logits: Logits) -> Said:
    """The answers that logits [images, classes] are."""
    best = logits.argmax(axis=1)
    # Of the softmax only the largest value, without a second array of that size in float64.
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float32)
    return Said(best, 1 / shifted.sum(axis=1, dtype=np.float64))


def flips(before: Said, after: Said, labels: Classes) -> Flips:
    """Which answers became others."""
    was, now, changed = before.best == labels, after.best == labels, before.best != after.best
    return Flips(*(np.flatnonzero(which) for which in (was & ~now, now & ~was, changed & ~was & ~now)))


def by_class(before: Said, after: Said, labels: Classes) -> list[ByClass]:
    """Each class that has images."""
    was, now = before.best == labels, after.best == labels
    counts = np.bincount(labels)
    sums = [np.bincount(labels, which, len(counts)).astype(int) for which in (was, now, was & ~now, now & ~was)]
    present = np.flatnonzero(counts)
    values = holm([mcnemar(int(sums[2][index]), int(sums[3][index])) for index in present])
    found = []
    for index, p in zip(present.tolist(), values, strict=True):
        images, right, still, lost, gained = int(counts[index]), *(int(one[index]) for one in sums)
        shares = right / images, still / images
        intervals = wilson(right, images), wilson(still, images)
        found.append(ByClass(index, images, *shares, *intervals, lost, gained, p))
    return found


def mcnemar(lost: int, gained: int) -> float:
    """The exact two-sided probability of a split at least so uneven, where either way is as likely."""
    changed = lost + gained
    tail = sum(math.comb(changed, count) for count in range(min(lost, gained) + 1))
    return min(1.0, float(2 * tail / 2**changed))


def holm(values: Sequence[float]) -> list[float]:
    """Probabilities of several tests, corrected so that one of all is wrongly below a level no oftener than it says."""
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected, most = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        most = max(most, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = most
    return corrected


def calibration_error(confidence: Floats, right: NDArray[np.bool_]) -> float:
    """The expected calibration error: how far confidence and accuracy are apart, over bins of equal width.

    A bin holds what is above its lower end and at most its upper one.
    """
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, right, BINS) - np.bincount(bins, confidence, BINS)
    return float(np.abs(gaps).sum() / len(confidence))


@dataclass(frozen=True)
class Answers:
    """What became of the answers.

    Attributes:
        images: how many there are.
        agreement: the share of images on which both models say the same.
        top1: shares of right answers, before and after.
        top1_intervals: their 95 % intervals.
        calibration: expected calibration errors, before and after.
        confidence: mean confidences, before and after.
    """

    images: int
    agreement: float
    top1: tuple[float, float]
    top1_intervals: tuple[Interval, Interval]
    drop_interval: Interval
    flips: Flips
    classes: list[ByClass]
    calibration: tuple[float, float]
    confidence: tuple[float, float]

    @property
    def flipped(self) -> float:
        """The share of images whose answer became another."""
        return self.flips.count / self.images

    @property
    def worst_class(self) -> ByClass:
        """The class that lost the largest share of its right answers."""
        return max(self.classes, key=lambda one: one.drop)

    def to_json(self, labels: Sequence[str], names: Sequence[str] = (), most: int = 0) -> dict[str, Any]:
        """All of it; of the images that flipped the first `most` each way by their `names`."""
        kinds = {
            "right_to_wrong": self.flips.lost,
            "wrong_to_right": self.flips.gained,
            "wrong_to_other": self.flips.other,
        }
        return {
            "images": self.images,
            "agreement": self.agreement,
            "top1": {"before": self.top1[0], "after": self.top1[1]},
            "top1_intervals": {"before": list(self.top1_intervals[0]), "after": list(self.top1_intervals[1])},
            "drop_interval": list(self.drop_interval),
            "flips": {
                "share": self.flipped,
                **{
                    kind: {"count": len(places), **({"pictures": [names[at] for at in places[:most]]} if names else {})}
                    for kind, places in kinds.items()
                },
            },
            "classes": [
                {
                    "class": labels[one.index],
                    "images": one.images,
                    "before": one.before,
                    "after": one.after,
                    "before_interval": list(one.before_interval),
                    "after_interval": list(one.after_interval),
                    "lost": one.lost,
                    "gained": one.gained,
                    "drop_interval": list(one.drop_interval),
                    "p": one.p,
                    "paid": one.paid,
                }
                for one in self.classes
            ],
            "calibration_error": {"before": self.calibration[0], "after": self.calibration[1]},
            "confidence": {"before": self.confidence[0], "after": self.confidence[1]},
        }


def answers_of(before: Said, after: Said, labels: Classes) -> Answers:
    """Compare the answers of two models for the same images."""
    was, now, count = before.best == labels, after.best == labels, len(labels)
    found = flips(before, after, labels)
    return Answers(
        images=count,
        agreement=float((before.best == after.best).mean()),
        top1=(float(was.mean()), float(now.mean())),
        top1_intervals=(wilson(int(was.sum()), count), wilson(int(now.sum()), count)),
        drop_interval=paired_interval(len(found.lost), len(found.gained), count),
        flips=found,
        classes=by_class(before, after, labels),
        calibration=(calibration_error(before.confidence, was), calibration_error(after.confidence, now)),
        confidence=(float(before.confidence.mean()), float(after.confidence.mean())),
    )
