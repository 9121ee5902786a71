"""An audit in words: the rows and lines that the terminal and the page have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from convoynet.exporter.auditing.robustness import STEPS, Row
from convoynet.exporter.evidence.accuracy import Interval

if TYPE_CHECKING:
    from convoynet.exporter.auditing.audit import Audit


def flips(audit: Audit) -> str:
    """How many answers became others, each way."""
    found = audit.answers.flips
    return (
        f"{found.count} of {audit.answers.images}: {len(found.lost)} right to wrong, {len(found.gained)} wrong to "
        f"right, {len(found.other)} wrong to another."
    )


def summary(audit: Audit) -> list[tuple[str, str]]:
    """The figures of all classes together: what it is, and what was found."""
    answers = audit.answers
    low, high = (100 * end for end in answers.drop_interval)
    before, after = answers.top1
    rows = [
        ("flipped", f"{answers.flipped:.2%}; {flips(audit)[:-1]}"),
        ("top-1", f"{before:.2%} to {after:.2%}; the loss lies between {low:+.2f} and {high:+.2f} points (95 %)"),
        (
            "calibration",
            "error {:.4f} to {:.4f}; mean confidence {:.2%} to {:.2%}".format(
                *answers.calibration, *answers.confidence
            ),
        ),
    ]
    paid = [audit.labels[one.index] for one in answers.classes if one.paid]
    told = ", ".join(paid[:10]) + (f" and {len(paid) - 10} more" if len(paid) > 10 else "")
    rows.append(("paid", told or "no class lost more than chance explains"))
    if audit.drift is not None:
        rows.append(("evidence", drift(audit)))
    if audit.temperature is not None:
        rows.append(("temperature", temperature(audit)))
    return rows


def classes(audit: Audit, most: int) -> list[dict[str, str]]:
    """Accuracy by class, the class that lost most first."""
    found = sorted(audit.answers.classes, key=lambda one: (-one.drop, one.p, one.index))
    return [
        {
            "class": audit.labels[one.index],
            "images": str(one.images),
            "before": _share(one.before, one.before_interval),
            "after": _share(one.after, one.after_interval),
            "points": f"{100 * (one.gained - one.lost) / one.images:+.1f}",
            "lost": str(one.lost),
            "gained": str(one.gained),
            "p": f"{one.p:.2g}",
            "paid": "paid" if one.paid else "",
        }
        for one in found[:most]
    ]


def confidence(audit: Audit) -> list[dict[str, str]]:
    """Calibration before and after."""
    found = audit.answers
    return [
        {
            "": name,
            "calibration error": f"{found.calibration[side]:.4f}",
            "mean confidence": f"{found.confidence[side]:.2%}",
            "top-1": f"{found.top1[side]:.2%}",
        }
        for side, name in enumerate((audit.reference, audit.model))
    ]


def drift(audit: Audit) -> str:
    """How far the evidence moved, if that was looked at."""
    found = audit.drift
    if found is None:
        return ""
    low, overlap = np.percentile(found.correlation, 5), np.median(found.overlap)
    same = found.median_of(audit.same[found.places])
    told = (
        f"maps of {len(found.places)} images correlate by {found.median:.4f} (median; fifth percentile {low:.4f}), top "
        f"fifths overlap by {overlap:.2f}, the peak moved in {found.moved:.1%}"
    )
    if same is not None:
        told += f"; where both say the same {same:.4f}"
    return told + (f"; without any evidence {found.flat}" if found.flat else "")


def corruptions(audit: Audit) -> list[dict[str, str]]:
    """Accuracy on spoilt pictures, a row for each kind; none where none were spoilt."""
    return [] if audit.robustness is None else _tried("pictures", audit.robustness.rows)


def attacks(audit: Audit) -> list[dict[str, str]]:
    """Accuracy under attack; none where nothing was attacked."""
    return [] if audit.robustness is None else _tried("attack", audit.robustness.attacks)


def severity(audit: Audit) -> str:
    """Which pictures were spoilt, and how; "" where none were."""
    found = audit.robustness
    return "" if found is None else f"severity {found.severity} of {found.constants}, {found.rows[0].images} images"


def size(audit: Audit) -> str:
    """What was attacked, and how; "" where nothing was."""
    found = audit.robustness
    if found is None or not found.attacks:
        return ""
    return f"at most {found.size}/255 a pixel, PGD in {STEPS} steps, {found.attacks[0].images} images"


def _tried(title: str, rows: Sequence[Row]) -> list[dict[str, str]]:
    return [
        {
            title: row.kind,
            "before": f"{row.before:.1%}",
            "after": f"{row.after:.1%}",
            "points": f"{100 * (row.after - row.before):+.1f}",
            "95 %": f"{-100 * row.drop_interval[1]:+.1f} to {-100 * row.drop_interval[0]:+.1f}",
            "agreement": f"{row.agreement:.1%}",
        }
        for row in rows
    ]


def temperature(audit: Audit) -> str:
    """What was fitted, if anything was."""
    found = audit.temperature
    if found is None:
        return ""
    return (
        f"{found.value:.4g}, fitted on {found.fitted_on} images; on the other {found.judged_on} the calibration error "
        f"goes from {found.before:.4f} to {found.after:.4f}"
    )


def _share(share: float, interval: Interval) -> str:
    return f"{share:.1%} ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})"
