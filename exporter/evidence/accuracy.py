"""Accuracy on labelled images, how sure it is, and what `--max-drop` makes of it.

Both models see the same images, so that what tells is how many answers changed each way. An interval for one share is
Wilson's (E. B. Wilson 1927, "Probable inference, the law of succession, and statistical inference", J. Am. Stat. Assoc.
22). One for the difference of two shares of the same images is Wald's with one image more that changed each way (D. G.
Bonett and R. M. Price 2012, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired
data", J. Educ. Behav. Stat. 37), which nearly holds its level also where few answers change, or none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from convoynet.exporter.data.images import Preprocess, load_images
from convoynet.exporter.errors import Refused
from convoynet.exporter.progress import Progress

if TYPE_CHECKING:
    from convoynet.exporter.running.runtime import Predictor

EVAL_BATCH = 32
# Of 95 %, two-sided.
_Z = 1.959964
# More images than this nobody has.
_MOST_IMAGES = 10_000_000
_BEST = 5
Hits = npt.NDArray[np.bool_]
Interval = tuple[float, float]
Decision = Literal["kept", "lost", "undecided"]


@dataclass(frozen=True)
class Accuracy:
    """Share of images (0 to 1) whose class is the first, or among the five best, for PyTorch and as exported.

    Attributes:
        samples: the number of images.
        reference_top1, top1, reference_top5, top5: the shares.
        lost, gained: images whose first class was right and is wrong now, and the other way round.
        reference_interval, interval: where the first shares lie, on more such images, in 95 of 100 cases.
        drop_interval: where reference_top1 - top1 does.
    """

    samples: int
    reference_top1: float
    top1: float
    reference_top5: float
    top5: float
    lost: int
    gained: int
    reference_interval: Interval
    interval: Interval
    drop_interval: Interval

    @property
    def drop(self) -> float:
        """The share of images that was lost."""
        return (self.lost - self.gained) / self.samples


def accuracy_of(reference: Hits, exported: Hits) -> Accuracy:
    """Compare the right answers of two models; both bool [images, 2]: the first class, one of the five best."""
    count, before, after = len(reference), reference[:, 0], exported[:, 0]
    (reference_top1, reference_top5), (top1, top5) = reference.mean(axis=0).tolist(), exported.mean(axis=0).tolist()
    lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
    return Accuracy(
        samples=count,
        reference_top1=reference_top1,
        top1=top1,
        reference_top5=reference_top5,
        top5=top5,
        lost=lost,
        gained=gained,
        reference_interval=wilson(int(before.sum()), count),
        interval=wilson(int(after.sum()), count),
        drop_interval=paired_interval(lost, gained, count),
    )


def wilson(right: int, count: int) -> Interval:
    """The 95 % interval of a share, `right` of `count`."""
    share, weight = right / count, _Z**2 / count
    middle = (share + weight / 2) / (1 + weight)
    half = _Z / (1 + weight) * math.sqrt(share * (1 - share) / count + weight / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_interval(lost: int, gained: int, count: int) -> Interval:
    """The 95 % interval of the share that was lost, where of `count` images so many changed each way."""
    drop, changed = _adjusted(lost, gained, count)
    half = _Z * math.sqrt(changed / (count + 2))
    return max(-1.0, drop - half), min(1.0, drop + half)


def _adjusted(lost: int, gained: int, count: int) -> tuple[float, float]:
    """The drop, and the variance of one image's part in it, with one image more that changed each way."""
    down, up = (lost + 1) / (count + 2), (gained + 1) / (count + 2)
    return down - up, max(down + up - (down - up) ** 2, 0.0)


def decide(accuracy: Accuracy, max_drop: float) -> Decision:
    """Whether no more was lost than `max_drop` percentage points, as far as so many images can tell."""
    low, high = (100 * end for end in accuracy.drop_interval)
    if high <= max_drop:
        return "kept"
    return "lost" if low > max_drop else "undecided"


def images_needed(accuracy: Accuracy, max_drop: float) -> int | None:
    """With how many images like these the interval would lie on one side of `max_drop`; None where no number helps."""
    drop, variance = _adjusted(accuracy.lost, accuracy.gained, accuracy.samples)
    distance = abs(max_drop / 100 - drop)
    if not distance:
        return None
    needed = math.ceil(_Z**2 * variance / distance**2)
    return needed if needed <= _MOST_IMAGES else None


def verdict(accuracy: Accuracy, max_drop: float) -> str:
    """What the images say about `--max-drop`, in words."""
    low, high = (100 * end for end in accuracy.drop_interval)
    said = f"the loss lies between {low:+.2f} and {high:+.2f} points (95 % interval, {accuracy.samples} images)"
    decision = decide(accuracy, max_drop)
    if decision != "undecided":
        return f"{said}, {'within' if decision == 'kept' else 'above'} {max_drop:g}"
    needed = images_needed(accuracy, max_drop)
    how = "more images than anybody has" if needed is None else f"about {_rounded(needed):,} such images"
    return f"{said}: undecided, these are too few to tell whether it is above {max_drop:g}; it would take {how}"


def _rounded(count: int) -> int:
    """Two digits of a number, rounded up."""
    step = int(10 ** max(len(str(count)) - 2, 0))
    return -(-count // step) * step


def check_drop(accuracy: Accuracy, max_drop: float) -> None:
    """Compare the loss of top-1 accuracy with what is allowed, in percentage points.

    What was measured decides; `decide` says how sure that is.

    Raises:
        Refused: the loss is larger.
    """
    drop = 100 * accuracy.drop
    # The small term forgives the rounding of the division, not an image.
    if drop > max_drop + 1e-9:
        raise Refused(
            f"top-1 fell by {drop:.2f} points, from {accuracy.reference_top1:.2%} to {accuracy.top1:.2%} on "
            f"{accuracy.samples} images ({accuracy.lost} right answers lost, {accuracy.gained} gained), and --max-drop "
            f"allows {max_drop:g}; {verdict(accuracy, max_drop)}; nothing was published"
        )


def measure_accuracy(
    reference: Predictor,
    exported: Sequence[Predictor],
    labelled: Sequence[tuple[Path, int]],
    preprocess: Preprocess,
    progress: Progress,
    batch: int = EVAL_BATCH,
) -> list[Accuracy]:
    """Run the reference and each exported model over labelled image files, `batch` of them at a time."""
    before, *after = hits((reference, *exported), labelled, preprocess, progress, batch)
    return [accuracy_of(before, one) for one in after]


def hit_rates(
    predictors: Sequence[Predictor],
    labelled: Sequence[tuple[Path, int]],
    preprocess: Preprocess,
    progress: Progress,
    batch: int = EVAL_BATCH,
) -> list[tuple[float, float]]:
    """For each model the share (0 to 1) of images whose class is the first, and among the five best."""
    found = hits(predictors, labelled, preprocess, progress, batch)
    return [(float(top1), float(top5)) for top1, top5 in (one.mean(axis=0) for one in found)]


def hits(
    predictors: Sequence[Predictor],
    labelled: Sequence[tuple[Path, int]],
    preprocess: Preprocess,
    progress: Progress,
    batch: int = EVAL_BATCH,
) -> list[Hits]:
    """For each model, bool [images, 2]: whether an image's class is the first, and is among the five best."""
    found = [np.zeros((len(labelled), 2), np.bool_) for _ in predictors]
    starts = range(0, len(labelled), batch)
    for at in progress.track(starts, f"accuracy on {len(labelled)} images", len(starts)):
        chosen = labelled[at : at + batch]
        images = load_images([path for path, _ in chosen], preprocess)
        classes = np.array([label for _, label in chosen])
        for predictor, rows in zip(predictors, found, strict=True):
            logits, *_ = predictor(predictor.prepare(images))
            right = np.argsort(-logits, axis=1, kind="stable")[:, :_BEST] == classes[:, None]
            rows[at : at + batch] = np.stack([right[:, 0], right.any(axis=1)], axis=1)
    return found
