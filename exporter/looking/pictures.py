"""The pictures of a unit: what excites it most, with its field marked, what of it, and what it would like best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from convoynet.exporter.data.images import load_images
from convoynet.exporter.errors import BadInput
from convoynet.exporter.looking.opened import Box, Images, Opened
from convoynet.exporter.looking.preferred import preferred
from convoynet.exporter.looking.projection import projections
from convoynet.exporter.looking.units import Unit, Units
from convoynet.exporter.progress import Progress

SIDE = 112
"""Pixels of a picture in the page."""
_GAP = 4
_NOTHING = Box(0, 0, 0, 0)
_MARK = (255, 60, 60)
# Of the strongest pixels of a projection, what is left out of its range.
_STRONGEST = 99.5


@dataclass(frozen=True)
class Shown:
    """One unit in pictures.

    Attributes:
        unit: which.
        marked: the pictures that excite it most, with the field of the place marked.
        fields: what lies in these fields.
        projected: what of it excites the unit; None where no projection leads back.
        preferred: the image that it likes best.
    """

    unit: Unit
    marked: Image.Image
    fields: Image.Image
    projected: Image.Image | None
    preferred: Image.Image


def shown(opened: Opened, units: Units, most: int, progress: Progress) -> tuple[list[Shown], str]:
    """The first units of `units.order` in pictures, and why there are no projections; empty where there are.

    Raises:
        BadInput: a picture cannot be read any more.
    """
    chosen = units.order[:most]
    liked = preferred(opened, units.layer, [unit.index for unit in chosen], progress) if chosen else []
    made, why = [], ""
    for unit, best in progress.track(list(zip(chosen, liked, strict=True)), "pictures of units", len(chosen)):
        top = unit.top
        pixels = load_images([units.pictures[one.picture] for one in top], opened.preprocess)
        boxes = [_box(opened, units, one.place) for one in top]
        projected = None
        if not why:
            try:
                projected = _strip(_signals(projections(opened, units.layer, pixels, unit.index, top)), boxes)
            except BadInput as error:
                why = str(error)
        colours = in_rgb(opened, pixels)
        made.append(
            Shown(
                unit,
                joined([_marked(each, box) for each, box in zip(colours, boxes, strict=True)]),
                _strip(colours, boxes),
                projected,
                fitted(drawn(best)),
            )
        )
    return made, why


def in_rgb(opened: Opened, pixels: Images) -> Images:
    """Pictures as a person sees them, of those that the network takes."""
    return pixels[..., ::-1] if opened.preprocess.order == "bgr" else pixels


def _box(opened: Opened, units: Units, place: tuple[int, int]) -> Box:
    """The field of a place within the image; all of the image where that is not known."""
    box = opened.box(units.layer, place)
    height, width = opened.size
    inside = Box(0, 0, height, width) if box is None else box.within(opened.size)
    # A place whose field lies in the padding sees nothing.
    return inside if min(inside.size) > 0 else _NOTHING


def _signals(values: NDArray[np.float32]) -> Images:
    """Signed values around grey, of each image by its own strongest ones."""
    strong = np.array([np.percentile(np.abs(each[each != 0]), _STRONGEST) if each.any() else 1 for each in values])
    levels = 127.5 + 127.5 * values / strong[:, None, None, None]
    made: Images = np.clip(levels, 0, 255).astype(np.uint8)
    return made


def _strip(images: Images, boxes: Sequence[Box]) -> Image.Image:
    blank = np.full((1, 1, images.shape[3]), 255, np.uint8)
    parts = [each[box.top : box.bottom, box.left : box.right] for each, box in zip(images, boxes, strict=True)]
    return joined([drawn(part if part.size else blank) for part in parts])


def _marked(pixels: NDArray[np.uint8], box: Box) -> Image.Image:
    picture = drawn(pixels)
    scale = SIDE / max(picture.size)
    picture = fitted(picture)
    if box == _NOTHING:
        return picture
    draw = ImageDraw.Draw(picture)
    draw.rectangle(
        (box.left * scale, box.top * scale, box.right * scale - 1, box.bottom * scale - 1), outline=_MARK, width=2
    )
    return picture


def drawn(pixels: NDArray[np.uint8]) -> Image.Image:
    """A picture of [h, w, channels]."""
    return Image.fromarray(np.ascontiguousarray(pixels if pixels.shape[2] > 1 else pixels[..., 0])).convert("RGB")


def fitted(picture: Image.Image) -> Image.Image:
    """As large as a picture in the page is."""
    scale = SIDE / max(picture.size)
    wide, high = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((wide, high), Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BILINEAR)


def joined(parts: Sequence[Image.Image]) -> Image.Image:
    """In a row, each in a place as large as the others."""
    made = Image.new("RGB", (max(1, len(parts) * (SIDE + _GAP) - _GAP), SIDE), "white")
    for index, part in enumerate(parts):
        made.paste(fitted(part), (index * (SIDE + _GAP), 0))
    return made
