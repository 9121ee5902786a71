"""An audit as one HTML page that opens by itself, with the pictures that it is about."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from numpy.typing import NDArray
from PIL import Image

from convoynet.exporter import assets
from convoynet.exporter.auditing import words
from convoynet.exporter.data.images import load_images
from convoynet.exporter.evidence.html_report import table

if TYPE_CHECKING:
    from convoynet.exporter.auditing.audit import Audit

_TEMPLATE = "audit.html.j2"
_MOST_PICTURES, _MOST_MAPS = 24, 12
# Pixels of a picture in the page: larger ones are made smaller, and smaller ones drawn larger.
_SIDE = 144
_GAP = 4


def html(audit: Audit) -> str:
    """The page."""
    flips = audit.answers.flips
    places = in_turn(audit)[:_MOST_PICTURES]
    templates = Environment(loader=FileSystemLoader(assets.FOLDER), autoescape=True)
    return templates.get_template(_TEMPLATE).render(
        audit=audit,
        cards=_cards(audit),
        classes=words.classes(audit, len(audit.labels)),
        confidence=words.confidence(audit),
        temperature=words.temperature(audit),
        pictures=[_picture(audit, place) for place in places],
        corruptions=words.corruptions(audit),
        severity=words.severity(audit),
        attacks=words.attacks(audit),
        size=words.size(audit),
        drift=words.drift(audit),
        moved=[_evidence(audit, int(row)) for row in audit.drift.order[:_MOST_MAPS]] if audit.drift else [],
        flipped="All" if len(places) == flips.count else len(places),
        table=table,
    )


def in_turn(audit: Audit) -> list[int]:
    """The flipped pictures, so that the first of them show every way and class, and not those of the first class."""
    flips, turns = audit.answers.flips, Counter[tuple[int, int]]()
    found = []
    for way, kind in enumerate((flips.lost, flips.other, flips.gained)):
        for place in map(int, kind):
            group = way, int(audit.classes[place])
            found.append((turns[group], *group, place))
            turns[group] += 1
    return [place for *_, place in sorted(found)]


def _cards(audit: Audit) -> list[dict[str, str]]:
    """The figures that are looked at first."""
    answers = audit.answers
    worst = answers.worst_class
    return [
        {
            "value": f"{answers.flipped:.2%}",
            "label": "of the answers flipped",
            "said": words.flips(audit),
        },
        {
            "value": f"{100 * (answers.top1[1] - answers.top1[0]):+.2f}",
            "label": "points of top-1",
            "said": f"{answers.top1[0]:.2%} before, {answers.top1[1]:.2%} after.",
        },
        {
            "value": f"{100 * (worst.gained - worst.lost) / worst.images:+.1f}",
            "label": f"points of {audit.labels[worst.index]}",
            "said": f"The class that lost most, of {worst.images} images.",
        },
        {
            "value": f"{answers.calibration[1]:.3f}",
            "label": "calibration error",
            "said": f"{answers.calibration[0]:.3f} before.",
        },
    ]


def _picture(audit: Audit, place: int) -> dict[str, Any]:
    with Image.open(audit.pictures[place]) as opened:
        made = opened.convert("RGB")
    made.thumbnail((_SIDE, _SIDE))
    sides: Sequence[str] = [f"{audit.labels[said.best[place]]} ({said.confidence[place]:.0%})" for said in audit.said]
    right = audit.labels[audit.classes[place]]
    return {
        "name": audit.name(place),
        "said": f"{audit.name(place)}: is {right}; was {sides[0]}, now {sides[1]}",
        "width": round(_SIDE * made.width / max(made.size)),
        "data": encoded(made),
    }


def _evidence(audit: Audit, row: int) -> dict[str, Any]:
    """The picture, and over it the map of the reference and that of the model."""
    assert audit.drift is not None
    place = int(audit.drift.places[row])
    pixels = load_images([audit.pictures[place]], audit.preprocess)[0]
    if audit.preprocess.color == "BGR":
        pixels = pixels[..., ::-1]
    picture = Image.fromarray(pixels.squeeze()).convert("RGB")
    wide, high = (max(1, round(_SIDE * side / max(picture.size))) for side in picture.size)
    picture = picture.resize((wide, high), Image.Resampling.NEAREST if wide > picture.width else None)
    parts = [picture, *(_over(picture, maps[row]) for maps in audit.drift.maps)]
    made = Image.new("RGB", (len(parts) * (wide + _GAP) - _GAP, high), "white")
    for index, part in enumerate(parts):
        made.paste(part, (index * (wide + _GAP), 0))
    before, after = (audit.labels[said.best[place]] for said in audit.said)
    answers = f"both say {before}" if before == after else f"{audit.reference} says {before}, {audit.model} {after}"
    return {
        "name": f"{audit.name(place)}: the picture, the evidence of {audit.reference} and that of {audit.model}",
        "said": f"{audit.name(place)}: {answers}; correlation {audit.drift.correlation[row]:.2f}, "
        f"overlap {audit.drift.overlap[row]:.2f}",
        "width": made.width,
        "data": encoded(made),
    }


def _over(picture: Image.Image, values: NDArray[np.float64]) -> Image.Image:
    """A picture in grey with a map over it: the more evidence, the redder and then yellower."""
    most = values.max() or 1.0
    heat = Image.fromarray((255 * values / most).astype(np.uint8)).resize(picture.size, Image.Resampling.BILINEAR)
    share = np.asarray(heat, np.float32)[..., None] / 255
    colour = np.concatenate([np.full_like(share, 255), 255 * np.clip(2 * share - 0.6, 0, 1), 0 * share], axis=-1)
    grey = np.asarray(picture.convert("L").convert("RGB"), np.float32)
    weight = 0.75 * np.sqrt(share)
    return Image.fromarray((grey * (1 - weight) + colour * weight).astype(np.uint8))


def encoded(picture: Image.Image) -> str:
    """A picture as the page carries it."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()
