"""Encoded images to network inputs, as the model's config states it."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from convoynet.server.errors import InvalidModel, InvalidRequest, Oversize, ServerError
from convoynet.server.images.image_decoder import JpegDecoder
from convoynet.server.types import Tensor

FORMATS = ("JPEG", "PNG", "WEBP")
Holding = Callable[[int], AbstractContextManager[object]]
"""Around a piece of work, told of the bytes that it takes."""
_PIXEL_BYTES = 8
"""What a pixel takes while an image is decoded and converted: four bytes each time."""
_WHOLE_PIXELS = 2**24
"""The largest image that is resized whole and then cropped."""
_MOST_SCANS = 100
_RESAMPLING = {
    name: Image.Resampling[name.upper()] for name in ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
}
_REACH = 3
"""Pixels of the image to either side that a filter looks at, at most."""
_COLORS = ("RGB", "BGR", "L")
_MOST_SIDE = 2**16


@dataclass(frozen=True)
class Region:
    """Where an image lies in the network input, and the way back; all pairs are (x, y) in pixels.

    Attributes:
        image: Size of the image.
        resized: The image's size in the input.
        corner: Where its top left corner lies in the input; negative where a crop cuts it off.
        input: Size of the input.
    """

    image: tuple[int, int]
    resized: tuple[int, int]
    corner: tuple[int, int]
    input: tuple[int, int]

    def boxes_in_image(self, boxes: NDArray[np.floating]) -> NDArray[np.float64]:
        """Boxes of the input, [n, 4] as x1, y1, x2, y2, in pixels of the image and clipped to it."""
        corner, scale = np.tile(self.corner, 2), np.tile(np.divide(self.image, self.resized), 2)
        found: NDArray[np.float64] = np.clip((boxes - corner) * scale, 0, np.tile(self.image, 2))
        return found

    def map_in_image(self, classes: NDArray[np.integer]) -> NDArray[np.int32]:
        """A map of the whole input, [h, w] of any size, at the image's pixels by nearest neighbour.

        Returns:
            int32 [height, width]; -1 where the network did not see the image.
        """
        columns, rows = (self._nearest(axis, cells) for axis, cells in enumerate(reversed(classes.shape)))
        # One more row and column, which is where the index -1 leads to.
        framed = np.pad(classes.astype(np.int32), (0, 1), constant_values=-1)
        return framed[rows[:, None], columns]

    def _nearest(self, axis: int, cells: int) -> NDArray[np.intp]:
        """For each pixel of the image along an axis the cell of the map that its centre lies in, or -1."""
        centres = np.arange(self.image[axis]) + 0.5
        positions = centres * self.resized[axis] / self.image[axis] + self.corner[axis]
        found = np.floor(positions * cells / self.input[axis]).astype(np.intp)
        return np.where((found >= 0) & (found < cells), found, -1)


@dataclass(frozen=True)
class ImageInput:
    """How an encoded image becomes one row of the model's input.

    Attributes:
        color: "RGB", "BGR" or "L" (greyscale).
        resize: The shorter side is resized to this first, in pixels, or the image to this (height, width), whatever its
            proportions are; without meaning where `fill` is set.
        size: (height, width) of the input.
        interpolation: Pillow's, by its name; all but "nearest" with antialiasing.
        fill: None cuts the centre out of the resized image. A colour, 0..255 for each channel in the order of `color`,
            fits all of the image into the top left of the input and fills the rest.
        scale, shift: Per channel, float32 [C]; the input is pixel * scale + shift. None where the graph takes
            raw pixels.
        channels_last: True for HWC rows, False for CHW.
    """

    color: str
    resize: int | tuple[int, int]
    size: tuple[int, int]
    interpolation: str
    fill: tuple[int, ...] | None
    scale: NDArray[np.float32] | None
    shift: NDArray[np.float32] | None
    channels_last: bool

    def decode(
        self, data: bytes, max_pixels: int, jpeg: JpegDecoder | None = None, holding: Holding = nullcontext
    ) -> Tensor:
        """One encoded image to one row: uint8 or float32, HWC or CHW.

        Args:
            data: The image.
            max_pixels: The largest that is decoded.
            jpeg: Decodes whole colour JPEGs; None for the CPU's decoder.
            holding: Told of the bytes that decoding takes, before it takes them, and of its end.

        Raises:
            Oversize: The image has more than `max_pixels` pixels, as its header states before it is decoded.
            InvalidRequest: The bytes are not an image of a format in FORMATS.
        """
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise Oversize(f"an image of {image.width}x{image.height} pixels is over the limit of {max_pixels}")
                _check_scans(data, image)
                with holding(_PIXEL_BYTES * image.width * image.height):
                    mode = self.mode
                    pixels = np.asarray(self.fit(_jpeg(data, image, mode, jpeg) or converted(image, mode)))
        except ServerError:
            raise
        except Exception as error:  # whatever a decoder makes of bytes that somebody sent
            raise _unreadable(data) from error
        row: Tensor = pixels.reshape(*self.size, -1)
        if self.color == "BGR":
            row = row[..., ::-1]
        if self.scale is not None and self.shift is not None:
            row = row.astype(np.float32) * self.scale + self.shift
        return row if self.channels_last else row.transpose(2, 0, 1)

    @property
    def mode(self) -> str:
        """Pillow's mode, in which an image is resized."""
        return "L" if self.color == "L" else "RGB"

    def region(self, width: int, height: int) -> Region:
        """Where an image of this size lies in the input."""
        size = self.size[1], self.size[0]
        if self.fill is not None:
            scale = min(size[0] / width, size[1] / height)
            resized = max(1, round(width * scale)), max(1, round(height * scale))
            return Region((width, height), resized, (0, 0), size)
        # The pixels that torchvision's Resize and CenterCrop choose.
        if isinstance(self.resize, int):
            long = int(self.resize * max(width, height) / min(width, height))
            resized = (self.resize, long) if height > width else (long, self.resize)
        else:
            resized = self.resize[1], self.resize[0]
        corner = _corner(resized[0], size[0]), _corner(resized[1], size[1])
        return Region((width, height), resized, corner, size)

    def fit(self, image: Image.Image) -> Image.Image:
        """The image resized, and cropped or padded to the input's size."""
        region = self.region(*image.size)
        left, top = -region.corner[0], -region.corner[1]
        if self.fill is None and region.resized[0] * region.resized[1] > _WHOLE_PIXELS:
            image, left, top = self._middle(image, region)
        elif region.resized != image.size:
            image = image.resize(region.resized, _RESAMPLING[self.interpolation])
        if self.fill is not None:
            fill = self.fill[::-1] if self.color == "BGR" else self.fill
            canvas = Image.new(self.mode, region.input, fill if len(fill) > 1 else fill[0])
            canvas.paste(image, region.corner)
            return canvas
        # Pillow fills with black where the image is smaller than the crop.
        return image.crop((left, top, left + region.input[0], top + region.input[1]))

    def _middle(self, image: Image.Image, region: Region) -> tuple[Image.Image, int, int]:
        """The same pixels without the rest of the resized image, and where the crop begins in them.

        One side of a thin image becomes as many times longer as the other has to: a picture of 1 x 65,535 pixels would
        be resized to 256 x 16,776,960.
        """
        begin, end, box = [], [], []
        for have, resized, corner, wanted in zip(image.size, region.resized, region.corner, region.input, strict=True):
            margin = _REACH * math.ceil(resized / have) + _REACH
            begin.append(max(0, -corner - margin))
            end.append(min(resized, -corner + wanted + margin))
            box.append((begin[-1] * have / resized, end[-1] * have / resized))
        (x0, x1), (y0, y1) = box
        size = end[0] - begin[0], end[1] - begin[1]
        part = image.resize(size, _RESAMPLING[self.interpolation], (x0, y0, x1, y1))
        return part, -region.corner[0] - begin[0], -region.corner[1] - begin[1]


def _check_scans(data: bytes, header: Image.Image) -> None:
    """Refuses a progressive JPEG that goes over its pixels again and again: each scan takes as long as a whole image.

    Raises:
        InvalidRequest: It has more scans than an image has any use for.
    """
    if header.format == "JPEG" and header.info.get("progressive"):
        # In what is coded, 255 is followed by 0.
        scans = data.count(b"\xff\xda")
        if scans > _MOST_SCANS:
            raise InvalidRequest(f"a JPEG of {scans} scans, {_MOST_SCANS} are allowed")


def _jpeg(data: bytes, header: Image.Image, color: str, decoder: JpegDecoder | None) -> Image.Image | None:
    """A whole colour JPEG, on the CPU in two thirds of Pillow's time and with its pixels; None leaves it to Pillow."""
    if header.format != "JPEG" or header.mode != "RGB" or color != "RGB":
        return None
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        if (width, height) != header.size:  # which was found small enough
            return None
        pixels = (decoder or simplejpeg.decode_jpeg)(data)
    except ValueError:  # what is broken or rare is judged by one library
        return None
    return Image.frombuffer("RGB", header.size, pixels, "raw", "RGB", 0, 1)


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels of an encoded image, as its header states them.

    Raises:
        InvalidRequest: The bytes are not an image of a format in FORMATS.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.size
    except Exception as error:  # as in decode()
        raise _unreadable(data) from error


def _unreadable(data: bytes) -> InvalidRequest:
    return InvalidRequest(f"{len(data)} bytes are not a readable image of a format in {', '.join(FORMATS)}")


def converted(image: Image.Image, color: str) -> Image.Image:
    """The image in another colour mode, opaque.

    Raises:
        ValueError: Its values have no known range.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # Pillow would cut at 255. Divided by 257 and rounded, as the exporter does it.
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about the direct way, and the colours are the same
    return image.convert(color)


def _corner(have: int, want: int) -> int:
    """Where the image begins in a centre crop: below 0 where it is larger."""
    return -round((have - want) / 2) if have >= want else (want - have) // 2


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
            _resize(stated["resize"]),
            (int(height), int(width)),
            stated["interpolation"],
            _fill(stated),
            scale,
            shift,
            channels_last,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidModel(f"parameter 'preprocess' of config.pbtxt is not readable: {error!r}") from error
    if found.color not in _COLORS or found.interpolation not in _RESAMPLING:
        raise InvalidModel(
            f"parameter 'preprocess' has color {found.color!r} and interpolation {found.interpolation!r}; "
            f"known are {', '.join(_COLORS)} and {', '.join(_RESAMPLING)}"
        )
    return found


def _resize(stated: Any) -> int | tuple[int, int]:
    """A shorter side, or a height and a width."""
    sides = [int(side) for side in (stated if isinstance(stated, list) else [stated])]
    if not all(1 <= side <= _MOST_SIDE for side in sides):
        raise ValueError(f"resize {stated} is not within 1 and {_MOST_SIDE} pixels")
    if not isinstance(stated, list):
        return sides[0]
    height, width = sides
    return height, width


def _fill(stated: dict[str, Any]) -> tuple[int, ...] | None:
    """The colour that an image is padded with, None where it is cropped."""
    fit = stated.get("fit", "crop")
    if fit not in ("crop", "pad"):
        raise ValueError(f"fit {fit!r} is neither crop nor pad")
    if fit == "crop":
        return None
    fill = tuple(int(value) for value in stated["fill"])
    if len(fill) != (1 if stated["color"] == "L" else 3) or not all(0 <= value <= 255 for value in fill):
        raise ValueError(f"fill {list(fill)} is no colour of {stated['color']}")
    return fill
