"""All that was found in a network, for the terminal, for programs and for the page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from convoynet.exporter.looking.concepts import LEVEL, Concepts, Verdict
from convoynet.exporter.looking.dissection import DETECTS, Overlaps
from convoynet.exporter.looking.effective_field import LEAST, EffectiveField
from convoynet.exporter.looking.opened import Opened
from convoynet.exporter.looking.units import ALIKE, Units

# Units, and pairs of them, that a line or a table names.
_MOST_NAMED, _MOST_ROWS, _MOST_BEST = 20, 30, 5


@dataclass(frozen=True)
class Found:
    """What was asked for.

    Attributes:
        opened: the network.
        effective: the field of one layer; None where it was not asked for.
        units: those of one layer; None likewise.
        concepts: which count for which classes; None likewise.
        overlaps: of the units of one layer with masks; None likewise.
    """

    opened: Opened
    effective: EffectiveField | None = None
    units: Units | None = None
    concepts: Concepts | None = None
    overlaps: Overlaps | None = None

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
            "concepts": None if self.concepts is None else self.concepts.to_json(),
            "overlaps": None if self.overlaps is None else self.overlaps.to_json(),
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
    many = "pair" if len(found.duplicates) == 1 else "pairs"
    told = f"{len(found.duplicates)} {many} whose maps correlate by {ALIKE} or more{_named(pairs)}"
    rows.append(("duplicates", told))
    if found.ablated:
        quiet = found.undecisive
        rows.append(
            (
                "undecisive",
                f"{len(quiet)} of {count - len(dead)} living ones: without any one of them "
                f"{_answers(found.ablated)}{'' if len(quiet) == count - len(dead) else _named(map(str, quiet))}",
            )
        )
    return rows


def _answers(count: int) -> str:
    return "the one answer stays what it is" if count == 1 else f"all {count} answers stay what they are"


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


def concept_rows(found: Concepts) -> list[tuple[str, str]]:
    """What was asked about concepts, in words."""
    tests, channels = len(found.tested), found.layer.channels
    drawn = sorted({one.drawn for one in found.told})
    halves = f"{drawn[0]}" if len(drawn) == 1 else f"{drawn[0]} to {drawn[-1]}"
    apart = sorted({one.concept.held_against for one in found.told if one.concept.apart})
    return [
        ("layer", f"{found.layer.name}, the means of {channels} units over their maps; on {found.source}"),
        ("concepts", ", ".join(f"{one.concept.name} ({len(one.concept.pictures)} pictures)" for one in found.told)),
        ("told from", apart[0] if apart else "each from the others"),
        ("vectors", f"{found.runs} of each, of {halves} pictures and as many others; and as many of random pictures"),
        ("tests", f"{tests}, so that p below {LEVEL / tests:.2g} is significant: {LEVEL:g} for all of them together"),
    ]


def ordered(found: Concepts) -> list[Verdict]:
    """The concepts of each class, those that speak for it first."""
    return sorted(found.tested, key=lambda one: (one.index, -one.score))


def concept_table(found: Concepts, most: int = _MOST_ROWS) -> list[dict[str, str]]:
    """The concepts of each class, those that speak for it first."""
    right = {one.concept.name: one.accuracy for one in found.told}
    return [
        {
            "concept": one.concept,
            "class": one.label,
            "images": str(one.images),
            "score": f"{one.score:.2f} ± {one.deviation:.2f}",
            "random": f"{one.random:.2f} ± {one.random_deviation:.2f}",
            "p": f"{one.p:.1g}",
            "speaks": one.said,
            "told right": f"{right[one.concept]:.0%}",
        }
        for one in ordered(found)[:most]
    ]


def overlap_rows(found: Overlaps) -> list[tuple[str, str]]:
    """The units of a layer beside masks, in words."""
    height, width = found.layer.size
    count = int((found.iou.max(axis=1) >= DETECTS).sum())
    return [
        ("layer", f"{found.layer.name}, {len(found.iou)} units over {height}x{width} places; on {found.source}"),
        ("detectors", f"{count} of {len(found.iou)} units overlap the masks of a concept by {DETECTS} or more"),
    ]


def overlap_table(found: Overlaps) -> list[dict[str, str]]:
    """The concepts, with the units that overlap each most."""
    made = []
    for index, (each, share) in enumerate(zip(found.masks, found.shown, strict=True)):
        detectors = found.detectors(index)
        best = (f"{unit} ({found.iou[unit, index]:.3f})" for unit in found.best(index)[:_MOST_BEST])
        made.append(
            {
                "concept": each.concept,
                "masks": str(len(each.by_picture)),
                "cover": f"{share:.1%}",
                "detectors": str(len(detectors)),
                "units that overlap them most": ", ".join(best),
            }
        )
    return made


def _named(names: Iterable[str]) -> str:
    """Some of them, behind a colon."""
    every = list(names)
    more = f" and {len(every) - _MOST_NAMED} more" if len(every) > _MOST_NAMED else ""
    return f": {', '.join(every[:_MOST_NAMED])}{more}" if every else ""
