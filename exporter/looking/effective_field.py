"""The effective receptive field: which pixels one output really depends on, by gradients on images.

W. Luo, Y. Li, R. Urtasun, R. Zemel 2016, "Understanding the Effective Receptive Field in Deep Convolutional Neural
Networks", arXiv:1701.04128. The gradient of the unit in the middle of a map, of all its channels together, is taken at
every pixel; its size, summed over the image's channels, is averaged over images. What is within 4.55 % of the largest
(two standard deviations of a Gaussian) is the effective field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from convoynet.exporter.errors import BadInput
from convoynet.exporter.inspecting.connections import Counts, connections
from convoynet.exporter.looking.opened import Box, Images, Layer, Opened
from convoynet.exporter.progress import Progress

LEAST = 0.0455
"""Of the largest: 1 less 95.45 %, what lies within two standard deviations."""


@dataclass(frozen=True)
class EffectiveField:
    """What was found of one layer.

    Attributes:
        layer: its name.
        place: (row, column) of the output in its map.
        source: which images, in words.
        sizes: [height, width] of the image, float64: the mean size of the gradient.
        field: the theoretical one, also beyond the image; None where it is not known.
        connections: along the height and along the width, for each row and column of the image, how many connections
            lie on the ways to the output; None where that is not known.
    """

    layer: str
    place: tuple[int, int]
    source: str
    sizes: NDArray[np.float64]
    field: Box | None
    connections: Sequence[Counts] | None

    @property
    def pixels(self) -> int:
        """How many are in the effective field."""
        return int((self.sizes >= LEAST * self.sizes.max()).sum())

    @property
    def side(self) -> float:
        """Of a square of as many pixels."""
        return sqrt(self.pixels)

    @property
    def share_of_image(self) -> float:
        """The effective field's."""
        return self.pixels / self.sizes.size

    @property
    def share_of_field(self) -> float | None:
        """The effective field's of the theoretical one, beyond the image too."""
        if self.field is None:
            return None
        height, width = self.field.size
        return self.pixels / (height * width)

    def to_json(self) -> Mapping[str, Any]:
        """As docs/inspecting.md describes it."""
        along = None
        if self.connections is not None:
            along = {key: counts.tolist() for key, counts in zip(("rows", "columns"), self.connections, strict=True)}
        return {
            "layer": self.layer,
            "place": list(self.place),
            "images": self.source,
            "theoretical_field": None if self.field is None else list(self.field.size),
            "effective_pixels": self.pixels,
            "effective_side": self.side,
            "share_of_field": self.share_of_field,
            "share_of_image": self.share_of_image,
            "connections": along,
        }


def effective_field(opened: Opened, layer: Layer, images: Images, source: str, progress: Progress) -> EffectiveField:
    """Find the effective field of the middle of a layer's map.

    Args:
        opened: the network.
        layer: of it.
        images: [n, h, w, channels].
        source: which ones, in words.
        progress: shows how far it is.

    Raises:
        BadInput: no gradient arrives.
    """
    row, column = layer.middle
    total = np.zeros(opened.size)
    starts = range(0, len(images), opened.batch)
    for at in progress.track(starts, f"gradients of {len(images)} images", len(starts)):
        inputs = opened.inputs(images[at : at + opened.batch]).requires_grad_()
        output = opened.maps(layer, inputs)[:, :, row, column].sum()
        (gradient,) = torch.autograd.grad(output, inputs)
        total += opened.in_places(gradient).abs().double().sum(dim=(0, 1)).numpy()
    if not np.isfinite(total).all() or not total.max() > 0:
        raise BadInput(
            f"no gradient arrives at the image from the middle of {layer.name}: all its {layer.channels} units are off "
            "there on these images, or broken; choose another layer, or other images"
        )
    return EffectiveField(
        layer.name,
        layer.middle,
        source,
        total / len(images),
        opened.box(layer, layer.middle),
        connections(opened.trace, opened.axes, layer.tensor, layer.middle),
    )
