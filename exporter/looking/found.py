"""All that was found in a network, for the terminal, for programs and for the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from convoynet.exporter.looking.effective_field import LEAST, EffectiveField
from convoynet.exporter.looking.opened import Opened


@dataclass(frozen=True)
class Found:
    """What was asked for.

    Attributes:
        opened: the network.
        effective: the field of one layer; None where it was not asked for.
    """

    opened: Opened
    effective: EffectiveField | None

    @property
    def title(self) -> str:
        """Which network it is."""
        height, width = self.opened.size
        return f"{self.opened.name} at {height}x{width}, weights: {self.opened.weights}"

    def to_json(self) -> dict[str, Any]:
        """As docs/inspecting.md describes it."""
        return {
            "name": self.opened.name,
            "input_size": list(self.opened.size),
            "weights": self.opened.weights,
            "effective_field": None if self.effective is None else self.effective.to_json(),
        }


def effective_rows(found: EffectiveField) -> list[tuple[str, str]]:
    """An effective field in words: what it is, and what was found."""
    height, width = found.sizes.shape
    square = f"as many as a square of {found.side:.0f}x{found.side:.0f} has"
    shares = [f"{found.share_of_image:.1%} of the image"]
    if found.share_of_field is not None:
        shares.insert(0, f"{found.share_of_field:.1%} of the theoretical field")
    rows = [
        ("layer", f"{found.layer}, its place {found.place}; on {found.source}"),
        ("field", _theoretical(found, height, width)),
        ("effective", f"{found.pixels:,} pixels whose gradient is {LEAST:.2%} of the largest or more, {square}"),
        ("", ", ".join(shares)),
    ]
    if found.connections is None:
        rows.append(("connections", "not counted: it is not known what some operator on the way sees"))
    else:
        rows.append(("connections", "; ".join(map(_along, ("down", "across"), found.connections))))
    return rows


def _theoretical(found: EffectiveField, height: int, width: int) -> str:
    if found.field is None:
        return "not known"
    inside = found.field.within((height, width)).size
    told = f"{found.field.size[0]}x{found.field.size[1]} pixels by the layers' windows"
    return told if inside == found.field.size else f"{told}, {inside[0]}x{inside[1]} of them in the image"


def _along(direction: str, counts: Any) -> str:
    """The count of the middle, and how little is left of it at the ends."""
    some = counts[counts > 0]
    if not some.size:
        return f"{direction} none"
    return f"{direction} {some.max():,} at most, {some[0]:,} and {some[-1]:,} at the ends of the {some.size} positions"
