"""The part of an audit that costs nearly nothing where accuracy is measured anyway: an export's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from convoynet.exporter.auditing.answers import Said, answers_of, said

if TYPE_CHECKING:
    from convoynet.exporter.running.runtime import Array, Images, Outputs, Predictor

# Classes that a report has of many: those that lost most.
_MOST_CLASSES = 20
_LARGE = 1e30


class Watched:
    """A predictor whose answers are kept while something else is measured of it.

    Args:
        predictor: returns logits first.
        shares: whether these are probabilities already.
    """

    def __init__(self, predictor: Predictor, *, shares: bool = False) -> None:
        self.name = predictor.name
        self._predictor, self._shares = predictor, shares
        self._parts: list[Said] = []

    def prepare(self, images: Images) -> Array:
        """As the predictor does."""
        return self._predictor.prepare(images)

    def __call__(self, inputs: Array) -> Outputs:
        """Return the predictor's outputs."""
        made = self._predictor(inputs)
        # What is no number is judged elsewhere; here it says nothing, and a report can carry it.
        logits = np.nan_to_num(np.asarray(made[0], np.float32), nan=0, posinf=_LARGE, neginf=-_LARGE)
        best = logits.argmax(axis=1)
        stated = logits.max(axis=1).clip(0, 1).astype(np.float64)
        self._parts.append(Said(best, stated) if self._shares else said(logits))
        return made

    @property
    def said(self) -> Said:
        """All of its answers."""
        best, confidence = zip(*((one.best, one.confidence) for one in self._parts), strict=True)
        return Said(np.concatenate(best), np.concatenate(confidence))


def told(before: Watched, after: Watched, classes: Sequence[int], labels: Sequence[str]) -> dict[str, Any]:
    """The report's `answers`: of many classes those that lost most, that one first."""
    found = answers_of(before.said, after.said, np.array(classes, np.int64))
    made = found.to_json(labels)
    rows = [row for _, row in sorted(zip(found.classes, made["classes"], strict=True), key=lambda pair: -pair[0].drop)]
    paid = [row["class"] for row in rows if row["paid"]]
    return {**made, "classes": rows[:_MOST_CLASSES], "classes_left_out": len(rows[_MOST_CLASSES:]), "paid": paid}
