"""The pictures of concepts: what lies along their vectors, and where units are on beside the masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from convoynet.exporter.data.images import load_images
from convoynet.exporter.looking.concept_folders import spread
from convoynet.exporter.looking.concepts import Concepts
from convoynet.exporter.looking.dissection import Overlaps, mask_of, on_maps
from convoynet.exporter.looking.opened import Images, Opened
from convoynet.exporter.looking.pictures import drawn, fitted, in_rgb, joined
from convoynet.exporter.looking.units import PICTURES
from convoynet.exporter.progress import Progress

_UNITS = 2  # of each concept
_MARK = (255, 60, 60)
_DARK = 0.3  # of the light that is left where a unit is off


@dataclass(frozen=True)
class Strip:
    """Pictures in a row.

    Attributes:
        name: what they are.
        picture: all of them.
        files: their names.
    """

    name: str
    picture: Image.Image
    files: str


@dataclass(frozen=True)
class Row:
    """A concept in pictures.

    Attributes:
        concept: its name.
        strips: of it.
    """

    concept: str
    strips: Sequence[Strip]


def rows_of_concepts(opened: Opened, found: Concepts, progress: Progress) -> list[Row]:
    """Some pictures of each concept, and the images of the classes that lie along its vectors most and least.

    Raises:
        BadInput: a picture cannot be read any more.
    """
    made = []
    for one in progress.track(found.told, "pictures of concepts", len(found.told)):
        order = np.argsort(-one.along, kind="stable")
        count = min(PICTURES, max(1, len(order) // 2))
        most, least = ([found.images[at] for at in some] for some in (order[:count], order[::-1][:count]))
        strips = [("some of its pictures", spread(one.concept.pictures, PICTURES))]
        strips.append(("the images that have most of it", most))
        if len(order) > 1:
            strips.append(("the images that have least of it", least))
        made.append(Row(one.concept.name, [_strip(name, files, _pixels(opened, files)) for name, files in strips]))
    return made


def rows_of_masks(opened: Opened, found: Overlaps, progress: Progress) -> list[Row]:
    """Of the units that overlap each concept most, the pictures that excite them: light where the unit is on.

    Raises:
        BadInput: a picture cannot be read any more.
    """
    numbers = {file: number for number, file in enumerate(found.pictures)}
    made = []
    for index, each in enumerate(progress.track(found.masks, "pictures of masks", len(found.masks))):
        units = [unit for unit in found.best(index)[:_UNITS] if found.iou[unit, index] > 0]
        strips = []
        for unit in units:
            files = sorted(each.by_picture, key=lambda file: -float(found.highest[numbers[file], unit]))[:PICTURES]
            pixels = _pixels(opened, files)
            on = _on(opened, found, files, unit)
            masks = [mask_of(opened, each.by_picture[file]).numpy() for file in files]
            lit = np.where(on[..., None], pixels, _DARK * pixels).astype(np.uint8)
            pictures = [_outlined(drawn(one), mask) for one, mask in zip(lit, masks, strict=True)]
            told = f"unit {unit}, overlap {found.iou[unit, index]:.3f}"
            strips.append(Strip(told, joined(pictures), ", ".join(file.name for file in files)))
        made.append(Row(each.concept, strips))
    return made


def _pixels(opened: Opened, files: Sequence[Path]) -> Images:
    return in_rgb(opened, load_images(files, opened.preprocess))


def _strip(name: str, files: Sequence[Path], pixels: Images) -> Strip:
    return Strip(name, joined([drawn(each) for each in pixels]), ", ".join(file.name for file in files))


def _on(opened: Opened, found: Overlaps, files: Sequence[Path], unit: int) -> np.ndarray:
    """[n, height, width], where a unit is on."""
    made = []
    for file in files:
        with torch.no_grad():
            maps = opened.maps(found.layer, opened.inputs(load_images([file], opened.preprocess))).float()
        some = slice(unit, unit + 1)
        made.append(on_maps(opened, found.layer, maps[:, some], found.thresholds[some])[0, 0].numpy())
    return np.stack(made)


def _outlined(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """As large as in the page, a line around what the mask shows."""
    picture = fitted(picture)
    shown = np.asarray(Image.fromarray(mask).resize(picture.size, Image.Resampling.NEAREST))
    inner = np.pad(shown, 1, constant_values=False)
    inside = inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
    line = Image.fromarray((255 * (shown & ~inside)).astype(np.uint8))
    ImageDraw.Draw(picture).bitmap((0, 0), line, fill=_MARK)
    return picture
