"""What compression changed beside the average, in a few numbers: for tables of many models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convoynet.exporter.errors import BadInput
from convoynet.exporter.progress import Progress


@dataclass(frozen=True)
class Changes:
    """How far a model is from the one that it is compared with, on the same labelled images.

    Attributes:
        flips: the share of images whose answer is another.
        worst_class: the class that lost the largest share of its right answers.
        class_drop: that share.
        calibration_error: how far its confidence and its accuracy are apart, over 15 bins.
        drift: how far the evidence moved, 1 less the median correlation of the maps; None where that is not known.
    """

    flips: float
    worst_class: str
    class_drop: float
    calibration_error: float
    drift: float | None = None


def of_answers(answers: Mapping[str, Any] | None) -> Changes | None:
    """The changes by a report's `answers`, whose first class is the one that lost most."""
    if answers is None or not answers["classes"]:
        return None
    worst = answers["classes"][0]
    return Changes(
        flips=answers["flips"]["share"],
        worst_class=worst["class"],
        class_drop=(worst["lost"] - worst["gained"]) / worst["images"],
        calibration_error=answers["calibration_error"]["after"],
    )


def drift(reference: Path, model: Path, images: Sequence[Path], progress: Progress) -> tuple[float | None, str]:
    """How far the evidence moved between two published models, for the classes that the first answers.

    Returns:
        It, and ""; or None and why it cannot be said.
    """
    from convoynet.exporter.auditing import audit, subjects
    from convoynet.exporter.auditing.drift import drift as compared
    from convoynet.exporter.data.images import load_images

    try:
        after, published = subjects.audited(model)
        before = subjects.reference(str(reference), after, published)
        chosen = audit.spread(len(images), audit.DRIFT_IMAGES)
        pixels = load_images([images[place] for place in chosen], after.preprocess)
        classes = before.logits(before.session(1), pixels).argmax(axis=1)
        return compared((before, after), pixels, np.arange(len(pixels)), classes, progress).value, ""
    except BadInput as error:
        return None, f"{model}: no evidence was looked at: {error}"
