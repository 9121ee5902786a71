"""An audit as one HTML page that opens by itself, with the pictures that it is about."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader
from PIL import Image

from convoynet.exporter import assets
from convoynet.exporter.auditing import words
from convoynet.exporter.evidence.html_report import table

if TYPE_CHECKING:
    from convoynet.exporter.auditing.audit import Audit

_TEMPLATE = "audit.html.j2"
_MOST_PICTURES = 24
# Pixels of a picture in the page: larger ones are made smaller, and smaller ones drawn larger.
_SIDE = 144


def html(audit: Audit) -> str:
    """The page."""
    flips = audit.answers.flips
    places = [int(place) for kind in (flips.lost, flips.other, flips.gained) for place in kind][:_MOST_PICTURES]
    templates = Environment(loader=FileSystemLoader(assets.FOLDER), autoescape=True)
    return templates.get_template(_TEMPLATE).render(
        audit=audit,
        cards=_cards(audit),
        classes=words.classes(audit, len(audit.labels)),
        confidence=words.confidence(audit),
        temperature=words.temperature(audit),
        pictures=[_picture(audit, place) for place in places],
        flipped="All" if len(places) == flips.count else len(places),
        table=table,
    )


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


def encoded(picture: Image.Image) -> str:
    """A picture as the page carries it."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()
