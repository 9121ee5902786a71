"""Which units detect what masks show: network dissection.

D. Bau and others 2017, "Network Dissection: Quantifying Interpretability of Deep Visual Representations",
arXiv:1704.05796. A unit is on where its map, brought to the image's size, is within the top 0.5 % of all of its values
on all pictures. Its overlap with a concept is the intersection with the concept's masks by the union (IoU), both summed
over the pictures that have a mask of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isinf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from convoynet.exporter.data.images import Preprocess, load_images, opened_image
from convoynet.exporter.errors import BadInput
from convoynet.exporter.looking.concept_folders import Masks
from convoynet.exporter.looking.opened import Layer, Opened
from convoynet.exporter.progress import Progress

SHARE = 0.005
"""Of a unit's values, those where it is on."""
DETECTS = 0.04
"""From this overlap on a unit detects a concept, as in the paper."""
# Bytes of maps at the image's size at a time, and of the highest values that are kept.
_MOST_BYTES = 64 * 2**20
_MOST_KEPT = 256 * 2**20
# Of images whose numbers are their colours: no index, and black is 0 in all of them.
_PLAIN = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F", "RGB", "RGBA")
# Of interpolation, by a unit's range.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Overlaps:
    """Of the units of a layer with masks.

    Attributes:
        layer: the layer.
        folder: where the pictures are.
        pictures: these.
        source: which ones, in words.
        masks: of each concept.
        shown: of each concept, the share of its pictures that the masks cover.
        iou: [units, concepts].
        thresholds: of each unit, from where on it is on; infinite for one that never changes.
        highest: [pictures, units], the largest value of each map.
    """

    layer: Layer
    folder: Path
    pictures: Sequence[Path]
    source: str
    masks: Sequence[Masks]
    shown: Sequence[float]
    iou: NDArray[np.float64]
    thresholds: Tensor
    highest: Tensor

    def best(self, concept: int) -> list[int]:
        """The units by their overlap with a concept, the largest first."""
        order: list[int] = np.argsort(-self.iou[:, concept], kind="stable").tolist()
        return order

    def detectors(self, concept: int) -> list[int]:
        """The units that overlap a concept enough, and no other one more."""
        mine = self.iou.argmax(axis=1) == concept
        return [unit for unit in self.best(concept) if mine[unit] and self.iou[unit, concept] >= DETECTS]

    def to_json(self) -> dict[str, Any]:
        """As docs/inspecting.md describes it."""
        names = [each.concept for each in self.masks]
        return {
            "layer": self.layer.name,
            "images": self.source,
            "concepts": [
                {
                    "concept": name,
                    "masks": len(each.by_picture),
                    "share": share,
                    "detectors": self.detectors(index),
                }
                for index, (name, each, share) in enumerate(zip(names, self.masks, self.shown, strict=True))
            ],
            "units": [
                {
                    "unit": unit,
                    "threshold": None if isinf(threshold) else threshold,
                    "iou": dict(zip(names, row, strict=True)),
                }
                for unit, (threshold, row) in enumerate(zip(self.thresholds.tolist(), self.iou.tolist(), strict=True))
            ],
        }


def most_pictures(layer: Layer) -> int:
    """How many pictures may be looked at, so that what is kept of them fits."""
    bytes_each = layer.channels * (4 + SHARE * 4 * layer.size[0] * layer.size[1])
    return max(1, int(_MOST_KEPT / bytes_each))


def overlaps_of(
    opened: Opened, layer: Layer, given: tuple[Path, Sequence[Path], str], masks: Sequence[Masks], progress: Progress
) -> Overlaps:
    """Look at all units of a layer.

    Args:
        opened: the network.
        layer: of it.
        given: the folder, the pictures in it, and which they are in words.
        masks: of each concept, for some of the pictures.
        progress: shows how far it is.

    Raises:
        BadInput: a picture or a mask cannot be read, the network does not run, or there is nothing to see.
    """
    folder, pictures, source = given
    thresholds, highest = _thresholds(opened, layer, pictures, progress)
    both = np.zeros((layer.channels, len(masks)), np.int64)
    either, covered, pixels = np.zeros_like(both), np.zeros(len(masks), np.int64), np.zeros(len(masks), np.int64)
    labelled = [file for file in pictures if any(file in each.by_picture for each in masks)]
    for file in progress.track(labelled, f"masks of {len(labelled)} pictures", len(labelled)):
        of = [index for index, each in enumerate(masks) if file in each.by_picture]
        shown = torch.stack([mask_of(opened, masks[index].by_picture[file]) for index in of]).flatten(1)
        size = shown.sum(dim=1)
        covered[of] += size.numpy()
        pixels[of] += shown.shape[1]
        for channels, on in _on(opened, layer, file, thresholds):
            flat = on.flatten(1).float()  # counts of pixels are exact
            common = (flat @ shown.float().T).long()
            both[channels, of] += common.numpy()
            either[channels, of] += (flat.sum(dim=1).long()[:, None] + size[None, :] - common).numpy()
    if empty := [each.concept for each, count in zip(masks, covered, strict=True) if not count]:
        raise BadInput(
            f"the masks of {', '.join(empty)} are all black where {opened.name} looks; what is not black is the concept"
        )
    return Overlaps(
        layer, folder, pictures, source, masks, (covered / pixels).tolist(), both / either, thresholds, highest
    )


def mask_of(opened: Opened, file: Path) -> Tensor:
    """[height, width] of the network's image, true where a mask is not black."""
    preprocess = opened.preprocess
    # As the picture is, but every pixel stays what it is, and what is filled in shows nothing.
    same = Preprocess(preprocess.size, preprocess.resize, (0.0,), (1.0,), "nearest", preprocess.fit)
    with opened_image(file) as image:
        colours = image if image.mode in _PLAIN else image.convert("RGBA")
        values = np.asarray(colours)
        values = values[..., :-1] if colours.mode.endswith("A") else values
        shown = values.reshape(*values.shape[:2], -1).any(axis=2)
        return torch.from_numpy(same.pixels(Image.fromarray(shown.astype(np.uint8) * 255))[..., 0] > 0)


def on_maps(opened: Opened, layer: Layer, maps: Tensor, thresholds: Tensor) -> Tensor:
    """[n, channels, height, width] of the image, true where a unit is on.

    Args:
        opened: the network.
        layer: of it.
        maps: [n, channels, height, width] of it.
        thresholds: of the channels.
    """
    down, across = _weights(opened, layer)
    large = torch.einsum("nchw,Hh,Ww->ncHW", maps, down, across)
    return large >= thresholds[:, None, None]


def _on(opened: Opened, layer: Layer, file: Path, thresholds: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Where units are on in a picture, some of them at a time: [channels, height, width]."""
    height, width = opened.size
    step = max(1, _MOST_BYTES // (height * width * 8))
    with torch.no_grad():
        maps = opened.maps(layer, opened.inputs(load_images([file], opened.preprocess))).float()
        for at in range(0, layer.channels, step):
            some = slice(at, min(at + step, layer.channels))
            yield some, on_maps(opened, layer, maps[:, some], thresholds[some])[0]


def _thresholds(opened: Opened, layer: Layer, pictures: Sequence[Path], progress: Progress) -> tuple[Tensor, Tensor]:
    """From where on each unit is on, and the largest value of each on each picture."""
    places = layer.size[0] * layer.size[1] * len(pictures)
    kept = int(SHARE * places)
    if not kept:
        raise BadInput(
            f"{len(pictures)} pictures have {places} places in {layer.name}, and {SHARE:.1%} of them are none: add "
            "pictures to --images, or take a layer with a larger map"
        )
    values = torch.empty(layer.channels, 0)
    lowest = torch.full((layer.channels,), torch.inf)
    highest = []
    starts = opened.starts(layer, len(pictures))
    for at in progress.track(starts, f"maps of {len(pictures)} pictures", len(starts)):
        pixels = load_images(pictures[at : at + starts.step], opened.preprocess)
        with torch.no_grad():
            maps = opened.maps(layer, opened.inputs(pixels)).float()
        if not torch.isfinite(maps).all():
            raise BadInput(f"the maps of {layer.name} are not finite: there is nothing to look at")
        flat = maps.flatten(2)
        highest.append(flat.amax(dim=2))
        lowest = torch.minimum(lowest, flat.amin(dim=(0, 2)))
        values = torch.cat((values, flat.transpose(0, 1).flatten(1)), dim=1)
        values = values.topk(min(kept, values.shape[1]), dim=1).values
    largest = torch.cat(highest)
    span = largest.amax(dim=0) - lowest
    # Where it is off nearly everywhere a unit is on wherever it is not off; one that never changes is never on.
    found = torch.maximum(values[:, -1] - _ROUNDING * span, lowest + _ROUNDING * span)
    return torch.where(span > 0, found, torch.inf), largest


def _weights(opened: Opened, layer: Layer) -> tuple[Tensor, Tensor]:
    """[image's rows, map's rows] and the same of columns: each pixel between the middles of the nearest two fields."""
    made = []
    for axis, (pixels, places) in enumerate(zip(opened.size, layer.size, strict=True)):
        first, step = (pixels / places - 1) / 2, pixels / places
        if layer.axes is not None:
            seen = layer.axes[axis].field()
            # Where squeeze and excitation lets each place see all, it is where its own window is.
            first, step = float(seen.centre), float(seen.stride or 0)
        middles = first + step * np.arange(places)
        rows = [np.interp(np.arange(pixels), middles, one) for one in np.eye(places)]
        made.append(torch.from_numpy(np.stack(rows, axis=1)).float())
    return made[0], made[1]
