"""A picture as the network's input, and the same with parts hidden."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from convoynet.server.client.errors import invalid
from convoynet.server.datatypes import Array
from convoynet.server.errors import InvalidRequest, Oversize
from convoynet.server.explaining.masks import Map
from convoynet.server.images.images import ImageInput

MOST_BYTES = 2**26
"""The largest input of one picture."""
_MOST_PIXELS = 50_000_000
"""The largest image, which is what a server takes by default."""
Color = tuple[int, int, int]


@dataclass(frozen=True)
class Picture:
    """One input of a model.

    Attributes:
        row: the picture, in the input's type and order of axes.
        hidden: what stands where it is hidden, broadcast to the row.
        channels_last: whether the axes are height, width, channels.
    """

    row: Array
    hidden: Array
    channels_last: bool

    def under(self, masks: Iterable[Map]) -> Array:
        """The picture once for each mask, [n, ...]."""
        return np.stack([self._under(mask) for mask in masks])

    def _under(self, mask: Map) -> Array:
        mask = mask[..., None] if self.channels_last else mask[None]
        mixed = self.hidden + mask * (self.row - self.hidden)
        # What is kept whole is the picture itself, whatever is hidden with.
        mixed = np.where(mask == 1, self.row, mixed)
        return (np.rint(mixed) if self.row.dtype.kind in "iu" else mixed).astype(self.row.dtype)


def picture_of(data: bytes, image_input: ImageInput, color: Color | None) -> Picture:
    """The picture in an encoded image.

    Args:
        data: the image.
        image_input: how the model's config makes an input of it.
        color: R, G, B of what hides a part; None for the mean of the picture.

    Raises:
        ClientError: it is no image, or too large.
    """
    row = _decoded(data, image_input)
    if row.nbytes > MOST_BYTES:
        height, width = image_input.size
        raise invalid(f"an input of {width}x{height} pixels has {row.nbytes:,} bytes, {MOST_BYTES:,} are allowed")
    if color is None:
        axes = (0, 1) if image_input.channels_last else (1, 2)
        hidden = row.mean(axes, dtype=np.float64, keepdims=True).astype(np.float32)
    else:
        plain = io.BytesIO()
        Image.new("RGB", image_input.size[::-1], color).save(plain, "PNG")
        hidden = _decoded(plain.getvalue(), image_input).astype(np.float32)
    return Picture(row, hidden, image_input.channels_last)


def _decoded(data: bytes, image_input: ImageInput) -> Array:
    try:
        return np.ascontiguousarray(image_input.decode(data, _MOST_PIXELS))
    except (InvalidRequest, Oversize) as error:
        raise invalid(str(error)) from error
