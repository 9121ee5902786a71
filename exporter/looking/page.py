"""What was found in a network as one HTML page that opens by itself, with the pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from convoynet.exporter import assets
from convoynet.exporter.auditing.page import encoded
from convoynet.exporter.evidence.html_report import table
from convoynet.exporter.looking.concept_pictures import Row, rows_of_concepts, rows_of_masks
from convoynet.exporter.looking.concepts import Concepts
from convoynet.exporter.looking.dissection import DETECTS, SHARE
from convoynet.exporter.looking.effective_field import LEAST, EffectiveField
from convoynet.exporter.looking.found import (
    Found,
    concept_rows,
    concept_table,
    effective_rows,
    ordered,
    overlap_rows,
    overlap_table,
    unit_rows,
    unit_table,
)
from convoynet.exporter.looking.pictures import Shown, shown
from convoynet.exporter.looking.units import PICTURES, Units
from convoynet.exporter.progress import Progress

_TEMPLATE = "looking.html.j2"
# Pixels of the picture of a field in the page.
_SIDE = 360
_MARK = (90, 200, 250)
_CURVE = (320, 90)
_MOST_CLASSES = 12


@dataclass(frozen=True)
class Pictures:
    """What the page shows of what was found.

    Attributes:
        units: some of them.
        why: there are no projections of them; empty where there are.
        concepts: each.
        masks: each concept's.
    """

    units: Sequence[Shown] = ()
    why: str = ""
    concepts: Sequence[Row] = ()
    masks: Sequence[Row] = ()


def pictures_of(found: Found, most: int, progress: Progress) -> Pictures:
    """The pictures of all that was found, at most so many units of a layer.

    Raises:
        BadInput: a picture cannot be read any more.
    """
    units, why = ([], "") if found.units is None else shown(found.opened, found.units, most, progress)
    return Pictures(
        units,
        why,
        [] if found.concepts is None else rows_of_concepts(found.opened, found.concepts, progress),
        [] if found.overlaps is None else rows_of_masks(found.opened, found.overlaps, progress),
    )


def html(found: Found, pictures: Pictures | None = None) -> str:
    """The page."""
    pictures = pictures or Pictures()
    templates = Environment(loader=FileSystemLoader(assets.FOLDER), autoescape=True)
    effective, units, concepts, overlaps = found.effective, found.units, found.concepts, found.overlaps
    return templates.get_template(_TEMPLATE).render(
        found=found,
        effective=effective,
        least=f"{LEAST:.2%}",
        rows=[] if effective is None else effective_rows(effective),
        field=None if effective is None else _field(effective),
        curves=[] if effective is None else _curves(effective),
        units=units,
        unit_rows=[] if units is None else unit_rows(units),
        unit_table=[] if units is None else unit_table(units, len(units.units)),
        shown=[] if units is None else [_unit(units, one) for one in pictures.units],
        pictures=PICTURES,
        why=pictures.why,
        concepts=concepts,
        concept_rows=[] if concepts is None else concept_rows(concepts),
        concept_table=[] if concepts is None else concept_table(concepts, len(concepts.tested)),
        bars=[] if concepts is None else _bars(concepts),
        concept_pictures=_with_data(pictures.concepts),
        overlaps=overlaps,
        detects=DETECTS,
        on=f"{SHARE:.1%}",
        overlap_rows=[] if overlaps is None else overlap_rows(overlaps),
        overlap_table=[] if overlaps is None else overlap_table(overlaps),
        mask_pictures=_with_data(pictures.masks),
        table=table,
    )


def _unit(units: Units, one: Shown) -> dict[str, Any]:
    """A unit with its pictures and what is said below them."""
    unit = one.unit
    said = [f"Above zero on {unit.active} of {len(units.pictures)} pictures, at most {unit.top[0].value:.4g}"]
    if unit.changed is not None:
        said.append(
            f"without it {unit.changed} of {units.ablated} answers become others, and their probability falls by "
            f"{unit.lost:.4f}"
        )
    if unit.twin is not None:
        said.append(f"most like unit {unit.twin[0]} ({unit.twin[1]:.2f})")
    strips = [("the pictures that excite it most, its field marked", one.marked), ("these fields", one.fields)]
    if one.projected is not None:
        strips.append(("what in them excites it", one.projected))
    return {
        "index": unit.index,
        "said": f"{'; '.join(said)}.",
        "names": ", ".join(units.name(each.picture) for each in unit.top),
        "preferred": photograph(one.preferred),
        "strips": [{"name": name, "width": strip.width, "data": photograph(strip)} for name, strip in strips],
    }


def _with_data(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Concepts in pictures, as the template takes them."""
    return [
        {
            "concept": row.concept,
            "strips": [
                {"name": one.name, "files": one.files, "width": one.picture.width, "data": photograph(one.picture)}
                for one in row.strips
            ],
        }
        for row in rows
    ]


def _bars(found: Concepts) -> list[dict[str, Any]]:
    """The scores of each class as bars in a drawing, and the random ones as a line across."""
    made: list[dict[str, Any]] = []
    for one in ordered(found):
        if not made or made[-1]["label"] != one.label:
            made.append({"label": one.label, "images": one.images, "bars": []})
        made[-1]["bars"].append(
            {
                "concept": one.concept,
                "score": one.score,
                "random": one.random,
                "significant": one.significant,
                "told": f"{one.score:.2f}, {one.said}",
            }
        )
    return made[:_MOST_CLASSES]


def photograph(picture: Image.Image) -> str:
    """A picture as the page carries it, where it is large."""
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=85)
    return base64.b64encode(file.getvalue()).decode()


def _field(found: EffectiveField) -> dict[str, Any]:
    """The gradient at every pixel of the image, the theoretical field marked."""
    height, width = found.sizes.shape
    scale = _SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    share = found.sizes / found.sizes.max()
    # A Gaussian falls fast: by their roots the weak pixels show as well.
    picture = Image.fromarray(_coloured(np.sqrt(share))).resize(size, Image.Resampling.NEAREST)
    if found.field is not None:
        inside = found.field.within((height, width))
        draw = ImageDraw.Draw(picture)
        corners = (inside.left * scale, inside.top * scale, inside.right * scale - 1, inside.bottom * scale - 1)
        draw.rectangle(corners, outline=_MARK, width=2)
    return {"width": size[0], "data": encoded(picture)}


def _coloured(share: NDArray[np.float64]) -> NDArray[np.uint8]:
    """0..1 from black over red and yellow to white."""
    parts = [np.clip(3 * share - step, 0, 1) for step in range(3)]
    return (255 * np.stack(parts, axis=-1)).astype(np.uint8)


def _curves(found: EffectiveField) -> list[dict[str, Any]]:
    """The connections along both axes, as points of a line in a drawing."""
    made = []
    for name, counts in zip(("from top to bottom", "from left to right"), found.connections or (), strict=False):
        width, height = _CURVE
        most = max(int(counts.max()), 1)
        across = np.linspace(0, width, len(counts))
        points = " ".join(f"{x:.1f},{height * (1 - y / most):.1f}" for x, y in zip(across, counts, strict=True))
        made.append({"name": name, "points": points, "most": f"{most:,}", "width": width, "height": height})
    return made
