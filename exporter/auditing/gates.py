"""What an audit's gates make of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from convoynet.exporter.errors import BadInput, Refused

if TYPE_CHECKING:
    from convoynet.exporter.auditing.audit import Audit

# Forgives the rounding of a division, not an image.
_TINY = 1e-9


@dataclass(frozen=True)
class Gates:
    """What is allowed; None for anything.

    Attributes:
        flips: percent of the images whose answer may become another.
        class_drop: percentage points that each class may lose.
        drift: how far the evidence may move: 1 less the median correlation of the maps.
    """

    flips: float | None = None
    class_drop: float | None = None
    drift: float | None = None

    def __post_init__(self) -> None:
        for flag, value, most in (
            ("--max-flips", self.flips, 100),
            ("--max-class-drop", self.class_drop, 100),
            ("--max-drift", self.drift, 2),
        ):
            if value is not None and not 0 <= value <= most:
                raise BadInput(f"{flag} {value:g} is not in 0..{most}")

    def check(self, audit: Audit) -> None:
        """Compare what was measured with what is allowed.

        Raises:
            Refused: one of the gates does not open; the message names each that does not.
        """
        if found := [*self._refusals(audit)]:
            raise Refused("; ".join(found))

    def _refusals(self, audit: Audit) -> list[str]:
        answers, found = audit.answers, []
        if self.flips is not None and 100 * answers.flipped > self.flips + _TINY:
            flips = answers.flips
            found.append(
                f"{100 * answers.flipped:.2f} % of {answers.images} answers flipped ({len(flips.lost)} right to wrong, "
                f"{len(flips.gained)} wrong to right, {len(flips.other)} wrong to another), and --max-flips allows "
                f"{self.flips:g}"
            )
        worst = answers.worst_class
        if self.class_drop is not None and 100 * worst.drop > self.class_drop + _TINY:
            low, high = (100 * end for end in worst.drop_interval)
            found.append(
                f"class {audit.labels[worst.index]!r} lost {100 * worst.drop:.2f} points, from {worst.before:.2%} to "
                f"{worst.after:.2%} of {worst.images} images (95 % interval {low:+.2f} to {high:+.2f}), and "
                f"--max-class-drop allows {self.class_drop:g}"
            )
        if self.drift is not None and audit.drift is not None and audit.drift.value > self.drift + _TINY:
            found.append(
                f"the evidence drifted by {audit.drift.value:.4f} (1 less the median correlation of the maps, "
                f"{audit.drift.median:.4f} on {len(audit.drift.places)} images), and --max-drift allows {self.drift:g}"
            )
        return found
