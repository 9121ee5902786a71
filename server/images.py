"""Encoded images to network inputs, as the model's config states it."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from server.errors import InvalidModel, InvalidRequest, Oversize
from server.types import Tensor

FORMATS = ("JPEG", "PNG", "WEBP")
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class ImageInput:
    """How an encoded image becomes one row of the model's input.

    Attributes:
        color: "RGB" or "L" (greyscale).
        resize: The shorter side is resized to this first, in pixels.
        size: (height, width) of the centre crop.
        interpolation: "bilinear" or "bicubic", with antialiasing.
        scale, shift: Per channel, float32 [C]; the input is pixel * scale + shift. None where the graph takes
            raw pixels.
        channels_last: True for HWC rows, False for CHW.
    """

    color: str
    resize: int
    size: tuple[int, int]
    interpolation: str
    scale: NDArray[np.float32] | None
    shift: NDArray[np.float32] | None
    channels_last: bool

    def decode(self, data: bytes, max_pixels: int) -> Tensor:
        """One encoded image to one row: uint8 or float32, HWC or CHW.

        Raises:
            Oversize: The image has more than `max_pixels` pixels, as its header states before it is decoded.
            InvalidRequest: The bytes are not an image of a format in FORMATS.
        """
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise Oversize(f"an image of {image.width}x{image.height} pixels is over the limit of {max_pixels}")
                pixels = np.asarray(self._crop(image.convert(self.color)))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InvalidRequest(
                f"{len(data)} bytes are not a readable image of a format in {', '.join(FORMATS)}"
            ) from error
        row: Tensor = pixels.reshape(*self.size, -1)
        if self.scale is not None and self.shift is not None:
            row = row.astype(np.float32) * self.scale + self.shift
        return row if self.channels_last else row.transpose(2, 0, 1)

    def _crop(self, image: Image.Image) -> Image.Image:
        """The centre of the resized image, at the pixels that torchvision's Resize and CenterCrop choose."""
        short, long = sorted(image.size)
        if short != self.resize:
            scaled = int(self.resize * long / short)
            tall = image.height > image.width
            target = (self.resize, scaled) if tall else (scaled, self.resize)
            image = image.resize(target, _RESAMPLING[self.interpolation])
        height, width = self.size
        left = _margin(image.width, width)
        top = _margin(image.height, height)
        return image.crop((left, top, left + width, top + height))


def _margin(have: int, want: int) -> int:
    """Where the crop begins; negative (Pillow fills with black) where the image is smaller than the crop."""
    return round((have - want) / 2) if have >= want else -((want - have) // 2)


def image_input_from_json(text: str, channels_last: bool) -> ImageInput:
    """Reads the `preprocess` parameter of config.pbtxt.

    Raises:
        InvalidModel: The text is not what `convoy export` writes.
    """
    try:
        stated = json.loads(text)
        scale = shift = None
        if "mean" in stated:
            std = np.asarray(stated["std"], np.float32)
            scale = (1 / (255 * std)).astype(np.float32)
            shift = (-np.asarray(stated["mean"], np.float32) / std).astype(np.float32)
        height, width = stated["size"]
        found = ImageInput(
            stated["color"],
            int(stated["resize"]),
            (int(height), int(width)),
            stated["interpolation"],
            scale,
            shift,
            channels_last,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidModel(f"parameter 'preprocess' of config.pbtxt is not readable: {error!r}") from error
    if found.color not in ("RGB", "L") or found.interpolation not in _RESAMPLING:
        raise InvalidModel(
            f"parameter 'preprocess' has color {found.color!r} and interpolation {found.interpolation!r}; "
            f"known are RGB, L and {', '.join(_RESAMPLING)}"
        )
    return found
