"""All that was found in a network, for the terminal, for programs and for the page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from convoynet.exporter.looking.effective_field import LEAST, EffectiveField
from convoynet.exporter.looking.opened import Opened
from convoynet.exporter.looking.units import ALIKE, Units

# Units, and pairs of them, that a line or a table names.
_MOST_NAMED, _MOST_ROWS = 20, 30


@dataclass(frozen=True)
class Found:
    """What was asked for.

    Attributes:
        opened: the network.
        effective: the field of one layer; None where it was not asked for.
        units: those of one layer; None likewise.
    """

    opened: Opened
    effective: EffectiveField | None = None
    units: Units | None = None

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
            "units": None if self.units is None else self.units.to_json(),
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


def unit_rows(found: Units) -> list[tuple[str, str]]:
    """The units of a layer in words: what it is, and what was found."""
    height, width = found.layer.size
    count, dead = len(found.units), found.dead
    rows = [
        ("layer", f"{found.layer.name}, {count} units over {height}x{width} places; on {found.source}"),
        ("dead", f"{len(dead)} of {count}, the same everywhere on every picture{_named(map(str, dead))}"),
    ]
    pairs = (f"{a} and {b} ({r:.3f})" for a, b, r in found.duplicates)
    told = f"{len(found.duplicates)} pairs whose maps correlate by {ALIKE} or more{_named(pairs)}"
    rows.append(("duplicates", told))
    if found.ablated:
        quiet = found.undecisive
        rows.append(
            (
                "undecisive",
                f"{len(quiet)} of {count - len(dead)} living ones: without any one of them all {found.ablated} answers "
                f"stay what they are{_named(map(str, quiet))}",
            )
        )
    return rows


def unit_table(found: Units, most: int = _MOST_ROWS) -> list[dict[str, str]]:
    """The living units, those that decide most first."""
    return [
        {
            "unit": str(unit.index),
            "answers changed": "" if unit.changed is None else f"{unit.changed} of {found.ablated}",
            "probability lost": "" if unit.lost is None else f"{unit.lost:+.4f}",
            "active on": f"{unit.active} of {len(found.pictures)}",
            "peak": f"{unit.top[0].value:.4g}",
            "mean": f"{unit.mean:.4g}",
            "most alike": "" if unit.twin is None else f"{unit.twin[0]} ({unit.twin[1]:.2f})",
        }
        for unit in found.order[:most]
    ]


def _named(names: Iterable[str]) -> str:
    """Some of them, behind a colon."""
    every = list(names)
    more = f" and {len(every) - _MOST_NAMED} more" if len(every) > _MOST_NAMED else ""
    return f": {', '.join(every[:_MOST_NAMED])}{more}" if every else ""
