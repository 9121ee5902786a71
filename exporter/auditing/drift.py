"""Where two models look: their Grad-CAM maps for the same class of the same images, and how far these are apart.

The class is the one that the reference answers: both are asked for the evidence of the same thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from convoynet.exporter.auditing.gradients import Head
from convoynet.exporter.auditing.subjects import Subject
from convoynet.exporter.errors import BadInput, short_reason
from convoynet.exporter.progress import Progress

# Share of the places of a map that count as its top.
_TOP = 0.2
Maps = NDArray[np.float64]


@dataclass(frozen=True)
class Drift:
    """How far the evidence moved.

    Attributes:
        places: which images of the audit these are: those for which one model or both have evidence.
        maps: of the reference and of the model, [images, h, w].
        correlation: Pearson's, of the two maps of each image; 1 where they are equal, 0 where one of them is flat.
        overlap: of the top fifths of both maps, intersection over union.
        shift: how far the peak moved, as a share of the picture's sides.
        flat: images for which one model, or both, has no evidence at all: a map of zeros.
    """

    places: NDArray[np.int64]
    maps: tuple[Maps, Maps]
    correlation: NDArray[np.float64]
    overlap: NDArray[np.float64]
    shift: NDArray[np.float64]
    flat: int

    @property
    def median(self) -> float:
        """The median correlation."""
        return float(np.median(self.correlation))

    @property
    def value(self) -> float:
        """What `--max-drift` limits: 1 less the median correlation."""
        return 1 - self.median

    @property
    def moved(self) -> float:
        """The share of images whose peak is at another place."""
        return float((self.shift > 0).mean())

    @property
    def order(self) -> NDArray[np.int64]:
        """The images, by their rows here, those whose evidence moved most first."""
        return np.argsort(self.correlation, kind="stable")

    def median_of(self, which: NDArray[np.bool_]) -> float | None:
        """The median correlation of some images; None of none."""
        return float(np.median(self.correlation[which])) if which.any() else None

    def to_json(self, names: Sequence[str], same: NDArray[np.bool_]) -> dict[str, Any]:
        """All of it; `names` are those of all images of the audit, and `same` says which got the same answer."""
        return {
            "images": len(self.places),
            "drift": self.value,
            "correlation": {**_spread(self.correlation), "median_of_same_answers": self.median_of(same[self.places])},
            "overlap": _spread(self.overlap),
            "peak": {"moved": self.moved, "median_shift": float(np.median(self.shift))},
            "flat": self.flat,
            "pictures": [
                {
                    "picture": names[self.places[row]],
                    "correlation": float(self.correlation[row]),
                    "overlap": float(self.overlap[row]),
                    "shift": float(self.shift[row]),
                    "same_answer": bool(same[self.places[row]]),
                }
                for row in self.order
            ],
        }


def _spread(values: NDArray[np.float64]) -> dict[str, float]:
    return {"median": float(np.median(values)), "percentile_5": float(np.percentile(values, 5))}


def drift(
    subjects: tuple[Subject, Subject],
    images: NDArray[np.uint8],
    places: NDArray[np.int64],
    classes: NDArray[np.int64],
    progress: Progress,
) -> Drift:
    """Compare where two models look.

    Args:
        subjects: the reference and the model.
        images: uint8 NHWC.
        places: which images of the audit these are.
        classes: the class whose evidence is looked for, of each.
        progress: shows it.

    Raises:
        BadInput: one of them has no feature map, or no gradient behind it, or neither has any evidence.
    """
    with progress.step(f"evidence of {len(images)} images"):
        before, after = (maps_of(subject, images, classes) for subject in subjects)
    if before.shape != after.shape:
        size = tuple(np.maximum(before.shape[1:], after.shape[1:]).tolist())
        before, after = (_resized(one, size) for one in (before, after))
    some = [one.any(axis=(1, 2)) for one in (before, after)]
    flat = ~(some[0] & some[1])
    known = some[0] | some[1]  # two maps of zeros are alike, and tell nothing
    if not known.any():
        raise BadInput(f"neither model has any evidence for its answers to {len(images)} images: all maps are zero")
    before, after = before[known], after[known]
    return Drift(
        places[known],
        (before, after),
        correlation(before, after),
        overlap(before, after),
        shift(before, after),
        int(flat.sum()),
    )


def maps_of(subject: Subject, images: NDArray[np.uint8], classes: NDArray[np.int64]) -> Maps:
    """The Grad-CAM map of each image for a class; the features are those of ONNX Runtime, as a server has them.

    Raises:
        BadInput: there is no feature map, no gradient behind it, or none that is finite, or the graph does not run.
    """
    from convoynet.exporter.running.runtime import inner_session

    head = Head(subject)
    prepare = (lambda pixels: pixels) if subject.takes_pixels else subject.preprocess.normalize
    parts = []
    try:
        session = inner_session(subject.graph, [head.features], optimized=not subject.basic)
        (taken,) = session.get_inputs()
        for at in range(0, len(images), subject.batch):
            (features,) = session.run([head.features], {taken.name: prepare(images[at : at + subject.batch])})
            parts.append(head.maps(features, classes[at : at + subject.batch]))
    except BadInput:
        raise
    except Exception as error:  # ONNX Runtime's own types, which have no common one
        raise BadInput(
            f"{subject.name}: its feature map {head.features} cannot be had: {short_reason(error)}"
        ) from error
    found = np.concatenate(parts)
    if broken := int((~np.isfinite(found)).any(axis=(1, 2)).sum()):
        raise BadInput(
            f"{subject.name} has no evidence for {broken} of {len(found)} images: its gradient at {head.features} is "
            "not finite there"
        )
    return found


def correlation(before: Maps, after: Maps) -> NDArray[np.float64]:
    """Pearson's correlation of the maps of each image; 1 where they are equal, else 0 where one is flat."""
    left, right = (one.reshape(len(one), -1) for one in (before, after))
    left, right = (one - one.mean(axis=1, keepdims=True) for one in (left, right))
    size = np.sqrt((left**2).sum(axis=1) * (right**2).sum(axis=1))
    found = np.divide((left * right).sum(axis=1), size, out=np.zeros(len(left)), where=size > 0)
    return np.where((before == after).all(axis=(1, 2)), 1.0, found.clip(-1, 1))


def overlap(before: Maps, after: Maps) -> NDArray[np.float64]:
    """Intersection over union of the places with the highest fifth of the values, those of zero left out."""
    left, right = (_top(one.reshape(len(one), -1)) for one in (before, after))
    union = (left | right).sum(axis=1)
    shares: NDArray[np.float64] = np.divide((left & right).sum(axis=1), union, out=np.ones(len(left)), where=union > 0)
    return shares


def _top(values: Maps) -> NDArray[np.bool_]:
    count = int(np.ceil(_TOP * values.shape[1]))
    chosen = np.zeros(values.shape, np.bool_)
    np.put_along_axis(chosen, np.argsort(-values, axis=1, kind="stable")[:, :count], True, axis=1)
    return chosen & (values > 0)


def shift(before: Maps, after: Maps) -> NDArray[np.float64]:
    """How far the highest place moved, as a share of the sides; a flat map has its highest place at the first."""
    sides = np.array(before.shape[1:])
    tops = [
        np.array(np.unravel_index(one.reshape(len(one), -1).argmax(axis=1), before.shape[1:]))
        for one in (before, after)
    ]
    found: NDArray[np.float64] = np.hypot(*((tops[1] - tops[0]) / sides[:, None]))
    return found


def _resized(maps: Maps, size: tuple[int, ...]) -> Maps:
    made: Maps = functional.interpolate(torch.from_numpy(maps)[:, None], size, mode="bilinear")[:, 0].numpy()
    return made
